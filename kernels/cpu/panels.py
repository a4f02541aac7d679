"""Matrix products of our own: weights in panels of 32 outputs, in bf16 or int8 (linear.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from batchinfer.kernels.cpu.library import TYPES, Library, Product
from batchinfer.kernels.cpu.pages import huge_pages
from batchinfer.kernels.cpu.quantized import rounded

_PANEL = 32

# Inputs that are turned together and share a scale: GROUP in rotated.h, and the bytes of a Group there.
_GROUP, _GROUP_BYTES = 64, 8

_ACTIVATIONS = {None: -1, "silu": 0, "gelu_tanh": 1}


@dataclass(frozen=True, slots=True)
class PanelLinear:
    """A bf16 weight in panels; ``bias`` fp32 [out]."""

    library: Library
    out_features: int
    in_features: int
    panels: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def pack(cls, library: Library, weight: torch.Tensor, bias: torch.Tensor | None) -> PanelLinear:
        """Of ``weight`` bf16 [out, in], in even, and ``bias`` [out]."""
        bias = None if bias is None else bias.float().contiguous()
        out_features, in_features = weight.shape
        return cls(library, out_features, in_features, _panels(weight, 2), bias)

    @property
    def gates(self) -> bool:
        """Whether its gates and its ups both end with a panel, so that one pass multiplies them."""
        return self.out_features % (2 * _PANEL) == 0

    def apply(self, x: torch.Tensor, kind: str | None, dtype: torch.dtype) -> torch.Tensor:
        """bf16 [T, in] -> [T, out] of ``dtype``; with the activation ``kind``, gated: [T, out / 2]."""
        x = x.contiguous()
        out = x.new_empty(len(x), self.out_features // (1 if kind is None else 2), dtype=dtype)
        call = _product(self, x, out, kind)
        self.library.linear(ctypes.byref(call))
        return out


@dataclass(frozen=True, slots=True)
class PanelInt8Linear:
    """An int8 weight in panels, turned by :func:`turned`, each byte 128 more than it stands for.

    ``scales`` fp32 [out], one for each output channel; ``bias`` fp32 [out]. The activations are turned
    and rounded to bytes in the product's own pass, with a scale for each row's group of 64.
    """

    library: Library
    out_features: int
    in_features: int
    panels: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def pack(cls, library: Library, weight: torch.Tensor, bias: torch.Tensor | None) -> PanelInt8Linear:
        """Of ``weight`` [out, in], turned and rounded row by row, and ``bias`` [out]."""
        whole, scales = rounded(turned(weight))
        panels = _panels(whole.view(torch.uint8) ^ 128, 4)
        bias = None if bias is None else bias.float().contiguous()
        return cls(library, len(weight), weight.shape[1], panels, scales, bias)

    @property
    def gates(self) -> bool:
        """Whether its gates and its ups both end with a panel, so that one pass multiplies them."""
        return self.out_features % (2 * _PANEL) == 0

    def apply(self, x: torch.Tensor, kind: str | None, dtype: torch.dtype) -> torch.Tensor:
        """[T, in] -> [T, out] of ``dtype``; with the activation ``kind``, gated: [T, out / 2]."""
        x = x.contiguous()
        out = x.new_empty(len(x), self.out_features // (1 if kind is None else 2), dtype=dtype)
        groups = -(-self.in_features // _GROUP)
        scratch = x.new_empty(len(x) * groups * (_GROUP + _GROUP_BYTES), dtype=torch.uint8)
        call = _product(self, x, out, kind)
        call.scales, call.scratch = self.scales.data_ptr(), scratch.data_ptr()
        self.library.linear_int8(ctypes.byref(call))
        return out


def turned(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [out, in] for activations that rotated.h has turned: fp32 [out, in filled up to 64s].

    Times the inverse of the matrix of (-1)^popcount(i & j), group by group: that matrix over 64.
    """
    matrix = torch.ones(1, 1)
    while len(matrix) < _GROUP:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    wide = torch.nn.functional.pad(weight.float(), (0, -weight.shape[1] % _GROUP))
    groups = wide.view(len(wide), wide.shape[1] // _GROUP, _GROUP)
    return (groups @ (matrix / _GROUP)).flatten(1)


def _panels(weight: torch.Tensor, inputs: int) -> torch.Tensor:
    """[out, in] -> [panels, in / inputs, 32, inputs], an even number of them, filled up with zeros."""
    out_features, in_features = weight.shape
    panels = huge_pages(
        (2 * -(-out_features // (2 * _PANEL)), in_features // inputs, _PANEL, inputs), weight.dtype
    )
    whole, left = divmod(out_features, _PANEL)
    grouped = weight.view(out_features, in_features // inputs, inputs)
    panels[:whole] = (
        grouped[: whole * _PANEL].view(whole, _PANEL, in_features // inputs, inputs).transpose(1, 2)
    )
    if left:
        panels[whole, :, :left] = grouped[whole * _PANEL :].transpose(0, 1)
    return panels


def _product(
    weight: PanelLinear | PanelInt8Linear, x: torch.Tensor, out: torch.Tensor, kind: str | None
) -> Product:
    return Product(
        x=x.data_ptr(),
        panels=weight.panels.data_ptr(),
        bias=None if weight.bias is None else weight.bias.data_ptr(),
        out=out.data_ptr(),
        rows=len(x),
        in_features=weight.in_features,
        out_features=weight.out_features,
        x_type=TYPES[x.dtype],
        type=TYPES[out.dtype],
        activation=_ACTIVATIONS[kind],
        threads=torch.get_num_threads(),
    )
