"""Numbers in 8 bits: weights with a scale for each output, activations with one for each row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchinfer.kernels.cpu.library import TYPES, Library


@dataclass(frozen=True, slots=True)
class QuantizedRows:
    """Activations as bytes: ``whole`` uint8 [T, in] around a zero point, ``scales`` fp32 [T], and the
    ``counts`` int32 [T] of each row's ``rests`` [T, most], what lies beyond the scale."""

    whole: torch.Tensor
    scales: torch.Tensor
    rests: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, library: Library, x: torch.Tensor, rests: int, limit: int) -> QuantizedRows:
        """``x`` [T, in] with the zero point ``limit`` + 1, and ``limit`` steps to each side."""
        x = x.contiguous()
        rows, size = x.shape
        made = cls(
            torch.empty(rows, size, dtype=torch.uint8),
            torch.empty(rows),
            torch.empty(rows, rests, dtype=torch.int64),
            torch.empty(rows, dtype=torch.int32),
        )
        library.quantize_rows(
            TYPES[x.dtype],
            x.data_ptr(),
            made.whole.data_ptr(),
            made.scales.data_ptr(),
            made.rests.data_ptr(),
            made.counts.data_ptr(),
            rows,
            size,
            limit,
            torch.get_num_threads(),
        )
        return made


def rounded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [out, in] as int8 and a scale fp32 [out] for each of its rows."""
    wide = weight.float()
    scales = (wide.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    return (wide / scales[:, None]).round().to(torch.int8), scales
