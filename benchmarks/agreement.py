"""How far greedy answers in few bits stay with those of fp32: ours and a peer's, on the same prompts.

    python benchmarks/agreement.py --model FOLDER --peer vllm --peer-python PEER_VENV/bin/python \\
        --prompts 64 --tokens 64 decode-heavy.jsonl

The reference is Hugging Face transformers in fp32. ``equal tokens`` is the share of positions with the
reference's token, ``first difference`` the mean position of the first other one (the number of tokens where
there is none), ``whole answers`` the share of answers without a difference.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from compare import Runner


def agreement(reference: list[list[int]], answers: list[list[int]]) -> dict[str, float]:
    """How far ``answers`` (token ids) are the reference's, row by row."""
    equal, firsts = 0, []
    for wanted, got in zip(reference, answers, strict=True):
        same = [a == b for a, b in zip(wanted, got, strict=True)]
        equal += sum(same)
        firsts.append(same.index(False) if False in same else len(same))
    whole = sum(first == len(row) for first, row in zip(firsts, reference, strict=True))
    return {
        "equal tokens": equal / sum(map(len, reference)),
        "first difference": statistics.mean(firsts),
        "whole answers": whole / len(reference),
    }


def main() -> None:
    """Answer the prompts with each engine in turn and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument(
        "--settings", nargs="*", default=['{"dtype": "bf16"}'], help="JSON, each a run of our engine"
    )
    parser.add_argument("--peer", choices=["vllm", "transformers"])
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-settings", default="{}", help="JSON, for the peer's engine")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    options = parser.parse_args()
    lines = options.dataset.read_text().splitlines()
    step = max(1, len(lines) // options.prompts)
    rows = [json.loads(line) for line in lines[::step][: options.prompts]]
    engines = [("batchinfer", sys.executable, settings) for settings in options.settings]
    if options.peer:
        engines.append((options.peer, options.peer_python, options.peer_settings))
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder, "prompts.jsonl")
        rows = [{"prompt": row["prompt"], "max_tokens": options.tokens} for row in rows]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))

        def answers(name: str, python: str, settings: str) -> list[list[int]]:
            runner = Runner(name, python, options.model, settings, options.threads)
            tokens: list[list[int]] = runner.run(prompts)["tokens"]
            runner.close()
            return tokens

        reference = answers("transformers", sys.executable, '{"dtype": "float32", "batch_size": 16}')
        print(
            f"| {len(rows)} prompts, {options.tokens} tokens "
            "| equal tokens | first difference | whole answers |"
        )
        print("|---|---|---|---|", flush=True)
        for name, python, settings in engines:
            found = agreement(reference, answers(name, python, settings))
            print(
                f"| {name} {settings} | {found['equal tokens']:.3f} | {found['first difference']:.1f} "
                f"| {found['whole answers']:.3f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
