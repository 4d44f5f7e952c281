"""Matrices as plain floats in a GGUF file: embeddings, and weights in formats that llama.cpp has no type for.

A float type is taken where it holds every value of a matrix as it is. FP8, MXFP8 and MXFP6 have no type, so their
products of element and scale are stored in the smallest of BF16, F16 and F32 that holds them all: values are equal,
and the file is two or four times as large as the codes. Elements times a power of two fit BF16; four bits of E4M3
times the eight of a bfloat16 scale have up to twelve, one more than F16 has.

>>> exact_type(torch.tensor([0.4375, 448.0])).name, exact_type(torch.tensor([1 + 2**-10])).name
('BF16', 'F16')
>>> exact_type(torch.tensor([1 + 2**-11])).name
'F32'
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lowbit.checkpoints.gguf_types import SIZES, AnyKind
from lowbit.exporters.run import Run

DTYPES = {Kind.BF16: torch.bfloat16, Kind.F16: torch.float16, Kind.F32: torch.float32}
MATRIX_ORDER = (Kind.F16, Kind.BF16, Kind.F32)  # of embeddings; llama.cpp computes with F16 on every device


def holds(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether every value is a number of ``dtype``."""
    return torch.equal(value.to(dtype).to(value.dtype), value)


def exact_type(value: Tensor, order: tuple[Kind, ...] = tuple(DTYPES)) -> Kind:
    """The first type of ``order``, which ends with F32, that holds every value of a float32 tensor."""
    return next(kind for kind in order if holds(value, DTYPES[kind]))


def cost(run: Run, kinds: Mapping[str, AnyKind]) -> str | None:
    """What the modules that are stored as floats cost, in one line; ``None`` if there are none.

    Args:
        run: the run.
        kinds: the types of all quantized modules.
    """
    floats = {module: kind for module, kind in kinds.items() if kind in DTYPES}
    if not floats:
        return None
    codes = stored = 0.0
    for module, kind in floats.items():
        rows, columns = run.subject.shapes[module]
        codes += rows * columns * run.subject.weights[module].bits_per_value(columns) / 8
        stored += rows * columns * SIZES[kind][1]
    formats = ", ".join(sorted({run.subject.weights[module].name for module in floats}))
    types = ", ".join(kind.name for kind in DTYPES if kind in floats.values())
    return (
        f"llama.cpp has no type for {formats}: {len(floats)} weights are stored as {types} with equal values, in "
        f"{stored / 1e6:.1f} MB where codes and scales take {codes / 1e6:.1f} MB"
    )
