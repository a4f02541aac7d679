"""A model's files, found and read: where they lie, which tensors they hold, what identifies them.

Reads safetensors (one file or sharded) and GGUF through memory maps, or makes random weights from a
configuration alone. Never unpickles and never runs code that comes with a model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from batchinfer.engine.gguf import GGUFCheckpoint, GGUFFile, gguf_config
from batchinfer.engine.types import ModelError

# Buffers that some checkpoints carry and every implementation computes itself.
_COMPUTED = (".rotary_emb.inv_freq", ".self_attn.rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.msgpack", "*.h5")
_SAMPLES, _SAMPLE_BYTES = 64, 64 * 1024

# Configurations by the names of their models, for dummy weights.
_SHIPPED = Path(__file__).parent / "models" / "configs"


class Checkpoint(Protocol):
    """The tensors of one model by Hugging Face's names."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors; empty when it can make any."""
        ...

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor in its stored dtype (GGUF: fp32), on the CPU; ``shape`` is what the model expects."""
        ...


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine: ``folder`` holds its files, or ``gguf`` is its one file."""

    source: str
    config: Mapping[str, Any]
    folder: Path
    gguf: GGUFFile | None

    def checkpoint(self, load_format: Literal["auto", "dummy"]) -> Checkpoint:
        """Its weights. Raises ModelError when there are none, or only formats that are never read."""
        if load_format == "dummy":
            return DummyCheckpoint()
        if self.gguf is not None:
            return GGUFCheckpoint(self.gguf)
        return SafetensorsCheckpoint(self.source, self.folder)


def find_model(source: str, load_format: Literal["auto", "dummy"] = "auto") -> ModelFiles:
    """Find ``source``: a folder, a GGUF file, ``package://NAME/FILE`` or a Hugging Face id.

    For dummy weights also a file like config.json, or the name of a configuration that is shipped.
    Raises ModelError when it is not there or holds no configuration.
    """
    path = _locate(source, load_format)
    if path.is_file() and path.suffix == ".json" and load_format == "dummy":
        return ModelFiles(source, _read_config(path), path.parent, None)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelError(f"{source} is a file but no .gguf; give the folder that holds the model.")
        file = GGUFFile(path)
        return ModelFiles(source, gguf_config(file), path.parent, file)
    config_path = path / "config.json"
    if not config_path.is_file():
        single = sorted(path.glob("*.gguf"))
        if len(single) == 1:
            return find_model(str(single[0]))
        held = f"{len(single)} GGUF files; name one of them" if single else "no config.json"
        raise ModelError(f"The model folder {source} holds {held}.")
    return ModelFiles(source, _read_config(config_path), path, None)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} must hold a JSON object.")
    return config


def _locate(source: str, load_format: str) -> Path:
    if source.startswith("package://"):
        return _package_file(source)
    path = Path(source).expanduser()
    if path.exists():
        return path
    if load_format == "dummy":
        shipped = {folder.name: folder for folder in sorted(_SHIPPED.iterdir())}
        if source in shipped:
            return shipped[source]
        if "/" not in source:
            raise ModelError(
                f"There is no model or configuration at {source}; give a path, "
                f"or one of the shipped names {', '.join(shipped)}."
            )
    looks_like_id = (
        source.count("/") == 1 and not source.startswith((".", "/", "~")) and path.suffix != ".gguf"
    )
    if not looks_like_id:
        raise ModelError(
            f"There is no model at {source}; give a folder, a .gguf file, package://NAME/FILE or a hub id."
        )
    return _download(source, load_format)


def _package_file(source: str) -> Path:
    """The file inside an installed package, found without importing the package."""
    name, _, file = source.removeprefix("package://").partition("/")
    if not name.isidentifier() or not file or ".." in Path(file).parts:
        raise ModelError(f"{source} must look like package://NAME/FILE, with an importable NAME.")
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(f"The package {name} of {source} is not installed; install it with pip.")
    for folder in spec.submodule_search_locations:
        if (Path(folder) / file).exists():
            return Path(folder) / file
    held = sorted(
        str(path.relative_to(folder))
        for folder in map(Path, spec.submodule_search_locations)
        for path in folder.rglob("*.gguf")
    )
    there = f"name one of its model files: {', '.join(held[:5])}" if held else "it has no GGUF file at all"
    raise ModelError(f"The package {name} holds no file {file}; {there}.")


def _download(source: str, load_format: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(
            snapshot_download(
                source, allow_patterns=patterns + (["*.safetensors"] if load_format != "dummy" else [])
            )
        )
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"The model {source} is no path here, is not in the local cache, and the hub can't be reached."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"The model {source} is no path here and could not be fetched from the hub: {reason}"
        ) from error


class SafetensorsCheckpoint:
    """The safetensors files of a folder: those of model.safetensors.index.json, or all there are.

    Raises ModelError when a file is missing or damaged, or when only pickled weights are there.
    """

    def __init__(self, source: str, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self._source = source
        self._files: dict[str, tuple[Any, str]] = {}
        for path in _safetensors_files(source, folder):
            try:
                file: Any = safe_open(path, framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"{path} can't be read as safetensors ({error}); fetch it again."
                ) from error
            names: list[str] = file.keys()
            for name in names:
                self._files[_full_name(name)] = (file, name)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors, with the prefix ``model.`` also where the file leaves it out."""
        return frozenset(self._files)

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One tensor as stored."""
        file, stored = self._files[name]
        tensor: torch.Tensor = file.get_tensor(stored)
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ModelError(
                f"{self._source}: tensor {name} is stored as {tensor.dtype}, which is not supported."
            )
        return tensor


class DummyCheckpoint:
    """Random weights of any shape, the same for the same name: for tests and benchmarks."""

    names: frozenset[str] = frozenset()

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Norms near one, the rest small."""
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        noise = torch.empty(shape).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))
        return noise + 1.0 if name.endswith("norm.weight") else noise


def _full_name(name: str) -> str:
    """Base models are stored without the prefix that causal models carry."""
    return name if name.startswith(("model.", "lm_head.")) else f"model.{name}"


def _safetensors_files(source: str, folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is not a valid index of safetensors files.") from error
        for name in names:
            if not (folder / name).is_file():
                raise ModelError(f"The model folder {source} lacks {name}, which its index names.")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    pickled = [path.name for pattern in _PICKLED for path in sorted(folder.glob(pattern))]
    if pickled:
        raise ModelError(
            f"The model folder {source} holds only {pickled[0]}, a format that can run code when read "
            "and is refused; convert it to safetensors."
        )
    raise ModelError(f"The model folder {source} holds no weights: no .safetensors file is in it.")


class WeightReader:
    """Takes tensors from a checkpoint into one dtype on one device, and accounts for every name.

    Implements the decoder's ``WeightSource``.
    """

    def __init__(
        self, source: str, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._source = source
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._left = set(checkpoint.names)

    def weight(self, names: list[str], sizes: list[int], columns: int | None) -> torch.Tensor:
        """The tensors ``names`` ([size, columns] or [size]) under one another, in the model's dtype.

        Raises ModelError for a name that is missing or has another shape.
        """
        shapes = [(size,) if columns is None else (size, columns) for size in sizes]
        if len(names) == 1:
            return self._take(names[0], shapes[0]).to(self._device, self._dtype).contiguous()
        whole = (sum(sizes),) if columns is None else (sum(sizes), columns)
        out = torch.empty(whole, dtype=self._dtype, device=self._device)
        end = 0
        for name, shape in zip(names, shapes, strict=True):
            start, end = end, end + shape[0]
            out[start:end] = self._take(name, shape)
        return out

    def norm(self, name: str, size: int, offset: float) -> torch.Tensor:
        """A norm's weight plus ``offset``: fp32 [size]."""
        return self._take(name, (size,)).to(self._device, torch.float32) + offset

    def finish(self, ignored: tuple[str, ...] = ()) -> None:
        """Raises ModelError when the checkpoint holds tensors that nothing took."""
        left = sorted(name for name in self._left if name not in ignored and not name.endswith(_COMPUTED))
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            raise ModelError(
                f"{self._source} holds the tensor {left[0]}{more}, which its architecture has no place for."
            )

    def _take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if self._checkpoint.names and name not in self._checkpoint.names:
            raise ModelError(f"{self._source} lacks the tensor {name}, which its configuration asks for.")
        tensor = self._checkpoint.read(name, shape)
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{self._source}: tensor {name} has the shape {tuple(tensor.shape)}, "
                f"but its configuration says {shape}."
            )
        self._left.discard(name)
        return tensor


def fingerprint(model: ModelFiles) -> str:
    """What the model is, whatever its path: 32 hexadecimal digits.

    SHA-256 over its files in the order of their names (weights, configuration, tokenizer, templates):
    name, size, then the whole content of files up to 16 MiB, and 64 evenly spaced ranges of 64 KiB,
    first and last included, of larger ones; a GGUF file's whole header as well. A copy elsewhere has
    the same fingerprint; a change that falls between the ranges and keeps the size goes unseen.
    """
    digest = hashlib.sha256()
    paths = [model.gguf.path] if model.gguf is not None else _identifying_files(model.folder)
    if model.gguf is not None:
        digest.update(model.gguf.header_bytes)
    for path in paths:
        size = path.stat().st_size
        name = "model.gguf" if model.gguf is not None else path.name
        digest.update(f"{name}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= 16 << 20:
                digest.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1), os.SEEK_SET)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def _identifying_files(folder: Path) -> list[Path]:
    suffixes = {".json", ".safetensors", ".jinja", ".model", ".txt"}
    return sorted(
        (p for p in folder.iterdir() if p.is_file() and p.suffix in suffixes), key=lambda p: p.name
    )
