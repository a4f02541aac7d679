"""The paged KV cache of the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchinfer.kernels.ops import KVSpec


@dataclass(frozen=True, slots=True)
class TritonKVCache:
    """Keys and values, each [num_layers, num_blocks, Hkv, BLOCK, D].

    An fp8 cache keeps beside each head of a token the largest magnitude of its key and of its value,
    fp32 [num_layers, num_blocks, Hkv, BLOCK]: the stored number 448 stands for it.
    """

    spec: KVSpec
    block_size: int
    num_blocks: int
    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None
    value_scales: torch.Tensor | None
