"""A model's tokenizer: text and messages to token ids, and back."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from batchinfer.engine import gguf_tokenizer
from batchinfer.engine.chat import ChatTemplate, ChatTemplateError
from batchinfer.engine.output import Detokenizer
from batchinfer.engine.types import Message, ModelError
from batchinfer.engine.weights import ModelFiles

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SPECIAL_NAMES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


_WORD_START = "\u2581"


def _byte_alphabet() -> dict[str, bytes]:
    """The letters in which byte-level vocabularies write bytes: printable Latin-1 characters stand for
    themselves, the other bytes, in order, for the characters from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    return letters | {chr(0x100 + place): bytes([byte]) for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()


class Tokenizer:
    """Encodes and decodes for one model; safe to use from several threads.

    ``eos_token_ids`` end a sample. ``vocab_size`` is the model's: its token ids are below it.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        chat_template: ChatTemplate | None,
        eos_token_ids: frozenset[int],
        vocab_size: int,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._chat_template = chat_template
        self.eos_token_ids = eos_token_ids
        self.vocab_size = vocab_size
        added = backend.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self._special_ids = frozenset(i for i, token in added.items() if token.special)
        # Only decoders with byte fallback give byte tokens a meaning; only bytes all alike have no start.
        decoder = repr(backend.decoder)
        self._anchored = not decoder.startswith("ByteLevel")
        vocabulary: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        byte_ids = (i for token, i in vocabulary.items() if _BYTE_TOKEN.fullmatch(token))
        self._byte_ids = frozenset(byte_ids) if "ByteFallback" in decoder else frozenset()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, with the special tokens that the model expects around plain text."""
        return [
            encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=True)
        ]

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True
    ) -> list[int]:
        """Token ids of a conversation, up to where the assistant's answer begins.

        Special tokens come from the template alone. Raises ChatTemplateError.
        """
        if self._chat_template is None:
            raise ChatTemplateError("This model has no chat template; give it text instead of messages.")
        text = self._chat_template.render(messages, add_generation_prompt)
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, special tokens left out."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=True)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, special ones too: UTF-8, maybe part of a character."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._byte_ids:
            return bytes([int(token[3:5], 16)])
        if token_id in self._added_ids:
            return str(token).encode()
        if self._anchored:
            return str(token).replace(_WORD_START, " ").encode()
        return b"".join(_BYTES.get(letter) or letter.encode() for letter in token)

    def detokenizer(self, prompt_ids: Sequence[int] = ()) -> Detokenizer:
        """An incremental detokenizer of what follows ``prompt_ids``."""
        return Detokenizer(
            self.decode,
            anchor=self._anchor(prompt_ids) if self._anchored else (),
            byte_ids=self._byte_ids,
            skipped_ids=self._special_ids,
        )

    def _anchor(self, prompt_ids: Sequence[int]) -> Sequence[int]:
        """The prompt's last token that is text of its own."""
        unfit = self._special_ids | self._byte_ids
        return next(([i] for i in reversed(prompt_ids) if i not in unfit and self.decode([i])), [])


def load_tokenizer(files: ModelFiles, vocab_size: int) -> Tokenizer:
    """The tokenizer of a model: of its GGUF file, of its tokenizer.json, or of its slow tokenizer.

    Raises ModelError when there is none.
    """
    if files.gguf is not None:
        metadata = files.gguf.metadata
        backend = gguf_tokenizer.build_tokenizer(files.source, metadata)
        template = metadata.get("tokenizer.chat_template")
        names = gguf_tokenizer.special_tokens(metadata)
        ends = gguf_tokenizer.eos_token_ids(metadata)
        compiled = _template(files.source, template, names)
        return Tokenizer(backend, chat_template=compiled, eos_token_ids=ends, vocab_size=vocab_size)
    settings = _json(files.folder / "tokenizer_config.json")
    backend = _backend(files)
    names = _special_tokens(settings, _json(files.folder / "special_tokens_map.json"))
    template = _template(files.source, _template_source(files.folder, settings), names)
    ends = _eos_token_ids(files, backend, names)
    return Tokenizer(backend, chat_template=template, eos_token_ids=ends, vocab_size=vocab_size)


def _backend(files: ModelFiles) -> Backend:
    path = files.folder / "tokenizer.json"
    if path.is_file():
        try:
            return Backend.from_file(str(path))
        except Exception as error:  # the library raises plain Exception
            raise ModelError(f"{path} can't be read as a tokenizer: {error}.") from error
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(
            str(files.folder), trust_remote_code=False, local_files_only=True
        )
        backend: Backend = slow.backend_tokenizer
    except Exception as error:
        # What transformers raises depends on the files that it finds or lacks.
        raise ModelError(
            f"The model folder {files.source} holds no tokenizer.json, nor anything that converts to one."
        ) from error
    return backend


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return value


def _special_tokens(*settings: Mapping[str, Any]) -> dict[str, str]:
    """By name; a token is a string or an object with its content. Earlier settings win."""
    found: dict[str, str] = {}
    for source in settings:
        for name in _SPECIAL_NAMES:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                found.setdefault(name, token)
    return found


def _template_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """The default template: of its own file, else of the tokenizer's configuration."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _template(source: str, template: str | None, names: Mapping[str, str]) -> ChatTemplate | None:
    try:
        return None if template is None else ChatTemplate(template, names)
    except ChatTemplateError as error:
        raise ModelError(f"{source}: {error}") from error


def _eos_token_ids(files: ModelFiles, backend: Backend, names: Mapping[str, str]) -> frozenset[int]:
    """The union of what generation_config.json, config.json and the tokenizer call the end."""
    found: set[int] = set()
    for settings in (_json(files.folder / "generation_config.json"), files.config):
        ids = settings.get("eos_token_id")
        found.update([ids] if isinstance(ids, int) else ids or [])
    end = backend.token_to_id(names["eos_token"]) if "eos_token" in names else None
    if end is not None:
        found.add(end)
    return frozenset(found)
