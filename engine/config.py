"""EngineConfig: everything that changes how an engine runs, in one frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Configuration of one engine.

    ``model`` is a local folder, a GGUF file, ``package://NAME/FILE``, or a Hugging Face id.
    ``max_context`` None takes the model's own limit. ``kv_bytes`` None sizes the KV cache from the
    memory there is (on a host two fifths of it), times ``memory_share``: workers on one host divide it.
    ``max_batch_tokens`` bounds the tokens of one step, ``max_sequences`` the rows on the device.
    ``steps_in_flight`` 1 waits for each step before planning the next, 2 plans step N+1 while N runs,
    more only delays results further (for tests); None is 2 on a GPU and 1 on a CPU, which has no cores
    to spare. ``window`` is how many requests are read ahead to be ordered. ``operators`` names the
    kernels ("auto": the fastest for the device).
    ``load_format`` "dummy" makes random weights from a config alone.
    """

    model: str
    device: str = "auto"
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    quantize: Literal["int8", "int4", "fp8"] | None = None
    kv_dtype: Literal["auto", "fp32", "bf16", "fp16", "int8", "fp8"] = "auto"
    max_context: int | None = None
    kv_bytes: int | None = None
    memory_share: float = 0.8
    max_batch_tokens: int = 2048
    max_sequences: int = 256
    prefix_cache: bool = True
    steps_in_flight: int | None = None
    window: int = 2048
    operators: Literal["auto", "reference", "cpu", "triton"] = "auto"
    load_format: Literal["auto", "dummy"] = "auto"
    num_threads: int | None = None

    def __post_init__(self) -> None:
        """Check ranges; raises ValueError naming the field."""
        for name in ("max_batch_tokens", "max_sequences", "steps_in_flight", "window"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, but it must be 1 or more")
        if not 0.0 < self.memory_share <= 1.0:
            raise ValueError(f"memory_share is {self.memory_share}, but it must be in (0, 1]")
