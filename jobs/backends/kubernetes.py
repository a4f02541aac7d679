"""Kubernetes: workers as the pods of an Indexed Job, submitted by kubectl.

kubectl and no client library: it knows the user's contexts and logins, it is on every machine that
speaks to a cluster, and what it reads is exactly what a dry run shows. Needs Kubernetes 1.29.
"""

from __future__ import annotations

import json
from typing import Any

import yaml

from batchinfer.jobs.backends.program import run_program
from batchinfer.jobs.backends.request import FINAL_EXITS, GRACE_SECONDS, Active, Place, Request
from batchinfer.jobs.health import HEALTH

CONTAINER = "worker"
LABEL = "batchinfer-job"
# The file that the worker touches and the kubelet's probe looks at; both are given its name.
_HEALTH_FILE = "/tmp/batchinfer-alive"
_PROBE = ("python3", "-P", "-m", "batchinfer.jobs.health")
_SPOT_TAINTS = (
    ("cloud.google.com/gke-spot", "true"),
    ("kubernetes.azure.com/scalesetpriority", "spot"),
)


def render(request: Request) -> str:
    """The manifest that kubectl gets, as YAML."""
    return yaml.safe_dump(manifest(request), sort_keys=False, width=1000)


def submit(request: Request) -> tuple[str, ...]:
    """Create the Job; returns its name."""
    run_program([*_kubectl(request.place), "create", "--filename=-"], render(request))
    return (request.unique_name,)


def active(place: Place) -> Active:
    """The workers of the job's Jobs that have not ended."""
    items = _jobs(place)
    running = sum(item.get("status", {}).get("ready", 0) for item in items)
    left = sum(_left(item) for item in items)
    return Active(max(0, left - running), running)


def cancel(place: Place) -> None:
    """Delete the job's Jobs; their pods get their time to save what they have."""
    command = [*_kubectl(place), "delete", "jobs", f"--selector={LABEL}={place.tag}"]
    run_program([*command, "--cascade=background", "--wait=false"])


def _jobs(place: Place) -> list[dict[str, Any]]:
    text = run_program(
        [*_kubectl(place), "get", "jobs", f"--selector={LABEL}={place.tag}", "--output=json"]
    )
    items: list[dict[str, Any]] = json.loads(text)["items"]
    return items


def _left(job: dict[str, Any]) -> int:
    """How many indexes of a Job have neither succeeded nor failed for good."""
    status = job.get("status", {})
    ended = {"Complete", "Failed", "SuccessCriteriaMet", "FailureTarget"}
    if any(item["type"] in ended and item["status"] == "True" for item in status.get("conditions", ())):
        return 0
    failed = _count_indexes(status.get("failedIndexes", ""))
    return max(0, int(job["spec"]["completions"]) - int(status.get("succeeded", 0)) - failed)


def _count_indexes(text: str) -> int:
    """How many numbers text such as ``1,3-5`` names."""
    total = 0
    for item in filter(None, text.split(",")):
        first, _, last = item.partition("-")
        total += int(last or first) - int(first) + 1
    return total


def _kubectl(place: Place) -> list[str]:
    options = place.options.kubernetes
    command = ["kubectl"]
    if options.context is not None:
        command.append(f"--context={options.context}")
    if options.namespace is not None:
        command.append(f"--namespace={options.namespace}")
    return command


def manifest(request: Request) -> dict[str, Any]:
    """The Job.

    The first rule that matches a failed pod counts: a worker that says that the job is wrong or stopped
    ends its index; a pod that the cluster took away is replaced at no charge; every other failure uses
    up one of the index's attempts.
    """
    place, workers = request.place, request.workers
    options = place.options.kubernetes
    labels = {"app.kubernetes.io/name": "batchinfer", LABEL: place.tag}
    metadata: dict[str, Any] = {
        "name": request.unique_name,
        "labels": labels,
        "annotations": {"batchinfer-job-uri": place.uri},
    }
    if options.namespace is not None:
        metadata["namespace"] = options.namespace
    rules = [
        {
            "action": "FailIndex",
            "onExitCodes": {"containerName": CONTAINER, "operator": "In", "values": list(FINAL_EXITS)},
        },
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    ]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_SECONDS,
        "containers": [_container(request)],
        "tolerations": _tolerations(request),
    }
    if options.service_account is not None:
        pod["serviceAccountName"] = options.service_account
    if options.node_selector:
        pod["nodeSelector"] = dict(options.node_selector)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {
            "completionMode": "Indexed",
            "completions": request.count,
            "parallelism": request.count,
            "backoffLimitPerIndex": workers.max_attempts - 1,
            "podFailurePolicy": {"rules": rules},
            "template": {
                "metadata": {"labels": dict(labels), "annotations": {"batchinfer-job-uri": place.uri}},
                "spec": {name: value for name, value in pod.items() if value},
            },
        },
    }


def _container(request: Request) -> dict[str, Any]:
    options = request.place.options.kubernetes
    wanted: dict[str, str] = {}
    if request.workers.cpus is not None:
        wanted["cpu"] = f"{request.workers.cpus:g}"
    if request.memory_mib is not None:
        wanted["memory"] = f"{request.memory_mib}Mi"
    limits = {"memory": wanted["memory"]} if "memory" in wanted else {}
    if request.workers.gpus:
        limits["nvidia.com/gpu"] = wanted["nvidia.com/gpu"] = str(request.workers.gpus)
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": request.image("Kubernetes"),
        # Kubernetes expands $(NAME); $$ stands for a dollar sign of ours.
        "command": [word.replace("$", "$$") for word in request.command],
        "env": [
            {"name": name, "value": value.replace("$", "$$")}
            for name, value in sorted({HEALTH: _HEALTH_FILE, **request.environment(options.env)}.items())
        ],
        "envFrom": [{"secretRef": {"name": name}} for name in options.secrets],
        "resources": {name: value for name, value in (("requests", wanted), ("limits", limits)) if value},
        # A worker that hangs is ended as one that failed; each probe costs it a Python start.
        "livenessProbe": {
            "exec": {"command": list(_PROBE)},
            "initialDelaySeconds": 60,
            "periodSeconds": 60,
            "timeoutSeconds": 10,
            "failureThreshold": 3,
        },
        # What namespaces ask for that enforce the restricted Pod Security Standard.
        "securityContext": {
            "runAsNonRoot": True,
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    return {name: value for name, value in container.items() if value}


def _tolerations(request: Request) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if request.workers.gpus:
        found.append({"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"})
    if request.workers.spot:
        found += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in _SPOT_TAINTS
        ]
    return [*found, *request.place.options.kubernetes.tolerations]
