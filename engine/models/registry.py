"""Which models run: Hugging Face's config.json of each supported family to a DecoderConfig."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from batchinfer.engine.models.decoder import DecoderConfig
from batchinfer.engine.models.layers import LayerConfig, RopeConfig
from batchinfer.engine.types import ModelError

_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_ROPE_SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "frequency_factors": ("factors",),
}


@dataclass(frozen=True, slots=True)
class _Family:
    """What a family adds to Llama; ``bias`` names the key that gives all attention products one."""

    defaults: Mapping[str, Any]
    bias: str | None = None
    qkv_bias: bool = False
    qk_norms: bool = False
    gemma: bool = False


_FAMILIES = {
    "LlamaForCausalLM": _Family({}, bias="attention_bias"),
    "MistralForCausalLM": _Family({"sliding_window": 4096}),
    "Qwen2ForCausalLM": _Family({"max_window_layers": 28, "sliding_window": 4096}, qkv_bias=True),
    "Qwen3ForCausalLM": _Family(
        {"head_dim": 128, "max_window_layers": 28, "sliding_window": 4096},
        bias="attention_bias",
        qk_norms=True,
    ),
    "SmolLM3ForCausalLM": _Family(
        {"rope_theta": 2000000.0, "tie_word_embeddings": True}, bias="attention_bias"
    ),
    "Gemma2ForCausalLM": _Family(
        {
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 256,
        },
        bias="attention_bias",
        gemma=True,
    ),
    "Gemma3ForCausalLM": _Family(
        {
            "head_dim": 256,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "rope_theta": 1000000.0,
            "rope_local_base_freq": 10000.0,
            "query_pre_attn_scalar": 256,
        },
        bias="attention_bias",
        qk_norms=True,
        gemma=True,
    ),
}
_MODEL_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def supported_architectures() -> tuple[str, ...]:
    """The values of ``architectures`` in config.json that run."""
    return tuple(_FAMILIES)


def decoder_config(source: str, config: Mapping[str, Any]) -> DecoderConfig:
    """The decoder that ``config`` (as in config.json) describes; ``source`` names it in errors.

    Raises ModelError for an architecture, activation, rope scaling or quantized format that is not
    supported, and for a key that is missing or makes no sense.
    """
    architecture = _architecture(source, config)
    family = _FAMILIES[architecture]
    values = _Values(source, {**family.defaults, **config})
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown")
        raise ModelError(
            f"{source} holds weights quantized by {method!r}, which is not supported; use the original."
        )
    if config.get("use_bidirectional_attention"):
        raise ModelError(f"{source} uses bidirectional attention, which is not supported.")
    hidden, heads = values.integer("hidden_size"), values.integer("num_attention_heads")
    head_size = values.integer("head_dim", hidden // heads)
    kv_heads = values.integer("num_key_value_heads", heads)
    if heads % kv_heads or head_size % 2:
        raise ModelError(
            f"{source}: num_attention_heads {heads}, num_key_value_heads {kv_heads} "
            f"and head_dim {head_size} don't go together."
        )
    activation = values.get(
        "hidden_activation" if family.gemma else "hidden_act",
        "gelu_pytorch_tanh" if family.gemma else "silu",
    )
    if activation not in _ACTIVATIONS:
        known = " or ".join(_ACTIVATIONS)
        raise ModelError(f"{source} has the activation {activation!r}, which is not supported; {known} is.")
    bias = bool(family.bias and values.get(family.bias, False))
    scalar = float(values.get("query_pre_attn_scalar", head_size)) if family.gemma else head_size
    return DecoderConfig(
        architecture=architecture,
        vocab_size=values.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=values.integer("intermediate_size"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        layers=_layers(values, architecture, head_size),
        max_context=values.integer("max_position_embeddings"),
        rms_eps=float(values.get("rms_norm_eps", 1e-6)),
        activation=_ACTIVATIONS[activation],
        attention_scale=scalar**-0.5,
        attention_soft_cap=float(values.get("attn_logit_softcapping", 0.0)) if family.gemma else 0.0,
        final_soft_cap=float(values.get("final_logit_softcapping", 0.0)) if family.gemma else 0.0,
        embedding_scale=hidden**0.5 if family.gemma else None,
        norm_offset=1.0 if family.gemma else 0.0,
        post_norms=family.gemma,
        qk_norms=family.qk_norms,
        qkv_bias=family.qkv_bias or bias,
        output_bias=bias,
        mlp_bias=bool(values.get("mlp_bias", False))
        and architecture in ("LlamaForCausalLM", "SmolLM3ForCausalLM"),
        tied_embeddings=bool(values.get("tie_word_embeddings", False)),
    )


@dataclass(frozen=True, slots=True)
class _Values:
    """config.json's keys over the family's defaults, with errors that name the model."""

    source: str
    values: Mapping[str, Any]

    def get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or value < 1:
            raise ModelError(
                f"{self.source}: {key} in its configuration is {value!r}, but it must be 1 or more."
            )
        return value


def _architecture(source: str, config: Mapping[str, Any]) -> str:
    named = config.get("architectures") or [_MODEL_TYPES.get(str(config.get("model_type")))]
    for architecture in named:
        if architecture in _FAMILIES:
            return str(architecture)
    name = named[0] or config.get("model_type") or "none"
    code = " and would run code from its folder, which is never done" if config.get("auto_map") else ""
    known = ", ".join(_FAMILIES)
    raise ModelError(
        f"{source} has the architecture {name}, which is not supported{code}; supported are {known}."
    )


def _layers(values: _Values, architecture: str, head_size: int) -> tuple[LayerConfig, ...]:
    count = values.integer("num_hidden_layers")
    windowed = _windowed_layers(values, architecture, count)
    positioned = [True] * count
    if architecture == "SmolLM3ForCausalLM":
        interval = values.integer("no_rope_layer_interval", 4)
        given = values.get("no_rope_layers", [(i + 1) % interval != 0 for i in range(count)])
        positioned = [bool(given[i]) for i in range(count)]
    window = int(values.get("sliding_window", 0))
    return tuple(
        LayerConfig(
            window=window if windowed[i] else 0,
            rope=_rope(values, architecture, windowed[i], head_size) if positioned[i] else None,
        )
        for i in range(count)
    )


def _windowed_layers(values: _Values, architecture: str, count: int) -> list[bool]:
    """Which layers see only their window."""
    if architecture == "LlamaForCausalLM":
        return [False] * count
    if architecture == "MistralForCausalLM":
        return [values.values.get("sliding_window") is not None] * count
    if not architecture.startswith("Gemma") and not values.get("use_sliding_window", False):
        return [False] * count
    kinds = values.get("layer_types", None)
    if kinds is not None:
        if len(kinds) != count or not {"sliding_attention", "full_attention"}.issuperset(kinds):
            raise ModelError(
                f"{values.source}: layer_types must name sliding_attention or full_attention "
                f"for each of its {count} layers."
            )
        return [kind == "sliding_attention" for kind in kinds]
    if architecture.startswith("Gemma"):
        pattern = 2 if architecture == "Gemma2ForCausalLM" else values.integer("sliding_window_pattern", 6)
        return [(i + 1) % pattern != 0 for i in range(count)]
    if architecture == "SmolLM3ForCausalLM":
        interval = values.integer("no_rope_layer_interval", 4)
        given = values.get("no_rope_layers", [(i + 1) % interval != 0 for i in range(count)])
        return [not given[i] for i in range(count)]
    first = int(values.get("max_window_layers", count))
    return [i >= first for i in range(count)]


def _rope(values: _Values, architecture: str, windowed: bool, head_size: int) -> RopeConfig:
    """The layer's rotary embedding, from ``rope_parameters`` or the older keys."""
    parameters = values.get("rope_parameters", None)
    theta = values.get("rope_theta", 10000.0)
    if parameters is None:
        parameters = values.get("rope_scaling", {})
        if architecture == "Gemma3ForCausalLM" and windowed:
            parameters, theta = {}, values.get("rope_local_base_freq", 10000.0)
    elif "full_attention" in parameters or "sliding_attention" in parameters:
        parameters = parameters.get("sliding_attention" if windowed else "full_attention") or {}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in _ROPE_SCALINGS:
        known = ", ".join(name for name in _ROPE_SCALINGS if name != "frequency_factors")
        raise ModelError(
            f"{values.source} has the rope scaling {kind!r}, which is not supported; {known} are."
        )
    for key in _ROPE_SCALINGS[kind]:
        if key not in parameters:
            raise ModelError(f"{values.source}: its rope scaling {kind} has no {key}.")
    share = float(parameters.get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0)))
    return RopeConfig(
        theta=float(parameters.get("rope_theta", theta)),
        size=int(head_size * share),
        scaling=kind,
        parameters={key: parameters[key] for key in _ROPE_SCALINGS[kind]},
    )
