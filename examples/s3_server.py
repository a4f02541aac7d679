"""A real S3 server on loopback, for the demo and the tests: SeaweedFS, or moto where that is missing."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

ACCESS_KEY, SECRET_KEY, REGION = "testing", "testing123", "us-east-1"


@dataclass(frozen=True)
class S3Server:
    """The server's address, and the environment in which every S3 client finds it."""

    endpoint_url: str

    @property
    def environment(self) -> dict[str, str]:
        """Variables for the processes that use the server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": REGION,
        }

    def create_bucket(self, name: str) -> None:
        """Make a bucket; waits for a server that answers before it can store."""
        import boto3
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=self.endpoint_url,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name=REGION,
        )
        deadline = time.monotonic() + 180
        while True:
            try:
                client.create_bucket(Bucket=name)
                client.put_object(Bucket=name, Key="ready", Body=b"1")
                client.delete_object(Bucket=name, Key="ready")
                return
            except (BotoCoreError, ClientError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.2)


@contextmanager
def seaweedfs(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS with its data in ``folder``, for the time of the block."""
    folder.mkdir(parents=True, exist_ok=True)
    identity = {
        "name": "demo",
        "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    services = ["master.port", "volume.port", "filer.port", "s3.port"]
    names = [*services, *(f"{name}.grpc" for name in services)]
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [str(_beside_python("weed")), "-v=0", "server", f"-dir={folder}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={folder / 's3.json'}"]
    command += ["-volume.max=300", "-master.volumeSizeLimitMB=64"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # fixed ports, so two servers would collide
    command += [f"-{name}={port}" for name, port in ports.items()]
    server = S3Server(f"http://127.0.0.1:{ports['s3.port']}")
    with running(command, server.endpoint_url, folder, {"HOME": str(folder)}):
        yield server


@contextmanager
def moto(folder: Path) -> Iterator[S3Server]:
    """moto's S3, which keeps everything in memory; its log goes to ``folder``."""
    (port,) = free_ports(1)
    command = [sys.executable, "-P", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = S3Server(f"http://127.0.0.1:{port}")
    with running(command, server.endpoint_url, folder):
        yield server


@contextmanager
def any_server(folder: Path) -> Iterator[S3Server]:
    """SeaweedFS if it is installed, else moto."""
    start = seaweedfs if _beside_python("weed").exists() else moto
    with start(folder) as server:
        yield server


def _beside_python(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def free_ports(count: int) -> list[int]:
    """Loopback ports that are free now, below 32768: SeaweedFS can't use those above."""
    ports: list[int] = []
    candidate = random.randrange(20000, 32000)
    while len(ports) < count:
        candidate += 1
        with closing(socket.socket(socket.AF_INET, socket.SOCK_STREAM)) as probe:
            if probe.connect_ex(("127.0.0.1", candidate)) != 0:
                ports.append(candidate)
    return ports


@contextmanager
def running(
    command: list[str], url: str, folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[None]:
    """A server process, from when it answers at ``url``, with its log in ``folder``. It is ended by
    SIGKILL, as SeaweedFS takes long to leave."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    try:
        while True:
            try:
                urllib.request.urlopen(url, timeout=5).close()
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
