"""Fake quantization as fused kernels on a GPU: the same numbers, fewer passes over memory.

Rounding a weight is a chain of elementwise operations, each of which reads and writes the whole weight, forward and
backward. Within ``on()`` Inductor fuses the chain for CUDA tensors; elsewhere, and by default, it runs as written.

What is trained must be what ships, bit for bit, so only that is compiled which a fused kernel computes as the plain
operations do. Ranges are maxima, exact in any order. In the elementwise part a value is divided, rounded, shifted,
clamped and multiplied; Inductor is told to divide as IEEE 754 says, not to contract products with sums, and to round
to 16 bits after each operation where the plain one does. The small arithmetic between the two, on one number for
each group (dividing by the levels, the scale's round trip through float16, the zero), is not compiled: it costs
nothing, and there eager CUDA itself takes short cuts, such as a product with a reciprocal, that a kernel would not.
Gradients are sums in another order, and differ in their last bits.

A GPU's test compares both, bit for bit. Were the running torch without one of the settings, ``on()`` refuses.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.affine import (
    Grid,
    QuantSpec,
    fake_quant,
    minmax_grid,
    on_token_grid,
    range_grid,
    token_ends,
    token_grid,
    weight_ends,
)
from lowbit.quant.affine import fake_quant_tokens as plain_tokens

# What each setting is called in Inductor, from the newest name back.
SETTINGS = (("eager_numerics.division_rounding", "emulate_divison_rounding"), ("emulate_precision_casts",))
ALSO = ("eager_numerics.disable_ftz",)  # keeps numbers below 1e-38; older versions have no such setting
GRAPHS = 256  # shapes and formats of one run; Dynamo gives up at 8

_using: list[bool] = [False]


def options() -> dict[str, bool]:
    """Inductor's settings for the numbers of eager operations, by the names that the running torch has.

    Raises:
        LowbitError: it has no name for one of them.
    """
    known = set(torch._inductor.list_options())
    out = {}
    for names in SETTINGS:
        found = [name for name in names if name in known]
        if not found:
            raise LowbitError(
                f"torch {torch.__version__} given; its compiler cannot keep eager numerics ({names[0]}): use torch "
                "2.10 or newer, or do not compile"
            )
        out[found[0]] = True
    return out | {name: True for name in ALSO if name in known}


def check_compiler(device: str) -> None:
    """Refuse what ``on`` cannot do for ``device``, before any work.

    Raises:
        LowbitError: no NVIDIA GPU, no Triton, or a torch that cannot keep eager numerics.
    """
    if not device.startswith("cuda"):
        raise LowbitError(f"--compile with --device {device}: kernels are fused for an NVIDIA GPU; use --device cuda")
    if importlib.util.find_spec("triton") is None:
        raise LowbitError("--compile needs Triton: pip install triton, or leave --compile out")
    options()


@contextmanager
def on() -> Iterator[None]:
    """Within it the functions of this file are compiled for CUDA tensors.

    The first call for each shape and format takes seconds. Not for several threads.

    Raises:
        LowbitError: the running torch cannot compile them to the same numbers.
    """
    options()
    before, _using[0] = _using[0], True
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=8 * GRAPHS):
            yield
    finally:
        _using[0] = before


def rounded_weight(weight: Tensor, spec: QuantSpec, low: Tensor | float = 1.0, high: Tensor | float = 1.0) -> Tensor:
    """``fake_quant(weight, minmax_grid(weight, spec, low, high), spec)``, see ``quant``."""
    if not _compiles(weight):
        return fake_quant(weight, minmax_grid(weight, spec, low, high), spec)
    bottom, top = compiled(weight_ends, spec)(weight)
    return on_grid(weight, range_grid(bottom * low, top * high, spec), spec)


def on_grid(weight: Tensor, grid: Grid, spec: QuantSpec) -> Tensor:
    """``quant.fake_quant``."""
    if not _compiles(weight):
        return fake_quant(weight, grid, spec)
    return compiled(_on_grid, spec)(weight, *grid)


def fake_quant_tokens(
    x: Tensor,
    spec: QuantSpec,
    low: Tensor | float = 1.0,
    high: Tensor | float = 1.0,
    offset: Tensor | None = None,
) -> Tensor:
    """``quant.fake_quant_tokens``."""
    if not _compiles(x):
        return plain_tokens(x, spec, low, high, offset)
    bottom, top = compiled(_token_ends, spec)(x)
    scale, zero = token_grid(bottom * low, top * high, spec)
    return compiled(_on_token_grid, spec)(x, scale, zero, offset)


def _compiles(x: Tensor) -> bool:
    return _using[0] and x.device.type == "cuda"


@cache
def compiled(function: Callable[..., Any], spec: QuantSpec) -> Callable[..., Any]:
    """``function`` of tensors and ``spec`` as fused kernels; a graph for each shape, and the format is a constant."""

    def with_spec(*tensors: Tensor | None) -> Any:
        return function(*tensors, spec)

    return torch.compile(with_spec, fullgraph=True, dynamic=False, options=dict(options()))


def _on_grid(weight: Tensor, scale: Tensor, zero: Tensor, spec: QuantSpec) -> Tensor:
    return fake_quant(weight, Grid(scale, zero), spec)


def _token_ends(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    return token_ends(x)


def _on_token_grid(x: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, spec: QuantSpec) -> Tensor:
    return on_token_grid(x, scale, zero, offset, spec)
