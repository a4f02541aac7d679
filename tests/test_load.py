"""Loading: from a folder to a runner that answers, settings that can't be met, and sizes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

import batchinfer.engine.load as loading
from batchinfer.engine.config import EngineConfig
from batchinfer.engine.load import load
from batchinfer.engine.memory import HostMemory
from batchinfer.engine.types import ModelError

TOKENS = ["<s>", "</s>", "the", "cat", "sat", "on", "mat", "."]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama in fp16 with a tokenizer of eight words."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
    )
    transformers.LlamaForCausalLM(config).half().save_pretrained(tmp_path)
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({t: i for i, t in enumerate(TOKENS)}, unk_token=".")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def config_of(folder: Path, **settings: Any) -> EngineConfig:
    return EngineConfig(model=str(folder), **{"device": "cpu", "operators": "reference", **settings})


def test_a_folder_becomes_a_runner_and_a_tokenizer(folder: Path) -> None:
    loaded = load(config_of(folder, max_sequences=3))
    assert (loaded.dtype, loaded.device, loaded.operators) == ("fp16", "cpu", "reference")
    assert loaded.max_context == loaded.runner.max_context == 64
    assert loaded.runner.max_rows == 3
    # Never more than the rows can use, however much memory there is.
    assert loaded.runner.num_blocks == 3 * 64 // loaded.runner.block_size
    assert loaded.kv_bytes == 3 * 64 * (2 * 2 * 1 * 8 * 2)
    assert loaded.eos_token_ids == {1}
    assert loaded.tokenizer.encode_batch(["the cat"]) == [[2, 3]]
    assert loaded.tokenizer.vocab_size == 16
    assert loaded.load_seconds > 0
    costs = loaded.runner.costs
    parameters = 2 * (16 * 16 * 2 + 16 * 8 * 2 + 3 * 16 * 32)
    assert costs.flops_per_token == 2 * parameters
    assert costs.flops_per_sample == 2 * 16 * 16
    assert costs.weight_bytes == 2 * (parameters + 16 * 16)
    assert costs.kv_bytes_per_token == 2 * 2 * 8 * 2
    assert costs.attention_flops == 4 * 2 * 8 * 2
    assert min(costs.flops_rate, costs.bytes_rate) > 1e6


def test_dtype_context_and_cache_are_as_asked(folder: Path) -> None:
    loaded = load(config_of(folder, dtype="bf16", kv_dtype="fp32", max_context=20, kv_bytes=40_000))
    assert loaded.dtype == "bf16"
    assert loaded.max_context == 20
    assert loaded.kv_bytes == loaded.runner.num_blocks * 16 * 2 * 2 * 8 * 4 <= 40_000


def test_a_context_too_long_for_memory_shrinks_unless_it_was_asked_for(folder: Path) -> None:
    loaded = load(config_of(folder, kv_bytes=2 * 16 * 64))
    assert loaded.max_context == 32
    with pytest.raises(ModelError, match="lower max_context or free memory"):
        load(config_of(folder, kv_bytes=2 * 16 * 64, max_context=64))


def test_dummy_weights_need_no_weight_files(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="holds no weights"):
        load(config_of(folder))
    assert load(config_of(folder, load_format="dummy")).runner.num_blocks > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "tpu"}, "device is 'tpu', but it must be auto, cpu, cuda or cuda:N"),
        ({"device": "meta"}, "device is 'meta', but it must be"),
        ({"device": "cuda:99"}, "device is 'cuda:99', but"),
        ({"operators": "triton"}, "operators is 'triton', but cpu runs"),
        ({"quantize": "int2"}, "can't quantize weights to int2: choose quantize int8"),
        ({"kv_dtype": "fp8"}, "keep no KV cache of torch.float8_e4m3fn: choose kv_dtype auto"),
        ({"max_context": 65}, "max_context is 65, but the model takes between 1 and 64"),
        ({"model": "/nowhere"}, "There is no model at /nowhere"),
    ],
)
def test_what_can_not_be_met_is_one_sentence(folder: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError) as error:
        load(config_of(folder, **settings) if "model" not in settings else EngineConfig(**settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cache_that_can_not_be_is_refused_before_weights_are_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="choose kv_dtype auto, bf16 or int8"):
        load(config_of(folder, kv_dtype="fp8"))


@pytest.mark.parametrize(
    ("settings", "layers", "head"),
    [
        ({"dtype": "fp32"}, 4, 4),
        ({"dtype": "bf16"}, 2, 2),
        ({"quantize": "int8"}, 1, 1),
        ({"quantize": "fp8"}, 1, 1),
        ({"quantize": "int4"}, 67 / 128, 1),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_a_step_is_charged_for_the_weights_as_they_are_kept(
    folder: Path, settings: dict[str, Any], layers: float, head: float, tied: bool
) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": tied}))
    costs = load(config_of(folder, **settings)).runner.costs
    assert costs.weight_bytes == layers * costs.flops_per_token / 2 + head * 16 * 16


def test_tied_models_may_hold_their_head_twice(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert load(config_of(folder)).model.tied_embeddings
    path.write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match=r"holds the tensor model\.layers\.1\.\S+ and 8 more"):
        load(config_of(folder))
    path.write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lacks the tensor model\.layers\.2"):
        load(config_of(folder))


def test_the_share_of_memory_sizes_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "host_memory", lambda: HostMemory(9_000_000, 400_000))
    whole = load(config_of(folder, memory_share=1.0))
    half = load(config_of(folder, memory_share=0.5))
    assert whole.runner.num_blocks == 400_000 // (16 * 64)
    assert half.runner.num_blocks == 200_000 // (16 * 64)
    monkeypatch.setattr(loading, "host_memory", lambda: HostMemory(500_000, 400_000))
    assert load(config_of(folder, memory_share=1.0)).runner.num_blocks == 200_000 // (16 * 64)


def test_on_a_gpu_the_cache_takes_what_weights_and_the_largest_step_leave(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic alone, on a CPU that is asked as if it were a GPU."""
    reserved = iter([1000, 201_000, 2000, 102_000])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: next(reserved))
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: next(reserved))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (700_000, 1_000_000))
    config = config_of(folder, memory_share=0.75, max_batch_tokens=100)
    files = loading.find_model(config.model)
    model = loading.decoder_config("m", files.config)
    ops = loading.operators_for(torch.device("cpu"), "reference")
    decoder = loading._decoder(config, files, model, ops, torch.device("cpu"), torch.float32, 64)
    spec = model.kv_spec(torch.float32)
    free = loading._free_after_peak(config, model, decoder, ops, spec)
    # Both peaks less their one block of cache; the rows of the device (64 tokens, four blocks) count once.
    rows, block = 4 * (config.max_sequences + 1) * (64 + 1 + 4), ops.block_bytes(spec)
    assert block > 0
    needed = (200_000 - block) + (100_000 - block - rows)
    # Beside the blocks of sequences there is one that recorded steps fill up their batches with.
    assert free == 700_000 - needed - block - 250_000


def test_a_step_that_does_not_fit_names_all_that_makes_it_large(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(*_: Any, **__: Any) -> int:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(loading, "step_bytes", no_room)
    config = config_of(folder)
    files = loading.find_model(config.model)
    model = loading.decoder_config("m", files.config)
    ops = loading.operators_for(torch.device("cpu"), "reference")
    decoder = loading._decoder(config, files, model, ops, torch.device("cpu"), torch.float32, 64)
    with pytest.raises(ModelError, match="lower max_batch_tokens, max_sequences or max_context"):
        loading._free_after_peak(config, model, decoder, ops, model.kv_spec(torch.float32))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("steps", [1, 2])
def test_a_gpu_gives_the_tokens_of_the_cpu(folder: Path, steps: int) -> None:
    from batchinfer.engine.engine import Engine
    from batchinfer.engine.types import SamplingParams

    prompts = [tuple(range(2, 2 + n)) for n in range(1, 14)]
    params = [
        SamplingParams(
            max_tokens=9,
            temperature=t,
            top_p=0.9,
            seed=3,
            presence_penalty=0.5,
            logprobs=2,
            ignore_eos=True,
        )
        for t in (0.0, 0.8)
        for _ in prompts
    ]
    results = []
    for device in ("cpu", "cuda"):
        settings: dict[str, Any] = {"device": device, "dtype": "fp32", "operators": "reference"}
        with Engine(str(folder), steps_in_flight=steps, memory_share=0.5, **settings) as engine:
            results.append(engine.generate(prompts + prompts, params))
    for ours, theirs in zip(*results, strict=True):
        assert ours.token_ids == theirs.token_ids
