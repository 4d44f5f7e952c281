"""Which learned parameters of a site can change the quantized block, as the formats of the plan decide.

A map keeps the float function, so its parameters act only through quantizers that do not commute with it. Columns of
a quantized weight share its groups' scales: a map that scales or mixes them always acts. Rows do not: with one scale
per row, or per group of a row, ``Q(a w) = a Q(w)`` for ``a > 0`` (up to the precision in which the scale is stored),
so that a positive factor per row acts on nothing, and only what mixes rows does.

============ ====================================================== ============================================
site         the map acts                                           the shift acts
============ ====================================================== ============================================
norms        where a reader is quantized                            where a reader is quantized
heads        where o is quantized, or V inside the attention, or v  where o is quantized, or V inside the
             and the map mixes channels                             attention
channels     where the reader (down, fc2) is quantized              (none)
qk           where Q and K are quantized inside the attention, or   (none)
             q or k and the map mixes channels
============ ====================================================== ============================================

Without an effect, a parameter has rounding noise for a gradient, of which Adam, which divides by its size, makes full
steps.
"""

from __future__ import annotations

from collections.abc import Iterable

from lowbit.methods.maps import Kind
from lowbit.models.block import Block
from lowbit.models.edges import Edge, Projection
from lowbit.quant.format import Format
from lowbit.quant.scales import Plain


def leaves_with_effect(block: Block, edge: Edge, kind: Kind, leaves: Iterable[str]) -> frozenset[str]:
    """Those leaves of a map of ``kind`` (names in ``LearnedMap.leaves``) that change the quantized block.

    A diagonal and a rotation's size scale rows; a rotation's angle and all leaves of a matrix mix them.
    """
    scales_rows = ("log",) if kind in ("diagonal", "rotation") else ()
    return frozenset(leaf for leaf in leaves if _map_acts(block, edge, mixes=leaf not in scales_rows))


def shift_has_effect(block: Block, edge: Edge) -> bool:
    """Whether a shift across the edge changes the quantized block.

    The readers' biases take back ``W s`` and their quantized weights give ``Q(W) s``: the difference acts also where
    inputs stay float.
    """
    return _reader_quantized(block, edge) or (edge.kind == "heads" and block.kv is not None)


def _map_acts(block: Block, edge: Edge, mixes: bool) -> bool:
    if edge.kind in ("heads", "qk") and block.kv is not None:
        return True
    if edge.kind != "qk" and _reader_quantized(block, edge):
        return True
    ends = (edge.src, *edge.dst) if edge.kind == "qk" else (edge.src,)
    formats = [
        block.weight_format(end.module) for end in ends if isinstance(end, Projection) and end.module in block.formats
    ]
    return any(mixes or not rows_scale_freely(format) for format in formats)


def _reader_quantized(block: Block, edge: Edge) -> bool:
    return any(dst.module in block.formats for dst in edge.readers)


def rows_scale_freely(format: Format) -> bool:
    """Whether ``Q(a w) = a Q(w)`` for a row ``w`` and ``a > 0``, up to the precision of the stored scale.

    It holds for scales of a row's own that are stored as numbers, and not for scales limited to powers of two, stored
    relative to a tensor's, or shared between rows.
    """
    return isinstance(format.scales, Plain) and not format.shares_rows
