"""``bench throughput`` on configurations alone, and the shares of a device that it reports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from batchinfer.engine.bench import shares_of
from batchinfer.engine.engine import Engine
from batchinfer.engine.roof import Limits
from batchinfer.engine.types import SamplingParams

SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "batchinfer", "bench", "throughput", *arguments],
        capture_output=True,
        text=True,
    )


def test_throughput_of_a_configuration_file(tmp_path: Path) -> None:
    (tmp_path / "small.json").write_text(json.dumps(SMALL))
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "four", "max_tokens": 7}\n' * 3)
    common = ["--dataset", str(tmp_path / "prompts.jsonl"), "--load-format", "dummy", "--json"]
    done = bench("--model", str(tmp_path / "small.json"), *common)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["prompt_tokens"], report["output_tokens"]) == (12, 21)
    assert report["output_tok_per_s"] > 0
    refused = bench("--model", "Qwen9", *common)
    assert refused.returncode == 78
    assert "Qwen3-0.6B" in refused.stderr and "Traceback" not in refused.stderr


def test_shares_of_a_run(tmp_path: Path) -> None:
    """A run of exactly the roof's time has a share of one, and twice the time half of it."""
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    limits = Limits(1e12, 1e12)
    with Engine(str(tmp_path), load_format="dummy", device="cpu", dtype="fp32", kv_bytes=1 << 20) as engine:
        completions = engine.generate(["abcd"] * 4, SamplingParams(max_tokens=10, ignore_eos=True))
        first = shares_of(engine, completions, 10, 1.0, limits)
        seconds = 40 / first.roof_tok_per_s
        at_roof = shares_of(engine, completions, 10, seconds, limits)
        slower = shares_of(engine, completions, 10, 2 * seconds, limits)
    assert at_roof.roof_share == pytest.approx(1.0, abs=1e-3)
    assert slower.roof_share == pytest.approx(0.5, abs=1e-3)
    assert at_roof.mfu + at_roof.mbu == pytest.approx(1.0, abs=0.01)
