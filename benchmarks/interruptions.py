"""What interruptions cost: tokens decoded again and time wasted, after nothing, SIGTERM, and kill -9.

    python benchmarks/interruptions.py

Each line is a whole job of two workers on an S3 server on loopback, held to every check of tests/chaos.py.
``fake`` engines note every token that they decode, so what is decoded twice is counted; ``real`` ones run
the demo's model. Waste is what workers computed that is in no answer: repeated prompts, repeated tokens.
"""

# ruff: noqa: E402
from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "examples")]

import chaos
import chaos_checks
import s3_server

INTERRUPTIONS: dict[str, tuple[chaos.Event, ...]] = {
    "nothing": (),
    "SIGTERM": (chaos.Event(1.0, "term", 0), chaos.Event(1.5, "term", 1)),
    "kill -9": (chaos.Event(1.0, "kill", 0),),
}


def script(real: bool, events: tuple[chaos.Event, ...]) -> chaos.Script:
    """A job without faults of the store, to which only these events happen."""
    seed = 9 if real else 0
    plain = replace(chaos.Script.of(seed), server="seaweed", events=events, fault_share=0.0)
    if real:
        return plain
    return replace(
        plain, rows=96, shard_rows=24, samples=1, step=0.05, tokens=60, workers=2, kill_submit=False
    )


def main() -> int:
    """Make the runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.parse_args()
    fake = script(False, ())
    most = 2 * fake.shard_rows / fake.step * chaos.FLUSH  # two open shards, a token of each row a step
    print(f"checkpoints every {chaos.FLUSH} s, in which a fake engine decodes up to {most:.0f} tokens")
    print("engine  interruption  tokens  decoded again  waste of the bill")
    with tempfile.TemporaryDirectory() as folder, s3_server.any_server(Path(folder) / "server") as server:
        for real in (False, True):
            plain = script(real, ())
            answers = chaos_checks.real_answers(plain, Path(folder) / "undisturbed") if real else {}
            for name, events in INTERRUPTIONS.items():
                scratch = Path(folder) / f"{name} {real}"
                figures = chaos.chaos_run(script(real, events), server, scratch, answers)
                again = "-" if real else str(figures.repeated)
                counts = f"{figures.tokens:6}  {again:>13}"
                print(f"{figures.engine:6}  {name:12}  {counts}  {figures.waste:17.2%}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
