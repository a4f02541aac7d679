"""From an EngineConfig to a model ready to run: files, weights, KV cache, runner and tokenizer."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.dummy import byte_tokenizer, lacks_tokenizer
from batchinfer.engine.graphs import CudaRecorder
from batchinfer.engine.memory import CacheSize, cache_size, host_memory
from batchinfer.engine.models.decoder import Decoder, DecoderConfig
from batchinfer.engine.models.registry import decoder_config
from batchinfer.engine.peak import CudaMeter, step_bytes
from batchinfer.engine.rates import measure_costs
from batchinfer.engine.runner import TorchRunner
from batchinfer.engine.tokenizer import Tokenizer, load_tokenizer
from batchinfer.engine.types import ModelError
from batchinfer.engine.weights import ModelFiles, WeightReader, find_model, fingerprint
from batchinfer.kernels.ops import KernelsUnavailable, KVSpec, Operators, operators_for

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_STORED_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
_KV_DTYPES = {**_DTYPES, "int8": torch.int8, "fp8": torch.float8_e4m3fn}

# The most of a host's memory that its KV caches may take: blocks are kept for as long as there is room.
_HOST_PART = 0.4


@dataclass(frozen=True, slots=True)
class Loaded:
    """A loaded model.

    ``dtype`` is the one chosen, ``max_context`` the longest sequence, ``load_seconds`` the time from
    nothing to here, ``kv_bytes`` what the cache takes.
    """

    runner: TorchRunner
    tokenizer: Tokenizer
    eos_token_ids: frozenset[int]
    fingerprint: str
    model: DecoderConfig
    dtype: str
    device: str
    operators: str
    max_context: int
    kv_bytes: int
    load_seconds: float


def load(config: EngineConfig) -> Loaded:
    """Load ``config.model`` on ``config.device``.

    Raises ModelError, one sentence, for whatever makes that impossible.
    """
    started = time.perf_counter()
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    device = _device(config.device)
    files = find_model(config.model, config.load_format)
    model = decoder_config(config.model, files.config)
    if config.load_format == "dummy" and files.gguf is None and lacks_tokenizer(files.folder):
        tokenizer = byte_tokenizer(model.vocab_size)
    else:
        tokenizer = load_tokenizer(files, model.vocab_size)
    dtype = _dtype(config, files)
    try:
        ops = operators_for(device, config.operators)
    except (ValueError, KernelsUnavailable) as error:
        raise ModelError(str(error)) from error
    spec = model.kv_spec(_KV_DTYPES[dtype if config.kv_dtype == "auto" else config.kv_dtype])
    try:
        ops.allocate_kv(spec, 1, device)
    except ValueError as error:
        raise ModelError(str(error)) from error
    context = config.max_context or model.max_context
    decoder = _decoder(config, files, model, ops, device, _DTYPES[dtype], min(context, model.max_context))
    # Before the cache takes what is left: the measurement needs a gigabyte for a moment.
    costs = measure_costs(decoder, spec)
    size = _size_cache(config, model, decoder, ops, spec)
    # One block more than sequences get: graphs fill up their batches with it.
    recorder = CudaRecorder() if device.type == "cuda" else None
    kv = ops.allocate_kv(spec, size.num_blocks + (recorder is not None), device)
    runner = TorchRunner(
        decoder,
        ops,
        kv,
        max_rows=config.max_sequences,
        max_context=size.max_context,
        eos_token_ids=tokenizer.eos_token_ids,
        costs=costs,
        steps_in_flight=config.steps_in_flight or (2 if device.type == "cuda" else 1),
        recorder=recorder,
    )
    return Loaded(
        runner=runner,
        tokenizer=tokenizer,
        eos_token_ids=tokenizer.eos_token_ids,
        fingerprint=fingerprint(files),
        model=model,
        dtype=dtype,
        device=str(device),
        operators=ops.name,
        max_context=size.max_context,
        kv_bytes=size.num_blocks * ops.block_bytes(spec),
        load_seconds=time.perf_counter() - started,
    )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"device is {name!r}, but it must be auto, cpu, cuda or cuda:N.") from error
    if device.type not in ("cpu", "cuda"):
        raise ModelError(f"device is {name!r}, but it must be auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device is {name!r}, but {torch.cuda.device_count()} CUDA devices are visible.")
    return device


def _dtype(config: EngineConfig, files: ModelFiles) -> str:
    """The dtype asked for, else the one that the model's configuration names, else bf16."""
    if config.dtype != "auto":
        return config.dtype
    stored = str(files.config.get("dtype") or files.config.get("torch_dtype")).removeprefix("torch.")
    return _STORED_DTYPES.get(stored, "bf16")


def _decoder(
    config: EngineConfig,
    files: ModelFiles,
    model: DecoderConfig,
    ops: Operators,
    device: torch.device,
    dtype: torch.dtype,
    max_context: int,
) -> Decoder:
    reader = WeightReader(config.model, files.checkpoint(config.load_format), dtype, device)
    try:
        decoder = Decoder(model, reader, ops, max_context, config.quantize)
    except ValueError as error:
        raise ModelError(str(error)) from error
    reader.finish(ignored=("lm_head.weight",) if model.tied_embeddings else ())
    return decoder


def _size_cache(
    config: EngineConfig, model: DecoderConfig, decoder: Decoder, ops: Operators, spec: KVSpec
) -> CacheSize:
    if config.kv_bytes is not None:
        available = config.kv_bytes
    elif decoder.device.type == "cuda":
        available = _free_after_peak(config, model, decoder, ops, spec)
    else:
        # Of the whole, so that two runs size it alike; a host's memory is not the engine's alone.
        memory = host_memory()
        available = int(min(memory.total * _HOST_PART, memory.available) * config.memory_share)
    return cache_size(
        available_bytes=available,
        block_bytes=ops.block_bytes(spec),
        block_size=ops.block_size(spec),
        max_sequences=config.max_sequences,
        wanted_context=config.max_context,
        model_context=model.max_context,
    )


def _free_after_peak(
    config: EngineConfig, model: DecoderConfig, decoder: Decoder, ops: Operators, spec: KVSpec
) -> int:
    """Bytes of the GPU that are left for the blocks of sequences: its share, less weights, less what steps
    need at their peak, less the block that recorded steps fill up their batches with.

    Raises ModelError when the largest step does not fit.
    """
    device = decoder.device
    try:
        needed = step_bytes(
            decoder,
            ops,
            spec,
            CudaMeter(device),
            max_sequences=config.max_sequences,
            max_batch_tokens=config.max_batch_tokens,
            max_context=min(config.max_context or model.max_context, model.max_context),
            recorded=True,
        )
    except torch.OutOfMemoryError as error:
        raise ModelError(
            f"A step of {config.max_batch_tokens} tokens and {config.max_sequences} sequences does not fit "
            f"into the memory of {device} beside the weights; lower max_batch_tokens, max_sequences or "
            "max_context."
        ) from error
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(free - needed - ops.block_bytes(spec) - total * (1.0 - config.memory_share))
