"""Servers of object stores on loopback for the tests that need a bucket; how properties are tested."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import cloud_servers
import hypothesis
import pytest
import s3_server
from cloud_servers import CloudServer

# The same examples in every run, and however slow the machine is: what fails once fails again.
hypothesis.settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("repeatable")


@dataclass(frozen=True)
class S3Bucket:
    """A fresh bucket and the server that holds it. In the test's environment clients find the server."""

    server: s3_server.S3Server
    name: str

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3Server]:
    """moto's S3, in a process of its own."""
    with s3_server.moto(tmp_path_factory.mktemp("moto")) as server:
        yield server


@pytest.fixture(scope="session")
def seaweed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[s3_server.S3Server]:
    """A real S3 server: SeaweedFS."""
    with s3_server.seaweedfs(tmp_path_factory.mktemp("seaweed")) as server:
        yield server


def _bucket(server: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    bucket = S3Bucket(server, f"bucket-{uuid.uuid4().hex[:12]}")
    server.create_bucket(bucket.name)
    return bucket


@pytest.fixture
def s3_moto(moto_server: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """A fresh bucket on moto, with the environment set for it."""
    return _bucket(moto_server, monkeypatch)


@pytest.fixture
def s3_seaweed(seaweed_server: s3_server.S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """A fresh bucket on SeaweedFS, with the environment set for it."""
    return _bucket(seaweed_server, monkeypatch)


@pytest.fixture(scope="session")
def gcs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    """An emulator of Google Cloud Storage."""
    with cloud_servers.gcs(tmp_path_factory.mktemp("gcs")) as server:
        yield server


@pytest.fixture(scope="session")
def azure_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    """Azurite; installed by npm on first use."""
    if shutil.which("npm") is None:
        pytest.skip("Azurite, the server of Azure Blob Storage for tests, needs npm")
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(cloud_servers.azurite(tmp_path_factory.mktemp("azurite")))
        except cloud_servers.Unavailable as why:
            pytest.skip(str(why))
        yield server


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """The module fake_runner: a runner, a tokenizer and a clock for engines without a model."""
    spec = importlib.util.spec_from_file_location("fake_runner", Path(__file__).with_name("fake_runner.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_runner"] = module
    spec.loader.exec_module(module)
    return module
