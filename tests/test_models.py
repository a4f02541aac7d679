"""Models in object storage: what is fetched, once, and what is refused."""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path

import pytest

import batchinfer.jobs.models as models
from batchinfer.connectors.storage import open_store
from batchinfer.jobs.models import local_model
from batchinfer.jobs.types import JobError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def put(root: str, **files: bytes) -> None:
    store = open_store(root)
    for name, data in files.items():
        store.put(name.replace("__", "."), data)


def bucket(tmp_path: Path) -> str:
    return f"memory://bucket{tmp_path.as_posix()}"


@pytest.mark.parametrize("source", ["org/model", "./here", "/there", "package://name/file.gguf"])
def test_what_the_engine_finds_by_itself_passes_through(cache: Path, source: str) -> None:
    assert local_model(source) == source
    assert not cache.exists()


def test_a_folder_is_fetched_whole_and_only_once(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "_CHUNK_BYTES", 7)
    weights = os.urandom(100)
    put(bucket(tmp_path), config__json=b"{}", model__safetensors=weights, README__md=b"#", empty__txt=b"")
    put(f"{bucket(tmp_path)}/original", big__safetensors=b"x")
    folder = Path(local_model(bucket(tmp_path)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "empty.txt",
        "model.safetensors",
    ]
    assert (folder / "model.safetensors").read_bytes() == weights
    monkeypatch.setattr(models, "_fetch", None)
    assert local_model(bucket(tmp_path)) == str(folder)


def test_a_changed_model_is_another_copy(cache: Path, tmp_path: Path) -> None:
    put(bucket(tmp_path), model__safetensors=b"one", config__json=b"{}")
    first = local_model(bucket(tmp_path))
    put(bucket(tmp_path), model__safetensors=b"two", config__json=b"{}")
    second = local_model(bucket(tmp_path))
    assert first != second
    assert (Path(second) / "model.safetensors").read_bytes() == b"two"


def test_a_gguf_file(cache: Path, tmp_path: Path) -> None:
    put(bucket(tmp_path), model__gguf=b"GGUF", other__gguf=b"x")
    path = Path(local_model(f"{bucket(tmp_path)}/model.gguf"))
    assert path.read_bytes() == b"GGUF"
    assert [file.name for file in path.parent.iterdir()] == ["model.gguf"]


def test_what_failed_halfway_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(bucket(tmp_path), model__safetensors=b"one", config__json=b"{}")
    real = models._listed
    monkeypatch.setattr(models, "_fetch", lambda store, files, folder: (folder.mkdir(), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        local_model(bucket(tmp_path))
    monkeypatch.undo()
    monkeypatch.setenv("BATCHINFER_CACHE", str(cache))
    assert [path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock")] == []

    def changing(uri: str, storage: object) -> object:
        found = real(uri, None)
        put(bucket(tmp_path), model__safetensors=b"three", config__json=b"{}")
        return found

    monkeypatch.setattr(models, "_listed", changing)
    with pytest.raises(JobError, match="changed while it was read"):
        local_model(bucket(tmp_path))
    assert [path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "there is no model at"),
        ({"pytorch_model__bin": b"x", "config__json": b"{}"}, "holds only pytorch_model.bin"),
        ({"config__json": b"{}"}, "holds no weights"),
    ],
)
def test_what_is_no_model_is_refused(
    cache: Path, tmp_path: Path, files: dict[str, bytes], words: str
) -> None:
    put(bucket(tmp_path), **files)
    with pytest.raises(JobError, match=words):
        local_model(bucket(tmp_path))
    with pytest.raises(JobError, match="there is no model at"):
        local_model(f"{bucket(tmp_path)}/none.gguf")


def test_a_cache_that_can_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket(tmp_path), model__safetensors=b"one", config__json=b"{}")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BATCHINFER_CACHE", str(tmp_path / "file"))
    with pytest.raises(JobError, match="BATCHINFER_CACHE"):
        local_model(bucket(tmp_path))


def _fetch_in_process(source: str, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    count = 0
    real = models._fetch

    def counted(*arguments: object) -> None:
        nonlocal count
        count += 1
        real(*arguments)  # type: ignore[arg-type]

    models._fetch = counted
    results.put((local_model(source), count))  # type: ignore[attr-defined]


def test_processes_share_one_copy(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(bucket(tmp_path), model__safetensors=os.urandom(1 << 16), config__json=b"{}")
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=_fetch_in_process, args=(bucket(tmp_path), barrier, results))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=240) for _ in processes]
    for process in processes:
        process.join()
    assert len({path for path, _ in found}) == 1
    assert sum(count for _, count in found) == 1
