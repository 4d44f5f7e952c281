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
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError

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
    """Within it fake quantization of CUDA tensors is compiled.

    The first call for each shape and format takes seconds. Not for several threads.

    Raises:
        LowbitError: the running torch cannot compile it to the same numbers.
    """
    options()
    before, _using[0] = _using[0], True
    try:
        with torch._dynamo.config.patch(recompile_limit=GRAPHS, accumulated_recompile_limit=8 * GRAPHS):
            yield
    finally:
        _using[0] = before


def active(x: Tensor) -> bool:
    """Whether operations on ``x`` are to be fused: within ``on()``, on a GPU."""
    return _using[0] and x.device.type == "cuda"


@cache
def compiled(function: Callable[..., Any], format: Hashable) -> Callable[..., Any]:
    """``function`` of tensors and ``format`` as fused kernels: a graph for each shape, the format is a constant."""

    def with_format(*tensors: Tensor | None) -> Any:
        return function(*tensors, format)

    return torch.compile(with_format, fullgraph=True, dynamic=False, options=dict(options()))
