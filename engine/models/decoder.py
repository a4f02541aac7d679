"""The decoder of every Llama-like family: one forward pass, told apart by its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from batchinfer.engine.models.layers import (
    Layer,
    LayerConfig,
    LayerWeights,
    rotary_table,
    run_layer,
    run_layers,
)
from batchinfer.kernels.ops import (
    AttentionBatch,
    BestLogitsOperator,
    KVCache,
    KVSpec,
    LayersWork,
    Operators,
    PackedLinear,
    RecordingOperators,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """All that the forward pass depends on.

    ``norm_offset`` is added to every norm's weight (Gemma stores them less one), ``embedding_scale``
    multiplies the embeddings. ``post_norms`` puts a norm after each block. Soft caps of 0 are none.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    layers: tuple[LayerConfig, ...]
    max_context: int
    rms_eps: float
    activation: str
    attention_scale: float
    attention_soft_cap: float = 0.0
    final_soft_cap: float = 0.0
    embedding_scale: float | None = None
    norm_offset: float = 0.0
    post_norms: bool = False
    qk_norms: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_embeddings: bool = False

    def kv_spec(self, dtype: torch.dtype) -> KVSpec:
        """The shape of its KV cache."""
        return KVSpec(len(self.layers), self.num_kv_heads, self.head_size, dtype)

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers' products, by which a token's operations are counted."""
        attention = self.hidden_size * self.head_size * 2 * (self.num_heads + self.num_kv_heads)
        return len(self.layers) * (attention + 3 * self.hidden_size * self.intermediate_size)


class WeightSource(Protocol):
    """Where a model takes its weights from, by Hugging Face's names."""

    def weight(self, names: list[str], sizes: list[int], columns: int | None) -> torch.Tensor:
        """The tensors ``names`` ([size, columns] or [size]) under one another, in the model's dtype."""
        ...

    def norm(self, name: str, size: int, offset: float) -> torch.Tensor:
        """A norm's weight plus ``offset``: fp32 [size]."""
        ...


class Decoder:
    """A model ready to run on one device.

    Takes from ``source`` exactly the tensors that ``config`` asks for. Tables of positions are made
    for ``max_context`` tokens.
    """

    def __init__(
        self,
        config: DecoderConfig,
        source: WeightSource,
        ops: Operators,
        max_context: int,
        quantize: str | None = None,
    ) -> None:
        self.config = config
        self._ops = ops
        self.quantize = quantize
        self._source = source
        self._embeddings = source.weight(
            ["model.embed_tokens.weight"], [config.vocab_size], config.hidden_size
        )
        self.dtype = self._embeddings.dtype
        self.device = self._embeddings.device
        weights = [self._load_layer(f"model.layers.{i}") for i in range(len(config.layers))]
        norms = [layer.input_norm for layer in weights] + [
            self._load_norm("model.norm", config.hidden_size)
        ]
        head = (
            self._embeddings
            if config.tied_embeddings
            else source.weight(["lm_head.weight"], [config.vocab_size], config.hidden_size)
        )
        # Four bits a weight are too few for the head: every token's chances come from it alone.
        self._head = ops.pack_linear(head, None, "int8" if quantize == "int4" else quantize)
        tables: list[torch.Tensor] = []
        ropes = [layer.rope for layer in config.layers]
        for i, rope in enumerate(ropes):
            first = ropes.index(rope)
            if first < i:
                tables.append(tables[first])
            else:
                tables.append(rotary_table(rope, config.head_size, max_context, self.device))
        self._layers = [
            Layer(i, layer.window, tables[i], weights[i], norms[i + 1])
            for i, layer in enumerate(config.layers)
        ]
        del self._source
        uncapped = config.final_soft_cap <= 0.0
        self._best = ops if uncapped and isinstance(ops, BestLogitsOperator) else None
        self._all = self._recorded(self._layers)
        self._before_last = self._recorded(self._layers[:-1])

    def forward(
        self,
        tokens: torch.Tensor,
        batch: AttentionBatch,
        kv: KVCache,
        last: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states of a step, after the last norm: ``tokens`` int [T] -> [T, H].

        With ``last``, int64 [S]: where each sequence's last token is, those of these tokens alone, [S, H].
        Of the others the last layer then stores keys and values and computes nothing more.
        """
        config, ops = self.config, self._ops
        residual = self._embeddings[tokens]
        if config.embedding_scale is not None:
            residual = residual * torch.tensor(config.embedding_scale, dtype=self.dtype)
        normed = ops.rms_norm(residual, self._layers[0].weights.input_norm, config.rms_eps)
        if last is None or len(last) == len(tokens):
            return self._all(normed, residual, batch, kv)[0]
        normed, residual = self._before_last(normed, residual, batch, kv)
        return run_layer(ops, config, self._layers[-1], normed, residual, batch, kv, last)[0]

    def _recorded(self, layers: list[Layer]) -> LayersWork:
        """``layers`` as one piece of work, recorded where the operators can."""
        work = partial(run_layers, self._ops, self.config, layers)
        return self._ops.recorded(work) if isinstance(self._ops, RecordingOperators) else work

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` [n, H] -> fp32 [n, V]."""
        logits = self._ops.logits(hidden, self._head)
        cap = self.config.final_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0.0 else logits

    def best_logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Each row's best token by its logits, int64 [n], and that logit, fp32 [n].

        None where the logits have to be computed for it: by operators that can't do without, and where
        they are capped, as the cap may round two of them to one.
        """
        return None if self._best is None else self._best.best_logits(hidden, self._head)

    def _load_layer(self, name: str) -> LayerWeights:
        config = self.config
        hidden, inner = config.hidden_size, config.intermediate_size
        queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        attention, mlp = f"{name}.self_attn", f"{name}.mlp"
        heads = config.head_size if config.qk_norms else None
        before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
        after = hidden if config.post_norms else None
        return LayerWeights(
            input_norm=self._load_norm(f"{name}.input_layernorm", hidden),
            qkv=self._load_linear(
                [f"{attention}.{part}_proj" for part in "qkv"],
                [queries, keys, keys],
                hidden,
                config.qkv_bias,
            ),
            q_norm=self._load_optional_norm(f"{attention}.q_norm", heads),
            k_norm=self._load_optional_norm(f"{attention}.k_norm", heads),
            attention_output=self._load_linear(
                [f"{attention}.o_proj"], [hidden], queries, config.output_bias
            ),
            post_attention_norm=self._load_optional_norm(f"{name}.post_attention_layernorm", after),
            feed_forward_norm=self._load_norm(f"{name}.{before_mlp}", hidden),
            gate_up=self._load_linear(
                [f"{mlp}.gate_proj", f"{mlp}.up_proj"], [inner, inner], hidden, config.mlp_bias
            ),
            down=self._load_linear([f"{mlp}.down_proj"], [hidden], inner, config.mlp_bias),
            post_feed_forward_norm=self._load_optional_norm(f"{name}.post_feedforward_layernorm", after),
        )

    def _load_linear(self, names: list[str], sizes: list[int], columns: int, bias: bool) -> PackedLinear:
        weight = self._source.weight([f"{name}.weight" for name in names], sizes, columns)
        biases = self._source.weight([f"{name}.bias" for name in names], sizes, None) if bias else None
        return self._ops.pack_linear(weight, biases, self.quantize)

    def _load_norm(self, name: str, size: int) -> torch.Tensor:
        return self._source.norm(f"{name}.weight", size, self.config.norm_offset)

    def _load_optional_norm(self, name: str, size: int | None) -> torch.Tensor | None:
        return None if size is None else self._load_norm(name, size)
