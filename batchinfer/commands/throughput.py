"""``batchinfer bench throughput``: the engine's rates on a data set."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from batchinfer.commands.frame import AsJson, command, emit, say


@command
def throughput(
    model: Annotated[
        str,
        typer.Option(
            help="A model, as in a job spec; for dummy weights also a name or file of its config."
        ),
    ],
    dataset: Annotated[Path, typer.Option(help='Lines of {"prompt": text, "max_tokens": number}.')],
    dtype: Annotated[str, typer.Option(help="auto, bf16, fp16 or fp32.")] = "auto",
    quantize: Annotated[str | None, typer.Option(help="int8, int4 or fp8.")] = None,
    max_context: Annotated[int | None, typer.Option(min=1, help="Default: the model's own.")] = None,
    load_format: Annotated[
        str, typer.Option(help="auto, or dummy: random weights, made from the configuration alone.")
    ] = "auto",
    kv_dtype: Annotated[str, typer.Option(help="auto, bf16, fp16, fp32, int8 or fp8.")] = "auto",
    as_json: AsJson = False,
) -> None:
    """Generate exactly max_tokens for each prompt, greedily, and report the rates."""
    from batchinfer.engine.bench import measure_throughput
    from batchinfer.jobs.models import local_model
    from batchinfer.jobs.types import JobError

    for name, value, known in (
        ("--dtype", dtype, ("auto", "bf16", "fp16", "fp32")),
        ("--quantize", quantize, (None, "int8", "int4", "fp8")),
        ("--load-format", load_format, ("auto", "dummy")),
        ("--kv-dtype", kv_dtype, ("auto", "bf16", "fp16", "fp32", "int8", "fp8")),
    ):
        if value not in known:
            raise typer.BadParameter(
                f"{value} is none of {', '.join(filter(None, known))}", param_hint=name
            )
    settings = {
        "dtype": dtype,
        "quantize": quantize,
        "kv_dtype": kv_dtype,
        "max_context": max_context,
        "load_format": load_format,
    }
    try:
        report = measure_throughput(local_model(model), dataset, **settings)
    except ValueError as error:
        raise JobError(str(error)) from error
    # On a CPU there are no shares of a roof.
    figures = {name: figure for name, figure in asdict(report).items() if figure is not None}
    for name, figure in figures.items():
        say(f"{name:<20} {figure:,}")
    if as_json:
        emit(figures)
