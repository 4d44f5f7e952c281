"""Fake quantization as fused kernels on a GPU: the same numbers, fewer passes over memory.

Fake quantization is a chain of elementwise operations, each of which reads and writes the whole weight, forward and
backward. Within ``on()`` Inductor fuses the chain for CUDA tensors; elsewhere, and by default, it runs eagerly.

Trained and stored weights must be equal bit for bit, so only operations that a fused kernel computes exactly as eager
mode does are compiled. Ranges are maxima, exact in any order. The elementwise part divides, rounds, shifts, clamps
and multiplies; Inductor is configured for IEEE 754 division, no contraction of products with sums, and rounding to 16
bits after each operation where eager mode rounds. The arithmetic on one number per group between the two (division by
the levels, the scale's round trip through float16, the zero point) is not compiled: its cost is negligible, and eager
CUDA uses shortcuts there, such as multiplication by a reciprocal, that a kernel would not. Gradients are summed in
another order and differ in their last bits.

A GPU test compares both, bit for bit. ``on()`` refuses a torch version that lacks one of the settings.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError

# The names of each setting in Inductor, newest first.
SETTINGS = (("eager_numerics.division_rounding", "emulate_divison_rounding"), ("emulate_precision_casts",))
ALSO = ("eager_numerics.disable_ftz",)  # keeps numbers below 1e-38; older versions have no such setting
GRAPHS = 256  # shapes and formats of one run; Dynamo gives up at 8

_using: list[bool] = [False]


def options() -> dict[str, bool]:
    """Inductor's settings for eager numerics, under their names in the installed torch.

    Raises:
        LowbitError: torch lacks one of the settings.
    """
    known = set(torch._inductor.list_options())
    out = {}
    for names in SETTINGS:
        available = [name for name in names if name in known]
        if not available:
            raise LowbitError(
                f"torch {torch.__version__} installed; its compiler cannot keep eager numerics ({names[0]}): use "
                "torch 2.10 or newer, or do not compile"
            )
        out[available[0]] = True
    return out | {name: True for name in ALSO if name in known}


def check_compiler(device: str) -> None:
    """Refuse a device or an environment that ``on`` does not support, before any work.

    Raises:
        LowbitError: no NVIDIA GPU, no Triton, or a torch version that cannot keep eager numerics.
    """
    if not device.startswith("cuda"):
        raise LowbitError(f"--compile with --device {device}: fused kernels need an NVIDIA GPU; use --device cuda")
    if importlib.util.find_spec("triton") is None:
        raise LowbitError("--compile needs Triton: pip install triton, or omit --compile")
    options()


@contextmanager
def on() -> Iterator[None]:
    """Within the context, fake quantization of CUDA tensors is compiled.

    The first call for each shape and format takes seconds. Not thread-safe.

    Raises:
        LowbitError: the installed torch cannot keep eager numerics.
    """
    options()
    previous, _using[0] = _using[0], True
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=8 * GRAPHS):
            yield
    finally:
        _using[0] = previous


def active(x: Tensor) -> bool:
    """Whether operations on ``x`` are to be fused: within ``on()``, on a GPU."""
    return _using[0] and x.device.type == "cuda"


@cache
def compiled(function: Callable[..., Any], format: Hashable) -> Callable[..., Any]:
    """``function`` of tensors and ``format`` as fused kernels: one graph per shape, with the format as a constant."""

    def with_format(*tensors: Tensor | None) -> Any:
        return function(*tensors, format)

    return torch.compile(with_format, fullgraph=True, dynamic=False, options=dict(options()))
