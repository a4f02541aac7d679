"""Products in fp8 (e4m3): rows of weights and of activations, each with a scale of its own.

Micikevicius et al., "FP8 formats for deep learning", arXiv 2209.05433.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

FP8 = torch.float8_e4m3fn

# The largest number of the format.
MOST = 448.0


@dataclass(frozen=True, slots=True)
class FP8Rows:
    """``values`` fp8 [rows, size] times ``scales`` fp32 [rows]."""

    values: torch.Tensor
    scales: torch.Tensor

    def wide(self) -> torch.Tensor:
        """The numbers that they stand for: fp32 [rows, size]."""
        return self.values.float() * self.scales[:, None]


@dataclass(frozen=True, slots=True)
class FP8Linear:
    """A weight [out, in] in fp8 with a scale for each output, and a bias [out]."""

    weight: FP8Rows
    bias: torch.Tensor | None

    @property
    def out_features(self) -> int:
        """Columns of the product."""
        return self.weight.values.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the input."""
        return self.weight.values.shape[1]

    def product(self, x: FP8Rows, dtype: torch.dtype) -> torch.Tensor:
        """``x`` [T, in] times the weight's transpose, plus the bias: [T, out] of ``dtype``.

        On CUDA by ``torch._scaled_mm``, whose products scaled by rows come in bf16; elsewhere in fp32.
        """
        if x.values.device.type == "cuda":
            out = torch._scaled_mm(
                x.values,
                self.weight.values.t(),
                scale_a=x.scales[:, None],
                scale_b=self.weight.scales[None, :],
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
            if self.bias is not None:
                out = out + self.bias
            return out.to(dtype)
        wide = (x.values.float() @ self.weight.values.float().t()) * x.scales[:, None]
        wide = wide * self.weight.scales
        return (wide if self.bias is None else wide + self.bias.float()).to(dtype)


def quantize_rows(x: torch.Tensor) -> FP8Rows:
    """Round each row of ``x`` [rows, size] to fp8; its largest magnitude becomes 448."""
    wide = x.float()
    scales = (wide.abs().amax(1) / MOST).clamp_min(1e-12)
    return FP8Rows((wide / scales[:, None]).clamp(-MOST, MOST).to(FP8), scales)


def pack_fp8(weight: torch.Tensor, bias: torch.Tensor | None) -> FP8Linear:
    """A weight [out, in] in fp8."""
    return FP8Linear(quantize_rows(weight), bias)
