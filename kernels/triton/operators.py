"""The operators on CUDA: Triton kernels, and products by cuBLAS where weights are as wide as activations.

fp8 products are those of ``torch._scaled_mm``, int8 and int4 weights are Triton's.
"""

from __future__ import annotations

import os

import torch
import torch.nn.functional as F

from batchinfer.kernels.fp8 import FP8Linear, FP8Rows, pack_fp8
from batchinfer.kernels.ops import (
    AttentionBatch,
    KernelsUnavailable,
    KVCache,
    KVSpec,
    PackedLinear,
)
from batchinfer.kernels.reference import ReferenceLinear
from batchinfer.kernels.triton.attend import attend
from batchinfer.kernels.triton.cache import TritonKVCache
from batchinfer.kernels.triton.filter import filter_kernel
from batchinfer.kernels.triton.rotary import rotary_kernel
from batchinfer.kernels.triton.rows import activation_kernel, norm_kernel, quantize_kernel
from batchinfer.kernels.triton.sample import bound_kernel, choose_kernel
from batchinfer.kernels.triton.sharing import SharedSplits, find_shared
from batchinfer.kernels.triton.tiles import BLOCK, SPLIT, num_splits, power_of_two, row_warps
from batchinfer.kernels.triton.weight_only import multiply
from batchinfer.kernels.weight_only import Int4Linear, Int8Linear, pack_int4, pack_int8

_FP8 = torch.float8_e4m3fn
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)

# Tokens of the vocabulary that one program scores.
STRETCH = 2048

# fp8 products and conversions came with Ada.
_FIRST_WITH_FP8 = (8, 9)


class TritonOperators:
    """See :class:`~batchinfer.kernels.ops.Operators` for the contract of every method.

    One step runs at a time: what its sequences share is found for its first layer and kept for the
    others, and a norm's or an activation's fp8 form until the product that reads it.
    """

    name = "triton"

    def __init__(self, capability: tuple[int, int]) -> None:
        self._capability = capability
        self._fp8 = False
        self._quantized: tuple[torch.Tensor, FP8Rows] | None = None
        self._found: tuple[AttentionBatch, int, SharedSplits] | None = None

    def block_size(self, spec: KVSpec) -> int:
        """32 tokens a block."""
        return BLOCK

    def block_bytes(self, spec: KVSpec) -> int:
        """Bytes of one block over all layers, with the scales of an fp8 cache."""
        scale = 4 if spec.dtype == _FP8 else 0
        per_head = spec.head_size * spec.dtype.itemsize + scale
        return 2 * spec.num_layers * spec.num_kv_heads * per_head * BLOCK

    def allocate_kv(self, spec: KVSpec, num_blocks: int, device: torch.device) -> TritonKVCache:
        """Zeroed blocks. Raises ValueError for a dtype that they can't hold on this GPU."""
        if spec.dtype not in (*_PLAIN, _FP8):
            raise ValueError(
                f"The triton operators keep no KV cache of {spec.dtype}: "
                "choose kv_dtype auto, bf16 or fp8; int8 is for CPUs."
            )
        if spec.dtype == _FP8 and self._capability < _FIRST_WITH_FP8:
            raise ValueError(
                "A KV cache in fp8 needs a GPU of compute capability 8.9 or higher, and this one has "
                f"{self._capability[0]}.{self._capability[1]}: choose kv_dtype auto or bf16."
            )
        shape = (spec.num_layers, num_blocks, spec.num_kv_heads, BLOCK, spec.head_size)
        keys, values = (torch.zeros(shape, dtype=spec.dtype, device=device) for _ in range(2))
        if spec.dtype != _FP8:
            return TritonKVCache(spec, BLOCK, num_blocks, keys, values, None, None)
        scales = [torch.zeros(shape[:-1], dtype=torch.float32, device=device) for _ in range(2)]
        return TritonKVCache(spec, BLOCK, num_blocks, keys, values, *scales)

    def pack_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantize: str | None
    ) -> ReferenceLinear | FP8Linear | Int8Linear | Int4Linear:
        """Keep the weight, or round its rows to fp8 or int8, or groups of their numbers to int4.

        A weight whose sizes are no multiples of 16 can't be multiplied in fp8 and is kept. Raises
        ValueError for another quantization, or for fp8 on a GPU without it.
        """
        if quantize is None:
            return ReferenceLinear(weight, bias)
        if quantize == "int8":
            return pack_int8(weight, bias)
        if quantize == "int4":
            return pack_int4(weight, bias)
        if quantize != "fp8":
            raise ValueError(
                f"The triton operators can't quantize weights to {quantize}: "
                "choose quantize int8, int4 or fp8."
            )
        if self._capability < _FIRST_WITH_FP8:
            raise ValueError(
                "Weights in fp8 need a GPU of compute capability 8.9 or higher, and this one has "
                f"{self._capability[0]}.{self._capability[1]}: choose quantize int8 or int4."
            )
        if weight.shape[0] % 16 or weight.shape[1] % 16:
            return ReferenceLinear(weight, bias)
        self._fp8 = True
        return pack_fp8(weight, bias)

    def linear(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """[T, in] -> [T, out]; for an fp8 weight each row of ``x`` is rounded to fp8 too."""
        if isinstance(weight, FP8Linear):
            return weight.product(self._fp8_rows(x), x.dtype)
        if isinstance(weight, (Int8Linear, Int4Linear)):
            return multiply(x, weight, x.dtype, self._capability)
        assert isinstance(weight, ReferenceLinear)
        return F.linear(x, weight.weight, weight.bias)

    def gated_linear(self, x: torch.Tensor, weight: PackedLinear, kind: str) -> torch.Tensor:
        """[T, in] -> [T, out / 2]."""
        return self.gated_activation(self.linear(x, weight), kind)

    def logits(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """[n, in] -> fp32 [n, out], the sums as they are; only cuBLAS rounds them where there is a bias."""
        if isinstance(weight, (Int8Linear, Int4Linear)):
            return multiply(x, weight, torch.float32, self._capability)
        half = x.is_cuda and x.dtype.itemsize == 2
        if half and isinstance(weight, ReferenceLinear) and weight.bias is None:
            return torch.mm(x, weight.weight.t(), out_dtype=torch.float32)
        return self.linear(x, weight).float()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, in fp32 inside."""
        size = x.shape[-1]
        rows = x.reshape(-1, size)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        self._norm(rows, None, weight, eps, out, out)
        return out

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, sum)."""
        x, residual = x.contiguous(), residual.contiguous()
        out, total = torch.empty_like(x), torch.empty_like(x)
        self._norm(x, residual, weight, eps, out, total)
        return out, total

    def rotary_and_store(
        self,
        qkv: torch.Tensor,
        cos_sin: torch.Tensor,
        batch: AttentionBatch,
        kv: KVCache,
        layer: int,
        num_heads: int,
        q_norm: torch.Tensor | None,
        k_norm: torch.Tensor | None,
        eps: float,
    ) -> torch.Tensor:
        """Returns the rotated queries [T, Hq, D]; keys and values go to the cache."""
        assert isinstance(kv, TritonKVCache)
        spec = kv.spec
        q = torch.empty(len(qkv), num_heads, spec.head_size, dtype=qkv.dtype, device=qkv.device)
        if len(qkv) == 0:
            return q
        fp8 = kv.key_scales is not None
        padded = power_of_two(spec.head_size)
        rotary_kernel[(len(qkv), 2)](
            qkv,
            cos_sin,
            batch.positions,
            batch.slots,
            cos_sin if q_norm is None else q_norm,
            cos_sin if k_norm is None else k_norm,
            q,
            kv.keys[layer],
            kv.values[layer],
            kv.key_scales[layer] if kv.key_scales is not None else cos_sin,
            kv.value_scales[layer] if kv.value_scales is not None else cos_sin,
            qkv.stride(0),
            eps,
            HEADS=num_heads,
            KV_HEADS=spec.num_kv_heads,
            D=spec.head_size,
            DP=padded,
            R=cos_sin.shape[1],
            BLOCK=BLOCK,
            HP=power_of_two(num_heads),
            KP=power_of_two(spec.num_kv_heads),
            Q_NORM=q_norm is not None,
            K_NORM=k_norm is not None,
            FP8=fp8,
            num_warps=row_warps(power_of_two(num_heads) * padded),
        )
        return q

    def attention(
        self,
        q: torch.Tensor,
        kv: KVCache,
        layer: int,
        batch: AttentionBatch,
        scale: float,
        window: int,
        soft_cap: float,
    ) -> torch.Tensor:
        """[T, Hq, D] -> [T, Hq * D]; blocks that decodes share are read once for all of them."""
        assert isinstance(kv, TritonKVCache)
        return attend(q, kv, layer, batch, scale, window, soft_cap, self._capability, self._shared_splits)

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        """[T, 2 * I] -> [T, I]. Raises ValueError for an activation that is neither silu nor gelu_tanh."""
        if kind not in ("silu", "gelu_tanh"):
            raise ValueError(f"Unknown activation {kind!r}.")
        rows, size = gate_up.shape[0], gate_up.shape[1] // 2
        out = torch.empty(rows, size, dtype=gate_up.dtype, device=gate_up.device)
        if rows == 0:
            return out
        quantized, scales = self._quantized_rows(out)
        width = power_of_two(size)
        activation_kernel[(rows,)](
            gate_up,
            out,
            quantized,
            scales,
            gate_up.stride(0),
            size,
            WIDTH=width,
            GELU=kind == "gelu_tanh",
            QUANTIZE=self._fp8,
            num_warps=row_warps(width),
        )
        return out

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """[S, V] -> int64 [S]."""
        rows, vocabulary = logits.shape
        tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
        if rows == 0:
            return tokens
        keys = keys.contiguous()
        stretches = -(-vocabulary // STRETCH)
        upper, lower = torch.empty(2, rows, stretches, dtype=torch.float32, device=logits.device).unbind()
        bound_kernel[(rows, stretches)](
            logits,
            temperature,
            keys,
            positions,
            upper,
            lower,
            logits.stride(0),
            vocabulary,
            WIDTH=STRETCH,
            num_warps=4,
        )
        choose_kernel[(rows,)](
            logits,
            temperature,
            keys,
            positions,
            upper,
            lower,
            tokens,
            logits.stride(0),
            vocabulary,
            stretches,
            WIDTH=STRETCH,
            PADDED=power_of_two(stretches),
            num_warps=4,
        )
        return tokens

    def filter(
        self,
        logits: torch.Tensor,
        places: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
    ) -> None:
        """Mask the logits at ``places`` in place; see ``FilterOperator``."""
        if len(places):
            filter_kernel[(len(places),)](
                logits,
                places,
                temperature,
                top_k,
                top_p,
                min_p,
                logits.stride(0),
                logits.shape[1],
                WIDTH=4096,
                num_warps=16,
            )

    def _norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        out: torch.Tensor,
        total: torch.Tensor,
    ) -> None:
        rows, size = x.shape
        if rows == 0:
            return
        quantized, scales = self._quantized_rows(out)
        width = power_of_two(size)
        norm_kernel[(rows,)](
            x,
            x if residual is None else residual,
            weight,
            out,
            total,
            quantized,
            scales,
            x.stride(0),
            size,
            eps,
            WIDTH=width,
            ADD=residual is not None,
            QUANTIZE=self._fp8,
            num_warps=row_warps(width),
        )

    def _quantized_rows(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a kernel puts the fp8 form of ``out``; without fp8 weights tensors that it won't touch."""
        if not self._fp8:
            return out, out
        rows = FP8Rows(
            torch.empty(out.shape, dtype=_FP8, device=out.device),
            torch.empty(len(out), dtype=torch.float32, device=out.device),
        )
        self._quantized = (out, rows)
        return rows.values, rows.scales

    def _fp8_rows(self, x: torch.Tensor) -> FP8Rows:
        """The fp8 form of ``x``: what the kernel that made it left, or made now."""
        if self._quantized is not None and self._quantized[0] is x:
            return self._quantized[1]
        rows = FP8Rows(
            torch.empty(x.shape, dtype=_FP8, device=x.device),
            torch.empty(len(x), dtype=torch.float32, device=x.device),
        )
        if len(x):
            width = power_of_two(x.shape[1])
            quantize_kernel[(len(x),)](
                x,
                rows.values,
                rows.scales,
                x.stride(0),
                x.shape[1],
                WIDTH=width,
                num_warps=row_warps(width),
            )
        return rows

    def _shared_splits(self, batch: AttentionBatch, layer: int, most: int) -> SharedSplits | None:
        """What the decodes of ``batch`` share, in pieces of ``most``; None where nothing can be.

        Found again for every first layer: a recorded step keeps its batch and changes what is in it.
        """
        if len(batch.context_lens) < 2 or batch.max_context <= SPLIT:
            return None
        if layer == 0 or self._found is None or self._found[0] is not batch or self._found[1] != most:
            self._found = (batch, most, find_shared(batch, num_splits(batch.max_context), most))
        return self._found[2]


def load() -> TritonOperators:
    """The operators for this process's GPU; under TRITON_INTERPRET=1 for the CPU, to test the kernels.

    Raises KernelsUnavailable, saying why they can't work here.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return TritonOperators((9, 0))
    if not torch.cuda.is_available():
        raise KernelsUnavailable("the triton operators need an NVIDIA GPU.")
    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise KernelsUnavailable(
            "the triton operators need a GPU of compute capability 8.0 or higher, "
            f"and this one has {capability[0]}.{capability[1]}."
        )
    # Blackwell's small ones have as little shared memory as Ada.
    return TritonOperators(min(capability, (9, 0)) if capability < (12, 0) else (8, 9))
