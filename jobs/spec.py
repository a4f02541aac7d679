"""The job spec: what to run, as one frozen value that is checked when it is made."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from batchinfer.engine.types import SamplingParams
from batchinfer.jobs.backends.options import OptionsSpec
from batchinfer.jobs.spec_errors import sentence
from batchinfer.jobs.types import JobError

_CREDENTIAL = re.compile(
    r"(^|_)(key_id|secret|password|passwd|token|credentials?|connection_string|sas|"
    r"(access|account|api|private|secret|shared)_key)$|^(key|secret_access_key)$"
)
_URI_WITH_PASSWORD = re.compile(r"^[a-z][a-z0-9+.-]*://[^/@]*:[^/@]*@", re.IGNORECASE)
_SECRET_VALUE = re.compile(
    r"(?<![A-Za-z0-9])(AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])|-----BEGIN [A-Z ]*PRIVATE KEY|"
    r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{30,}|[a-z][a-z0-9+.-]*://[^/@\s]*:[^/@\s]*@"
)
_ASSIGNMENT = re.compile(r"(?:^|[\s;])([A-Za-z_][A-Za-z0-9_]*)=[\"']?(?![\"'$\s])\S")
_SIZE = re.compile(r"^\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?)(i?)B?\s*$", re.IGNORECASE)


def _error(message: str, **context: Any) -> PydanticCustomError:
    """An error whose message goes on after the field's path; ``field`` extends that path."""
    return PydanticCustomError("rule", "{message}", {"message": message, **context})


def looks_like_credential(key: str) -> bool:
    """Whether a key's name says that its value is a secret: ``aws_secret_access_key``, ``apiToken``."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).replace("-", "_").lower()
    return _CREDENTIAL.search(words) is not None


def _refuse_credentials(value: Any, path: tuple[str, ...] = ()) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if looks_like_credential(str(key)):
                raise _error(
                    "looks like a credential, and a job's spec is stored beside its output: remove it and "
                    "set it in the environment of the workers, or give them a role",
                    field=".".join((*path, str(key))),
                )
            _refuse_credentials(inner, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for inner in value:
            _refuse_credentials(inner, path)
    elif isinstance(value, str) and (
        _SECRET_VALUE.search(value) or any(map(looks_like_credential, _ASSIGNMENT.findall(value)))
    ):
        raise _error(
            "holds a credential, and a job's spec is stored beside its output: remove it and set it in the "
            "environment of the workers, or give them a role",
            field=".".join(path),
        )


def _checked_uri(uri: str) -> str:
    if not uri.strip():
        raise _error("is empty, but it must be a path or a URI such as s3://bucket/folder/")
    if _URI_WITH_PASSWORD.match(uri):
        raise _error(
            "holds a credential, and a job's spec is stored beside its output: take it out of the URI and "
            "set it in the environment of the workers"
        )
    return uri


def _without_credentials(value: Any) -> Any:
    _refuse_credentials(value)
    return value


def _options_without_credentials(value: Any) -> Any:
    """Options may name variables whose values a service keeps as secrets, but not hold these values."""
    if not isinstance(value, Mapping):
        return value
    for backend, options in value.items():
        if isinstance(options, Mapping) and isinstance(options.get("secrets"), Mapping):
            for name, reference in options["secrets"].items():
                if not str(reference).startswith(("arn:", "projects/")):
                    raise _error(
                        "is no address of a secret: give where the service keeps it (arn:… or projects/…), "
                        "never its value",
                        field=f"{backend}.secrets.{name}",
                    )
            options = {key: inner for key, inner in options.items() if key != "secrets"}
        if isinstance(options, Mapping):  # what tolerations call a key is the name of a taint
            options = {key: inner for key, inner in options.items() if key != "tolerations"}
        _refuse_credentials(options, (str(backend),))
    return value


def _source_as_model(value: Any) -> Any:
    return {"source": value} if isinstance(value, str) else value


def _one_as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _size_in_bytes(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    match = _SIZE.match(value)
    if match is None:
        raise _error(f"is {value!r}, but it must be a size such as 16GiB or 500MB")
    number, prefix, binary = match.groups()
    return int(
        float(number) * (1024 if binary else 1000) ** ("KMGT".index(prefix.upper()) + 1 if prefix else 0)
    )


Uri = Annotated[str, AfterValidator(_checked_uri)]
Positive = Annotated[StrictInt, Field(ge=1)]
Bytes = Annotated[Positive, BeforeValidator(_size_in_bytes, json_schema_input_type=int | str)]


class Part(BaseModel):
    """A part of a job spec: frozen, and strict about keys and types."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelSpec(Part):
    """The model that answers, and in which precision."""

    source: Uri = Field(
        description="a Hugging Face id, a folder, a folder in object storage, a GGUF file or package://NAME/FILE"
    )
    dtype: Literal["bf16", "fp16", "fp32"] = Field(default="bf16", description="of weights and activations")
    quantize: Literal["int8", "int4", "fp8"] | None = Field(
        default=None, description="quantize the weights at load"
    )
    max_context: Positive | None = Field(
        default=None,
        description="longest prompt and completion together, in tokens; null: the model's own limit",
    )
    kv_dtype: Literal["auto", "bf16", "int8", "fp8"] = Field(default="auto", description="of the KV cache")


class InputSpec(Part):
    """The data set: each row becomes one prompt."""

    uri: Annotated[
        tuple[Uri, ...],
        Field(min_length=1),
        BeforeValidator(_one_as_list, json_schema_input_type=str | list[str]),
    ] = Field(description="a file, a folder, a glob, or a list of them")
    format: Literal["auto", "parquet", "jsonl", "csv", "openai"] = Field(
        default="auto",
        description="auto: by the file names; openai: batch files, each line with its prompt and sampling",
    )
    delimiter: str | None = Field(
        default=None,
        pattern=r'^[^"\r\n]$',
        description="what separates the fields of CSV; null: found: a comma, semicolon, tab or bar",
        examples=[";"],
    )
    columns: tuple[str, ...] | None = Field(default=None, description="columns to pass through; null: all")


class MessageSpec(Part):
    """One chat message; its content is a template."""

    role: str = Field(
        min_length=1, description="system, user, assistant, or what the model's template knows"
    )
    content: str = Field(description="a Jinja2 template over the row")


class SamplingSpec(Part):
    """How completions are chosen and when they end; the fields are those of SamplingParams."""

    max_tokens: StrictInt | None = Field(
        default=256, description="tokens to generate at most; null: up to max_context"
    )
    min_tokens: StrictInt = Field(
        default=0, description="tokens before a stop string or the end of the sequence counts"
    )
    temperature: StrictFloat = Field(default=0.0, description="0 is greedy")
    top_k: StrictInt = Field(default=0, description="0: off")
    top_p: StrictFloat = Field(default=1.0, description="1: off")
    min_p: StrictFloat = Field(default=0.0, description="0: off")
    repetition_penalty: StrictFloat = Field(default=1.0, description="1: off; over prompt and completion")
    presence_penalty: StrictFloat = Field(default=0.0, description="0: off; over the completion")
    frequency_penalty: StrictFloat = Field(default=0.0, description="0: off; over the completion")
    logit_bias: dict[int, StrictFloat] = Field(
        default_factory=dict, description="added to logits, by token id"
    )
    seed: StrictInt = Field(default=0, description="of the sampling noise, with the row's position")
    stop: Annotated[
        tuple[str, ...], BeforeValidator(_one_as_list, json_schema_input_type=str | list[str])
    ] = Field(default=(), description="strings that end a completion")
    stop_token_ids: tuple[StrictInt, ...] = Field(default=(), description="token ids that end a completion")
    include_stop: StrictBool = Field(default=False, description="keep the stop string in the completion")
    ignore_eos: StrictBool = Field(default=False, description="go on after the end-of-sequence token")
    n: StrictInt = Field(default=1, description="samples of each row")
    logprobs: StrictInt | None = Field(
        default=None, description="0: of the sampled tokens; k: and of the k most likely"
    )
    prompt_logprobs: StrictInt | None = Field(default=None, description="the same for the prompt's tokens")

    @model_validator(mode="after")
    def _in_range(self) -> Self:
        try:
            SamplingParams(**dict(self))
        except ValueError as error:
            field, _, rest = str(error).partition(" ")
            raise _error(rest, field=field) from None
        return self


class OutputSpec(Part):
    """Where the answers go; the URI is the job's address from then on."""

    uri: Uri = Field(description="a folder that no other job uses")
    tokens: StrictBool = Field(
        default=False, description="add token ids, log-probabilities and costs, one entry a token"
    )


class ShardsSpec(Part):
    """How the input is cut."""

    rows: Positive | None = Field(default=None, description="rows of a shard; null: a few minutes of work")


class WorkersSpec(Part):
    """Who does the work; may change between submits of one job."""

    count: Positive = Field(default=1, description="workers to start")
    backend: Literal["local", "slurm", "kubernetes", "aws_batch", "gcp_batch"] = Field(
        default="local", description="who starts them"
    )
    gpus: StrictInt = Field(default=1, ge=0, description="of one worker; without any it runs on the CPU")
    cpus: StrictFloat | None = Field(default=None, gt=0, description="of one worker")
    memory: Bytes | None = Field(
        default=None,
        description="of one worker, such as 16GiB; local workers share out this machine's",
    )
    image: str | None = Field(
        default=None, description="the container image of a worker, for backends that run containers"
    )
    spot: StrictBool = Field(
        default=True, description="use interruptible machines where the backend has them"
    )
    max_attempts: Positive = Field(default=5, description="starts of one worker before it is given up")
    options: Annotated[OptionsSpec, BeforeValidator(_options_without_credentials)] = Field(
        default=OptionsSpec(), description="further settings, by backend"
    )


class PriceSpec(Part):
    """What a worker costs."""

    usd_per_hour: StrictFloat | None = Field(
        default=None, ge=0, description="of one worker, in USD; null: costs stay empty"
    )


class BudgetSpec(Part):
    """What a job may cost at most."""

    max_usd: StrictFloat | None = Field(default=None, gt=0, description="in USD; null: no limit")
    max_worker_hours: StrictFloat | None = Field(default=None, gt=0, description="null: no limit")


class FailuresSpec(Part):
    """When failing rows stop the job."""

    max_share: StrictFloat = Field(
        default=0.05, ge=0, le=1, description="of rows failed, above which the job stops"
    )
    after_rows: Positive = Field(default=200, description="rows that must be done before max_share counts")


class StoreSpec(Part):
    """Where a store is; credentials come from the environment or the role."""

    endpoint_url: str | None = Field(default=None, description="of a store that speaks S3")
    region: str | None = None


PromptField = Literal["prompt", "messages", "prompt_column", "messages_column"]
PROMPT_FIELDS: tuple[PromptField, ...] = ("prompt", "messages", "prompt_column", "messages_column")


def _exactly_one_prompt(schema: dict[str, Any]) -> None:
    prompts: list[dict[str, Any]] = [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in PROMPT_FIELDS
    ]
    batch_file = {
        "properties": {"input": {"required": ["format"], "properties": {"format": {"const": "openai"}}}}
    }
    schema["if"] = batch_file
    schema["then"] = {"not": {"anyOf": prompts}}
    schema["else"] = {"oneOf": prompts}


class JobSpec(Part):
    """A job: a model, a data set, a prompt made of each row, and where the answers go."""

    model_config = ConfigDict(json_schema_extra=_exactly_one_prompt)

    name: str | None = Field(default=None, description="for people")
    model: Annotated[
        ModelSpec, BeforeValidator(_source_as_model, json_schema_input_type=str | ModelSpec)
    ] = Field(description="the model, or just its source as a string")
    input: InputSpec
    prompt: str | None = Field(default=None, description="a Jinja2 template over the row")
    messages: Annotated[tuple[MessageSpec, ...], Field(min_length=1)] | None = Field(
        default=None, description="chat messages whose contents are Jinja2 templates"
    )
    prompt_column: str | None = Field(default=None, description="the column that holds the prompt")
    messages_column: str | None = Field(
        default=None,
        description="the column that holds chat messages: a list of {role, content}, or it as JSON",
    )
    sampling: SamplingSpec = SamplingSpec()
    output: OutputSpec
    shards: ShardsSpec = ShardsSpec()
    workers: WorkersSpec = WorkersSpec()
    price: PriceSpec = PriceSpec()
    budget: BudgetSpec = BudgetSpec()
    failures: FailuresSpec = FailuresSpec()
    storage: Annotated[dict[str, StoreSpec], BeforeValidator(_without_credentials)] = Field(
        default_factory=dict, description="settings of stores, by URI prefix; never credentials"
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [name for name in PROMPT_FIELDS if getattr(self, name) is not None]
        if self.input.format == "openai":
            own = [*given, *["sampling"] * (self.sampling != SamplingSpec())]
            if own:
                raise _error(
                    "can't be given beside input.format openai, as every line of a batch file carries its "
                    "own: remove it",
                    field=own[0],
                )
        elif len(given) != 1:
            found = " and ".join(given) if given else "none of them"
            raise _error(
                f"exactly one of {', '.join(PROMPT_FIELDS)} says what to ask the model, but there is "
                f"{found}"
            )
        if self.budget.max_usd is not None and self.price.usd_per_hour is None:
            raise _error(
                "needs price.usd_per_hour, to know what a worker costs: add it, or set "
                "budget.max_worker_hours instead",
                field="budget.max_usd",
            )
        for prefix in self.storage:
            if "://" not in prefix:
                raise _error(
                    "is no URI prefix: write the key as the beginning of a URI, such as s3://bucket/",
                    field=f"storage.{prefix}",
                )
        return self

    def storage_options(self) -> dict[str, dict[str, Any]]:
        """The settings of stores by URI prefix, as ``connectors.storage`` takes them."""
        return {prefix: store.model_dump() for prefix, store in self.storage.items()}

    def sampling_params(self) -> SamplingParams:
        """The sampling of every row; with ``output.tokens`` the sampled tokens' log-probabilities too."""
        fields = dict(self.sampling)
        if self.output.tokens and fields["logprobs"] is None:
            fields["logprobs"] = 0
        return SamplingParams(**fields)


def parse_spec(data: Any, where: str = "the job spec") -> JobSpec:
    """The spec that ``data`` (what YAML or JSON gives) describes; raises JobError in one sentence."""
    if not isinstance(data, Mapping):
        raise JobError(f"{where} must hold a mapping of fields such as model, input, prompt and output")
    try:
        return JobSpec.model_validate(data)
    except ValidationError as error:
        raise JobError(f"{where}: {sentence(error, JobSpec)}") from None
