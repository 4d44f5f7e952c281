"""Bytes of ``model.pte`` for every choice of formats, as XNNPACK stores weights: see ``xnnpack``.

Formats of 2 and 3 bits take 4 and those of 5 to 7 bits take 8, so they are no choice. An embedding is int8 with
float32 scales; embedding and head that share a matrix are stored twice. The caches of keys and values are memory of
the runtime, not of the file.
"""

from __future__ import annotations

from lowbit.exporters.footprint import FloatModel, Footprint
from lowbit.exporters.linear_footprint import FLOAT, PackedLinears
from lowbit.exporters.linear_footprint import footprint as of_linears
from lowbit.exporters.offered import Refuses
from lowbit.exporters.xnnpack import stored_bits
from lowbit.models.skeleton import Skeleton
from lowbit.quant.integer import IntFormat

FORMATS = (*(IntFormat(4, group) for group in (None, 128, 64, 32)), IntFormat(8))
BFLOAT16 = 2
# The program and the delegates' graphs, with the padding of their constants: 18 kB for each layer of SmolLM2's
# program, whose size docs/executorch.json records.
GRAPH = (64 * 1024, 24 * 1024)


def weight_size(format: IntFormat, shape: tuple[int, int]) -> int:
    """Bytes of a linear's weight ``(out, in)``: scales of int4 are bfloat16, those of int8 float32.

    >>> weight_size(IntFormat(4, 32), (2, 64)), weight_size(IntFormat(4), (2, 64)), weight_size(IntFormat(8), (2, 64))
    (72, 68, 136)
    """
    rows, columns = shape
    codes = -(-columns * stored_bits(format) // 8)
    scale = BFLOAT16 if stored_bits(format) == 4 else FLOAT
    return rows * (codes + columns // (format.group or columns) * scale)


def embedding_size(format: IntFormat, shape: tuple[int, int]) -> int:
    """Bytes of the embedding ``(rows, columns)``: a byte for each value, whatever the format, and float32 scales.

    >>> embedding_size(IntFormat(4), (2, 64)), embedding_size(IntFormat(8), (2, 64))
    (136, 136)
    """
    rows, columns = shape
    return rows * (columns + FLOAT * (columns // (format.group or columns)))


STORES = PackedLinears("executorch", FORMATS, weight_size, embedding_size, GRAPH, tied_twice=True)


def footprint(model: FloatModel, skeleton: Skeleton, refuses: Refuses) -> Footprint:
    """The file's footprint; ``refuses``: why the target has no place for a plan."""
    return of_linears(model, skeleton, [(name,) for name in model.modules], refuses, STORES)
