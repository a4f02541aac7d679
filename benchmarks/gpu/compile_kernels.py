"""Compile every Triton kernel ahead of time, without a GPU, as the operators would launch it.

    python benchmarks/gpu/compile_kernels.py [--shapes Qwen3-8B ...] [--targets sm_90 ...] [--json]

The operators run on tensors that hold nothing, their launches are recorded, and each is compiled with the
very tile sizes and constants of that launch. Prints shared memory, registers, spills and the kinds of
tensor core instruction of each; fails when a kernel takes more shared memory than its GPU has.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchinfer.kernels.ops import AttentionBatch, KVSpec
from batchinfer.kernels.triton import attend, operators, sharing, weight_only
from batchinfer.kernels.triton.operators import TritonOperators
from batchinfer.kernels.triton.tiles import SHARED_MEMORY

TARGETS = {f"sm_{major}{minor}": (major, minor) for major, minor in SHARED_MEMORY}
META = torch.device("meta")


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that kernels depend on, and the dtypes it is run in."""

    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    inner: int
    vocabulary: int
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    quantize: str | None = None
    qk_norms: bool = False
    window: int = 0
    soft_cap: float = 0.0
    activation: str = "silu"


FP8 = torch.float8_e4m3fn
SHAPES = {
    "Qwen3-0.6B": Shape(16, 8, 128, 1024, 3072, 151936, qk_norms=True),
    "Qwen3-8B": Shape(32, 8, 128, 4096, 12288, 151936, qk_norms=True),
    "Qwen3-8B fp8": Shape(32, 8, 128, 4096, 12288, 151936, kv_dtype=FP8, quantize="fp8", qk_norms=True),
    "Qwen3-8B int8": Shape(32, 8, 128, 4096, 12288, 151936, quantize="int8", qk_norms=True),
    "Qwen3-8B int4": Shape(32, 8, 128, 4096, 12288, 151936, quantize="int4", qk_norms=True),
    "SmolLM2-135M int4": Shape(9, 3, 64, 576, 1536, 49152, quantize="int4"),
    "SmolLM2-135M fp32 int8": Shape(
        9, 3, 64, 576, 1536, 49152, dtype=torch.float32, kv_dtype=torch.float32, quantize="int8"
    ),
    "Llama-3.1-8B fp16": Shape(
        32, 8, 128, 4096, 14336, 128256, dtype=torch.float16, kv_dtype=torch.float16
    ),
    "SmolLM2-135M": Shape(9, 3, 64, 576, 1536, 49152),
    "SmolLM2-135M fp32": Shape(9, 3, 64, 576, 1536, 49152, dtype=torch.float32, kv_dtype=torch.float32),
    "Gemma-2-9B": Shape(
        16, 8, 256, 3584, 14336, 256000, window=4096, soft_cap=50.0, activation="gelu_tanh"
    ),
    "Gemma-2-9B fp8": Shape(
        16,
        8,
        256,
        3584,
        14336,
        256000,
        kv_dtype=FP8,
        quantize="fp8",
        window=4096,
        soft_cap=50.0,
        activation="gelu_tanh",
    ),
    "heads of 80": Shape(32, 32, 80, 2560, 6912, 32000),
    "heads of 96": Shape(32, 32, 96, 3072, 8192, 32064),
    "256 fp32": Shape(8, 1, 256, 2048, 16384, 256000, dtype=torch.float32, kv_dtype=torch.float32),
}


@dataclass(frozen=True)
class Launch:
    """One kernel with the arguments of a launch."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch. ``registers`` of a thread, ``spills`` bytes of one."""

    shape: str
    target: str
    kernel: str
    tile: str
    warps: int
    shared_bytes: int
    limit_bytes: int
    registers: int
    spills: int
    instructions: str


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches that the operators make meanwhile; nothing runs."""
    launches: list[Launch] = []

    class Recorder:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def launch(*args: Any, **named: Any) -> None:
                options = {k: named.pop(k) for k in ("num_warps", "num_stages") if k in named}
                arguments = dict(zip(self.kernel.arg_names, args, strict=False)) | named
                assert set(arguments) == set(self.kernel.arg_names), self.kernel.__name__
                launches.append(Launch(self.kernel, arguments, options))

            return launch

    kernels = [
        (module, name, value)
        for module in (attend, operators, sharing, weight_only)
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    ]
    for module, name, value in kernels:
        setattr(module, name, Recorder(value))
    try:
        yield launches
    finally:
        for module, name, value in kernels:
            setattr(module, name, value)


def launches_of(shape: Shape, capability: tuple[int, int]) -> list[Launch]:
    """The launches of one layer and one sampling of a step with prefill, decodes and shared splits."""
    ops = TritonOperators(capability)
    sequences, context, chunk = 64, 4096, 256
    tokens = sequences - 1 + chunk
    spec = KVSpec(1, shape.kv_heads, shape.head_size, shape.kv_dtype)

    def empty(*sizes: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        return torch.empty(sizes, dtype=dtype, device=META)

    batch = AttentionBatch(
        query_starts=empty(sequences + 1, dtype=torch.int32),
        positions=empty(tokens, dtype=torch.int64),
        context_lens=empty(sequences, dtype=torch.int32),
        block_tables=empty(sequences, context // 32, dtype=torch.int32),
        slots=empty(tokens, dtype=torch.int64),
        max_query=chunk,
        max_context=context,
    )
    norm = empty(shape.head_size, dtype=torch.float32) if shape.qk_norms else None
    if shape.quantize in ("int8", "int4"):
        return product_launches(ops, shape, empty)
    with recorded() as launches:
        kv = ops.allocate_kv(spec, 8, META)
        if shape.quantize:
            ops.pack_linear(empty(32, 32), None, shape.quantize)
            ops._fp8_rows(empty(tokens, shape.heads * shape.head_size))
        hidden, weight = empty(tokens, shape.hidden), empty(shape.hidden, dtype=torch.float32)
        ops.rms_norm(hidden, weight, 1e-6)
        ops.add_rms_norm(hidden, hidden, weight, 1e-6)
        width = (shape.heads + 2 * shape.kv_heads) * shape.head_size
        table = empty(context, shape.head_size, dtype=torch.float32)
        q = ops.rotary_and_store(empty(tokens, width), table, batch, kv, 0, shape.heads, norm, norm, 1e-6)
        ops.attention(q, kv, 0, batch, shape.head_size**-0.5, shape.window, shape.soft_cap)
        ops.gated_activation(empty(tokens, 2 * shape.inner), shape.activation)
        ops.filter(
            empty(sequences, shape.vocabulary, dtype=torch.float32),
            empty(sequences, dtype=torch.int64),
            empty(sequences, dtype=torch.float32),
            empty(sequences, dtype=torch.int64),
            empty(sequences, dtype=torch.float32),
            empty(sequences, dtype=torch.float32),
        )
        ops.sample(
            empty(sequences, shape.vocabulary, dtype=torch.float32),
            empty(sequences, dtype=torch.float32),
            empty(sequences, 2, dtype=torch.int64),
            empty(sequences, dtype=torch.int64),
        )
    return launches


def product_launches(
    ops: TritonOperators, shape: Shape, empty: Callable[..., torch.Tensor]
) -> list[Launch]:
    """The launches of the attention's output, with a bias, at few and at many rows, and of the head.

    Nothing else changes with narrow weights: those kernels are another shape's.
    """
    size = shape.heads * shape.head_size
    weight = ops.pack_linear(empty(shape.hidden, size), empty(shape.hidden), shape.quantize)
    head = ops.pack_linear(empty(shape.vocabulary, shape.hidden), None, "int8")
    with recorded() as launches:
        for rows in (16, 32, 64, 256, 4096):
            ops.linear(empty(rows, size), weight)
        ops.logits(empty(64, shape.hidden), head)
    return launches


_POINTERS = {
    torch.int8: "*i8",
    torch.uint8: "*u8",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
    FP8: "*fp8e4nv",
}


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Any:
    """The compiled kernel, specialised as a launch of these arguments would have it."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        divisible = False
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name], divisible = _POINTERS[value.dtype], True
        elif isinstance(value, int):
            signature[parameter.name], divisible = "i32", value % 16 == 0
        else:
            signature[parameter.name] = "fp32"
        if divisible and not parameter.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=launch.options)


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread and bytes that it spills (its stack and local memory), by cuobjdump."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    # One function a cubin; a common line before it has other names.
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2]) + int(found[3])


def instructions(ptx: str) -> str:
    """The kinds of tensor core instruction, such as ``wgmma m64n64k16 bf16``."""
    kinds = set()
    for line in ptx.splitlines():
        wide = re.search(r"wgmma\.mma_async\.sync\.aligned\.(m\d+n\d+k\d+)\.\w+\.(\w+)", line)
        narrow = re.search(r"\bmma\.sync\.aligned\.(m\d+n\d+k\d+)\.row\.col\.\w+\.(\w+)", line)
        if wide:
            kinds.add(f"wgmma {wide[1]} {wide[2]}")
        elif narrow:
            kinds.add(f"mma {narrow[1]} {narrow[2]}")
    return ", ".join(sorted(kinds))


def tile(launch: Launch) -> str:
    """The sizes by which a launch was cut."""
    names = ("M", "N", "DP", "WIDTH", "HP", "CHUNK", "INT4")
    return " ".join(f"{name}={launch.arguments[name]}" for name in names if name in launch.arguments)


def compile_shape(name: str, target: str) -> list[Compiled]:
    """Every kernel of one shape for one target; none for fp8 on a GPU without."""
    shape, capability = SHAPES[name], TARGETS[target]
    if (shape.quantize == "fp8" or shape.kv_dtype == FP8) and capability < (8, 9):
        return []
    rows = []
    for launch in launches_of(shape, capability):
        made = compile_launch(launch, capability)
        registers, spills = resources(made.asm["cubin"])
        rows.append(
            Compiled(
                name,
                target,
                launch.kernel.__name__.removesuffix("_kernel"),
                tile(launch),
                launch.options["num_warps"],
                made.metadata.shared,
                SHARED_MEMORY[capability],
                registers,
                spills,
                instructions(made.asm["ptx"]),
            )
        )
    return rows


def table(rows: Sequence[Compiled]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| shape | target | kernel | tile | warps | shared bytes | registers | spills | tensor cores |",
        "|---|---|---|---|---:|---:|---:|---:|---|",
    ]
    lines += [
        f"| {r.shape} | {r.target} | {r.kernel} | {r.tile} | {r.warps} | {r.shared_bytes:,} "
        f"| {r.registers} | {r.spills} | {r.instructions} |"
        for r in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args(arguments)
    rows = [
        row for name in options.shapes for target in options.targets for row in compile_shape(name, target)
    ]
    print(json.dumps([asdict(row) for row in rows]) if options.json else table(rows))
    over = [row for row in rows if row.shared_bytes > row.limit_bytes]
    for row in over:
        print(
            f"{row.kernel} of {row.shape} takes {row.shared_bytes:,} bytes of shared memory, "
            f"but {row.target} has {row.limit_bytes:,}.",
            file=sys.stderr,
        )
    return 1 if over else 0


if __name__ == "__main__":
    assert os.environ.get("TRITON_INTERPRET") != "1", "the interpreter compiles nothing"
    sys.exit(main())
