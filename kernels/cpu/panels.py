"""Matrix products of our own: weights in panels of 64 outputs, in bf16 or int8 (linear.cpp)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from batchinfer.kernels.cpu.library import TYPES, Library, Product
from batchinfer.kernels.cpu.pages import huge_pages
from batchinfer.kernels.cpu.quantized import QuantizedRows, rounded

_PANEL = 64

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
        """Whether its gates and its ups both end with a half panel, so that one pass multiplies them."""
        return self.out_features % _PANEL == 0

    def apply(self, x: torch.Tensor, kind: str | None, dtype: torch.dtype) -> torch.Tensor:
        """bf16 [T, in] -> [T, out] of ``dtype``; with the activation ``kind``, gated: [T, out / 2]."""
        x = x.contiguous()
        out = x.new_empty(len(x), self.out_features // (1 if kind is None else 2), dtype=dtype)
        call = _product(self, x, self.panels, self.bias, out, kind)
        self.library.linear(ctypes.byref(call))
        return out


@dataclass(frozen=True, slots=True)
class PanelInt8Linear:
    """An int8 weight in panels, with a scale for each output channel.

    ``columns`` int8 [in, out] are for the few inputs that stand out, at most ``rests`` of a row;
    ``scales`` fp32 [out]; ``offsets`` int32 [out] are the sums of each channel's bytes times the
    activations' zero point; ``bias`` fp32 [out].
    """

    library: Library
    out_features: int
    in_features: int
    panels: torch.Tensor
    columns: torch.Tensor
    rests: int
    scales: torch.Tensor
    offsets: torch.Tensor
    bias: torch.Tensor | None

    # Activations are bytes around 128, at most this far from it.
    LIMIT = 127

    @classmethod
    def pack(cls, library: Library, weight: torch.Tensor, bias: torch.Tensor | None) -> PanelInt8Linear:
        """Of ``weight`` [out, in], in a multiple of 4, rounded row by row, and ``bias`` [out]."""
        whole, scales = rounded(weight)
        offsets = (whole.sum(1, dtype=torch.int32) * (cls.LIMIT + 1)).int()
        bias = None if bias is None else bias.float().contiguous()
        rests = library.most_rests(weight.shape[1])
        columns = whole.t().contiguous()
        return cls(
            library, len(weight), weight.shape[1], _panels(whole, 4), columns, rests, scales, offsets, bias
        )

    @property
    def gates(self) -> bool:
        """Whether its gates and its ups both end with a half panel, so that one pass multiplies them."""
        return self.out_features % _PANEL == 0

    def apply(self, x: torch.Tensor, kind: str | None, dtype: torch.dtype) -> torch.Tensor:
        """[T, in] -> [T, out] of ``dtype``; with the activation ``kind``, gated: [T, out / 2]."""
        rows = QuantizedRows.of(self.library, x, self.rests, self.LIMIT)
        out = x.new_empty(len(x), self.out_features // (1 if kind is None else 2), dtype=dtype)
        call = _product(self, rows.whole, self.panels, self.bias, out, kind)
        call.scales, call.offsets = self.scales.data_ptr(), self.offsets.data_ptr()
        call.row_scales, call.rests = rows.scales.data_ptr(), rows.rests.data_ptr()
        call.rest_counts, call.most_rests = rows.counts.data_ptr(), self.rests
        call.columns = self.columns.data_ptr()
        self.library.linear_int8(ctypes.byref(call))
        return out


def _panels(weight: torch.Tensor, inputs: int) -> torch.Tensor:
    """[out, in] -> [panels, in / inputs, 64, inputs], the last panel filled up with zeros."""
    out_features, in_features = weight.shape
    count = -(-out_features // _PANEL)
    panels = huge_pages((count, in_features // inputs, _PANEL, inputs), weight.dtype)
    whole = out_features // _PANEL
    grouped = weight.view(out_features, in_features // inputs, inputs)
    panels[:whole] = (
        grouped[: whole * _PANEL].view(whole, _PANEL, in_features // inputs, inputs).transpose(1, 2)
    )
    if whole < count:
        panels[whole, :, : out_features - whole * _PANEL] = grouped[whole * _PANEL :].transpose(0, 1)
    return panels


def _product(
    weight: PanelLinear | PanelInt8Linear,
    x: torch.Tensor,
    panels: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    kind: str | None,
) -> Product:
    return Product(
        x=x.data_ptr(),
        panels=panels.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        out=out.data_ptr(),
        rows=len(x),
        in_features=weight.in_features,
        out_features=weight.out_features,
        type=TYPES[out.dtype],
        activation=_ACTIVATIONS[kind],
        threads=torch.get_num_threads(),
    )
