"""The blocks of a decoder layer, their weights and rotary tables; all arithmetic is the operators'."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from batchinfer.kernels.ops import AttentionBatch, KVCache, Operators, PackedLinear


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding of the first ``size`` dimensions of a head.

    ``scaling`` is ``default``, ``linear``, ``llama3`` or ``frequency_factors``, with ``parameters``
    named as in Hugging Face's config.json.
    """

    theta: float
    size: int
    scaling: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def frequencies(self) -> torch.Tensor:
        """Radians a position of each pair of dimensions: fp32 [size / 2].

        Su et al., "RoFormer", arXiv 2104.09864; the scaled kinds stretch the slow pairs.
        """
        exponents = torch.arange(0, self.size, 2, dtype=torch.int64).float() / self.size
        plain = 1.0 / (self.theta**exponents)
        if self.scaling == "default":
            return plain
        if self.scaling == "linear":
            return plain / float(self.parameters["factor"])
        if self.scaling == "frequency_factors":
            return plain / torch.tensor(self.parameters["factors"], dtype=torch.float32)
        if self.scaling == "llama3":
            return self._llama3(plain)
        raise ValueError(f"Unknown rope scaling {self.scaling!r}.")

    def _llama3(self, plain: torch.Tensor) -> torch.Tensor:
        """Llama 3.1's: long waves divided by the factor, short ones kept, a ramp between."""
        original = float(self.parameters["original_max_position_embeddings"])
        low, high = float(self.parameters["low_freq_factor"]), float(self.parameters["high_freq_factor"])
        waves = 2 * math.pi / plain
        slow = plain / float(self.parameters["factor"])
        ramp = (original / waves - low) / (high - low)
        between = (1 - ramp) * slow + ramp * plain
        return torch.where(
            waves > original / low, slow, torch.where(waves < original / high, plain, between)
        )


def rotary_table(
    rope: RopeConfig | None, size: int, max_context: int, device: torch.device
) -> torch.Tensor:
    """Cosines, then sines, of every position: fp32 [max_context, R].

    Without ``rope`` it is the rotation by zero of all ``size`` dimensions: the layer sees no positions.
    """
    if rope is None:
        half = torch.ones(max_context, size // 2, device=device)
        return torch.cat((half, torch.zeros_like(half)), dim=1)
    positions = torch.arange(max_context, device=device, dtype=torch.float32)
    angles = torch.outer(positions, rope.frequencies().to(device))
    return torch.cat((angles.cos(), angles.sin()), dim=1)


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer: ``window`` 0 sees everything, ``rope`` None no positions."""

    window: int
    rope: RopeConfig | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """One layer's weights; norms are fp32. The two ``post`` norms are Gemma's, after each block."""

    input_norm: torch.Tensor
    qkv: PackedLinear
    q_norm: torch.Tensor | None
    k_norm: torch.Tensor | None
    attention_output: PackedLinear
    post_attention_norm: torch.Tensor | None
    feed_forward_norm: torch.Tensor
    gate_up: PackedLinear
    down: PackedLinear
    post_feed_forward_norm: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer ready to run: the ``index``-th, with its rotary table and the norm that follows it."""

    index: int
    window: int
    table: torch.Tensor
    weights: LayerWeights
    following_norm: torch.Tensor


class Sizes(Protocol):
    """The part of a decoder's configuration that its layers read."""

    @property
    def num_heads(self) -> int: ...  # noqa: D102
    @property
    def rms_eps(self) -> float: ...  # noqa: D102
    @property
    def attention_scale(self) -> float: ...  # noqa: D102
    @property
    def attention_soft_cap(self) -> float: ...  # noqa: D102
    @property
    def activation(self) -> str: ...  # noqa: D102


def run_layers(
    ops: Operators,
    sizes: Sizes,
    layers: Sequence[Layer],
    normed: torch.Tensor,
    residual: torch.Tensor,
    batch: AttentionBatch,
    kv: KVCache,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``layers`` one after the other; a :class:`~batchinfer.kernels.ops.LayersWork` of the last four."""
    for layer in layers:
        normed, residual = run_layer(ops, sizes, layer, normed, residual, batch, kv, None)
    return normed, residual


def run_layer(
    ops: Operators,
    sizes: Sizes,
    layer: Layer,
    normed: torch.Tensor,
    residual: torch.Tensor,
    batch: AttentionBatch,
    kv: KVCache,
    last: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(normed, residual), both [T, H], as the layer before has left them -> the same after this one.

    With ``last``, int64 [S], where each sequence's last token is: of these tokens alone, [S, H].
    """
    weights = layer.weights
    added = _attention_block(ops, sizes, layer, normed, batch, kv, last)
    if last is not None:
        residual = residual[last]
    normed, residual = ops.add_rms_norm(added, residual, weights.feed_forward_norm, sizes.rms_eps)
    added = _feed_forward_block(ops, sizes, weights, normed)
    return ops.add_rms_norm(added, residual, layer.following_norm, sizes.rms_eps)


def _attention_block(
    ops: Operators,
    sizes: Sizes,
    layer: Layer,
    normed: torch.Tensor,
    batch: AttentionBatch,
    kv: KVCache,
    last: torch.Tensor | None,
) -> torch.Tensor:
    """Self-attention of ``normed`` [T, H]: what is added to the residual, [T, H] or [S, H]."""
    weights = layer.weights
    q = ops.rotary_and_store(
        ops.linear(normed, weights.qkv),
        layer.table,
        batch,
        kv,
        layer.index,
        sizes.num_heads,
        weights.q_norm,
        weights.k_norm,
        sizes.rms_eps,
    )
    if last is not None:
        q, batch = q[last], _last_queries(batch, last)
    mixed = ops.attention(
        q, kv, layer.index, batch, sizes.attention_scale, layer.window, sizes.attention_soft_cap
    )
    out = ops.linear(mixed, weights.attention_output)
    if weights.post_attention_norm is not None:
        out = ops.rms_norm(out, weights.post_attention_norm, sizes.rms_eps)
    return out


def _last_queries(batch: AttentionBatch, last: torch.Tensor) -> AttentionBatch:
    """The batch of each sequence's last token alone."""
    return AttentionBatch(
        query_starts=torch.arange(len(last) + 1, dtype=torch.int32, device=last.device),
        positions=batch.positions[last],
        context_lens=batch.context_lens,
        block_tables=batch.block_tables,
        slots=batch.slots[last],
        max_query=1,
        max_context=batch.max_context,
    )


def _feed_forward_block(
    ops: Operators, sizes: Sizes, weights: LayerWeights, normed: torch.Tensor
) -> torch.Tensor:
    """The gated feed-forward block of ``normed`` [T, H]: what is added to the residual, [T, H]."""
    out = ops.linear(ops.gated_linear(normed, weights.gate_up, sizes.activation), weights.down)
    if weights.post_feed_forward_norm is not None:
        out = ops.rms_norm(out, weights.post_feed_forward_norm, sizes.rms_eps)
    return out
