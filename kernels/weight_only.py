"""Weights of 8 and of 4 bits that meet activations as they are: how they are stored and rounded.

Inputs are cut into chunks of 128, and a chunk of one output lies in one piece, chunk after chunk over all
outputs: what a tile of outputs reads at a time is one run of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

# Inputs of a chunk; in int4 also those that share a scale and a zero point.
CHUNK = 128

# Rows that are rounded at a time, so that temporaries stay small beside the weights.
_ROWS = 4096


@dataclass(frozen=True, slots=True)
class Int8Linear:
    """A weight in int8 with a scale for each output, and a bias [out].

    ``values`` int8 [chunks, out, 128]: inputs past the last are 0. ``scales`` fp32 [out].
    """

    values: torch.Tensor
    scales: torch.Tensor
    bias: torch.Tensor | None
    in_features: int

    @property
    def out_features(self) -> int:
        """Columns of the product."""
        return self.values.shape[1]

    def wide(self) -> torch.Tensor:
        """The weight that it stands for: fp32 [out, in]."""
        numbers = self.values.transpose(0, 1).flatten(1)[:, : self.in_features]
        return numbers.float() * self.scales[:, None]


@dataclass(frozen=True, slots=True)
class Int4Linear:
    """A weight in int4, each 128 inputs of an output with a scale and a zero point, and a bias [out].

    ``values`` uint8 [chunks, out, 64]: byte i has input i of its chunk in the low half, input i + 64 in
    the high one. ``scales`` bf16 and ``zeros`` int8, both [chunks, out]: a half h, 0 to 15, stands for
    (h - zero) * scale. What is stored past the last input means nothing.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    bias: torch.Tensor | None
    in_features: int

    @property
    def out_features(self) -> int:
        """Columns of the product."""
        return self.values.shape[1]

    def wide(self) -> torch.Tensor:
        """The weight that it stands for: fp32 [out, in]."""
        halves = torch.cat((self.values & 15, self.values >> 4), -1).float()
        numbers = (halves - self.zeros[..., None]) * self.scales[..., None].float()
        return numbers.transpose(0, 1).flatten(1)[:, : self.in_features]


WeightOnlyLinear = Int8Linear | Int4Linear


def pack_int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Int8Linear:
    """Round each row of ``weight`` [out, in] to int8; its largest magnitude becomes 127."""
    outputs, inputs = weight.shape
    values = torch.empty((-(-inputs // CHUNK), outputs, CHUNK), dtype=torch.int8, device=weight.device)
    scales = torch.empty(outputs, dtype=torch.float32, device=weight.device)
    for start in range(0, outputs, _ROWS):
        part = slice(start, start + _ROWS)
        chunks = _chunks(weight[part])
        scales[part] = (chunks.abs().amax((0, 2)) / 127.0).clamp_min(1e-12)
        values[:, part] = (chunks / scales[part, None]).round().clamp(-127, 127).to(torch.int8)
    return Int8Linear(values, scales, bias, inputs)


def pack_int4(weight: torch.Tensor, bias: torch.Tensor | None) -> Int4Linear:
    """Round ``weight`` [out, in] to int4, the range of each group in fifteen steps."""
    outputs, inputs = weight.shape
    chunks, device = -(-inputs // CHUNK), weight.device
    values = torch.empty((chunks, outputs, CHUNK // 2), dtype=torch.uint8, device=device)
    scales = torch.empty((chunks, outputs), dtype=torch.bfloat16, device=device)
    zeros = torch.empty((chunks, outputs), dtype=torch.int8, device=device)
    for start in range(0, outputs, _ROWS):
        part = slice(start, start + _ROWS)
        halves, scales[:, part], zeros[:, part] = _round_to_int4(_chunks(weight[part]))
        values[:, part] = halves[..., : CHUNK // 2] | (halves[..., CHUNK // 2 :] << 4)
    return Int4Linear(values, scales, zeros, bias, inputs)


def _chunks(weight: torch.Tensor) -> torch.Tensor:
    """``weight`` [rows, in] filled up with zeros: fp32 [chunks, rows, 128]."""
    rows, inputs = weight.shape
    return F.pad(weight.float(), (0, -inputs % CHUNK)).view(rows, -1, CHUNK).transpose(0, 1)


def _round_to_int4(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Halves uint8, scales bf16 and zero points int8 of ``groups`` fp32 [.., 128].

    A group's range reaches to 0 at least, which then is one of the 16 numbers: zeros stay zeros.
    """
    low, high = groups.amin(-1).clamp_max(0.0), groups.amax(-1).clamp_min(0.0)
    scales = ((high - low) / 15.0).clamp_min(1e-12).bfloat16()
    # Weights are rounded by the scale as it is stored.
    steps = scales.float()
    zeros = (-low / steps).round().clamp(0, 15)
    halves = ((groups / steps[..., None]).round() + zeros[..., None]).clamp(0, 15)
    return halves.to(torch.uint8), scales, zeros.to(torch.int8)
