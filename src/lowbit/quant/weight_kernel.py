"""Fake quantization of a weight as one kernel, with diagonal maps folded into it.

A learned step quantizes every weight of a block: it multiplies columns by a diagonal map's factors, divides rows by
another's, finds the ends of each group's range, shrinks them by clipping ratios, and rounds. As single operations
that is some sixty accesses of each weight, forward and backward. One kernel reads the weight twice and writes it
once; another, backward, reads weight and gradient again and recomputes everything. Nothing is kept in between.

``naive`` is the same in plain operations and defines the numbers: the kernel equals it bit for bit, and its gradients
within the rounding of float32 sums. Kernels run within ``on()`` alone, and elsewhere nothing changes.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lowbit.errors import LowbitError

Ratio = Tensor | float
SCALES = (torch.float16, torch.float32)
_using: list[bool] = [False]


@dataclass(frozen=True)
class Diagonals:
    """Diagonal maps on both sides of a weight ``(out, in)``: ``weight * columns / rows``.

    Attributes:
        columns: factors ``(in,)``; ``None``: 1.
        rows: divisors ``(out,)``; ``None``: 1.
    """

    columns: Tensor | None = None
    rows: Tensor | None = None

    def of(self, weight: Tensor) -> Tensor:
        """The weight between them.

        >>> Diagonals(torch.tensor([2.0, 4.0]), torch.tensor([8.0])).of(torch.ones(1, 2)).tolist()
        [[0.25, 0.5]]
        """
        scaled = weight if self.columns is None else weight * self.columns
        return scaled if self.rows is None else scaled / self.rows[:, None]


NO_MAPS = Diagonals()


def check_kernels(device: str) -> None:
    """Refuse a device on which the kernels do not run.

    Raises:
        LowbitError: Triton is missing, or there is neither a GPU nor Triton's interpreter.
    """
    if importlib.util.find_spec("triton") is None:
        raise LowbitError("kernels need Triton: pip install triton, or leave them out")
    if not device.startswith("cuda") and os.environ.get("TRITON_INTERPRET") != "1":
        raise LowbitError(
            f"kernels on {device}: they need an NVIDIA GPU, or Triton's interpreter: use --device cuda, or set "
            "TRITON_INTERPRET=1"
        )


@contextmanager
def on(device: str = "cuda") -> Iterator[None]:
    """Within the context weights of integer formats are quantized by the kernel. Not thread-safe.

    Raises:
        LowbitError: as for ``check_kernels``.
    """
    check_kernels(device)
    before, _using[0] = _using[0], True
    try:
        yield
    finally:
        _using[0] = before


def within() -> bool:
    """Whether kernels are asked for."""
    return _using[0]


class Kind(Protocol):
    """What a kernel and its plain form need of a format of integers."""

    @property
    def group(self) -> int | None:
        """Consecutive values that share a scale; ``None``: the row."""

    @property
    def levels(self) -> int:
        """The largest code."""

    @property
    def symmetric(self) -> bool:
        """The zero point is fixed at the middle."""

    @property
    def scale_dtype(self) -> torch.dtype:
        """Of the stored scales."""

    def groups(self, columns: int) -> int:
        """Number of groups in a row."""

    def qparams(self, weight: Tensor, low: Ratio = 1.0, high: Ratio = 1.0) -> Any:
        """Scale and zero point of each group."""

    def fake_quant(self, weight: Tensor, qparams: Any) -> Tensor:
        """The weight rounded to nearest."""


def takes(weight: Tensor, group: int | None) -> bool:
    """Whether a kernel is asked for and can quantize this weight: float32, groups divide its width.

    Its format must have one, see ``Format.has_kernel``.
    """
    fits = weight.dtype == torch.float32 and weight.ndim == 2
    return _using[0] and fits and weight.shape[1] % (group or weight.shape[1]) == 0


def naive(weight: Tensor, format: Kind, low: Ratio = 1.0, high: Ratio = 1.0, maps: Diagonals = NO_MAPS) -> Tensor:
    """The plain form of ``fake_quant``."""
    scaled = maps.of(weight)
    return format.fake_quant(scaled, format.qparams(scaled, low, high))


def fake_quant(
    weight: Tensor, format: Kind, low: Ratio = 1.0, high: Ratio = 1.0, maps: Diagonals = NO_MAPS
) -> Tensor:
    """``weight`` between its maps, rounded to nearest, by the kernel; differentiable in all tensors.

    Args:
        weight: ``(rows, columns)``, float32.
        format: integers whose groups divide the columns.
        low, high: clipping ratios ``(rows, groups)``, or what broadcasts to them.
        maps: diagonals on both sides.

    Raises:
        LowbitError: the format's groups do not divide the columns.
    """
    shape = (weight.shape[0], format.groups(weight.shape[1]))
    ratios = (torch.as_tensor(ratio, dtype=weight.dtype, device=weight.device).expand(shape) for ratio in (low, high))
    out: Tensor = _FakeQuant.apply(weight, maps.columns, maps.rows, *ratios, format)
    return out


class _FakeQuant(torch.autograd.Function):
    """The kernel forward, and the one that recomputes backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, columns: Tensor | None, rows: Tensor | None, low: Tensor, high: Tensor,
                format: Kind) -> Tensor:  # fmt: skip
        from lowbit.quant import weight_triton as kernels

        weight, low, high = weight.contiguous(), low.contiguous(), high.contiguous()
        ctx.save_for_backward(weight, columns, rows, low, high)
        ctx.format = format
        out = torch.empty_like(weight)
        given = _given(weight, columns, rows)
        shape = (weight.shape[0], weight.shape[1], low.shape[1])
        kernels.forward_kernel[kernels.programs(weight, _size(weight, format))](
            weight, *given, low, high, out, *shape, **_constants(weight, columns, rows, format)
        )
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        from lowbit.quant import weight_triton as kernels

        weight, columns, rows, low, high = ctx.saved_tensors
        grid = kernels.programs(weight, _size(weight, ctx.format))
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[0] else weight
        # A part for each program over rows, and for each group of a row.
        to_columns = weight if columns is None else weight.new_empty(grid[0], weight.shape[1])
        to_rows, to_low, to_high = (torch.empty_like(low) for _ in range(3))
        shape = (weight.shape[0], weight.shape[1], low.shape[1])
        kernels.backward_kernel[grid](
            weight, *_given(weight, columns, rows), low, high, grads[0].contiguous(),
            to_weight, to_columns, to_rows, to_low, to_high, *shape,
            **_constants(weight, columns, rows, ctx.format), TO_WEIGHT=ctx.needs_input_grad[0],
        )  # fmt: skip
        return (
            to_weight if ctx.needs_input_grad[0] else None,
            None if columns is None else to_columns.sum(0),
            None if rows is None else to_rows.sum(1),
            to_low,
            to_high,
            None,
        )


def _given(weight: Tensor, columns: Tensor | None, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """The factors; in place of missing ones a tensor that is not read."""
    return tuple(weight if one is None else one.contiguous() for one in (columns, rows))  # type: ignore[return-value]


def _size(weight: Tensor, format: Kind) -> int:
    return format.group or weight.shape[1]


def _constants(weight: Tensor, columns: Tensor | None, rows: Tensor | None, format: Kind) -> dict[str, Any]:
    """What the kernels are compiled for."""
    from lowbit.quant import weight_triton as kernels

    size, stored = _size(weight, format), torch.finfo(format.scale_dtype)
    height, block = kernels.tile(size)
    return {
        "SIZE": size,
        "HAS_COLUMNS": columns is not None,
        "HAS_ROWS": rows is not None,
        "LEVELS": format.levels,
        "SYMMETRIC": format.symmetric,
        "HALF": format.scale_dtype == torch.float16,
        "SMALLEST": stored.smallest_normal * stored.eps,
        "LARGEST": stored.max,
        "ROWS": height,
        "BLOCK": block,
        "enable_fp_fusion": False,
    }
