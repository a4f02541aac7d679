"""The operators' contracts (shapes, dtypes, layouts) and the dispatch by device.

Every implementation (``reference``, ``cpu``, ``triton``) provides all methods of :class:`Operators`
with one signature; ``reference`` defines what is correct. T is the number of tokens of a step, S the
number of sequences in it, H the hidden size, D the head size, Hq and Hkv the query and KV heads.
"""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

logger = logging.getLogger(__name__)


class KernelsUnavailable(ImportError):
    """Why an implementation can't work here, as one sentence: no compiler, an unknown instruction set."""


@dataclass(frozen=True, slots=True)
class KVSpec:
    """The shape of a KV cache: ``dtype`` is a torch dtype (int8 and fp8 caches keep scales beside).

    In int8 each key and each value of a head is rounded to the multiples of its largest magnitude / 127.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype


class KVCache(Protocol):
    """Paged keys and values of all layers. Opaque: only the operators that made it look inside."""

    spec: KVSpec
    block_size: int
    num_blocks: int


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Where the tokens of a step stand, made once a step and shared by all layers.

    Tokens are packed sequence after sequence. ``query_starts`` int32 [S + 1]: sequence i owns the
    tokens query_starts[i]:query_starts[i + 1], at least one. ``positions`` int64 [T] in the sequence.
    ``context_lens`` int32 [S]: tokens of the sequence in the cache once this step has stored its own,
    so its queries stand at the last positions. ``block_tables`` int32 [S, max_blocks]: block ids,
    any value past the end. ``slots`` int64 [T]: block id * block_size + offset, where the token's
    keys and values are stored; no other sequence of the batch reads these blocks. ``max_query`` and
    ``max_context`` are host integers.
    """

    query_starts: torch.Tensor
    positions: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    slots: torch.Tensor
    max_query: int
    max_context: int


class PackedLinear(Protocol):
    """The weight of one product in the layout that its implementation reads fastest. Opaque."""

    out_features: int
    in_features: int


class Operators(Protocol):
    """All operators of one implementation.

    Activations are in the model's dtype unless said; the weights of norms are always fp32.
    """

    name: str

    def block_size(self, spec: KVSpec) -> int:
        """Tokens of one block of the KV cache."""
        ...

    def block_bytes(self, spec: KVSpec) -> int:
        """Bytes of one block over all layers, keys and values and scales."""
        ...

    def allocate_kv(self, spec: KVSpec, num_blocks: int, device: torch.device) -> KVCache:
        """Allocate a cache; its content is undefined, but finite."""
        ...

    def pack_linear(
        self, weight: torch.Tensor, bias: torch.Tensor | None, quantize: str | None
    ) -> PackedLinear:
        """Lay out ``weight`` [out, in] (and ``bias`` [out]) for ``linear``; may keep or copy it."""
        ...

    def linear(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """``x`` [T, in] times the weight's transpose, plus its bias: [T, out], x's dtype."""
        ...

    def gated_linear(self, x: torch.Tensor, weight: PackedLinear, kind: str) -> torch.Tensor:
        """``gated_activation`` of ``linear``: [T, in] -> [T, out / 2]; may round less between the two."""
        ...

    def logits(self, x: torch.Tensor, weight: PackedLinear) -> torch.Tensor:
        """``linear`` [n, in] -> fp32 [n, out]; may leave out the rounding to x's dtype."""
        ...

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside: x's shape."""
        ...

    def add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The residual sum x + residual (rounded to x's dtype), normed: (normed, sum), both [T, H].

        May write over ``x`` and ``residual``.
        """
        ...

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
        """Norm (where given, over D), rotate q and k, store k and v in the cache, return q [T, Hq, D].

        ``qkv`` [T, (Hq + 2 * Hkv) * D]: queries, keys, values. ``cos_sin`` fp32 [max_context, R]:
        R / 2 cosines, then R / 2 sines, R <= D the rotated size. Rotation pairs dimension i with
        i + R / 2 (the Hugging Face layout); dimensions from R on pass through.
        """
        ...

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
        """Causal attention of ``q`` [T, Hq, D] over the cache, softmax in fp32: [T, Hq * D].

        A query at position p sees positions max(0, p - window + 1) .. p; ``window`` 0 is no limit.
        ``soft_cap`` > 0 replaces a score s by soft_cap * tanh(s / soft_cap). Query head h reads KV
        head h // (Hq / Hkv). The result for a token depends on nothing but its own sequence.
        """
        ...

    def gated_activation(self, gate_up: torch.Tensor, kind: str) -> torch.Tensor:
        """act(gate) * up of ``gate_up`` [T, 2 * I] (gate first): [T, I]; kind silu or gelu_tanh."""
        ...

    def sample(
        self,
        logits: torch.Tensor,
        temperature: torch.Tensor,
        keys: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Choose a token a row: argmax(logits / temperature + Gumbel noise), int64 [S].

        ``logits`` fp32 [S, V], -inf where masked; ``temperature`` fp32 [S], 0 is greedy (the lowest id
        among equals); ``keys`` int64 [S, 2], the two 32-bit words of each row's Philox key;
        ``positions`` int64 [S], the position of the token to be chosen. Noise of token v is
        -log(-log(u)) with u from word v % 4 of Philox4x32-10 at counter (position, v // 4, 0, 0):
        u = ((word >> 8) + 0.5) / 2**24, so that all implementations draw the same bits. That u has 25
        significant bits: in fp32 the half is lost above 2**23 and u may round to 1, so take the inner
        logarithm in fp64, or of 1 - u by log1p. On CPUs a logit that is no number is chosen before plus
        infinity, and that before any other, so that a damaged row shows by its token's logit.
        """
        ...


@runtime_checkable
class FilterOperator(Protocol):
    """Operators that also filter logits, where that pays: without sorting and without the host."""

    def filter(
        self,
        logits: torch.Tensor,
        places: torch.Tensor,
        temperature: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
    ) -> None:
        """Set to -inf, in place, what the rows ``places`` (int64 [m]) of ``logits`` fp32 [n, V] lose.

        A row's scores are its logits over ``temperature`` (fp32 [m], above 0). Its ``top_k`` (int64 [m],
        V keeps all) best stay, and their equals; of those a token stays while the chances of all better
        ones have not reached ``top_p`` (fp32 [m], 1 keeps all), and while its own is at least ``min_p``
        (fp32 [m]) times the best one's.
        """
        ...


@runtime_checkable
class BestLogitsOperator(Protocol):
    """Operators that find the best token without writing all logits to memory."""

    def best_logits(
        self, x: torch.Tensor, weight: PackedLinear
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Of ``logits`` of ``x`` [n, in]: what ``sample`` chooses at temperature 0, int64 [n], and the
        logits of these, fp32 [n]. None where ``weight`` has no product that can.
        """
        ...


class LayersWork(Protocol):
    """Some layers of a model, by the methods of operators alone."""

    def __call__(
        self, normed: torch.Tensor, residual: torch.Tensor, batch: AttentionBatch, kv: KVCache
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(normed, residual), both [T, H] and what the layers before have left -> the same after them."""
        ...


@runtime_checkable
class RecordingOperators(Protocol):
    """Operators that can write down all calls of some layers and make them again for other tokens."""

    def recorded(self, work: LayersWork) -> LayersWork:
        """``work`` to the bit, with less time between its operators.

        It must make the same calls whatever its tensors hold, and use nothing else on what they return.
        """
        ...


def operators_for(device: torch.device, name: str = "auto") -> Operators:
    """The implementation called ``name``, or the fastest that works on ``device``.

    ``auto`` is ``cpu`` on CPUs and ``triton`` on CUDA; where that one is absent or can't work it is
    ``reference``, with one warning that says why. Raises ValueError for a name that the device can't
    run, and KernelsUnavailable where the implementation asked for by name doesn't work here.
    """
    fastest = {"cpu": "cpu", "cuda": "triton"}.get(device.type)
    if name not in ("auto", "reference", fastest):
        raise ValueError(
            f"operators is {name!r}, but {device.type} runs auto, reference"
            + (f" or {fastest}." if fastest else " only.")
        )
    if name == "auto" and fastest is not None:
        try:
            return _load(fastest)
        except KernelsUnavailable as why:
            logger.warning("The reference operators run in place of the fast ones: %s", why)
    elif name != "auto" and name != "reference":
        return _load(name)
    return _load("reference")


def _load(name: str) -> Operators:
    """Import one implementation's module, whose ``load()`` makes its operators."""
    module = f"{__package__}.{name}.operators" if name != "reference" else f"{__package__}.reference"
    try:
        loaded: Operators = importlib.import_module(module).load()
    except ModuleNotFoundError as error:
        raise KernelsUnavailable(f"the {name} operators need the module {error.name}.") from error
    return loaded
