"""A Slurm cluster of two nodes on this machine: munged, slurmctld and two slurmd, without systemd."""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from s3_server import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
NODES = ("n1", "n2")


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if absent:
        return f"Slurm is not installed: {', '.join(absent)} missing (Debian: slurmctld slurmd munge)"
    return None


def _path() -> str:
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


@dataclass
class Cluster:
    """A running cluster. ``environment`` is what its client programs need."""

    folder: Path
    environment: dict[str, str]
    daemons: dict[str, subprocess.Popen[bytes]]

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def details(self, task: str) -> dict[str, str]:
        """What Slurm says of one task."""
        words = self.run("scontrol", "show", "job", "--oneliner", task).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def kill_node(self, node: str) -> int:
        """The node is gone at once, with everything that runs on it; returns how many processes."""
        self.daemons[node].kill()
        self.daemons[node].wait()
        marks = {f"SLURMD_NODENAME={node}".encode(), f"SLURM_CONF={self.folder}/slurm.conf".encode()}
        killed = 0
        for process in self._processes():
            if marks <= set(_environment(process)):
                for victim in (_parent(process), process):
                    # The step's own daemon is the parent of its script.
                    if victim == process or _name(victim).startswith("slurmstepd"):
                        with contextlib.suppress(ProcessLookupError):
                            os.kill(victim, signal.SIGKILL)
                            killed += 1
        return killed

    def _processes(self) -> list[int]:
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]

    def stop(self) -> None:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            self.run("scancel", f"--user={getpass.getuser()}")
        for node in NODES:
            if self.daemons[node].poll() is None:
                self.kill_node(node)
        for daemon in self.daemons.values():
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _environment(process: int) -> list[bytes]:
    try:
        return Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    except OSError:
        return []


def _parent(process: int) -> int:
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return process


def _name(process: int) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


@contextlib.contextmanager
def cluster(folder: Path, max_array_size: int) -> Iterator[Cluster]:
    """Start a cluster with its files in ``folder``, and end it with everything that runs on it."""
    ports = free_ports(3)
    key, sock = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o600)
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text(_configuration(folder, sock, ports, max_array_size))
    environment = {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}
    commands = {
        "munged": [
            "munged",
            "--foreground",
            "--force",
            f"--socket={sock}",
            f"--key-file={key}",
            f"--pid-file={folder}/munged.pid",
            f"--log-file={folder}/munged.log",
            f"--seed-file={folder}/munged.seed",
        ],
        "slurmctld": ["slurmctld", "-D"],
        **{node: ["slurmd", "-D", "-N", node] for node in NODES},
    }
    daemons: dict[str, subprocess.Popen[bytes]] = {}
    found = Cluster(folder, environment, daemons)
    try:
        for name, command in commands.items():
            with (folder / f"{name}.out").open("wb") as log:
                daemons[name] = subprocess.Popen(
                    command,
                    env={**os.environ, **environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            if name == "munged":
                _until(sock.exists, "munged", folder)
        _until(lambda: _idle(found) == len(NODES), "the nodes", folder)
        yield found
    finally:
        if len(daemons) == len(commands):
            found.stop()
        for daemon in daemons.values():
            if daemon.poll() is None:
                daemon.kill()
                daemon.wait()


def _idle(cluster: Cluster) -> int:
    try:
        return cluster.run("sinfo", "--noheader", "--Node", "--format=%T").split().count("idle")
    except AssertionError:
        return 0  # slurmctld does not answer yet


def _until(condition: object, what: str, folder: Path) -> None:
    assert callable(condition)
    deadline = time.monotonic() + 240
    while not condition():
        said = "".join(path.read_text(errors="replace")[-500:] for path in folder.glob("*.out"))
        assert time.monotonic() < deadline, f"waited in vain for {what}: {said}"
        time.sleep(0.2)


def _configuration(folder: Path, sock: Path, ports: list[int], max_array_size: int) -> str:
    host, user = socket.gethostname().partition(".")[0], getpass.getuser()
    nodes = [
        f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=1000"
        for node, port in zip(NODES, ports[1:], strict=True)
    ]
    return "\n".join(
        [
            "ClusterName=test",
            f"SlurmctldHost={host}(127.0.0.1)",
            f"SlurmctldPort={ports[0]}",
            f"SlurmUser={user}",
            f"SlurmdUser={user}",
            "AuthType=auth/munge",
            # A credential of a few seconds: a requeued job waits for as long as one lives.
            f"AuthInfo=socket={sock},cred_expire=5",
            f"StateSaveLocation={folder}/state",
            f"SlurmdSpoolDir={folder}/spool.%n",
            f"SlurmctldPidFile={folder}/slurmctld.pid",
            f"SlurmdPidFile={folder}/slurmd.%n.pid",
            "ProctrackType=proctrack/pgid",
            "TaskPlugin=task/none",
            "JobAcctGatherType=jobacct_gather/none",
            "AccountingStorageType=accounting_storage/none",
            "SwitchType=switch/none",
            "MpiDefault=none",
            "SelectType=select/cons_tres",
            "SelectTypeParameters=CR_CPU",
            "SchedulerType=sched/backfill",
            "SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=1,bf_interval=1",
            "MinJobAge=600",
            "KillWait=30",
            "ReturnToService=2",
            f"MaxArraySize={max_array_size}",
            "SlurmdParameters=config_overrides",
            "SlurmdTimeout=10",
            *nodes,
            f"PartitionName=batch Nodes={','.join(NODES)} Default=YES MaxTime=INFINITE State=UP",
            "",
        ]
    )
