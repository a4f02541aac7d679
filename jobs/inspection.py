"""What a job's model is, told from its files without loading its weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from batchinfer.engine.types import ModelError
from batchinfer.jobs.models import local_model
from batchinfer.jobs.prompts import Prompt
from batchinfer.jobs.spec import JobSpec
from batchinfer.jobs.types import JobError, RowError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class InspectedModel:
    """A model that can be loaded as the spec asks.

    ``path`` is what the engine takes, ``parameters`` those that every token passes, ``max_context`` the
    longest prompt and completion together in tokens.
    """

    path: str
    fingerprint: str
    parameters: int
    max_context: int
    _tokenizer: object

    def encode(self, prompts: Sequence[Prompt]) -> list[npt.NDArray[np.int32] | RowError]:
        """Each prompt's token ids (int32), or why it has none: messages that the template refuses."""
        import numpy as np

        from batchinfer.engine.tokenizer import Tokenizer

        tokenizer = self._tokenizer
        assert isinstance(tokenizer, Tokenizer)
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        encoded = iter(tokenizer.encode_batch(texts) if texts else ())
        found: list[npt.NDArray[np.int32] | RowError] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                found.append(np.array(next(encoded), np.int32))
                continue
            messages = [part for part in prompt if not isinstance(part, int)]
            if not messages:
                found.append(np.array(prompt, np.int32))  # token ids
                continue
            try:
                found.append(np.array(tokenizer.apply_chat_template(messages), np.int32))
            except ValueError as error:
                found.append(RowError("chat_template", str(error)))
        return found


def inspect_model(spec: JobSpec) -> InspectedModel:
    """Find the model, fetching it where it is in object storage, and check that an engine can load it.

    Raises ModelError for no model, no weights, formats that run code, and architectures that are not
    supported; JobError where the spec asks of it what it can't do; StorageError where a store refuses.
    """
    source = local_model(spec.model.source, spec.storage_options())
    from batchinfer.engine.models.registry import decoder_config
    from batchinfer.engine.tokenizer import load_tokenizer
    from batchinfer.engine.weights import find_model, fingerprint

    try:
        files = find_model(source)
        config = decoder_config(source, files.config)
        checkpoint = files.checkpoint("auto")
        tokenizer = load_tokenizer(files, config.vocab_size)
    except ModelError as error:
        # A fetched copy lies in a cache; people know the model by the name in the spec.
        raise ModelError(str(error).replace(source, spec.model.source)) from error
    if not checkpoint.names:
        raise ModelError(f"The model {spec.model.source} holds no weights.")
    wanted = spec.model.max_context
    if wanted is not None and wanted > config.max_context:
        raise JobError(
            f"model.max_context is {wanted}, but the model {spec.model.source} takes at most "
            f"{config.max_context} tokens: lower it"
        )
    _check_formats(spec, config.num_kv_heads, config.head_size)
    return InspectedModel(
        path=source,
        fingerprint=fingerprint(files),
        parameters=config.layer_parameters + config.vocab_size * config.hidden_size,
        max_context=wanted or config.max_context,
        _tokenizer=tokenizer,
    )


def token_decoder(spec: JobSpec) -> tuple[Callable[[int], bytes], frozenset[int]]:
    """What each token of the spec's model stands for, in bytes, and the tokens that end an answer.

    Raises ModelError where the model is no longer there, and StorageError where a store refuses.
    """
    source = local_model(spec.model.source, spec.storage_options())
    from batchinfer.engine.models.registry import decoder_config
    from batchinfer.engine.tokenizer import load_tokenizer
    from batchinfer.engine.weights import find_model

    files = find_model(source)
    tokenizer = load_tokenizer(files, decoder_config(source, files.config).vocab_size)
    return tokenizer.token_bytes, tokenizer.eos_token_ids


def _check_formats(spec: JobSpec, num_kv_heads: int, head_size: int) -> None:
    """Refuse a quantization or a KV dtype that the workers can't do.

    Those of the local backend run on this machine, so here it is tried; of others it's known whether they
    have GPUs.
    """
    if spec.workers.backend != "local":
        _check_elsewhere(spec)
        return
    if spec.model.quantize is None and spec.model.kv_dtype in ("auto", "bf16"):
        return
    import torch

    from batchinfer.kernels.ops import KernelsUnavailable, KVSpec, operators_for

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[spec.model.dtype]
    stored = {"auto": dtype, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}
    device = torch.device("cuda" if spec.workers.gpus and torch.cuda.is_available() else "cpu")
    try:
        operators = operators_for(device, "auto")
    except (ValueError, KernelsUnavailable) as error:
        raise JobError(str(error)) from error
    try:
        operators.pack_linear(torch.zeros(64, 64, dtype=dtype, device=device), None, spec.model.quantize)
    except ValueError as error:
        raise JobError(
            f"model.quantize is {spec.model.quantize!r}, but here it can't be: {error}"
        ) from error
    try:
        operators.allocate_kv(KVSpec(1, num_kv_heads, head_size, stored[spec.model.kv_dtype]), 1, device)
    except ValueError as error:
        raise JobError(
            f"model.kv_dtype is {spec.model.kv_dtype!r}, but here it can't be: {error}"
        ) from error


def _check_elsewhere(spec: JobSpec) -> None:
    """Refuse what no worker with (or without) GPUs can do, wherever it runs."""
    gpus, quantize, kv_dtype = spec.workers.gpus, spec.model.quantize, spec.model.kv_dtype
    if gpus and kv_dtype == "int8":
        raise JobError(
            f"model.kv_dtype is 'int8', which CPUs have and GPUs don't, but workers.gpus is {gpus}: "
            "choose auto, bf16 or fp8"
        )
    if not gpus and kv_dtype == "fp8":
        raise JobError(
            "model.kv_dtype is 'fp8', which GPUs have and CPUs don't, but workers.gpus is 0: "
            "choose auto, bf16 or int8"
        )
    if not gpus and quantize in ("int4", "fp8"):
        raise JobError(
            f"model.quantize is {quantize!r}, which GPUs have and CPUs don't, but workers.gpus is 0: "
            "choose int8 or leave it out"
        )
