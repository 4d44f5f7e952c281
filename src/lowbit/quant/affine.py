"""The number core: one integer grid, ``value = (code - zero) * scale``.

Every number in ``lowbit`` that is rounded goes through this file, and every exporter reads ``QTensor`` alone.
Choices:

* Codes are unsigned, ``0 .. 2**bits - 1``; a symmetric grid is one whose zero is ``2**(bits - 1)``. One
  formula then covers both, and every file format is a relabelling of it.
* The scale is rounded to the dtype in which it will be stored *before* a code is chosen. What is simulated
  is then what is shipped, bit for bit; rounding the scale afterwards would move every value a little.
* The zero is an integer in the range of the codes, so that every format can store it. A group whose values
  all have one sign therefore gets a range that includes 0.
* Rejected: a signed representation beside this one, float zero points (no runtime but one has them), and
  tensor subclasses (they hide the arithmetic that this project is about).

Activations follow the arithmetic of ``compressed-tensors``, operation for operation, so that a checkpoint
gives the same logits in stock ``transformers`` as in the simulation: see ``fake_quant_tokens``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.errors import LowbitError

MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True)
class QuantSpec:
    """A number format; it holds nothing about how its grid was found.

    Attributes:
        bits: width of a code, 2 to 8.
        group_size: consecutive values of a row that share a scale; ``None`` for one group a row (an output
            channel of a weight, a token of an activation).
        symmetric: the zero is fixed at the middle of the range.
        scale_dtype: the dtype in which scales are stored; they are rounded to it before codes are chosen.
    """

    bits: int
    group_size: int | None = None
    symmetric: bool = True
    scale_dtype: torch.dtype = field(default=torch.float16)

    def __post_init__(self) -> None:
        if not MIN_BITS <= self.bits <= MAX_BITS:
            raise LowbitError(f"{self.bits} bits given; {MIN_BITS} to {MAX_BITS} are allowed")
        if self.group_size is not None and self.group_size < 2:
            raise LowbitError(f"group size {self.group_size} given; it must be 2 or more, or left out")

    @property
    def levels(self) -> int:
        """The largest code, ``2**bits - 1``."""
        return 2**self.bits - 1

    def groups(self, columns: int) -> int:
        """How many groups a row of ``columns`` values has; a size that does not divide it is an error."""
        size = self.group_size or columns
        if columns % size:
            usable = ", ".join(str(g) for g in usable_group_sizes(columns))
            raise LowbitError(f"group size {size} does not divide a width of {columns}; usable sizes: {usable}")
        return columns // size

    def bits_per_value(self, columns: int) -> float:
        """Stored bits per value of a row: codes, scales and (where they are free) zeros.

        >>> QuantSpec(4, 128).bits_per_value(4096)
        4.125
        """
        scale_bits = torch.finfo(self.scale_dtype).bits
        overhead = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + overhead * self.groups(columns) / columns


def usable_group_sizes(columns: int) -> list[int]:
    """Divisors of ``columns`` from 16 to 256 that are multiples of 16, the sizes that runtimes take.

    >>> usable_group_sizes(576)
    [16, 32, 48, 64, 96, 144, 192]
    """
    return [g for g in range(16, 257, 16) if columns % g == 0 and g <= columns]


class Grid(NamedTuple):
    """Where the codes lie: ``value = (code - zero) * scale``.

    Both are ``(rows, groups)`` in the compute dtype; ``scale`` holds values of the spec's ``scale_dtype``, and
    ``zero`` holds integers in ``[0, 2**bits - 1]``.
    """

    scale: Tensor
    zero: Tensor


@dataclass(frozen=True)
class QTensor:
    """A rounded weight: the only thing that an exporter reads.

    ``codes`` is ``uint8 (rows, columns)``, ``grid`` is ``(rows, groups)`` twice.
    """

    codes: Tensor
    grid: Grid
    spec: QuantSpec

    def dequantize(self) -> Tensor:
        """The values that the codes stand for, ``(rows, columns)``, in the dtype of the grid."""
        grouped = _group(self.codes.to(self.grid.scale.dtype), self.spec)
        return _ungroup((grouped - self.grid.zero[..., None]) * self.grid.scale[..., None])

    @property
    def stored_bits(self) -> float:
        """Bits that codes, scales and zeros take together."""
        return self.codes.numel() * self.spec.bits_per_value(self.codes.shape[-1])


class _Round(torch.autograd.Function):
    """Rounding to the nearest integer (ties to even) with the identity as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> Tensor:
        return grad[0]


def round_ste(x: Tensor) -> Tensor:
    """``round(x)`` whose gradient is 1 everywhere (straight-through estimator; Bengio et al. 2013)."""
    return _Round.apply(x)


class _Store(torch.autograd.Function):
    """A round trip through a storage dtype with the identity as its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, None]:
        return grad[0], None


def round_trip(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` as ``dtype`` holds it, in its own dtype again; differentiable as the identity."""
    return _Store.apply(x, dtype)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` as ``dtype`` can hold it, never 0 and never infinite; differentiable as the identity.

    A scale below the smallest number of the dtype becomes that number: a row of zeros stays exact, and a row
    of very small values keeps what the format can express.

    >>> stored_scale(torch.tensor([0.1, 0.0]), torch.float16).tolist()
    [0.0999755859375, 5.960464477539063e-08]
    """
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps  # the smallest subnormal
    return _Store.apply(scale.clamp(smallest, info.max), dtype)


def minmax_grid(weight: Tensor, spec: QuantSpec, low: Tensor | float = 1.0, high: Tensor | float = 1.0) -> Grid:
    """The grid that spans each group's range, shrunk by ``low`` and ``high``.

    Args:
        weight: ``(rows, columns)``.
        spec: the format.
        low: factor on each group's minimum, ``(rows, groups)`` or a number; 1 leaves the range alone.
        high: the same for the maximum. A symmetric grid takes the larger of the two shrunken ends.

    The range always includes 0. Differentiable in ``weight``, ``low`` and ``high``.

    >>> grid = minmax_grid(torch.tensor([[-1.0, 0.0, 0.5, 2.0]]), QuantSpec(2, symmetric=False))
    >>> grid.scale.tolist(), grid.zero.tolist()
    ([[1.0]], [[1.0]])
    """
    bottom, top = weight_ends(weight, spec)
    return range_grid(bottom * low, top * high, spec)


def weight_ends(weight: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The ends of each group's range, 0 included, ``(rows, groups)`` each; differentiable."""
    grouped = _group(weight, spec)
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def range_grid(bottom: Tensor, top: Tensor, spec: QuantSpec) -> Grid:
    """The grid from ``bottom`` (0 or less) to ``top`` (0 or more), ``(rows, groups)`` each; differentiable in both.

    A symmetric grid takes the larger of the two for both sides.

    >>> grid = range_grid(torch.tensor([[-1.0]]), torch.tensor([[2.0]]), QuantSpec(2, symmetric=False))
    >>> grid.scale.tolist(), grid.zero.tolist()
    ([[1.0]], [[1.0]])
    """
    if spec.symmetric:
        scale = stored_scale(torch.maximum(top, -bottom) / (spec.levels / 2), spec.scale_dtype)
        return Grid(scale, torch.full_like(scale, 2 ** (spec.bits - 1)))
    scale = stored_scale((top - bottom) / spec.levels, spec.scale_dtype)
    return Grid(scale, round_ste(-bottom / scale).clamp(0, spec.levels))


def _codes(weight: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """The nearest codes, as floats, grouped ``(rows, groups, size)``; differentiable inside the range."""
    steps = round_ste(_group(weight, spec) / grid.scale[..., None])
    return (steps + grid.zero[..., None]).clamp(0, spec.levels)


def fake_quant(weight: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """``weight`` moved to the nearest points of ``grid``: what ``quantize(...).dequantize()`` gives, bit for bit.

    Differentiable in the weight and the grid (straight-through rounding).

    >>> spec = QuantSpec(2, symmetric=False)
    >>> w = torch.tensor([[-1.0, 0.0, 0.6, 2.0]])
    >>> fake_quant(w, minmax_grid(w, spec), spec).tolist()
    [[-1.0, 0.0, 1.0, 2.0]]
    """
    return _ungroup((_codes(weight, grid, spec) - grid.zero[..., None]) * grid.scale[..., None])


def quantize(weight: Tensor, grid: Grid, spec: QuantSpec) -> QTensor:
    """Round ``weight`` ``(rows, columns)`` to the nearest codes of ``grid``."""
    with torch.no_grad():
        codes = _ungroup(_codes(weight, grid, spec)).to(torch.uint8)
    return QTensor(codes, Grid(grid.scale.detach(), grid.zero.detach()), spec)


def fake_quant_tokens(
    x: Tensor,
    spec: QuantSpec,
    low: Tensor | float = 1.0,
    high: Tensor | float = 1.0,
    offset: Tensor | None = None,
) -> Tensor:
    """Activations rounded on the fly, one range for each vector along the last axis (a token, or token and head).

    The operations and their order are those of ``compressed-tensors`` 0.20 for ``strategy: token, dynamic:
    true``: signed codes, ``scale = (max - min) / (2**b - 1)`` with a range that includes 0 (symmetric: ``absmax
    / ((2**b - 1) / 2)``), the zero rounded once, and ``round(x / scale + zero)``. A different order would round
    ties differently, and then logits would differ from what runs. The scale is not stored anywhere, so it keeps
    the compute dtype. Gradients pass straight through the rounding and reach the range.

    ``low`` and ``high`` shrink the ends of every range; what lies beyond is clipped. ``offset``
    is added before rounding, in steps, one for each channel ``(width,)``. No stock runtime does either.

    >>> fake_quant_tokens(torch.tensor([[0.0, 1.0, 2.0, 3.1]]), QuantSpec(2, symmetric=False)).tolist()
    [[0.0, 1.0333333015441895, 2.066666603088379, 3.0999999046325684]]
    """
    bottom, top = token_ends(x)
    scale, zero = token_grid(bottom * low, top * high, spec)
    return on_token_grid(x, scale, zero, offset, spec)


def token_ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of each token's range, 0 included, ``(..., 1)`` each; differentiable."""
    return x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)


def token_grid(bottom: Tensor, top: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of ranges from ``bottom`` to ``top``, ``(..., 1)`` each; a symmetric format has no zero."""
    eps = torch.finfo(bottom.dtype).eps
    if spec.symmetric:
        scale = torch.maximum(bottom.abs(), top.abs()) / (spec.levels / 2)
        return torch.where(scale == 0, eps, scale), None
    scale = (top - bottom) / spec.levels
    # An all-zero vector has scale 0; any positive scale then gives zeros, and eps is what the library takes.
    scale = torch.where(scale == 0, eps, scale)
    code_min, code_max = _token_codes(spec)
    return scale, round_ste((code_min - bottom / scale).clamp(code_min, code_max))


def on_token_grid(x: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, spec: QuantSpec) -> Tensor:
    """Activations at the nearest points of the grids of ``token_grid``; see ``fake_quant_tokens``."""
    code_min, code_max = _token_codes(spec)
    steps = x / scale if offset is None else x / scale + offset
    if zero is None:
        return round_ste(steps.clamp(code_min, code_max)) * scale
    return (round_ste((steps + zero).clamp(code_min, code_max)) - zero) * scale


def _token_codes(spec: QuantSpec) -> tuple[int, int]:
    """The least and the largest signed code."""
    return -(2 ** (spec.bits - 1)), 2 ** (spec.bits - 1) - 1


def _group(x: Tensor, spec: QuantSpec) -> Tensor:
    """``(rows, columns) -> (rows, groups, size)``."""
    return x.unflatten(-1, (spec.groups(x.shape[-1]), -1))


def _ungroup(x: Tensor) -> Tensor:
    """``(rows, groups, size) -> (rows, columns)``."""
    return x.flatten(-2)
