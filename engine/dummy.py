"""The tokenizer of models that have none: of configurations alone, to measure with dummy weights."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from batchinfer.engine.tokenizer import Tokenizer
from batchinfer.engine.types import ModelError


def lacks_tokenizer(folder: Path) -> bool:
    """Whether a folder has no file that a tokenizer is read from."""
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
    return not any((folder / name).is_file() for name in names)


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """One token for each byte of UTF-8, the ids 0 to 255; nothing ends a sample.

    Raises ModelError for a vocabulary that has no room for them.
    """
    if vocab_size < 256:
        raise ModelError(
            f"A dummy model without tokenizer needs a vocab_size of 256 or more, not {vocab_size}."
        )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend, chat_template=None, eos_token_ids=frozenset(), vocab_size=vocab_size)
