"""What a job spec may say of each batch service under ``workers.options``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, StrictInt


class ServiceOptions(BaseModel):
    """Settings of one service: frozen, and strict about keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class SlurmOptions(ServiceOptions):
    """Of sbatch."""

    partition: str | None = Field(
        default=None, description="partition of the cluster; null: its default", examples=["gpu"]
    )
    account: str | None = Field(default=None, description="who is charged", examples=["team"])
    qos: str | None = Field(default=None, description="quality of service", examples=["low"])
    time: str | None = Field(
        default=None,
        pattern=r"^[0-9]+(-[0-9]+)?(:[0-9]+){0,2}$",
        description="time limit of one start, such as 4:00:00; workers are requeued at it",
        examples=["4:00:00"],
    )
    gres: str | None = Field(
        default=None,
        description="generic resources, such as gpu:a100:1; null: gpu:GPUS",
        examples=["gpu:a100:1"],
    )
    setup: tuple[str, ...] = Field(
        default=(),
        description="shell lines before the worker starts, such as module load cuda",
        examples=[["module load cuda"]],
    )
    sbatch: tuple[str, ...] = Field(
        default=(),
        description="further options of sbatch, such as --constraint=a100",
        examples=[["--constraint=a100"]],
    )


class KubernetesOptions(ServiceOptions):
    """Of the Job and its pods."""

    context: str | None = Field(
        default=None, description="of kubectl; null: the current one", examples=["production"]
    )
    namespace: str | None = Field(
        default=None, description="where the Job is; null: the context's", examples=["batch"]
    )
    service_account: str | None = Field(
        default=None, description="whose identity reaches the stores", examples=["batchinfer"]
    )
    node_selector: dict[str, str] = Field(
        default_factory=dict, description="labels that nodes must have", examples=[{"gpu": "l4"}]
    )
    tolerations: tuple[dict[str, Any], ...] = Field(
        default=(),
        description="further taints that pods tolerate",
        examples=[[{"key": "spot", "operator": "Exists"}]],
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="environment of the workers", examples=[{"HF_HOME": "/cache"}]
    )
    secrets: tuple[str, ...] = Field(
        default=(),
        description="names of Secrets whose keys become environment variables",
        examples=[["store-keys"]],
    )


class AwsBatchOptions(ServiceOptions):
    """Of the job definition and the job."""

    queue: str | None = Field(
        default=None, description="name or ARN of the job queue; must be given", examples=["spot-gpus"]
    )
    region: str | None = Field(
        default=None, description="of the queue; null: the environment's", examples=["eu-central-1"]
    )
    job_role: str | None = Field(
        default=None,
        description="ARN of the role by which workers reach stores",
        examples=["arn:aws:iam::123456789012:role/batchinfer"],
    )
    execution_role: str | None = Field(
        default=None,
        description="ARN of the role that starts containers; secrets and Fargate need it",
        examples=["arn:aws:iam::123456789012:role/starts-containers"],
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="environment of the workers", examples=[{"HF_HOME": "/cache"}]
    )
    secrets: dict[str, str] = Field(
        default_factory=dict,
        description="environment variables whose values are in Secrets Manager or Parameter Store, by ARN",
        examples=[{"HF_TOKEN": "arn:aws:secretsmanager:eu-central-1:123456789012:secret:hf"}],
    )


class GcpBatchOptions(ServiceOptions):
    """Of the Job of Google Cloud Batch."""

    project: str | None = Field(
        default=None, description="project of the job; must be given", examples=["my-project"]
    )
    location: str | None = Field(
        default=None, description="region of the job; must be given", examples=["europe-west4"]
    )
    machine_type: str | None = Field(
        default=None, description="of the workers' machines; null: by cpus", examples=["g2-standard-8"]
    )
    accelerator: str | None = Field(
        default=None,
        description="type of GPU, such as nvidia-l4; null: the machine type's own",
        examples=["nvidia-l4"],
    )
    service_account: str | None = Field(
        default=None,
        description="email of the account by which workers reach stores",
        examples=["batchinfer@my-project.iam.gserviceaccount.com"],
    )
    boot_disk_gib: StrictInt | None = Field(
        default=None, ge=10, description="size of the boot disk", examples=[100]
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="environment of the workers", examples=[{"HF_HOME": "/cache"}]
    )
    secrets: dict[str, str] = Field(
        default_factory=dict,
        description="environment variables whose values are in Secret Manager, by resource name",
        examples=[{"HF_TOKEN": "projects/my-project/secrets/hf/versions/1"}],
    )


class RayOptions(ServiceOptions):
    """Of the cluster and its actors."""

    address: str | None = Field(
        default=None,
        description="HOST:PORT or ray://HOST:PORT of the cluster; null: RAY_ADDRESS, or this machine's",
        examples=["ray://head:10001"],
    )
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="custom resources that a worker takes, such as those of a node group",
        examples=[{"a100_node": 1.0}],
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="environment of the workers", examples=[{"HF_HOME": "/cache"}]
    )


class OptionsSpec(ServiceOptions):
    """Settings by backend, so that one spec runs on each."""

    slurm: SlurmOptions = SlurmOptions()
    kubernetes: KubernetesOptions = KubernetesOptions()
    aws_batch: AwsBatchOptions = AwsBatchOptions()
    gcp_batch: GcpBatchOptions = GcpBatchOptions()
    ray: RayOptions = RayOptions()
