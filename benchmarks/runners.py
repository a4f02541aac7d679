"""One engine in a process of its own: loads a model, then runs each data set that it is told to.

    python benchmarks/runners.py {batchinfer,vllm,transformers} MODEL SETTINGS_JSON

Every line on stdin names a JSONL file of {"prompt", "max_tokens"}; the answer is one JSON line: seconds
from texts to texts, and the ids of the tokens made. All are greedy and ignore the end of sequence.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
# Completes the rows: the token ids of each, and the first completion's text.
Complete = Callable[[list[Row]], tuple[list[list[int]], str]]


def batchinfer(model: str, settings: Row) -> Complete:
    """Our engine, with an empty prefix cache for every run."""
    from batchinfer.engine.engine import Engine
    from batchinfer.engine.types import SamplingParams

    loaded = Engine(model, **settings)

    def complete(rows: list[Row]) -> tuple[list[list[int]], str]:
        engine = Engine.from_parts(loaded.config, loaded.runner, loaded.tokenizer)
        sampling = [SamplingParams(max_tokens=row["max_tokens"], ignore_eos=True) for row in rows]
        done = engine.generate([row["prompt"] for row in rows], sampling)
        return [list(item.token_ids) for item in done], done[0].text

    return complete


def vllm(model: str, settings: Row) -> Complete:
    """vLLM's offline engine."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    engine = LLM(
        model,
        **{"dtype": "bfloat16", "max_num_batched_tokens": 4096, "max_model_len": 2048, **settings},
    )

    def complete(rows: list[Row]) -> tuple[list[list[int]], str]:
        assert engine.reset_prefix_cache()
        sampling = [
            SamplingParams(temperature=0, max_tokens=row["max_tokens"], ignore_eos=True) for row in rows
        ]
        done = engine.generate([row["prompt"] for row in rows], sampling, use_tqdm=False)
        return [list(item.outputs[0].token_ids) for item in done], done[0].outputs[0].text

    return complete


def transformers(model: str, settings: Row) -> Complete:
    """Hugging Face's generate, in padded batches of prompts of like length."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = getattr(torch, settings.get("dtype", "bfloat16"))
    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
    size = settings.get("batch_size", 64)

    @torch.inference_mode()
    def complete(rows: list[Row]) -> tuple[list[list[int]], str]:
        order = sorted(range(len(rows)), key=lambda i: (rows[i]["max_tokens"], len(rows[i]["prompt"])))
        made: list[list[int]] = [[] for _ in rows]
        for start in range(0, len(order), size):
            part = order[start : start + size]
            inputs = tokenizer([rows[i]["prompt"] for i in part], return_tensors="pt", padding=True)
            most = max(rows[i]["max_tokens"] for i in part)
            tokens = network.generate(**inputs, do_sample=False, max_new_tokens=most, min_new_tokens=most)
            tokens = tokens[:, inputs["input_ids"].shape[1] :]
            for i, row in zip(part, tokens, strict=True):
                made[i] = row[: rows[i]["max_tokens"]].tolist()
        return made, tokenizer.decode(made[0], skip_special_tokens=True)

    return complete


def main() -> None:
    """Serve the process's stdin."""
    name, model, settings = sys.argv[1:4]
    # Whatever the engines print goes to stderr: stdout carries the answers alone.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    begun = time.perf_counter()
    make = {"batchinfer": batchinfer, "vllm": vllm, "transformers": transformers}[name]
    complete = make(model, json.loads(settings))
    print(json.dumps({"load_seconds": round(time.perf_counter() - begun, 2)}), file=answers)
    for line in sys.stdin:
        rows = [json.loads(row) for row in Path(line.strip()).read_text().splitlines()]
        begun = time.perf_counter()
        made, text = complete(rows)
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "tokens": made, "sample": text[:60]}), file=answers)


if __name__ == "__main__":
    main()
