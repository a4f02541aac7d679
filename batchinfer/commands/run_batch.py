"""``batchinfer run-batch``: an OpenAI batch file in, another out."""

from __future__ import annotations

from typing import Annotated

import typer

from batchinfer.commands.frame import AsJson, command, emit, say


@command
def run_batch(
    input_file: Annotated[
        str, typer.Option("-i", "--input-file", help="OpenAI batch lines: a path, s3:// or https://.")
    ],
    output_file: Annotated[
        str, typer.Option("-o", "--output-file", help="Where the answers go: a path, s3:// or gs://.")
    ],
    model: Annotated[str, typer.Option("--model", help="A model, as in a job spec.")],
    dtype: Annotated[str, typer.Option(help="auto, bfloat16, float16 or float32.")] = "auto",
    max_model_len: Annotated[
        int | None, typer.Option(min=1, help="Prompt and answer together, in tokens; default: the model's.")
    ] = None,
    quantization: Annotated[
        str | None, typer.Option("-q", "--quantization", help="int8, int4 or fp8.")
    ] = None,
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, bfloat16, int8 or fp8.")] = "auto",
    as_json: AsJson = False,
) -> int:
    """Answer an OpenAI batch file; run it again to go on after an interruption."""
    from batchinfer.jobs.batch_run import run_batch
    from batchinfer.jobs.view import bill_lines

    short = {"auto": "bf16", "bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32"}
    short |= {"float": "fp32", "bf16": "bf16", "fp16": "fp16", "fp32": "fp32"}
    if dtype not in short:
        raise typer.BadParameter(f"{dtype} is none of {', '.join(short)}", param_hint="--dtype")
    settings = {
        "source": model,
        "dtype": short[dtype],
        "max_context": max_model_len,
        "quantize": quantization,
        "kv_dtype": "bf16" if kv_cache_dtype == "bfloat16" else kv_cache_dtype,
    }
    result = run_batch(input_file, output_file, settings, say)
    if result.status.state == "done":
        for line in bill_lines(result.bill):
            say(line)
        say(f"{result.answered:,} answers and {result.failed:,} errors are in {output_file}")
        if result.repeated:
            say(f"{result.repeated:,} lines have a custom_id that an earlier line has; all were answered.")
    elif result.status.message:
        say(f"batchinfer: {result.status.message}")
    if as_json:
        emit(
            {
                "input": input_file,
                "output": output_file,
                "state": result.status.state,
                "answered": result.answered,
                "failed": result.failed,
                "repeated": result.repeated,
                "usage": {
                    "prompt_tokens": result.status.prompt_tokens,
                    "cached_tokens": result.status.cached_tokens,
                    "completion_tokens": result.status.completion_tokens,
                },
            }
        )
    return result.status.exit_code
