"""The smooth start: SmoothQuant's scale and centring shifts, folded in before maps are learned on top.

At every norm, heads and channels site, with ``low`` and ``high`` the ends of a channel over the float model's inputs
and ``p`` the power,

    shift = (low + high) / 2              where the site has one
    scale = peak**p / max|w|**(1 - p)     (AffineQuant's released implementation takes signed maxima of ``w``)

``peak`` is one of two statistics of the shifted inputs:

* ``absolute``: the largest absolute value over all tokens, as in the papers. One massive token decides the scale of
  its channel for all tokens, which then use few of its codes.
* ``relative``: the eighth-power mean of the values over their tokens' root mean squares. Ranges are per token, so a
  channel matters by how far it stands out in its own tokens. A factor common to all channels changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from lowbit.methods.cold import is_cold
from lowbit.methods.sites import Site
from lowbit.methods.statistics import Statistics, input_statistics, over_leaves
from lowbit.models.block import Block
from lowbit.models.edges import first_edges
from lowbit.models.equivalence import Params, move
from lowbit.models.forward import observe
from lowbit.models.shard import States

PEAKS = ("relative", "absolute")
LEAST = 1e-5  # of peaks and scales


def smooth_start(block: Block, sites: Sequence[Site], x: States, power: float, peaks: str, batch: int) -> Params:
    """Parameters with scales and shifts folded at all sites but q/k; computed in float64, in the block's dtypes.

    Args:
        block: the block.
        sites: where maps are learned; a site without a shift gets none.
        x: the block's input in the float model ``(sequences, length, hidden)``.
        power: migration strength ``p``.
        peaks: ``relative`` or ``absolute``.
        batch: sequences to run at once.
    """
    sites = [site for site in sites if site.edge.kind != "qk" and site.edge.scales]
    first = first_edges(site.edge for site in sites)
    sites = [site for site in sites if site.edge in first]
    if not sites:
        return dict(block.params)
    shifts = _shifts(block, sites, x, batch)
    found = _peaks(block, sites, x, peaks, shifts, batch)
    sites = [site for site in sites if site.edge.readers[0].module in found]
    params = {name: value.double() for name, value in block.params.items()}
    for site in sites:
        edge, reader = site.edge, site.edge.readers[0]
        weight = torch.stack([dst.read(params).abs().amax(0) for dst in edge.readers]).amax(0)
        # The query heads of a group share their KV head's channels, and so their shift.
        peak, weight = edge.pooled(reader.inputs(found[reader.module]), "amax"), edge.pooled(weight, "amax")
        scale = peak.clamp(min=LEAST).pow(power) / weight.clamp(min=LEAST).pow(1 - power)
        shift = None
        if site.shift is not None:
            shift = edge.pooled(reader.inputs(shifts[reader.module]), "amax").reshape(edge.diagonal_shape)
        params = move(block, edge, scale.clamp(min=LEAST).reshape(edge.diagonal_shape), params, shift)
    return {name: value.to(block.params[name].dtype) for name, value in params.items()}


def _shifts(block: Block, sites: Sequence[Site], x: States, batch: int) -> dict[str, Tensor]:
    """The middle of each channel's range where a site has a shift, by reader: ``(in,)`` float64."""
    shifted = [site for site in sites if site.shift is not None]
    if not shifted:
        return {}
    readers = [site.edge.readers[0].module for site in shifted]
    seen = input_statistics(block, x, readers, ("low", "high"), batch=batch)
    out = {}
    for site, reader in zip(shifted, readers, strict=True):
        low, high = seen[reader]["low"].double(), seen[reader]["high"].double()
        own = site.edge.readers[0]
        low, high = site.edge.pooled(own.inputs(low), "amin"), site.edge.pooled(own.inputs(high), "amax")
        middle = site.edge.spread((low + high) / 2)
        out[reader] = own.outer(middle, len(seen[reader]["low"]), rest=0.0)
    return out


def _peaks(
    block: Block, sites: Sequence[Site], x: States, peaks: str, shifts: Mapping[str, Tensor], batch: int
) -> dict[str, Tensor]:
    """The statistic of each reader's shifted input: ``(in,)`` float64; none for experts that few tokens reach."""
    figure = "peak" if peaks == "absolute" else "crest"
    readers = list(dict.fromkeys(site.edge.readers[0].module for site in sites))

    def of_leaf(part: slice) -> dict[str, Statistics]:
        found = {reader: Statistics((figure,)) for reader in readers}

        def add(reader: str, value: Tensor) -> None:
            found[reader].add(value - shifts[reader].to(value.dtype) if reader in shifts else value)

        observe(block, x[part], {reader: partial(add, reader) for reader in readers}, batch=batch)
        return found

    seen = over_leaves(len(x), batch, of_leaf)
    seen = {reader: stats for reader, stats in seen.items() if not is_cold(block, reader, stats.count)}
    if peaks == "absolute":
        return {reader: stats["peak"].double() for reader, stats in seen.items()}
    return {reader: (stats["crest"].double() / stats.count).pow(1 / 8) for reader, stats in seen.items()}
