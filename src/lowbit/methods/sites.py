"""Sites of learned maps: construction, and application of the maps to the parameters.

A site is an edge of the block with one learned map, and a learned shift where both ends have a bias. Training and
folding share ``apply``, so that trained and stored weights agree. A dense matrix after a norm does not fold: its
inverse stays online, after the norm.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.methods.effect import leaves_with_effect, shift_has_effect
from lowbit.methods.maps import Kind, LearnedMap
from lowbit.models.architecture import Edge
from lowbit.models.block import Block
from lowbit.models.equivalence import Params, can_shift, check_can_move, map_width, move

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
    """

    name: str
    edge: Edge
    map: LearnedMap
    shift: Tensor | None = None
    online: bool = False
    without_effect: tuple[str, ...] = ()

    def leaves(self) -> list[Tensor]:
        """All trained tensors of the site; none where no quantizer sees it."""
        leaves = [leaf for name, leaf in self.map.leaves.items() if name not in self.without_effect]
        return [*leaves, *([] if self.shift is None else [self.shift])]


def site_name(block: Block, edge: Edge) -> str:
    """The name of an edge's site: its kind, or for norms ``qkv`` or ``mlp`` by what reads them."""
    if edge.kind != "norm":
        return edge.kind
    first = {f"{i}.{name}" for i in block.indices for name in block.family.linears[0]}
    return "qkv" if edge.dst[0].module in first else "mlp"


def make_site(block: Block, edge: Edge, name: str, choice: str, matrix: LearnedMap, shift: bool) -> Site:
    """The site for a choice of ``diagonal`` or ``matrix``.

    ``matrix`` carries the options of a map (kind, mask, stability, condition, dtype, device); its size is set here.
    Between q and k with a rotary embedding, a matrix is a scaled rotation per pair; where q and k have norms, only a
    diagonal tied within the pairs folds.
    """
    heads, pairs = block.heads, block.heads.rotary // 2
    count, size = 1, map_width(block, edge) if edge.kind in ("norm", "channels") else 0
    kind: Kind = matrix.kind if choice == "matrix" else "diagonal"
    if edge.kind == "heads" or (edge.kind == "qk" and not pairs):
        count, size = heads.kv, heads.dim
    elif edge.kind == "qk" and block.family.qk_norm_per_head:
        count, size, kind = 1, pairs, "diagonal"
    elif edge.kind == "qk":
        count, size, kind = heads.kv, pairs, "rotation" if choice == "matrix" else "diagonal"
    learned = LearnedMap(
        kind,
        count,
        size,
        matrix.condition,
        matrix.mask,
        matrix.stability,
        _divisor(size, matrix.block_size),
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
            shape = (heads.kv, heads.dim) if edge.kind == "heads" else (size,)
            initial_shift = torch.zeros(shape, dtype=matrix.dtype, device=matrix.device, requires_grad=True)
        else:
            unseen.append("shift")
    online = edge.kind == "norm" and learned.is_matrix
    return Site(name, edge, learned, initial_shift, online, tuple(unseen))


def _divisor(size: int, limit: int) -> int:
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
        flat = site.edge.kind in ("norm", "channels") or (site.edge.kind == "qk" and block.family.qk_norm_per_head)
        out = move(block, site.edge, value[0] if flat else value, out, site.shift, inverse)
    return out, online


def _behind_norm(block: Block, site: Site, a: Tensor, params: Params) -> Params:
    """``W A^T`` for the norm's readers; a shift folds into the norm's bias as for a diagonal."""
    check_can_move(block, site.edge)
    identity = torch.ones(a.shape[0], dtype=a.dtype, device=a.device)
    out = move(block, site.edge, identity, params, site.shift) if site.shift is not None else dict(params)
    for dst in site.edge.readers:
        dst.change_weight(out, lambda weight: weight @ a.mT)
    return out
