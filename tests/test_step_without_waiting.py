"""No step makes the host wait for the device: whatever would fails where tensors hold no numbers.

The step runs on tensors of the meta device, where ``item``, ``nonzero`` and boolean masks have no answer
and every copy between host and device is seen but those by the two functions that queue them.
Triton's kernels are not launched: what they compute is tested elsewhere.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton")

import triton

from batchinfer.engine import batch, graphs, runner, sampler
from batchinfer.engine.models.decoder import Decoder, DecoderConfig
from batchinfer.engine.models.layers import LayerConfig, RopeConfig
from batchinfer.engine.runner import TorchRunner
from batchinfer.engine.types import NewRow, SamplingParams, StepCosts, StepPlan
from batchinfer.kernels.triton import attend, operators, sharing, weight_only
from batchinfer.kernels.triton.operators import TritonOperators

META = torch.device("meta")
aten = torch.ops.aten


class Waited(AssertionError):
    """A step did what a GPU's host waits for."""


class NoWaiting(TorchDispatchMode):
    """Refuses what a GPU's host waits for, once it is ``strict``: tensors made before are known then."""

    strict = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), named: Any = None) -> Any:
        named = named or {}
        if self.strict:
            self._check(function, args, named)
        out = function(*args, **named)
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                leaf.made = True  # type: ignore[attr-defined]
        return out

    def _check(self, function: Any, args: Any, named: Any) -> None:
        leaves = tree_leaves((args, named))
        # A host's number of no dimension is handed over with the launch.
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.ndim]
        devices = {tensor.device.type for tensor in tensors}
        devices |= {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}
        if len(devices) > 1:
            raise Waited(f"{function} of both host and device")
        if any(tensor.device == META and not hasattr(tensor, "made") for tensor in tensors):
            raise Waited(f"{function} of a tensor made from a list")
        kind = function.overloadpacket
        if kind in (aten.nonzero, aten.item, aten.is_nonzero, aten.masked_select):
            raise Waited(str(function))
        indexing = kind in (aten.index, aten.index_put_, aten.index_put)
        if indexing and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise Waited(f"{function} by a mask")


CONFIG = DecoderConfig(
    architecture="Qwen3ForCausalLM",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_heads=4,
    num_kv_heads=2,
    head_size=16,
    layers=(LayerConfig(0, RopeConfig(100.0, 16)), LayerConfig(24, RopeConfig(100.0, 16))),
    max_context=1200,
    rms_eps=1e-5,
    activation="silu",
    attention_scale=0.25,
    embedding_scale=2.0,
    final_soft_cap=10.0,
    qk_norms=True,
)


class Weights:
    """Of no content."""

    def weight(self, names: list[str], sizes: list[int], columns: int | None) -> torch.Tensor:
        shape = (sum(sizes),) if columns is None else (sum(sizes), columns)
        return torch.empty(shape, dtype=torch.bfloat16, device=META)

    def norm(self, name: str, size: int, offset: float) -> torch.Tensor:
        return torch.empty(size, device=META)


class Launch:
    """Stands for a kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **named: None


@pytest.fixture
def uploads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers that ``to_device`` was given, call by call."""
    seen: list[int] = []

    def to_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
        seen.append(values.size)
        host = torch.from_numpy(np.ascontiguousarray(values))
        return torch.empty(host.shape, dtype=host.dtype, device=device)

    for module in (batch, graphs, runner, sampler):
        monkeypatch.setattr(module, "to_device", to_device)
    monkeypatch.setattr(
        runner.TorchRunner, "_to_host", lambda self, tensor: torch.empty(tensor.shape, dtype=tensor.dtype)
    )
    for module in (attend, operators, sharing, weight_only):
        for name, value in list(vars(module).items()):
            if isinstance(value, triton.JITFunction) and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Launch())
    return seen


KINDS = [
    SamplingParams(max_tokens=9),
    SamplingParams(max_tokens=9, temperature=1.0),
    SamplingParams(max_tokens=9, temperature=0.8, top_k=5, top_p=0.9, min_p=0.1),
    SamplingParams(max_tokens=9, repetition_penalty=1.2, presence_penalty=0.1, frequency_penalty=0.2),
    SamplingParams(max_tokens=9, min_tokens=4, logit_bias={3: 1.0, 9: -2.0}, stop_token_ids=(5,)),
    SamplingParams(max_tokens=9, logprobs=3, prompt_logprobs=2),
]


def make_runner(quantize: str | None = None, recorded: bool = False) -> TorchRunner:
    ops = TritonOperators((9, 0))
    decoder = Decoder(CONFIG, Weights(), ops, CONFIG.max_context, quantize)
    kv = ops.allocate_kv(CONFIG.kv_spec(torch.bfloat16), 50, META)
    return TorchRunner(
        decoder,
        ops,
        kv,
        max_rows=len(KINDS),
        max_context=CONFIG.max_context,
        eos_token_ids=(1,),
        costs=StepCosts(1, 1, 1, 1, 1, 1, 1),
        steps_in_flight=2,
        recorder=(lambda work: work) if recorded else None,
    )


def plan(index: int, count: int, start: int, new: bool) -> StepPlan:
    rows = np.arange(len(KINDS), dtype=np.int32)
    tokens = np.arange(1000, dtype=np.int32) % 60
    return StepPlan(
        index=index,
        rows=rows,
        num_tokens=np.full(len(rows), count, np.int32),
        starts=np.full(len(rows), start, np.int32),
        samples=np.ones(len(rows), np.bool_),
        new_rows=tuple(NewRow(int(r), tokens, 1000, KINDS[r], int(r), 0) for r in rows) if new else (),
        block_rows=rows,
        block_positions=rows * 0 + start // 32,
        block_ids=rows,
    )


@pytest.mark.parametrize("quantize", [None, "fp8", "int8", "int4"])
@pytest.mark.parametrize("recorded", [False, True])
def test_no_step_waits(uploads: list[int], quantize: str | None, recorded: bool) -> None:
    with NoWaiting():
        made = make_runner(quantize, recorded)
    steps = [plan(0, 990, 0, True), plan(1, 10, 990, False)]
    sent = []
    with NoWaiting() as watch:
        watch.strict = True
        for step in [*steps, *(plan(2 + i, 1, 1000 + i, False) for i in range(5))]:
            uploads.clear()
            made.launch(step)._outcome.result()
            sent.append(list(uploads))
    # While the same rows decode a step sends its plan, where tokens go, and no row's parameters: floats.
    assert sent[-1] == sent[-2] != sent[0]
    assert len(sent[-1]) <= 14


@pytest.mark.parametrize(
    "waiting",
    [
        lambda logits: logits[0, 0].item(),
        lambda logits: bool(logits[0, 0] > 0),
        lambda logits: logits[logits > 0],
        lambda logits: logits.nonzero(),
        lambda logits: logits.cpu(),
        lambda logits: torch.tensor([1, 2], device=META) + 1,
        lambda logits: logits * torch.tensor([2.0], device=META),
        lambda logits: logits[[0, 1]],
        lambda logits: logits[torch.tensor([0, 1])],
    ],
)
def test_what_waits_is_seen(uploads: list[int], waiting: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with NoWaiting():
        made = make_runner()
    whole = made._decoder.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        found = whole(hidden)
        waiting(found)
        return found

    monkeypatch.setattr(made._decoder, "logits", logits)
    with NoWaiting() as watch, pytest.raises(Waited):
        watch.strict = True
        made.launch(plan(0, 5, 0, True))._outcome.result()
