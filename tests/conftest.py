"""Real S3 servers on loopback for the tests that need a bucket."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

ACCESS_KEY, SECRET_KEY = "testing", "testing123"


@dataclass(frozen=True)
class S3Server:
    """An S3 server on loopback: its address and the environment in which clients reach it."""

    endpoint_url: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def create_bucket(self) -> str:
        import boto3

        name = f"bucket-{uuid.uuid4().hex[:12]}"
        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=name)
        return name


@dataclass(frozen=True)
class S3Bucket:
    """A fresh bucket, and the server that holds it; the environment is set for this test."""

    server: S3Server
    name: str

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"


def free_ports(count: int) -> list[int]:
    """Loopback ports that are free now; below 32768, since SeaweedFS can't use the ones above."""
    ports: list[int] = []
    candidate = 20000 + os.getpid() % 5000
    while len(ports) < count:
        candidate += 1
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            if probe.connect_ex(("127.0.0.1", candidate)) != 0:
                ports.append(candidate)
    return ports


@contextmanager
def running(command: list[str], ready_url: str, log: Path, environment: dict[str, str]) -> Iterator[None]:
    """A server process for the time of the block; ended with SIGKILL, since some take long to leave."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=os.environ | environment, start_new_session=True
        )
    try:
        while True:
            try:
                urllib.request.urlopen(ready_url, timeout=5).close()
                break
            except urllib.error.HTTPError:
                break  # an answer, if only that we may not
            except OSError:
                if process.poll() is not None:
                    raise RuntimeError(f"{command[0]} ended: {log.read_text()[-2000:]}") from None
                time.sleep(0.05)
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="session")
def moto_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """moto's S3, in a process of its own."""
    (port,) = free_ports(1)
    command = [sys.executable, "-P", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    log = tmp_path_factory.mktemp("moto") / "log"
    with running(command, f"http://127.0.0.1:{port}/", log, {}):
        yield S3Server(f"http://127.0.0.1:{port}")


@pytest.fixture(scope="session")
def seaweed_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server: SeaweedFS."""
    weed = Path(sys.executable).with_name("weed")
    folder = tmp_path_factory.mktemp("seaweed")
    credentials = {"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}
    actions = ["Admin", "Read", "Write", "List", "Tagging"]
    config = {"identities": [{"name": "tests", "credentials": [credentials], "actions": actions}]}
    (folder / "s3.json").write_text(json.dumps(config))
    names = ["master.port", "volume.port", "filer.port", "s3.port"]
    names += [f"{name}.grpc" for name in names]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [str(weed), "-v=0", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += ["-filer", "-s3", f"-s3.config={folder / 's3.json'}"]
    command += ["-volume.max=300", "-master.volumeSizeLimitMB=64"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    with running(command, endpoint, folder / "log", {"HOME": str(folder)}):
        yield S3Server(endpoint)
    shutil.rmtree(folder, ignore_errors=True)


def _bucket(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    deadline = time.monotonic() + 60
    while True:
        try:
            return S3Bucket(server, server.create_bucket())
        except Exception:
            # SeaweedFS answers before its volumes are up.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


@pytest.fixture
def s3_moto(moto_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """A fresh bucket on moto, with the environment set for it."""
    return _bucket(moto_server, monkeypatch)


@pytest.fixture
def s3_seaweed(seaweed_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> S3Bucket:
    """A fresh bucket on SeaweedFS, with the environment set for it."""
    return _bucket(seaweed_server, monkeypatch)


@pytest.fixture(scope="session")
def fakes() -> ModuleType:
    """The module fake_runner: a runner, a tokenizer and a clock for engines without a model."""
    spec = importlib.util.spec_from_file_location("fake_runner", Path(__file__).with_name("fake_runner.py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["fake_runner"] = module
    spec.loader.exec_module(module)
    return module
