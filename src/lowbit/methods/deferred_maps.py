"""Diagonal maps that a kernel folds into weights while it quantizes them, without a pass over the weight for each.

A map across a norm multiplies columns of its readers, one across channels divides rows of its source. Where a weight
meets nothing but such maps, columns first, they need not be folded beforehand: ``quant.weight_kernel`` takes them as
factors and computes what folding computes, in the same order, so that training and folding still give the same bits.
All else that the maps change, norms, biases and other weights, is folded as always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from lowbit.methods.sites import Site, apply
from lowbit.models.block import Block
from lowbit.models.edges import Edge, Projection
from lowbit.models.equivalence import Params, check_can_move
from lowbit.quant.weight_kernel import Diagonals, takes

ORDERS = (["columns"], ["rows"], ["columns", "rows"])


def deferrable(block: Block, sites: Sequence[Site], params: Mapping[str, Tensor]) -> frozenset[str]:
    """Linears whose quantizing kernel can take all the maps that they meet.

    Those are linears that meet a diagonal across a norm or channels, on whole matrices and without a shift, at most
    one on either side, that of the columns first; whose weights and formats the kernel takes.
    """
    met: dict[str, list[str | None]] = {}
    for site in sites:
        for end in _ends(site.edge):
            met.setdefault(end.module, []).append(_side(site, end))
    return frozenset(
        name
        for name, sides in met.items()
        if sides in ORDERS
        and name in block.formats
        and not block.is_stacked(name)
        and block.weight_format(name).has_kernel
        and takes(params[f"{name}.weight"], block.weight_format(name).group)
    )


def _ends(edge: Edge) -> list[Projection]:
    return [end for end in (edge.src, *edge.dst) if isinstance(end, Projection)]


def _side(site: Site, end: Projection) -> str | None:
    """The side of the matrix on which a diagonal folds; ``None``: what is no such diagonal."""
    plain = site.edge.kind in ("norm", "channels") and not site.map.is_matrix and site.shift is None
    if not (plain and end.whole and end.columns is None):
        return None
    return "rows" if end is site.edge.src else "columns"


def apply_deferring(
    block: Block, sites: Sequence[Site], params: Mapping[str, Tensor], linears: frozenset[str]
) -> tuple[Params, dict[str, Tensor], dict[str, Diagonals]]:
    """``sites.apply``, but for the weights of ``linears``, whose maps are returned.

    Args:
        block: the block.
        sites: learned maps.
        params: its parameters.
        linears: some of those that ``deferrable`` names.

    Returns:
        The parameters, those weights as they were; the inverses that stay online; and by linear the maps.
    """
    kept = {f"{name}.weight": params[f"{name}.weight"] for name in linears}
    out: Params = {name: value for name, value in params.items() if name not in kept}
    online: dict[str, Tensor] = {}
    maps = dict.fromkeys(linears, Diagonals())
    for site in sites:
        own = [end for end in _ends(site.edge) if end.module in linears]
        if own:
            check_can_move(block, site.edge)
            value, _ = site.map.value()
            for end in own:
                maps[end.module] = _with(maps[end.module], site.edge, end, value[0])
        # Without their weights ``out`` has no more of these linears than biases, which a map of rows divides.
        others = tuple(end for end in site.edge.dst if end not in own)
        out, more = apply(block, [replace(site, edge=replace(site.edge, dst=others))], out)
        online |= more
    return {**out, **kept}, online, maps


def _with(maps: Diagonals, edge: Edge, end: Projection, map: Tensor) -> Diagonals:
    if end is edge.src:
        return replace(maps, rows=map if edge.power == 1 else map.pow(1 / edge.power))
    return replace(maps, columns=edge.spread(map))
