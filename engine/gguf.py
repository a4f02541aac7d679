"""GGUF files, versions 2 and 3: metadata and tensors, read through a memory map.

Knows the container and what llama.cpp's converter does to a model on the way in: its names, its
permuted query and key rows, its norms with one added. Out come Hugging Face's terms.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from batchinfer.engine.dequantize import FORMATS, UNSUPPORTED, dequantize
from batchinfer.engine.types import ModelError

_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies: ``shape`` in torch's order, GGML type number, absolute byte offset."""

    shape: tuple[int, ...]
    type: int
    offset: int


class GGUFFile:
    """One open file: ``metadata`` by key and ``tensors`` by llama.cpp's name.

    Raises ModelError when the file is no GGUF, is of another version or byte order, or ends early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.stat().st_size < 24:
            raise ModelError(f"{path} is no GGUF file: it has {path.stat().st_size} bytes.")
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._data = np.frombuffer(self._map, np.uint8)
        self._at = 24
        magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", self._map)
        if magic != b"GGUF":
            raise ModelError(f"{path} is no GGUF file: it begins with {magic!r}.")
        if version not in (2, 3):
            raise ModelError(
                f"{path} is GGUF version {version}; versions 2 and 3 (little-endian) are read."
            )
        try:
            self.metadata: dict[str, Any] = {self._string(): self._value() for _ in range(key_count)}
            infos = [(self._string(), self._tensor_info()) for _ in range(tensor_count)]
        except (struct.error, ValueError, KeyError) as error:
            raise ModelError(f"{path} is damaged: its header can't be read ({error}).") from error
        alignment = int(self.metadata.get("general.alignment", 32))
        base = -(-self._at // alignment) * alignment
        self.tensors = {name: TensorInfo(info.shape, info.type, info.offset + base) for name, info in infos}
        self._check_tensors()

    @property
    def header_bytes(self) -> bytes:
        """Everything before the tensor data: metadata and the tensor table."""
        return self._map[: self._at]

    def read(self, name: str) -> torch.Tensor:
        """The tensor called ``name`` as fp32."""
        info = self.tensors[name]
        form = FORMATS[info.type]
        length = int(np.prod(info.shape)) // form.weights * form.size
        weights = dequantize(self._data[info.offset : info.offset + length], form)
        return torch.from_numpy(weights).view(info.shape)

    def _check_tensors(self) -> None:
        for name, info in self.tensors.items():
            if info.type not in FORMATS:
                kind = UNSUPPORTED.get(info.type, f"number {info.type}")
                known = ", ".join(form.name for form in FORMATS.values())
                raise ModelError(
                    f"{self.path}: tensor {name} has the type {kind}, which is not supported; "
                    f"use a file with {known}."
                )
            form = FORMATS[info.type]
            weights = int(np.prod(info.shape))
            if weights % form.weights:
                raise ModelError(f"{self.path} is damaged: tensor {name} is no whole number of blocks.")
            if info.offset + weights // form.weights * form.size > len(self._data):
                raise ModelError(
                    f"{self.path} is cut off: tensor {name} ends past the end of the file; fetch it again."
                )

    def _take(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self._map, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        """``count`` strings in a row: a vocabulary has a hundred thousand, read at every start."""
        data, at, texts = self._map, self._at, []
        for _ in range(count):
            (length,) = struct.unpack_from("<Q", data, at)
            at += 8
            if length > len(data) - at:
                raise ValueError("a string runs past the end")
            texts.append(data[at : at + length].decode("utf-8", errors="replace"))
            at += length
        self._at = at
        return texts

    def _value(self, kind: int | None = None) -> Any:
        kind = self._take("<I") if kind is None else kind
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            return self._take(_SCALARS[kind])
        kind, count = self._take("<I"), self._take("<Q")
        if kind == _STRING:
            return self._strings(count)
        if kind == _ARRAY:
            return [self._value(kind) for _ in range(count)]
        form = np.dtype(_SCALARS[kind])
        values = self._data[self._at : self._at + count * form.itemsize]
        self._at += count * form.itemsize
        return values.view(form).tolist()

    def _tensor_info(self) -> TensorInfo:
        dimensions = self._take("<I")
        shape = tuple(self._take("<Q") for _ in range(dimensions))
        return TensorInfo(shape[::-1], self._take("<I"), self._take("<Q"))


@dataclass(frozen=True, slots=True)
class _Family:
    """What one ``general.architecture`` is called by Hugging Face, and what its converter changed."""

    architecture: str
    permuted: bool = False
    norms_plus_one: bool = False


_FAMILIES = {
    "llama": _Family("LlamaForCausalLM", permuted=True),
    "smollm3": _Family("SmolLM3ForCausalLM", permuted=True),
    "qwen2": _Family("Qwen2ForCausalLM"),
    "qwen3": _Family("Qwen3ForCausalLM"),
    "gemma2": _Family("Gemma2ForCausalLM", norms_plus_one=True),
    "gemma3": _Family("Gemma3ForCausalLM", norms_plus_one=True),
}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# The norm before the feed-forward block, and Gemma's norms after each block.
_NORM_NAMES = {
    False: {"ffn_norm": "post_attention_layernorm"},
    True: {
        "ffn_norm": "pre_feedforward_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}


class GGUFCheckpoint:
    """The weights of a GGUF file under Hugging Face's names, as Hugging Face stores them."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self._family = _family(file)
        self._heads = int(_required(file, "attention.head_count"))
        self._kv_heads = int(_key(file, "attention.head_count_kv", self._heads))
        self._names = {
            self._hugging_face_name(name): name for name in file.tensors if name != "rope_freqs.weight"
        }

    @property
    def names(self) -> frozenset[str]:
        """Hugging Face's names of all tensors."""
        return frozenset(self._names)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor called ``name``, fp32; whether it has ``shape`` is the caller's to check."""
        tensor = self._file.read(self._names[name])
        if self._family.permuted and ".self_attn.q_proj." in name:
            tensor = _unpermute(tensor, self._heads)
        if self._family.permuted and ".self_attn.k_proj." in name:
            tensor = _unpermute(tensor, self._kv_heads)
        if self._family.norms_plus_one and name.endswith("norm.weight"):
            tensor = tensor - 1.0
        return tensor

    def _hugging_face_name(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        part = block[2] if block else stem
        known = {**_NAMES, **_NORM_NAMES[self._family.norms_plus_one]}.get(part)
        if known is None:
            return name
        return f"model.layers.{block[1]}.{known}.{kind}" if block else f"{known}.{kind}"


def _unpermute(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """From llama.cpp's rotary pairs (2i, 2i + 1) back to Hugging Face's (i, i + D / 2), rows of heads."""
    return tensor.view(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)


def gguf_config(file: GGUFFile) -> dict[str, Any]:
    """The model's configuration in the terms of Hugging Face's config.json.

    Raises ModelError when the architecture is not supported or a key is missing.
    """
    arch = str(file.metadata.get("general.architecture"))
    family = _family(file)
    heads = int(_required(file, "attention.head_count"))
    hidden = int(_required(file, "embedding_length"))
    layers = int(_required(file, "block_count"))
    head_size = int(_key(file, "attention.key_length", hidden // heads))
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "vocab_size": file.tensors["token_embd.weight"].shape[0]
        if "token_embd.weight" in file.tensors
        else 0,
        "hidden_size": hidden,
        "intermediate_size": int(_required(file, "feed_forward_length")),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": int(_key(file, "attention.head_count_kv", heads)),
        "head_dim": head_size,
        "max_position_embeddings": int(_required(file, "context_length")),
        "rms_norm_eps": float(_required(file, "attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "attention_bias": "blk.0.attn_q.bias" in file.tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in file.tensors,
        "rope_theta": float(_key(file, "rope.freq_base", 10000.0)),
        "partial_rotary_factor": int(_key(file, "rope.dimension_count", head_size)) / head_size,
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": file.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    window = _key(file, "attention.sliding_window", None)
    scaling = _key(file, "rope.scaling.type", None)
    if scaling not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": float(_key(file, "rope.scaling.factor", 1.0)),
        }
    if "rope_freqs.weight" in file.tensors:
        factors = file.read("rope_freqs.weight").tolist()
        config["rope_scaling"] = {"rope_type": "frequency_factors", "factors": factors}
    if arch == "llama" and window:
        config["architectures"], config["sliding_window"] = ["MistralForCausalLM"], int(window)
    if arch in ("gemma2", "gemma3"):
        # The file does not say which scale its attention uses: only the largest of each deviates.
        largest = {"gemma2": 46, "gemma3": 62}[arch]
        config["query_pre_attn_scalar"] = hidden / heads if layers == largest else head_size
        config["sliding_window"] = int(_required(file, "attention.sliding_window"))
        config["attn_logit_softcapping"] = _key(file, "attn_logit_softcapping", None)
        config["final_logit_softcapping"] = _key(file, "final_logit_softcapping", None)
        config["hidden_activation"] = "gelu_pytorch_tanh"
    return config


def _family(file: GGUFFile) -> _Family:
    arch = file.metadata.get("general.architecture")
    if arch not in _FAMILIES:
        known = ", ".join(sorted(_FAMILIES))
        raise ModelError(
            f"{file.path} has the architecture {arch!r}, which is not supported; GGUF files of {known} are."
        )
    return _FAMILIES[str(arch)]


def _key(file: GGUFFile, name: str, default: Any) -> Any:
    return file.metadata.get(f"{file.metadata.get('general.architecture')}.{name}", default)


def _required(file: GGUFFile, name: str) -> Any:
    value = _key(file, name, None)
    if value is None or isinstance(value, list):
        arch = file.metadata.get("general.architecture")
        raise ModelError(
            f"{file.path} has no single number under {arch}.{name} in its metadata, so it can't be run."
        )
    return value
