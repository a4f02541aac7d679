"""The tokenizer that a GGUF file's metadata describes, rebuilt from the parts of ``tokenizers``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from batchinfer.engine.types import ModelError

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "\u2581"

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# As Llama 3's, but each digit alone.
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")

# Tokens that end a turn; chat models of a family use them beside the end of a text.
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>")


def build_tokenizer(source: str, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of the file ``source`` with these metadata.

    Raises ModelError for a kind of tokenizer that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if "tokenizer.ggml.tokens" not in metadata:
        raise ModelError(f"{source} holds no tokenizer.")
    if kind == "gpt2":
        tokenizer = _byte_level(source, metadata)
    elif kind == "llama":
        gemma = str(metadata.get("general.architecture")).startswith("gemma")
        tokenizer = _sentence_piece(metadata, gemma)
    else:
        raise ModelError(
            f"{source} has a tokenizer of the kind {kind!r}, which is not supported; gpt2 and llama are."
        )
    tokenizer.add_special_tokens(_added(metadata, _CONTROL))
    tokenizer.add_tokens(_added(metadata, _USER_DEFINED))
    tokenizer.post_processor = _template(metadata)
    return tokenizer


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """``bos_token``, ``eos_token`` and so on, where the file names them."""
    tokens = metadata["tokenizer.ggml.tokens"]
    keys = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    found = {name: metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    return {name: tokens[i] for name, i in found.items() if i is not None and i < len(tokens)}


def eos_token_ids(metadata: Mapping[str, Any]) -> frozenset[int]:
    """Tokens that end a sample: of the text, of the turn, and control tokens known to end turns."""
    named = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot", "eom"))
    ends = {i for i, token, kind in _typed_tokens(metadata) if kind == _CONTROL and token in _TURN_ENDS}
    return frozenset(ends | {int(i) for i in named if i is not None})


def _byte_level(source: str, metadata: Mapping[str, Any]) -> Tokenizer:
    """BPE over bytes spelled as printable characters, after a pre-tokenizer known by name."""
    name = metadata.get("tokenizer.ggml.pre")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = {
        "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "smollm": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        ),
        "llama-bpe": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_LLAMA3_SPLIT), "isolated"), byte_level]
        ),
        "qwen2": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(_QWEN2_SPLIT), "isolated"), byte_level]
        ),
    }
    if name not in splits:
        known = ", ".join(splits)
        raise ModelError(f"{source} has the pre-tokenizer {name!r}, which is not supported; {known} are.")
    merges = [tuple(merge.split(" ")) for merge in metadata.get("tokenizer.ggml.merges", [])]
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=name == "llama-bpe"))
    tokenizer.pre_tokenizer = splits[name]
    tokenizer.decoder = decoders.ByteLevel()
    if name == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentence_piece(metadata: Mapping[str, Any], gemma: bool) -> Tokenizer:
    """SentencePiece's BPE: words keep their spaces, unknown characters fall back to byte tokens."""
    tokens = list(metadata["tokenizer.ggml.tokens"])
    if gemma:
        # Runs of spaces are stored as such, but looked up as runs of the visible space.
        tokens = [
            _SPACE * len(token) if token.strip(" ") == "" and len(token) > 1 else token for token in tokens
        ]
    types = metadata.get("tokenizer.ggml.token_type", [1] * len(tokens))
    scores = metadata.get("tokenizer.ggml.scores", [0.0] * len(tokens))
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    # Gemma's scores don't follow the order of its merges; the order of its tokens does.
    ranks = [-float(i) for i in range(len(tokens))] if gemma else scores
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(vocabulary, dict(zip(tokens, ranks, strict=True))),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces = normalizers.Replace(" ", _SPACE)
    decoding = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", not gemma):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        tokenizer.decoder = decoders.Sequence([*decoding, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spaces
        tokenizer.decoder = decoders.Sequence(decoding)
    return tokenizer


def _merges(vocabulary: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Every way to put a token together from two others, the best-scored token first."""
    found = [
        (-scores[token], vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token in vocabulary
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    return [(left, right) for _, _, _, left, right in sorted(found)]


def _typed_tokens(metadata: Mapping[str, Any]) -> Iterator[tuple[int, str, int]]:
    """Id, token and type of every token; nothing where an old file names no types."""
    types = metadata.get("tokenizer.ggml.token_type", [])
    for i, (token, kind) in enumerate(zip(metadata["tokenizer.ggml.tokens"], types, strict=False)):
        yield i, token, kind


def _added(metadata: Mapping[str, Any], kind: int) -> list[AddedToken]:
    """The tokens of one type, to be found whole in a text before anything else."""
    return [
        AddedToken(token, normalized=False, special=kind == _CONTROL)
        for _, token, own in _typed_tokens(metadata)
        if own == kind
    ]


def _template(metadata: Mapping[str, Any]) -> Any:
    """Puts the start before a text and the end after it, as the file says."""
    tokens = metadata["tokenizer.ggml.tokens"]
    first, last = metadata.get("tokenizer.ggml.bos_token_id"), metadata.get("tokenizer.ggml.eos_token_id")
    # SentencePiece models and Llama 3's get a start unless their file says otherwise.
    usual = metadata["tokenizer.ggml.model"] == "llama" or metadata.get("tokenizer.ggml.pre") == "llama-bpe"
    bos = metadata.get("tokenizer.ggml.add_bos_token", usual)
    eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    before = [(tokens[first], first)] if bos and first is not None else []
    after = [(tokens[last], last)] if eos and last is not None else []
    single = [*(token for token, _ in before), "$A", *(token for token, _ in after)]
    return processors.TemplateProcessing(single=single, special_tokens=[*before, *after])
