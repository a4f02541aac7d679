"""The KV cache is sized so that no step can want more memory than there is, and none lies idle."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fake_runner import FakeTokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from batchinfer.engine.config import EngineConfig
from batchinfer.engine.engine import Engine
from batchinfer.engine.models.decoder import Decoder, DecoderConfig
from batchinfer.engine.models.layers import LayerConfig, RopeConfig
from batchinfer.engine.peak import step_bytes
from batchinfer.engine.runner import TorchRunner
from batchinfer.engine.types import SamplingParams, StepCosts
from batchinfer.engine.weights import DummyCheckpoint, WeightReader
from batchinfer.kernels.reference import ReferenceOperators

CPU = torch.device("cpu")
CONTEXT, SEQUENCES, TOKENS = 1100, 24, 40
CONFIG = DecoderConfig(
    architecture="LlamaForCausalLM",
    vocab_size=FakeTokenizer.vocab_size,
    hidden_size=16,
    intermediate_size=24,
    num_heads=4,
    num_kv_heads=2,
    head_size=4,
    layers=(LayerConfig(0, RopeConfig(100.0, 4)),) * 2,
    max_context=CONTEXT,
    rms_eps=1e-5,
    activation="silu",
    attention_scale=0.5,
)


class Device(TorchDispatchMode):
    """A device's memory: counts the bytes of all tensors made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._counting = True
        self._views: Counter[int] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), named: Any = None) -> Any:
        out = function(*args, **(named or {}))
        if self._counting:
            for tensor in tree_leaves(out):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                    self._count(tensor)
        return out

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        self._views[address] += 1
        if self._views[address] == 1:
            self.held += size
            self.most = max(self.most, self.held)
        weakref.finalize(tensor, self._release, address, size)

    def _release(self, address: int, size: int) -> None:
        self._views[address] -= 1
        if not self._views[address]:
            self.held -= size

    def peak(self, work: Callable[[], None]) -> int:
        before, self.most = self.held, self.held
        work()
        return self.most - before

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        self._counting = False
        yield
        self._counting = True


class Pool:
    """Records as a GPU does: what the work needs is taken once, stays taken, and is used by each replay."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._pool = torch.empty(0, dtype=torch.uint8)

    def __call__(self, work: Callable[[], None]) -> Callable[[], None]:
        needed = self._device.peak(work)
        if needed > len(self._pool):
            self._pool = torch.empty(needed, dtype=torch.uint8)

        def replay() -> None:
            with self._device.uncounted():
                work()

        return replay


class SplitOperators(ReferenceOperators):
    """With the partial sums that decodes of long contexts have on a GPU."""

    def attention(self, q, kv, layer, batch, *rest):  # type: ignore[no-untyped-def]
        splits = -(-batch.max_context // 64)
        partial = torch.empty(len(batch.context_lens), q.shape[1], splits, q.shape[2])
        out = super().attention(q, kv, layer, batch, *rest)
        del partial
        return out


def run_all(runner: TorchRunner) -> None:
    """Every kind of request at once, up to the end of the context."""
    everything = SamplingParams(
        max_tokens=9,
        temperature=1.0,
        top_k=4,
        top_p=0.8,
        repetition_penalty=1.2,
        frequency_penalty=0.4,
        logit_bias={3: 2.0},
        logprobs=20,
        prompt_logprobs=20,
        ignore_eos=True,
    )
    plain = SamplingParams(max_tokens=9, ignore_eos=True)
    lengths = [CONTEXT - 9] * 2 + [20 + i for i in range(SEQUENCES - 2)]
    prompts = [tuple(1 + (i + j) % 18 for j in range(length)) for i, length in enumerate(lengths)]
    settings = EngineConfig(model="m", max_sequences=SEQUENCES, max_batch_tokens=TOKENS)
    with Engine.from_parts(settings, runner, FakeTokenizer()) as engine:
        for sampling in ([everything] * len(prompts), [plain] * len(prompts)):
            engine.generate(prompts, sampling)


@pytest.mark.parametrize("recorded", [True, False])
def test_no_step_wants_more_than_there_is(recorded: bool) -> None:
    ops = SplitOperators()
    decoder = Decoder(CONFIG, WeightReader("m", DummyCheckpoint(), torch.float32, CPU), ops, CONTEXT)
    spec = CONFIG.kv_spec(torch.float32)
    with Device() as device:
        needed = step_bytes(
            decoder,
            ops,
            spec,
            device,
            max_sequences=SEQUENCES,
            max_batch_tokens=TOKENS,
            max_context=CONTEXT,
            recorded=recorded,
        )
        assert device.held == 0
        blocks = 2 * -(-CONTEXT // ops.block_size(spec)) + 60
        total = needed + blocks * ops.block_bytes(spec)
        device.most = 0
        kv = ops.allocate_kv(spec, blocks, CPU)
        runner = TorchRunner(
            decoder,
            ops,
            kv,
            max_rows=SEQUENCES,
            max_context=CONTEXT,
            eos_token_ids=(),
            costs=StepCosts(1, 1, 1, 1, 1, 1, 1),
            recorder=Pool(device) if recorded else None,
        )
        after_recording = device.held
        device.most = 0
        run_all(runner)
    assert after_recording < device.most <= total
    # Of what steps were given, most was in use at once.
    assert device.most - blocks * ops.block_bytes(spec) > 0.7 * needed
