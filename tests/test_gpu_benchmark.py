"""The GPU benchmark: its workloads, its table, and what it says where there is no GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

PATH = Path(__file__).parent.parent / "benchmarks" / "gpu" / "throughput.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_throughput", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_without_a_gpu_it_says_so(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert benchmark.main([]) == 78
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == "There is no NVIDIA GPU here, so nothing is measured.\n"


def test_workloads_have_the_lengths_that_they_name(benchmark: ModuleType) -> None:
    for workload in benchmark.WORKLOADS.values():
        prompts, sampling = benchmark.prompts_of(workload, 1000, seed=2)
        assert len(prompts) == workload.requests == len(sampling)
        assert all(workload.prompt[0] <= len(p) <= workload.prompt[1] for p in prompts)
        assert all(workload.output[0] <= s.max_tokens <= workload.output[1] for s in sampling)
        assert len({p[: workload.shared] for p in prompts}) == 1
        assert len({p[: workload.shared + 8] for p in prompts}) == len(prompts)
        assert prompts == benchmark.prompts_of(workload, 1000, seed=2)[0]


def test_one_workload_from_engine_to_table(
    benchmark: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU, with a configuration of toy size."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 320,
        "max_position_embeddings": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    workload = benchmark.Workload(str(tmp_path), None, 3, (70, 75), (4, 6), shared=64)
    row = benchmark.measure("toy", workload, "cpu")
    assert row.requests == 3 and 210 <= row.prompt_tokens <= 225 and 12 <= row.output_tokens <= 18
    assert row.cached_tokens == 2 * 64
    assert 0.0 < row.roof_share < 1.0 and row.mfu > 0.0 and row.mbu > 0.0
    line = benchmark.table([row]).splitlines()[-1]
    assert line.startswith(f"| toy | {row.prompt_tokens} | 128 | {row.output_tokens} |")
