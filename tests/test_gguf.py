"""GGUF files: block formats against the format's own package, metadata, and files that are refused."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from batchinfer.engine.dequantize import FORMATS, dequantize
from batchinfer.engine.gguf import GGUFCheckpoint, GGUFFile, gguf_config
from batchinfer.engine.types import ModelError


@pytest.mark.parametrize("form", list(FORMATS.values()), ids=lambda f: f.name)
def test_blocks_dequantize_as_the_format_package_does(form) -> None:
    kind = gguf.GGMLQuantizationType[form.name]
    assert gguf.GGML_QUANT_SIZES[kind] == (form.weights, form.size)
    count = 70_000 // form.weights  # more than are unpacked at once
    data = np.random.default_rng(0).integers(0, 256, (count, form.size), np.uint8)
    # Random bytes make scales that are not finite; such blocks prove nothing.
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, kind).reshape(count, -1)
    sane = np.isfinite(expected).all(axis=1)
    assert sane.sum() > 0.6 * count
    np.testing.assert_array_equal(
        dequantize(data[sane], form).reshape(-1, form.weights), expected[sane].astype(np.float32)
    )


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """What the converter does to query and key weights of Llama models."""
    shape = (heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
    return weights.reshape(shape).swapaxes(1, 2).reshape(weights.shape)


def write_model(path: Path, arch: str = "llama", **extra) -> dict[str, np.ndarray]:
    """A file of one layer: 4 query heads, 2 KV heads of size 8."""
    rng = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_block_count(1)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    for key, value in extra.items():
        writer.add_key_value(f"{arch}.{key.replace('__', '.')}", value, gguf.GGUFValueType.get_type(value))
    weights = {
        "token_embd.weight": rng.normal(size=(50, 32)),
        "output_norm.weight": rng.normal(size=32),
        "blk.0.attn_norm.weight": rng.normal(size=32),
        "blk.0.ffn_norm.weight": rng.normal(size=32),
        "blk.0.attn_q.weight": rng.normal(size=(32, 32)),
        "blk.0.attn_k.weight": rng.normal(size=(16, 32)),
        "blk.0.attn_v.weight": rng.normal(size=(16, 32)),
        "blk.0.attn_output.weight": rng.normal(size=(32, 32)),
        "blk.0.ffn_gate.weight": rng.normal(size=(64, 32)),
        "blk.0.ffn_up.weight": rng.normal(size=(64, 32)),
        "blk.0.ffn_down.weight": rng.normal(size=(32, 64)),
    }
    weights = {name: value.astype(np.float32) for name, value in weights.items()}
    for name, value in weights.items():
        heads = {"blk.0.attn_q.weight": 4, "blk.0.attn_k.weight": 2}.get(name)
        writer.add_tensor(name, permuted(value, heads) if heads and arch == "llama" else value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def test_llama_tensors_come_back_under_hugging_face_names_and_unpermuted(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "m.gguf")
    checkpoint = GGUFCheckpoint(GGUFFile(tmp_path / "m.gguf"))
    expected = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "model.layers.0.input_layernorm.weight": "blk.0.attn_norm.weight",
        "model.layers.0.post_attention_layernorm.weight": "blk.0.ffn_norm.weight",
        "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
        "model.layers.0.self_attn.k_proj.weight": "blk.0.attn_k.weight",
        "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
        "model.layers.0.self_attn.o_proj.weight": "blk.0.attn_output.weight",
        "model.layers.0.mlp.gate_proj.weight": "blk.0.ffn_gate.weight",
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "model.layers.0.mlp.down_proj.weight": "blk.0.ffn_down.weight",
    }
    assert checkpoint.names == set(expected)
    for name, own in expected.items():
        got = checkpoint.read(name, weights[own].shape)
        assert torch.equal(got, torch.from_numpy(weights[own])), name


def test_metadata_become_a_configuration(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    config = gguf_config(GGUFFile(tmp_path / "m.gguf"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert (config["vocab_size"], config["hidden_size"], config["intermediate_size"]) == (50, 32, 64)
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (4, 2, 8)
    assert (config["num_hidden_layers"], config["max_position_embeddings"]) == (1, 128)
    assert config["tie_word_embeddings"]
    assert config["rope_theta"] == 5000.0
    assert config["rms_norm_eps"] == pytest.approx(1e-5)


def test_gemma_norms_lose_the_one_that_the_converter_added(tmp_path: Path) -> None:
    weights = write_model(
        tmp_path / "m.gguf", "gemma2", attention__sliding_window=16, attention__key_length=8
    )
    file = GGUFFile(tmp_path / "m.gguf")
    checkpoint = GGUFCheckpoint(file)
    got = checkpoint.read("model.layers.0.pre_feedforward_layernorm.weight", (32,))
    torch.testing.assert_close(got, torch.from_numpy(weights["blk.0.ffn_norm.weight"]) - 1)
    query = checkpoint.read("model.layers.0.self_attn.q_proj.weight", (32, 32))
    assert torch.equal(query, torch.from_numpy(weights["blk.0.attn_q.weight"]))
    assert gguf_config(file)["query_pre_attn_scalar"] == 8


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf", "mamba")
    with pytest.raises(
        ModelError, match="architecture 'mamba', which is not supported; GGUF files of gemma2"
    ):
        gguf_config(GGUFFile(tmp_path / "m.gguf"))


def test_missing_metadata_are_named(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"llama\.attention\.head_count"):
        gguf_config(GGUFFile(tmp_path / "m.gguf"))


def test_unsupported_tensor_types_are_refused_by_name(tmp_path: Path) -> None:
    write_model(tmp_path / "m.gguf")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    name = b"blk.0.attn_v.weight"
    # The type follows the name, the number of dimensions and the two dimensions.
    at = data.index(name) + len(name) + 4 + 2 * 8
    data[at : at + 4] = struct.pack("<I", 23)
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(
        ModelError, match=r"blk\.0\.attn_v\.weight has the type IQ4_XS, which is not supported"
    ):
        GGUFFile(tmp_path / "m.gguf")


@pytest.mark.parametrize("kept", [0, 10, 24, 100, 400, 800])
def test_cut_off_files_are_refused(tmp_path: Path, kept: int) -> None:
    write_model(tmp_path / "m.gguf")
    data = (tmp_path / "m.gguf").read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[:kept])
    with pytest.raises(ModelError, match=r"no GGUF file|is damaged|is cut off"):
        GGUFFile(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(data[:-40])
    with pytest.raises(ModelError, match="is cut off"):
        GGUFFile(tmp_path / "m.gguf")


def test_other_files_and_versions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ModelError, match="begins with b'PK"):
        GGUFFile(tmp_path / "m.gguf")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 1, 0, 0))
    with pytest.raises(ModelError, match="GGUF version 1"):
        GGUFFile(tmp_path / "m.gguf")
