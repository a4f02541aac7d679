"""Models in object storage: fetched once into a cache on this machine, under a lock."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from batchinfer.connectors.storage import Storage, normalize_uri, open_store, protocol_of
from batchinfer.connectors.types import ObjectInfo, ObjectStore, StorageError
from batchinfer.jobs.types import JobError

_SUFFIXES = (".safetensors", ".gguf", ".json", ".jinja", ".model", ".txt")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK_BYTES = 32 << 20
_PARALLEL_CHUNKS = 8


def local_model(source: str, storage: Storage | None = None) -> str:
    """What the engine takes for a job's ``model.source``.

    A Hugging Face id, a local path and ``package://`` pass through. A folder or GGUF file in object
    storage is fetched into the cache, ``BATCHINFER_CACHE`` or ``~/.cache/batchinfer``, where every
    process of this machine shares it: a copy is named by the names, sizes and tags of its files, so a
    changed model is another copy.

    Raises JobError where nothing there is a model, and StorageError where the store refuses.
    """
    protocol = protocol_of(source)
    if protocol == "package":
        return source
    if protocol == "file":
        return normalize_uri(source) if "://" in source else source
    uri = normalize_uri(source)
    store, files = _listed(uri, storage)
    name = f"{uri.rpartition('/')[2].removesuffix('.gguf')}-{_digest(files)}"
    folder = cache_folder() / "models" / name
    with _locked(folder):
        if not folder.is_dir():
            aside = folder.with_name(f".{name}.{uuid.uuid4().hex}")
            try:
                _fetch(store, files, aside)
                if _digest(_listed(uri, storage)[1]) != _digest(files):
                    raise JobError(f"the model {source} was changed while it was read: submit again")
                os.rename(aside, folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
    return str(folder / files[0].key if uri.endswith(".gguf") else folder)


def _listed(uri: str, storage: Storage | None) -> tuple[ObjectStore, list[ObjectInfo]]:
    """The store above a model's files, and those of them that a model may need."""
    if uri.endswith(".gguf"):
        parent, _, name = uri.rpartition("/")
        store = open_store(parent, storage)
        try:
            return store, [store.head(name)]
        except FileNotFoundError:
            raise JobError(f"there is no model at {uri}: correct model.source") from None
    store = open_store(uri, storage)
    here = [info for info in store.list("") if "/" not in info.key]
    files = [info for info in here if info.key.endswith(_SUFFIXES)]
    if any(info.key.endswith((".safetensors", ".gguf")) for info in files):
        return store, files
    pickled = [info.key for info in here if info.key.endswith(_PICKLED)]
    if pickled:
        raise JobError(
            f"the model {uri} holds only {pickled[0]}, a format that can run code when read "
            "and is refused: convert it to safetensors"
        )
    if here:
        raise JobError(f"the model {uri} holds no weights: no .safetensors or .gguf file is in that folder")
    raise JobError(f"there is no model at {uri}: correct model.source")


def _digest(files: Sequence[ObjectInfo]) -> str:
    digest = hashlib.sha256()
    for info in files:
        digest.update(f"{info.key}\0{info.size}\0{info.etag}\0".encode())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where this machine keeps copies of what it fetched."""
    return Path(os.environ.get("BATCHINFER_CACHE") or Path.home() / ".cache" / "batchinfer")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Only one process of this machine at a time; the lock ends with its process."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(folder.with_name(f".{folder.name}.lock"), "a")  # noqa: SIM115 - closed below
    except OSError as error:
        raise JobError(
            f"the model can't be kept in {folder.parent} ({error.strerror}): set BATCHINFER_CACHE to a "
            "folder with room for it"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(store: ObjectStore, files: Sequence[ObjectInfo], folder: Path) -> None:
    """Read the files into ``folder``, several ranges at a time."""
    folder.mkdir()
    ranges = [(info, start) for info in files for start in range(0, max(info.size, 1), _CHUNK_BYTES)]

    def fetch(part: tuple[ObjectInfo, int]) -> None:
        info, start = part
        stop = min(start + _CHUNK_BYTES, info.size)
        data = store.get_range(info.key, start, stop)
        if len(data) != stop - start:
            raise StorageError(f"{store.root}/{info.key} is shorter than its listing says: submit again")
        with open(folder / info.key, "r+b") as file:
            file.seek(start)
            file.write(data)

    try:
        for info in files:
            (folder / info.key).touch()
        with ThreadPoolExecutor(_PARALLEL_CHUNKS) as pool:
            for _ in pool.map(fetch, ranges):
                pass
    except OSError as error:
        raise JobError(
            f"the model {store.root} can't be kept in {folder.parent} ({error.strerror or error}): set "
            "BATCHINFER_CACHE to a folder with room for it"
        ) from None
