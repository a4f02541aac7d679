"""Matrix products of our own: weights in panels of 32 outputs, in bf16 or int8 (linear.cpp)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """A bf16 weight in panels; ``bias`` fp32 [out].

    ``_call`` says what is the same in every product with it. One product runs at a time.
    """

    library: Library
    out_features: int
    in_features: int
    panels: torch.Tensor
    bias: torch.Tensor | None
    _call: Product

    @classmethod
    def pack(cls, library: Library, weight: torch.Tensor, bias: torch.Tensor | None) -> PanelLinear:
        """Of ``weight`` bf16 [out, in], in even, and ``bias`` [out]."""
        bias = None if bias is None else bias.float().contiguous()
        out_features, in_features = weight.shape
        panels = _panels(weight, 2)
        call = _product(panels, bias, in_features, out_features)
        return cls(library, out_features, in_features, panels, bias, call)

    @property
    def gates(self) -> bool:
        """Whether its gates and its ups both end with a panel, so that one pass multiplies them."""
        return self.out_features % (2 * _PANEL) == 0

    @property
    def kernel(self) -> Any:
        """What takes its calls."""
        return self.library.linear

    @property
    def choice(self) -> Any:
        """What takes its calls where only each row's largest output is asked for."""
        return self.library.choose

    def scratch_bytes(self, rows: int) -> int:
        """None."""
        return 0

    def call(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor, kind: str | None) -> Product:
        """bf16 ``x`` [T, in] -> ``out`` [T, out]; with the activation ``kind``, gated: [T, out / 2]."""
        return _filled(self._call, x, out, kind)


@dataclass(frozen=True, slots=True)
class PanelInt8Linear:
    """An int8 weight in panels, turned by :func:`turned`, each byte 128 more than it stands for.

    ``scales`` fp32 [out], one for each output channel; ``bias`` fp32 [out]. The activations are turned
    and rounded to bytes in the product's own pass, with a scale for each row's group of 64. ``_call`` is
    as in :class:`PanelLinear`.
    """

    library: Library
    out_features: int
    in_features: int
    panels: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    _call: Product

    @classmethod
    def pack(cls, library: Library, weight: torch.Tensor, bias: torch.Tensor | None) -> PanelInt8Linear:
        """Of ``weight`` [out, in], turned and rounded row by row, and ``bias`` [out]."""
        whole, scales = rounded(turned(weight))
        panels = _panels(whole.view(torch.uint8) ^ 128, 4)
        bias = None if bias is None else bias.float().contiguous()
        out_features, in_features = weight.shape
        call = _product(panels, bias, in_features, out_features)
        call.scales = scales.data_ptr()
        return cls(library, out_features, in_features, panels, scales, bias, call)

    @property
    def gates(self) -> bool:
        """Whether its gates and its ups both end with a panel, so that one pass multiplies them."""
        return self.out_features % (2 * _PANEL) == 0

    @property
    def kernel(self) -> Any:
        """What takes its calls."""
        return self.library.linear_int8

    @property
    def choice(self) -> Any:
        """What takes its calls where only each row's largest output is asked for."""
        return self.library.choose_int8

    def scratch_bytes(self, rows: int) -> int:
        """For the rows' bytes and scales."""
        return rows * -(-self.in_features // _GROUP) * (_GROUP + _GROUP_BYTES)

    def call(self, x: torch.Tensor, out: torch.Tensor, scratch: torch.Tensor, kind: str | None) -> Product:
        """``x`` [T, in] -> ``out`` [T, out]; with the activation ``kind``, gated: [T, out / 2].

        ``scratch`` uint8, as much as ``scratch_bytes`` says.
        """
        self._call.scratch = scratch.data_ptr()
        return _filled(self._call, x, out, kind)


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
    panels: torch.Tensor, bias: torch.Tensor | None, in_features: int, out_features: int
) -> Product:
    """What is the same in every product with a weight."""
    return Product(
        panels=panels.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        in_features=in_features,
        out_features=out_features,
    )


def _filled(call: Product, x: torch.Tensor, out: torch.Tensor, kind: str | None) -> Product:
    """``call`` with this input and output."""
    call.x, call.x_type, call.rows = x.data_ptr(), TYPES[x.dtype], x.shape[0]
    call.out, call.type, call.activation = out.data_ptr(), TYPES[out.dtype], _ACTIVATIONS[kind]
    call.threads = torch.get_num_threads()
    return call
