"""Where a decode step's time goes in a running engine, call by call: medians of the later steps.

    python benchmarks/running_step.py --model FOLDER [--settings '{"dtype": "bf16", "quantize": "int8"}']

Each kernel's call is timed where the engine makes it, by the model's own weights and values, so that what
one operator leaves in the caches for the next one counts; ``operators.py`` times each by itself. For that
the layers' calls are made one by one from Python; otherwise an engine makes them in one go, and the table
ends with what a step takes then. Of both a first run warms up, and a second one is measured in the steps
after the first two fifths.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from batchinfer.engine.engine import Engine
from batchinfer.engine.types import Request, SamplingParams
from batchinfer.kernels.cpu.recording import Recording

KERNELS = (
    "linear",
    "linear_int8",
    "choose",
    "choose_int8",
    "rms_norm",
    "rotary_and_store",
    "attention",
    "gated_activation",
    "sample",
)


class Stopwatch:
    """Seconds of each step's calls, by what they were."""

    def __init__(self, library: Any) -> None:
        """Time the calls of ``library`` from now on."""
        self.steps: list[dict[str, float]] = []
        for name in KERNELS:
            setattr(library, name, self._timed(name, getattr(library, name)))

    def _timed(self, name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = kernel(*arguments)
            if self.steps:
                self.steps[-1][_what(name, arguments)] += time.perf_counter() - begun
            return result

        return call


def _what(name: str, arguments: tuple[Any, ...]) -> str:
    """A product by its shape, any other kernel by its name."""
    if not name.startswith(("linear", "choose")):
        return name
    product = arguments[0]._obj  # what ctypes.byref was given
    return f"{name} {product.in_features} -> {product.out_features}"


def run(engine: Engine, requests: list[Request], watch: Stopwatch | None) -> list[float]:
    """Answer the requests: seconds of each step."""
    engine.add(requests)
    seconds = []
    while engine.has_work:
        if watch is not None:
            watch.steps.append(defaultdict(float))
        begun = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - begun)
    return seconds


def main() -> None:
    """Measure and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--settings", default='{"dtype": "bf16"}', help="JSON, for the engine")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=256, help="generated for each prompt")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    engine = Engine(options.model, **json.loads(options.settings))
    sampling = SamplingParams(max_tokens=options.tokens, ignore_eos=True)
    chance = torch.Generator().manual_seed(0)
    prompts = torch.randint(100, 40_000, (options.sequences, options.prompt), generator=chance).tolist()
    requests = [Request(row, prompt, sampling) for row, prompt in enumerate(prompts)]
    recorded = [run(engine, requests, None) for _ in range(2)][1]
    decoder = engine.runner._decoder
    for name in ("_all", "_before_last"):
        if isinstance(layers := getattr(decoder, name), Recording):
            setattr(decoder, name, layers._work)
    watch = Stopwatch(decoder._ops._library)
    alone = [run(engine, requests, watch) for _ in range(2)][1]
    part = slice(2 * options.tokens // 5, 4 * options.tokens // 5)
    steps = watch.steps[len(alone) :][part]
    medians = {what: 1e3 * statistics.median(step[what] for step in steps) for what in steps[0]}
    whole = 1e3 * statistics.median(alone[part])
    print(f"| {options.sequences} sequences, {len(steps)} steps | ms |")
    print("|---|---|")
    for what, milliseconds in sorted(medians.items(), key=lambda item: -item[1]):
        print(f"| {what} | {milliseconds:.2f} |")
    print(f"| between the kernels | {whole - sum(medians.values()):.2f} |")
    print(f"| step, call by call | {whole:.2f} |")
    print(f"| **step, the layers in one go** | **{1e3 * statistics.median(recorded[part]):.2f}** |")


if __name__ == "__main__":
    main()
