"""Matrix products through oneDNN with packed weights, in the model's dtype or in int8."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from batchinfer.kernels.cpu.build import cpu_flags
from batchinfer.kernels.cpu.library import TYPES, Library
from batchinfer.kernels.cpu.quantized import QuantizedRows, rounded


@dataclass(frozen=True, slots=True)
class Linear:
    """A weight packed by oneDNN (``packed``) or as it is; computed in ``dtype``."""

    out_features: int
    in_features: int
    weight: torch.Tensor
    bias: torch.Tensor | None
    dtype: torch.dtype
    packed: bool

    @classmethod
    def pack(cls, weight: torch.Tensor, bias: torch.Tensor | None) -> Linear:
        """Of ``weight`` [out, in] and ``bias`` [out]; fp16 becomes fp32."""
        out_features, in_features = weight.shape
        packed = bool(torch._C._has_mkldnn)
        if weight.dtype == torch.bfloat16:
            packed = packed and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
        dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
        weight = weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        return cls(out_features, in_features, weight, bias, dtype, packed)

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out], in x's dtype."""
        y: torch.Tensor
        given = x.dtype
        if given != self.dtype:
            x = x.to(self.dtype)
        if self.packed and len(x) > 0:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        elif self.packed:
            y = x.new_empty(0, self.out_features)
        else:
            y = torch.nn.functional.linear(x, self.weight, self.bias)
        return y if y.dtype == given else y.to(given)


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """A weight in int8 with a scale for each output channel.

    ``packed`` by oneDNN, and ``columns`` int8 [in, out] for the few inputs that stand out; ``scales``
    fp32 [out], ``zeros`` int32 [out], ``bias`` fp32 [out]; ``rests`` is how many inputs of a row can
    stand out. Activations are bytes around ``limit`` + 1.
    """

    library: Library
    out_features: int
    in_features: int
    packed: torch.Tensor
    columns: torch.Tensor
    rests: int
    limit: int
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def pack(cls, library: Library, weight: torch.Tensor, bias: torch.Tensor | None) -> Int8Linear:
        """Of ``weight`` [out, in], rounded row by row, and ``bias`` [out]."""
        whole, scales = rounded(weight)
        return cls(
            library,
            weight.shape[0],
            weight.shape[1],
            torch.ops.onednn.qlinear_prepack(whole, None),
            whole.t().contiguous(),
            library.most_rests(weight.shape[1]),
            # Without VNNI a product of bytes adds pairs in 16 bits: 7-bit activations can't overflow it.
            127 if cpu_flags() & {"avx512_vnni", "avx_vnni"} else 63,
            scales,
            torch.zeros(len(scales), dtype=torch.int32),
            None if bias is None else bias.float().contiguous(),
        )

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """[T, in] -> [T, out], in x's dtype."""
        x = x.contiguous()
        rows, size = x.shape
        out = x.new_empty(rows, self.out_features)
        if rows == 0:
            return out
        x8 = QuantizedRows.of(self.library, x, self.rests, self.limit)
        product = torch.ops.onednn.qlinear_pointwise(
            x8.whole,
            1.0,
            self.limit + 1,
            self.packed,
            self.scales,
            self.zeros,
            None,
            1.0,
            0,
            torch.float32,
            "none",
            [],
            "",
        )
        self.library.finish_rows(
            TYPES[x.dtype],
            product.data_ptr(),
            out.data_ptr(),
            x8.scales.data_ptr(),
            x8.rests.data_ptr(),
            x8.counts.data_ptr(),
            self.columns.data_ptr(),
            self.scales.data_ptr(),
            None if self.bias is None else self.bias.data_ptr(),
            rows,
            self.out_features,
            size,
            torch.get_num_threads(),
        )
        return out
