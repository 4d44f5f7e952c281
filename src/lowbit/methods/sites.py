"""Sites of learned maps: construction, and application of the maps to the parameters.

A site is an edge of the block with one learned map, and a learned shift where both ends have a bias. Training and
folding share ``apply``, so that trained and stored weights agree. A dense matrix after a norm does not fold: its
inverse stays online, after the norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.methods.effect import leaves_with_effect, shift_has_effect
from lowbit.methods.maps import Kind, LearnedMap
from lowbit.models.block import Block
from lowbit.models.edges import Edge
from lowbit.models.equivalence import Params, can_shift, check_can_move, move

SITES = ("qkv", "mlp", "heads", "qk", "channels")


@dataclass
class Site:
    """One learned map.

    Attributes:
        name: ``qkv``, ``mlp``, ``heads``, ``qk`` or ``channels``.
        edge: the edge that it transforms.
        map: the learned map.
        shift: learned shift, subtracted from the activations before the map; ``None`` without one.
        online: whether the map's inverse stays in the graph (a matrix after a norm).
        without_effect: names of leaves, and ``shift``, that change nothing in the quantized block (``effect.py``);
            they are not trained.
        label: the name in reports where a layer has several sites of one name: ``qk-free``, ``mlp-q_a_layernorm``.
    """

    name: str
    edge: Edge
    map: LearnedMap
    shift: Tensor | None = None
    online: bool = False
    without_effect: tuple[str, ...] = ()
    label: str = ""

    def leaves(self) -> list[Tensor]:
        """All trained tensors of the site; none where no quantizer sees it."""
        leaves = [leaf for name, leaf in self.map.leaves.items() if name not in self.without_effect]
        return [*leaves, *([] if self.shift is None else [self.shift])]


def site_name(block: Block, edge: Edge) -> str:
    """The name of an edge's site: its kind, or for norms ``qkv`` or ``mlp`` by what reads them.

    ``qkv`` are the norms up to the attention's output projection, or before another mixer's first linears; ``mlp``
    are all others.
    """
    if edge.kind != "norm":
        return edge.kind
    index, _, reader = edge.readers[0].module.partition(".")
    kind = block.kind_of(edge.src.module)
    outputs = {dst.module for other in block.edges() if other.kind == "heads" for dst in other.readers}
    last = next((at for at, group in enumerate(kind.groups) if f"{index}.{group[0]}" in outputs), 1)
    return "qkv" if any(reader in group for group in kind.groups[:last]) else "mlp"


def labelled(sites: Sequence[Site]) -> list[Site]:
    """The sites, with labels where a layer has several of one name; the first keeps the name."""
    seen: set[str] = set()
    out: list[Site] = []
    for site in sites:
        index, _, module = site.edge.src.module.partition(".")
        own = "free" if site.edge.kind == "qk" and site.edge.free else module.rpartition(".")[2]
        names = (site.name, f"{site.name}-{own}", f"{site.name}-{module}", f"{site.name}-{module}-{len(out)}")
        label = next(name for name in names if f"{index}.{name}" not in seen)
        seen.add(f"{index}.{label}")
        out.append(replace(site, label=label))
    return out


def map_kind(edge: Edge, choice: str, matrix: Kind) -> Kind | None:
    """The parametrization for a choice of ``diagonal`` or ``matrix``; ``None`` where none of that choice folds.

    ``matrix`` is the parametrization of matrices that the options ask for. Where an edge's limit is a diagonal, that
    is all that folds; where it is a rotation, no scale does.
    """
    if edge.limit == "rotation":
        if choice == "diagonal":
            return None
        return "turn" if edge.pairs else "orthogonal"
    if choice == "diagonal":
        return "diagonal"
    if edge.kind == "norm":  # not folded: it stays online
        return matrix if edge.gathers else "diagonal"
    if edge.limit != "matrix":
        return "diagonal"
    return "rotation" if edge.pairs else matrix


def group_width(block: Block, edge: Edge) -> int | None:
    """The width of the groups in which the edge's readers are quantized, if the edge's maps consist of such blocks.

    Of several widths the smallest. ``None`` where no reader has groups, where a map is not wider than one, or where
    groups do not divide it, so that they lie across two heads; and between q and k, where maps mix rows.

    Heads of 64 channels before a projection in NVFP4 give 16, heads of 24 channels ``None``.
    """
    if edge.kind == "qk":
        return None
    formats = [block.weight_format(dst.module) for dst in edge.readers if dst.module in block.formats]
    widths = [format.group for format in formats if format.group is not None]
    width = min(widths, default=edge.size)
    return width if width < edge.size and edge.size % width == 0 else None


def make_site(
    block: Block, edge: Edge, name: str, choice: str, matrix: LearnedMap, shift: bool, in_groups: bool = False
) -> Site | None:
    """The site for a choice of ``diagonal`` or ``matrix``; ``None`` where no map of that choice folds.

    ``matrix`` carries the options of a map (kind, mask, stability, condition, dtype, device); its size is set here.
    With ``in_groups`` its matrices are block-diagonal, in blocks of ``group_width`` where there is one.
    See ``map_kind`` for what an edge allows of the choice.
    """
    if (kind := map_kind(edge, choice, matrix.kind)) is None:
        return None
    count, size = (edge.layout.kv, edge.size) if edge.per_head else (1, edge.size)
    block_size = divisor(size, matrix.block_size)
    if in_groups and kind in ("masked", "blocks") and (width := group_width(block, edge)) is not None:
        kind, block_size = "blocks", width
    learned = LearnedMap(
        kind,
        count,
        size,
        matrix.condition,
        matrix.mask,
        matrix.stability,
        block_size,
        matrix.dtype,
        matrix.device,
    )
    acting = leaves_with_effect(block, edge, kind, learned.leaves)
    for leaf in learned.leaves.keys() - acting:
        learned.leaves[leaf].requires_grad_(False)
    unseen = [leaf for leaf in learned.leaves if leaf not in acting]
    initial_shift = None
    if shift and can_shift(block, edge):
        if shift_has_effect(block, edge):
            initial_shift = torch.zeros(
                edge.diagonal_shape, dtype=matrix.dtype, device=matrix.device, requires_grad=True
            )
        else:
            unseen.append("shift")
    online = edge.kind == "norm" and learned.is_matrix
    return Site(name, edge, learned, initial_shift, online, tuple(unseen))


def divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` that is at most ``limit``."""
    return next(n for n in range(min(limit, size), 0, -1) if size % n == 0)


def apply(block: Block, sites: Sequence[Site], params: Mapping[str, Tensor]) -> tuple[Params, dict[str, Tensor]]:
    """Parameters with all maps folded, and the inverses that stay online; differentiable in the sites' leaves."""
    out, online = dict(params), {}
    for site in sites:
        value, inverse = site.map.value()
        if site.online:
            assert inverse is not None
            out = _behind_norm(block, site, value[0], out)
            online[site.edge.src.module] = inverse[0]
            continue
        out = move(block, site.edge, value if site.edge.per_head else value[0], out, site.shift, inverse)
    return out, online


def _behind_norm(block: Block, site: Site, a: Tensor, params: Params) -> Params:
    """``W A^T`` for the norm's readers; a shift folds into the norm's bias as for a diagonal."""
    check_can_move(block, site.edge)
    identity = torch.ones(a.shape[0], dtype=a.dtype, device=a.device)
    out = move(block, site.edge, identity, params, site.shift) if site.shift is not None else dict(params)
    for dst in site.edge.readers:
        dst.change_weight(out, lambda weight: weight @ a.mT)
    return out
