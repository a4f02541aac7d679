"""A whole job, from a bucket and into it, beside the bare engine on the same prompts.

    python benchmarks/whole_job.py --model FOLDER --rows 2048 --tokens 64 mixed.jsonl

The prompts of the data set, repeated with a number in front, are written to an S3 server on loopback as
Parquet; one worker answers them into Parquet there. Then the engine alone, in a process of its own with the
same settings, answers them once more. The start of both is left out of the ratio and shown; so are the CPU
seconds of the S3 server, which takes them from the same cores.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from compare import Runner, machine_cpu_seconds

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from s3_server import any_server  # the same server as the demo's

JOB_URI = "s3://bench/answers"


def make_prompts(dataset: Path, rows: int) -> list[str]:
    """``rows`` prompts, those of the data set in turn; from the second round on no two are the same."""
    given = [json.loads(line)["prompt"] for line in dataset.read_text().splitlines()]
    return [f"{i // len(given)}. {given[i % len(given)]}" for i in range(rows)]


def child_cpu_seconds() -> float:
    """CPU seconds of this process's children that run now: the S3 server, while nothing else does."""
    own, ticks = str(os.getpid()), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[1] == own:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def ended_cpu_seconds() -> float:
    """CPU seconds of this process's children that have ended, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def adopt_orphans() -> None:
    """From now on wait for processes whose parents have ended before them, as a worker before its engine:
    only of those that were waited for the CPU seconds are counted."""
    prctl_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(prctl_set_child_subreaper, 1, 0, 0, 0)


def bury_orphans(seconds: float) -> None:
    """Wait for those that end within this time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not os.waitpid(-1, os.WNOHANG)[0]:
            time.sleep(0.05)


def run_job(prompts: list[str], tokens: int, model: str, folder: Path) -> dict[str, float]:
    """Answer ``prompts`` by a job with one worker: seconds of its bill and of the server's CPU, and the
    share of the machine that others took meanwhile."""
    from batchinfer.connectors.storage import open_store
    from batchinfer.jobs.folder import JobFolder
    from batchinfer.jobs.status import StatusReader

    table, spec = folder / "prompts.parquet", folder / "job.json"
    pq.write_table(pa.table({"prompt": prompts}), table)
    document = {
        "name": "whole-job",
        "model": {"source": model, "dtype": "bf16", "max_context": 2048},
        "input": {"uri": "s3://bench/prompts/*.parquet"},
        "prompt_column": "prompt",
        "sampling": {"max_tokens": tokens, "ignore_eos": True},
        "output": {"uri": JOB_URI},
        "workers": {"count": 1, "backend": "local"},
        "price": {"usd_per_hour": 1.0},
    }
    spec.write_text(json.dumps(document))
    with any_server(folder / "s3") as server:
        os.environ |= server.environment
        server.create_bucket("bench")
        open_store("s3://bench/prompts").put(table.name, table)
        before, begun = child_cpu_seconds(), time.perf_counter()
        others = machine_cpu_seconds() - ended_cpu_seconds()
        subprocess.run(
            [sys.executable, "-P", "-m", "batchinfer", "submit", str(spec), "--wait"], check=True
        )
        took = time.perf_counter() - begun
        bury_orphans(3.0)
        cpu = child_cpu_seconds() - before
        others = machine_cpu_seconds() - ended_cpu_seconds() - cpu - others
        settlement = StatusReader(JobFolder(open_store(JOB_URI))).settlement()
    bill = settlement.bill
    seconds = {
        name: getattr(bill, name) / 1e9 for name in ("total", "startup", "rows", "idle", "storage", "waste")
    }
    share = max(0.0, others) / (took * (os.cpu_count() or 1))
    return seconds | {"server_cpu": cpu, "tokens": settlement.completion_tokens, "others": share}


def main() -> None:
    """Run the job, then the engine, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=64, help="generated for each prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    # What a worker's processes are given, for both.
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    adopt_orphans()
    prompts = make_prompts(options.dataset, options.rows)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = run_job(prompts, options.tokens, options.model, folder)
        lines = (json.dumps({"prompt": prompt, "max_tokens": options.tokens}) for prompt in prompts)
        bare_rows = folder / "bare.jsonl"
        bare_rows.write_text("\n".join(lines) + "\n")
        settings = json.dumps({"dtype": "bf16", "max_context": 2048})
        engine = Runner("batchinfer", sys.executable, options.model, settings, options.threads)
        bare = engine.run(bare_rows)
        engine.close()
    made = sum(len(row) for row in bare["tokens"])
    if made != job["tokens"]:
        raise SystemExit(f"The job made {job['tokens']:.0f} tokens, the engine {made}: no comparison.")
    worked = job["total"] - job["startup"]
    print(f"| {options.rows} rows, {made} tokens | whole job | bare engine |")
    print("|---|---|---|")
    print(f"| start-up, s | {job['startup']:.1f} | {engine.load_seconds:.1f} |")
    print(f"| work, s | {worked:.1f} | {bare['seconds']:.1f} |")
    parts = ", ".join(f"{part} {job[part]:.1f}" for part in ("rows", "idle", "storage", "waste"))
    print(f"| of it, s | {parts} | |")
    print(f"| output tok/s | {made / worked:.1f} | {made / bare['seconds']:.1f} |")
    print(f"| CPU seconds of the S3 server | {job['server_cpu']:.1f} | |")
    print(f"| taken by other programs | {job['others']:.0%} | {bare['others']:.0%} |")
    print(f"| ratio | {bare['seconds'] / worked:.3f} | |")


if __name__ == "__main__":
    main()
