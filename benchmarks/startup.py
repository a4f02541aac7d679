"""What starting costs: imports, loading and the first token, each in processes of their own.

    python benchmarks/startup.py --model MODEL [--runs 3]

Files are in the system's cache and the kernels are built, as at the second start on a machine. Each figure
is the least of the runs, in seconds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

# Prints one JSON document: seconds from the start of the interpreter's own work to each point.
_CHILD = """
import json, sys, time
begun = time.perf_counter()
from batchinfer.engine.engine import Engine, collection_paused
from batchinfer.engine.types import SamplingParams
with collection_paused():
    import torch
    torch_seconds = time.perf_counter()
    import batchinfer.engine.load
imported = time.perf_counter()
engine = Engine(sys.argv[1], **json.loads(sys.argv[2]))
loaded = time.perf_counter()
engine.generate(["The sky is"], SamplingParams(max_tokens=1))
first = time.perf_counter()
print(json.dumps({"import torch": torch_seconds - begun, "import the engine": imported - torch_seconds,
                  "load": loaded - imported, "first token": first - loaded, "all": first - begun}))
"""


def main() -> None:
    """Start engines one after another and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--settings", default='{"dtype": "bf16"}', help="JSON, for the engine")
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    command = [sys.executable, "-P", "-c", _CHILD, options.model, options.settings]
    runs: list[dict[str, float]] = []
    for _ in range(options.runs):
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    print("| seconds |  |\n|---|---|")
    for name in runs[0]:
        print(f"| {name} | {min(run[name] for run in runs):.2f} |")


if __name__ == "__main__":
    main()
