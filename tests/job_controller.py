"""Plays the Job controller of Kubernetes: runs each index of an Indexed Job as a process of this machine.

It keeps to what the documentation says of indexes, exit codes, the pod failure policy, back-off limits,
evictions and deletion; of pods it knows the command, the environment and the grace period. A program
``kubectl`` for the tests' PATH hands it manifests and reads their status.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

_KUBECTL = """\
#!{python}
import json, pathlib, sys, yaml
folder = pathlib.Path({folder!r})
words = [word for word in sys.argv[1:] if not word.startswith("-")]
flags = dict(word.partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
with (folder / "calls").open("a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
name, _, value = flags.get("--selector", "").partition("=")
jobs = [yaml.safe_load(path.read_text()) for path in sorted(folder.glob("*.yaml"))]
if words == ["create"] and flags["--filename"] == "-":
    text = sys.stdin.read()
    job = yaml.safe_load(text)["metadata"]["name"]
    with (folder / (job + ".yaml")).open("x") as file:
        file.write(text)
    print("job.batch/" + job + " created")
elif words == ["get", "jobs"] and flags["--output"] == "json":
    items = [job for job in jobs if job["metadata"]["labels"][name] == value]
    for job in items:
        status = folder / (job["metadata"]["name"] + ".status")
        job["status"] = json.loads(status.read_text()) if status.exists() else {{}}
    print(json.dumps({{"items": items}}))
elif words == ["delete", "jobs"] and name:
    for job in jobs:
        if job["metadata"]["labels"][name] == value:
            (folder / (job["metadata"]["name"] + ".yaml")).unlink()
else:
    sys.exit("the test's kubectl does not know: " + " ".join(sys.argv[1:]))
"""


def install_kubectl(folder: Path) -> Path:
    """A program ``kubectl`` that keeps manifests in ``folder``; returns the folder for PATH."""
    programs = folder / "programs"
    programs.mkdir()
    program = programs / "kubectl"
    program.write_text(_KUBECTL.format(python=sys.executable, folder=str(folder)))
    program.chmod(0o755)
    return programs


@dataclass
class Pod:
    """One start of one index."""

    index: int
    process: subprocess.Popen[bytes]
    conditions: set[str] = field(default_factory=set)


class IndexedJob:
    """One Job while it runs."""

    def __init__(self, manifest: Mapping[str, Any], image: Mapping[str, str], logs: Path) -> None:
        """``image`` is the environment that a container's image and its node give it."""
        self.manifest = manifest
        self.spec = manifest["spec"]
        self.pod_spec = self.spec["template"]["spec"]
        assert self.spec["completionMode"] == "Indexed"
        assert self.pod_spec["restartPolicy"] == "Never"
        [self.container] = self.pod_spec["containers"]
        self._image = dict(image)
        self._logs = logs
        self.pods: dict[int, Pod] = {}
        self.starts: Counter[int] = Counter()
        self.exits: list[tuple[int, int]] = []
        self.counted: Counter[int] = Counter()
        self.succeeded: set[int] = set()
        self.failed: set[int] = set()
        self.deleted = False

    @property
    def over(self) -> bool:
        ended = len(self.succeeded) + len(self.failed) == self.spec["completions"]
        return not self.pods and (ended or self.deleted)

    def status(self) -> dict[str, Any]:
        """The Job's status as the API shows it."""
        found: dict[str, Any] = {
            "active": len(self.pods),
            "ready": len(self.pods),
            "succeeded": len(self.succeeded),
            "failedIndexes": ",".join(map(str, sorted(self.failed))),
        }
        if self.over and not self.deleted:
            kind = "Failed" if self.failed else "Complete"
            found["conditions"] = [{"type": kind, "status": "True"}]
        return found

    def turn(self) -> None:
        """Take in what ended and start what is missing."""
        for index, pod in list(self.pods.items()):
            code = pod.process.poll()
            if code is not None:
                del self.pods[index]
                self._ended(pod, code if code >= 0 else 128 - code)
        for index in range(self.spec["completions"]):
            if self.deleted or len(self.pods) >= self.spec["parallelism"]:
                break
            if index not in self.succeeded | self.failed | self.pods.keys():
                self.pods[index] = self._start(index)

    def evict(self, index: int) -> None:
        """The node is drained: the pod gets the condition DisruptionTarget and SIGTERM."""
        self.pods[index].conditions.add("DisruptionTarget")
        self.pods[index].process.terminate()

    def lose_node(self, index: int) -> None:
        """The pod's node is gone: it ends without a word and is deleted as a disrupted one."""
        self.pods[index].conditions.add("DisruptionTarget")
        self.pods[index].process.kill()

    def kill(self, index: int) -> None:
        """The pod takes more memory than it may."""
        self.pods[index].process.kill()

    def delete(self) -> None:
        """The Job is deleted and its pods with it."""
        self.deleted = True
        for pod in self.pods.values():
            pod.process.terminate()

    def kill_all(self) -> None:
        self.deleted = True
        for pod in self.pods.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pod.process.pid, signal.SIGKILL)
            pod.process.wait()

    def _start(self, index: int) -> Pod:
        environment = dict(self._image)
        for item in self.container.get("env", ()):
            environment[item["name"]] = _expanded(item["value"], environment)
        environment["JOB_COMPLETION_INDEX"] = str(index)
        command = [_expanded(word, environment) for word in self.container["command"]]
        self.starts[index] += 1
        with (self._logs / f"{self.manifest['metadata']['name']}-{index}.log").open("ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return Pod(index, process)

    def _ended(self, pod: Pod, code: int) -> None:
        self.exits.append((pod.index, code))
        if code == 0:
            self.succeeded.add(pod.index)
            return
        action = self._action(pod, code)
        if action == "FailIndex":
            self.failed.add(pod.index)
        elif action == "Count":
            self.counted[pod.index] += 1
            if self.counted[pod.index] > self.spec["backoffLimitPerIndex"]:
                self.failed.add(pod.index)
        else:
            assert action == "Ignore", f"the action {action} is not played here"

    def _action(self, pod: Pod, code: int) -> str:
        """What the first rule that matches says; without one the failure counts."""
        for rule in self.spec["podFailurePolicy"]["rules"]:
            codes, conditions = rule.get("onExitCodes"), rule.get("onPodConditions")
            if codes is not None:
                assert codes["containerName"] == self.container["name"]
                if (code in codes["values"]) == (codes["operator"] == "In"):
                    return str(rule["action"])
            elif any(item["type"] in pod.conditions and item["status"] == "True" for item in conditions):
                return str(rule["action"])
        return "Count"


def _expanded(text: str, environment: Mapping[str, str]) -> str:
    """``$(NAME)`` is a variable that is known, ``$$`` a dollar sign."""

    def replace(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else environment.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


class Controller:
    """Runs the Jobs whose manifests are in a folder."""

    def __init__(self, folder: Path, image: Mapping[str, str]) -> None:
        self.folder = folder
        self.jobs: dict[str, IndexedJob] = {}
        self._image = image
        self._stop = threading.Event()
        self.lock = threading.Lock()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            with self.lock:
                self._turn()

    def _turn(self) -> None:
        present = {path.stem: path for path in self.folder.glob("*.yaml")}
        for name, path in present.items():
            if name not in self.jobs:
                manifest = yaml.safe_load(path.read_text())
                self.jobs[name] = IndexedJob(manifest, self._image, self.folder)
        for name, job in self.jobs.items():
            if name not in present and not job.deleted:
                job.delete()
            job.turn()
            status = self.folder / f"{name}.status.new"
            status.write_text(json.dumps(job.status()))
            status.rename(self.folder / f"{name}.status")

    def wait(self, seconds: float = 240) -> None:
        """Until all Jobs are over."""
        deadline = time.monotonic() + seconds
        while not (self.jobs and all(job.over for job in self.jobs.values())):
            assert self._thread.is_alive(), "the controller failed"
            assert time.monotonic() < deadline, {name: job.status() for name, job in self.jobs.items()}
            time.sleep(0.05)

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob("*.log")))


@contextlib.contextmanager
def controller(folder: Path, image: Mapping[str, str]) -> Iterator[Controller]:
    """A controller of the Jobs in ``folder``; its pods end with it."""
    found = Controller(folder, image)
    found._thread.start()
    try:
        yield found
    finally:
        found._stop.set()
        found._thread.join()
        for job in found.jobs.values():
            job.kill_all()
