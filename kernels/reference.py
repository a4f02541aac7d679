"""The operators in plain torch: the definition of correct, on any device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from batchinfer.kernels.fp8 import FP8Linear, pack_fp8, quantize_rows
from batchinfer.kernels.ops import AttentionBatch, KVCache, KVSpec, PackedLinear
from batchinfer.kernels.weight_only import Int4Linear, Int8Linear, pack_int4, pack_int8

# fp32 elements of the largest temporary that attention makes: 64 MiB.
_ATTENTION_ELEMENTS = 1 << 24

_MASK32 = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class ReferenceKVCache:
    """Keys and values of all layers: each [num_layers, num_blocks, block_size, Hkv, D].

    In int8 each is so many times its scale: fp32 [num_layers, num_blocks, block_size, Hkv, 1].
    """

    spec: KVSpec
    block_size: int
    num_blocks: int
    keys: torch.Tensor
    values: torch.Tensor
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class ReferenceLinear:
    """A weight [out, in] and a bias [out] as they are."""

    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def out_features(self) -> int:
        """Columns of the product."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the input."""
        return self.weight.shape[1]


class ReferenceOperators:
    """See :class:`~batchinfer.kernels.ops.Operators` for the contract of every method."""

    name = "reference"

    def block_size(self, spec: KVSpec) -> int:
        """16 tokens a block."""
        return 16

    def block_bytes(self, spec: KVSpec) -> int:
        """Bytes of keys and values of one block over all layers."""
        per_head = spec.head_size * spec.dtype.itemsize + (4 if spec.dtype == torch.int8 else 0)
        return 2 * spec.num_layers * spec.num_kv_heads * per_head * self.block_size(spec)

    def allocate_kv(self, spec: KVSpec, num_blocks: int, device: torch.device) -> ReferenceKVCache:
        """Zeroed pages. Raises ValueError for a dtype that they don't keep."""
        if spec.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
            raise ValueError(
                f"The reference operators keep no KV cache of {spec.dtype}: "
                "choose kv_dtype auto, bf16 or int8."
            )
        size = self.block_size(spec)
        shape = (spec.num_layers, num_blocks, size, spec.num_kv_heads, spec.head_size)
        keys, values = (torch.zeros(shape, dtype=spec.dtype, device=device) for _ in range(2))
        if spec.dtype != torch.int8:
            return ReferenceKVCache(spec, size, num_blocks, keys, values)
        key_scales, value_scales = (torch.zeros((*shape[:-1], 1), device=device) for _ in range(2))
        return ReferenceKVCache(spec, size, num_blocks, keys, values, key_scales, value_scales)

    def pack_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantize: str | None
    ) -> ReferenceLinear | FP8Linear | Int8Linear | Int4Linear:
        """Keep the weight, or round it to fp8, int8 or int4. Raises ValueError for anything else."""
        if quantize == "fp8":
            return pack_fp8(weight, bias)
        if quantize == "int8":
            return pack_int8(weight, bias)
        if quantize == "int4":
            return pack_int4(weight, bias)
        if quantize is not None:
            raise ValueError(
                f"The reference operators can't quantize weights to {quantize}: "
                "choose quantize int8, int4 or fp8."
            )
        return ReferenceLinear(weight, bias)

    def linear(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """[T, in] -> [T, out]; for an fp8 weight each row of ``x`` is rounded to fp8 too."""
        if isinstance(weight, FP8Linear):
            return weight.product(quantize_rows(x), x.dtype)
        if isinstance(weight, (Int8Linear, Int4Linear)):
            return self._weight_only(x, weight).to(x.dtype)
        assert isinstance(weight, ReferenceLinear)
        return F.linear(x, weight.weight, weight.bias)

    def gated_linear(self, x: torch.Tensor, weight: PackedLinear, kind: str) -> torch.Tensor:
        """[T, in] -> [T, out / 2]."""
        return self.gated_activation(self.linear(x, weight), kind)

    def logits(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """[n, in] -> fp32 [n, out]."""
        if isinstance(weight, (Int8Linear, Int4Linear)):
            return self._weight_only(x, weight)
        return self.linear(x, weight).float()

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """Over the last dimension, in fp32 inside."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return (normed * weight).to(x.dtype)

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, sum)."""
        total = x + residual
        return self.rms_norm(total, weight, eps), total

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
        assert isinstance(kv, ReferenceKVCache)
        kv_heads, size = kv.spec.num_kv_heads, kv.spec.head_size
        heads = qkv.view(len(qkv), -1, size)
        q, k, v = heads[:, :num_heads], heads[:, num_heads:-kv_heads], heads[:, -kv_heads:]
        if q_norm is not None:
            q = self.rms_norm(q, q_norm, eps)
        if k_norm is not None:
            k = self.rms_norm(k, k_norm, eps)
        turn = cos_sin[batch.positions].unsqueeze(1)
        q, k = _rotate(q, turn), _rotate(k, turn)
        for x, pages, scales in ((k, kv.keys, kv.key_scales), (v, kv.values, kv.value_scales)):
            if scales is not None:
                x, scale = _round_to_int8(x)
                scales[layer].flatten(0, 1)[batch.slots] = scale
            pages[layer].flatten(0, 1)[batch.slots] = x.to(kv.spec.dtype)
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
        """[T, Hq, D] -> [T, Hq * D], in fp32 inside.

        Sequences with equally many queries are computed together, padded to the longest context
        among them: the decodes at once, prefill chunks mostly one by one.
        """
        assert isinstance(kv, ReferenceKVCache)
        out = torch.empty_like(q)
        starts = batch.query_starts.tolist()
        contexts = batch.context_lens.tolist()
        groups: dict[int, list[int]] = {}
        for i in sorted(range(len(contexts)), key=contexts.__getitem__):
            groups.setdefault(starts[i + 1] - starts[i], []).append(i)
        for queries, members in groups.items():
            for part in _portions(members, contexts, queries, q.shape[1], kv.spec):
                index = torch.tensor(part, device=q.device)
                first = batch.query_starts[index].long()
                tokens = first[:, None] + torch.arange(queries, device=q.device)
                context = max(contexts[i] for i in part)
                out[tokens] = _attend(
                    q[tokens], kv, layer, batch, index, tokens, context, scale, window, soft_cap
                )
        return out.flatten(1)

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        """[T, 2 * I] -> [T, I]."""
        gate, up = gate_up.chunk(2, dim=-1)
        if kind == "silu":
            return F.silu(gate) * up
        if kind == "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        raise ValueError(f"Unknown activation {kind!r}.")

    def _weight_only(self, x: torch.Tensor, weight: Int8Linear | Int4Linear) -> torch.Tensor:
        """The product with what the weight stands for, in fp32: [T, in] -> fp32 [T, out]."""
        return F.linear(x.float(), weight.wide(), None if weight.bias is None else weight.bias.float())

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """[S, V] -> int64 [S]; noise is drawn only for the rows with a temperature."""
        tokens = logits.argmax(-1)
        noisy = temperature.nonzero().flatten()
        if len(noisy):
            noise = gumbel_noise(keys[noisy], positions[noisy], logits.shape[1])
            scores = logits[noisy].double() / temperature[noisy, None].double() + noise
            tokens[noisy] = scores.argmax(-1)
        return tokens


def load() -> ReferenceOperators:
    """The operators of this module."""
    return ReferenceOperators()


def philox(counter: tuple[torch.Tensor, ...], key: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Philox4x32-10: four counter words and two key words (int64, each below 2**32) to four words.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Shapes broadcast. Products
    of two 32-bit words wrap in int64, which leaves both halves intact.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((second >> 32) & _MASK32) ^ c1 ^ k0,
            second & _MASK32,
            ((first >> 32) & _MASK32) ^ c3 ^ k1,
            first & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0, c1, c2, c3


def gumbel_noise(keys: torch.Tensor, positions: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """The noise of ``Operators.sample``: fp64 [S, vocabulary] for ``keys`` [S, 2], ``positions`` [S]."""
    quads = torch.arange((vocabulary + 3) // 4, device=keys.device)
    zero = torch.zeros_like(quads)
    counter = (positions[:, None], quads, zero, zero)
    words = torch.stack(philox(counter, (keys[:, :1], keys[:, 1:])), dim=-1).flatten(1)
    uniform = ((words[:, :vocabulary] >> 8).double() + 0.5) / 2.0**24
    return -torch.log(-torch.log(uniform))


def _rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Rotate the first R dimensions of ``x`` [T, heads, D] by ``turn`` fp32 [T, 1, R]."""
    cos, sin = turn.chunk(2, dim=-1)
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
    return torch.cat((turned, x[..., 2 * half :]), dim=-1)


def _round_to_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``x`` [T, heads, D] as whole multiples (fp32, up to 127) of a scale: fp32 [T, heads, 1]."""
    largest = x.float().abs().amax(-1, keepdim=True)
    # A number over a tensor would be its reciprocal, rounded, times the number.
    inverse = torch.where(largest > 0.0, torch.full_like(largest, 127.0) / largest, 0.0)
    return (x.float() * inverse).round(), largest / 127.0


def _read(
    pages: torch.Tensor, scales: torch.Tensor | None, layer: int, blocks: torch.Tensor
) -> torch.Tensor:
    """The ``blocks`` [N, B] of a layer in fp32: [N, B, block_size, Hkv, D]."""
    elements = pages[layer][blocks].float()
    return elements if scales is None else elements * scales[layer][blocks]


def _portions(
    members: list[int], contexts: list[int], queries: int, heads: int, spec: KVSpec
) -> list[list[int]]:
    """Cut sequences (shortest context first) into lists whose temporaries stay small."""
    parts: list[list[int]] = [[]]
    for i in members:
        per_sequence = contexts[i] * max(queries * heads, 2 * spec.num_kv_heads * spec.head_size)
        if parts[-1] and per_sequence * (len(parts[-1]) + 1) > _ATTENTION_ELEMENTS:
            parts.append([])
        parts[-1].append(i)
    return parts


def _attend(
    q: torch.Tensor,
    kv: ReferenceKVCache,
    layer: int,
    batch: AttentionBatch,
    index: torch.Tensor,
    tokens: torch.Tensor,
    context: int,
    scale: float,
    window: int,
    soft_cap: float,
) -> torch.Tensor:
    """Attention of the sequences ``index`` [N], Q queries each: ``q`` [N, Q, Hq, D] -> the same shape."""
    count, queries, heads, _ = q.shape
    kv_heads = kv.spec.num_kv_heads
    num_blocks = -(-context // kv.block_size)
    # Past a sequence's end the table holds anything, so those entries are pointed at a real block.
    held = torch.arange(num_blocks, device=q.device) * kv.block_size < batch.context_lens[index, None]
    blocks = torch.where(held, batch.block_tables[index, :num_blocks], 0).long()
    # [N, Hkv, C, D]
    k, v = (
        _read(pages, scales, layer, blocks).flatten(1, 2)[:, :context].transpose(1, 2)
        for pages, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales))
    )
    grouped = q.float().view(count, queries, kv_heads, heads // kv_heads, -1).permute(0, 2, 3, 1, 4)
    out = torch.empty_like(grouped)
    step = max(1, _ATTENTION_ELEMENTS // (count * heads * context))
    for start in range(0, queries, step):
        part = grouped[:, :, :, start : start + step]
        # [N, Hkv, G, q, C]; the heads of a group and their queries are rows of one product.
        scores = (part.flatten(2, 3) @ k.transpose(2, 3)).view(*part.shape[:4], context) * scale
        if soft_cap > 0.0:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        here = batch.positions[tokens[:, start : start + step]][:, None, None, :, None]
        there = torch.arange(context, device=q.device)
        seen = there <= here
        if window > 0:
            seen = seen & (there > here - window)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        out[:, :, :, start : start + step] = (weights.flatten(2, 3) @ v).view(part.shape)
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3).to(q.dtype)
