"""Models of configurations alone: by name, by file, with a tokenizer of bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchinfer.engine.dummy import byte_tokenizer
from batchinfer.engine.engine import Engine
from batchinfer.engine.types import ModelError, SamplingParams
from batchinfer.engine.weights import find_model

SMALL = {
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 128,
}


def test_bytes_are_tokens_both_ways() -> None:
    tokenizer = byte_tokenizer(300)
    text = "A line,  \n two: höhö 你好"
    ids = tokenizer.encode_batch([text])[0]
    assert len(ids) == len(text.encode()) and max(ids) < 256
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 299]) == text
    assert tokenizer.eos_token_ids == frozenset()


def test_a_vocabulary_too_small_for_bytes_is_named() -> None:
    with pytest.raises(ModelError, match="not 255"):
        byte_tokenizer(255)


@pytest.mark.parametrize("name", ["small.json", "config.json"])
def test_an_engine_from_a_configuration_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(json.dumps(SMALL))
    results = []
    for model in (path, path, tmp_path) if name == "config.json" else (path, path):
        with Engine(
            str(model), load_format="dummy", device="cpu", dtype="fp32", kv_bytes=1 << 20
        ) as engine:
            sampling = SamplingParams(max_tokens=5, ignore_eos=True)
            (completion,) = engine.generate("twelve bytes", sampling)
        assert completion.prompt_tokens == 12 and len(completion.token_ids) == 5
        results.append(completion.token_ids)
    assert all(ids == results[0] for ids in results)


@pytest.mark.parametrize("name", ["Qwen3-0.6B", "Qwen3-8B", "Llama-3.1-8B"])
def test_shipped_names_are_found_for_dummies_only(name: str) -> None:
    assert find_model(name, "dummy").config["num_key_value_heads"] == 8
    with pytest.raises(ModelError, match="There is no model at"):
        find_model(name)


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelError, match=r"Qwen4.*Llama-3\.1-8B, Qwen3-0\.6B, Qwen3-8B"):
        find_model("Qwen4", "dummy")


@pytest.mark.parametrize("content", ["[]", "{"])
def test_a_file_that_is_no_configuration_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ModelError, match=r"c\.json"):
        find_model(str(tmp_path / "c.json"), "dummy")
