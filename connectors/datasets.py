"""A job's results as a pyarrow dataset."""

from __future__ import annotations

import pyarrow.dataset
import pyarrow.fs

from batchinfer.connectors.local import LocalStore
from batchinfer.connectors.storage import Storage, open_store
from batchinfer.connectors.types import StorageError


def open_dataset(root_uri: str, storage: Storage | None = None) -> pyarrow.dataset.Dataset:
    """The Parquet files directly below ``root_uri`` as one pyarrow dataset: a job's answered rows.

    The files are those there now. Raises StorageError if there is none.
    """
    store = open_store(root_uri, storage)
    keys = [info.key for info in store.list("") if "/" not in info.key and info.key.endswith(".parquet")]
    if not keys:
        raise StorageError(f"{root_uri}: no Parquet file is there yet")
    file_system: pyarrow.fs.FileSystem
    if isinstance(store, LocalStore):
        file_system, folder = pyarrow.fs.LocalFileSystem(), store.root
    else:
        file_system = pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(store.file_system))
        folder = store.root.partition("://")[2]
    paths = [f"{folder}/{key}" for key in keys]
    return pyarrow.dataset.dataset(paths, filesystem=file_system, format="parquet")
