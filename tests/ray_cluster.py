"""A Ray cluster of several nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Ray asks for a token otherwise, says what it does to its makers, and looks for newer versions of itself.
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0"}


@dataclass
class RayCluster:
    """A running cluster: its head takes no workers, each of its nodes takes ``CPUS`` cores of them."""

    cluster: Any
    nodes: list[Any] = field(default_factory=list)

    CPUS = 2

    @property
    def address(self) -> str:
        return str(self.cluster.address)

    def add_node(self) -> Any:
        self.nodes.append(self.cluster.add_node(num_cpus=self.CPUS, object_store_memory=80 << 20))
        return self.nodes[-1]

    def lose_node(self, node: Any) -> int:
        """The machine is gone at once, with everything that runs on it; returns how many processes."""
        gone = [
            process for info in node.all_processes["raylet"] for process in descendants(info.process.pid)
        ]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # nobody sees another's end
            for process in gone:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, number)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.remove(node)
        return len(gone)


def descendants(process: int) -> list[int]:
    """The process and all below it."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                children.setdefault(parent, []).append(int(entry.name))
    found = [process]
    for member in found:
        found += children.get(member, [])
    return found


@contextlib.contextmanager
def ray_cluster(nodes: int) -> Iterator[RayCluster]:
    """Start a cluster, and end it with everything that runs on it."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False, "object_store_memory": 80 << 20}
    found = RayCluster(Cluster(initialize_head=True, head_node_args=head))
    try:
        for _ in range(nodes):
            found.add_node()
        yield found
    finally:
        found.cluster.shutdown()
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
