"""Our engine and a peer, in turn in one run: output tokens a second of each, and the ratio.

    python benchmarks/compare.py --model FOLDER --peer vllm --peer-python PEER_VENV/bin/python \\
        --runs 3 --threads 2 mixed.jsonl shared-prefix.jsonl

Both engines load once, each in a process of its own, and run every data set ``--runs`` times by turns, so
that whatever else the machine does meets both. A figure is the median; ``others`` is the share of the
machine that other processes took during a run, at its worst: where that is more than a few hundredths the
figures are not to be trusted. ``--peer batchinfer`` with ``--peer-settings`` compares two settings of ours.

A line of a Markdown table is printed on stdout as each data set is done, and ``--json FILE`` is written
anew then: what is measured is kept if the run is ended early, an unfinished data set with the turns it has.
LD_PRELOAD, by which some peers bring an allocator and an OpenMP runtime, is the peer's alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RUNNERS = Path(__file__).with_name("runners.py")


class Runner:
    """A loaded engine in its own process, idle between runs."""

    def __init__(self, name: str, python: str, model: str, settings: str, threads: int) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        if name == "batchinfer":
            environment.pop("LD_PRELOAD", None)
        command = [python, "-P", str(RUNNERS), name, model, settings]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.load_seconds: float = self._answer()["load_seconds"]

    def run(self, dataset: Path) -> dict[str, Any]:
        """Complete the data set; adds the share of the machine that others took meanwhile."""
        before, begun = _cpu_seconds(self._process.pid), time.perf_counter()
        assert self._process.stdin is not None
        print(dataset.resolve(), file=self._process.stdin, flush=True)
        answer = self._answer()
        after, took = _cpu_seconds(self._process.pid), time.perf_counter() - begun
        others = (after[0] - before[0]) - (after[1] - before[1])
        return answer | {"others": max(0.0, others) / (took * (os.cpu_count() or 1))}

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"A runner ended early, with exit status {self._process.wait()}.")
        answer: dict[str, Any] = json.loads(line)
        return answer


def machine_cpu_seconds() -> float:
    """CPU seconds since boot of the whole machine."""
    fields = [int(field) for field in Path("/proc/stat").read_text().split(maxsplit=9)[1:9]]
    return (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")


def _cpu_seconds(process: int) -> tuple[float, float]:
    """CPU seconds since boot of the whole machine, and of one process."""
    own = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return machine_cpu_seconds(), (int(own[11]) + int(own[12])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Measure, and print a line a data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("datasets", nargs="+", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--settings", default='{"dtype": "bf16"}', help="JSON, for our engine")
    parser.add_argument("--peer", choices=["vllm", "transformers", "batchinfer"], required=True)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-model", help="where the peer needs another form of the model")
    parser.add_argument("--peer-settings", default="{}", help="JSON, for the peer's engine")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="where to write all figures")
    options = parser.parse_args()
    peer_model = options.peer_model or options.model
    runners = {
        "ours": Runner("batchinfer", sys.executable, options.model, options.settings, options.threads),
        "peer": Runner(
            options.peer, options.peer_python, peer_model, options.peer_settings, options.threads
        ),
    }
    report: dict[str, Any] = {"peer": options.peer, "threads": options.threads, "datasets": {}}
    report["load_seconds"] = {side: runner.load_seconds for side, runner in runners.items()}
    print(f"| output tok/s, median of {options.runs} | ours | {options.peer} | ratio | others |")
    print("|---|---|---|---|---|", flush=True)
    try:
        for dataset in options.datasets:
            turns: list[dict[str, dict[str, Any]]] = []
            try:
                for _ in range(options.runs):
                    turn = {}
                    for side, runner in runners.items():
                        turn[side] = runner.run(dataset)
                        print(f"{dataset.stem}: {side} {_rate(turn[side]):.1f} tok/s", file=sys.stderr)
                    turns.append(turn)
            finally:
                if turns:
                    figures = report["datasets"][dataset.stem] = _figures(turns)
                    ours, peer = (figures["output_tok_per_s"][side] for side in ("ours", "peer"))
                    print(
                        f"| {dataset.stem} | {ours:.0f} | {peer:.0f} | {figures['ratio']:.2f} "
                        f"| {figures['others']:.0%} |",
                        flush=True,
                    )
                    if options.json:
                        options.json.write_text(json.dumps(report, indent=1))
    except KeyboardInterrupt:
        print("Ended early.", file=sys.stderr)
    for runner in runners.values():
        runner.close()


def _rate(result: dict[str, Any]) -> float:
    """Output tokens a second."""
    return sum(len(row) for row in result["tokens"]) / float(result["seconds"])


def _figures(turns: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Medians, their ratio and what they come from."""
    rates = {side: [_rate(turn[side]) for turn in turns] for side in ("ours", "peer")}
    median = {side: statistics.median(values) for side, values in rates.items()}
    return {
        "output_tok_per_s": {side: round(value, 1) for side, value in median.items()},
        "ratio": round(median["ours"] / median["peer"], 3),
        "runs": {side: [round(value, 1) for value in values] for side, values in rates.items()},
        "others": round(max(result["others"] for turn in turns for result in turn.values()), 3),
        "samples": {side: result["sample"] for side, result in turns[-1].items()},
    }


if __name__ == "__main__":
    main()
