"""Learned invertible mixes of a linear's input, which stay online: a fixed rotation, then what is learned on top.

A mix is ``A = M Q`` with a fixed orthogonal ``Q`` (random signs times a Hadamard matrix, transposed) and a learned
``M`` that starts at the identity, so that every mix starts as a random-sign Hadamard transform. Inputs become
``x A^-1 = x Q^T M^-1``, weights ``W A^T``.

=================== ============================== =================================================================
choice              ``Q``                          ``M``
=================== ============================== =================================================================
``hadamard``        the whole width                none: nothing is learned
``kronecker``       one for each of two factors    a map for each factor; ``A = (M_1 Q_1) (x) (M_2 Q_2)``
``blocks``          one for each block             a map for each block
``hadamard-matrix`` the whole width                one dense map of the whole width
=================== ============================== =================================================================

With the parametrisation ``svd`` a factor is ``U diag(s) V^T``, ``U = C(X)`` and ``V = Q^T C(Y)`` with Cayley
transforms ``C`` (FlatQuant, Sun et al., 2024, arXiv 2410.09426). The dense map is AffineQuant's masked one by
default: its mask, and the dominance of its diagonal, are those of ``M``, which is to say relative to the rotation.

In front of each stands the folded map of the site's edge: a diagonal in the norm's gain or the rows of up, or the
matrices of v -> o.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from lowbit.methods.affine_options import MIXES, Maps, Sites
from lowbit.methods.maps import Kind, LearnedMap
from lowbit.methods.mixing import MIXED, MixSite, mix_sites
from lowbit.methods.sites import divisor
from lowbit.models.block import Block
from lowbit.models.diagonal_blocks import DiagonalBlocks, times_blocks
from lowbit.models.equivalence import Params
from lowbit.models.hadamard import Hadamard, random_flips, times_hadamard
from lowbit.models.kronecker import Kronecker, sides, times_kronecker
from lowbit.models.runtime_ops import Matrix, RuntimeOp

OPS: dict[str, type[RuntimeOp]] = {
    "hadamard": Hadamard,
    "kronecker": Kronecker,
    "blocks": DiagonalBlocks,
    "hadamard-matrix": Matrix,
}
"""The runtime op that each choice leaves."""


@dataclass(frozen=True)
class LearnedMix:
    """The mix of one site.

    Attributes:
        site: what reads the mixed channels.
        choice: a key of ``OPS``.
        turns: the fixed rotations ``Q^T``, as Hadamard transforms: one, or two for ``kronecker``. Those of ``blocks``
            are the blocks of one.
        maps: ``M``: none, one, or two for ``kronecker``; that of ``blocks`` has a map for each block.
        label: the name in reports.
    """

    site: MixSite
    choice: str
    turns: tuple[Hadamard, ...]
    maps: tuple[LearnedMap, ...]
    label: str

    def leaves(self) -> list[Tensor]:
        """The learned tensors."""
        return [leaf for map in self.maps for leaf in map.leaves.values()]

    def apply(self, params: Params) -> RuntimeOp:
        """Replace the readers' weights ``W`` by ``W A^T`` and return the op ``A^-1``, in the precision of the maps.

        Differentiable in the leaves.
        """
        if not self.maps:
            self.site.fold(params, self.turns[0])
            return self.turns[0]
        weights, inputs = [], []  # A^T and A^-1 of each factor, (count, size, size)
        for turn, learned in zip(self.turns, self.maps, strict=True):
            value, inverse = learned.value()
            assert inverse is not None
            weights.append(turned(turn, value.mT))
            inputs.append(turned(turn, inverse))
        if self.choice == "kronecker":
            self.site.fold(params, lambda weight: times_kronecker(weight, [own[0] for own in weights]))
            return Kronecker(inputs[0][0], inputs[1][0])
        if self.choice == "blocks":
            self.site.fold(params, lambda weight: times_blocks(weight, weights[0]))
            return DiagonalBlocks(inputs[0])
        self.site.fold(params, lambda weight: weight @ weights[0][0].to(weight.dtype))
        return Matrix(inputs[0][0])

    @torch.no_grad()
    def condition(self) -> float:
        """A bound on the condition number of ``A``: that of ``M``, for two factors the product of theirs."""
        out = 1.0
        for map in self.maps:
            out *= float(map.conditions().max())
        return out


def turned(turn: Hadamard, matrices: Tensor) -> Tensor:
    """``Q^T X`` for ``matrices`` ``X`` ``(count, size, size)``, with the rotation of each block of ``turn``."""
    signs = 1 - 2 * turn.flips.to(matrices.dtype)
    return signs[..., None] * times_hadamard(matrices.mT).mT  # H is symmetric


def learned_mixes(block: Block, chosen: Sites, maps: Maps, dtype: torch.dtype) -> list[LearnedMix]:
    """The mixes that the options ask for, at their start.

    Args:
        block: the block.
        chosen: what is learned at which site.
        maps: the options of maps.
        dtype: of the learned tensors.
    """
    found = [
        _mix(block, site, choice, maps, dtype)
        for site in mix_sites(block)
        if (choice := getattr(chosen, site.name)) in MIXES
    ]
    taken: set[str] = set()
    out = []
    for mix in found:
        place = mix.site.places[0].partition(".")[2]
        label = mix.label if f"{mix.site.layer}.{mix.label}" not in taken else f"{mix.label}-{place}"
        taken.add(f"{mix.site.layer}.{label}")
        out.append(replace(mix, label=label))
    return out


def _mix(block: Block, site: MixSite, choice: str, maps: Maps, dtype: torch.dtype) -> LearnedMix:
    """One site's mix."""
    layouts = _layouts(block, site, choice, maps)
    turns = tuple(
        Hadamard(random_flips(count, size, _seed(site, position)).to(block.device))
        for position, (count, size) in enumerate(layouts)
    )
    own: tuple[LearnedMap, ...] = ()
    if choice != "hadamard":
        kind = cast(Kind, maps.parametrisation if choice == "hadamard-matrix" else maps.mixing)
        width = divisor(site.width, maps.block_size)  # of the parametrisation ``blocks``, for one dense map
        options = maps.condition, maps.mask, maps.stability, width, dtype, block.device
        own = tuple(LearnedMap(kind, count, size, *options) for count, size in layouts)
    return LearnedMix(site, choice, turns, own, f"{site.name}-{choice}")


def _layouts(block: Block, site: MixSite, choice: str, maps: Maps) -> list[tuple[int, int]]:
    """For each factor of a mix the number of its blocks and their width."""
    if choice == "kronecker":
        return [(1, size) for size in _sides(block, site)]
    if choice == "blocks":
        size = site.group(block) or divisor(site.width, maps.block_size)
        return [(site.width // size, size)]
    return [(1, site.width)]


def _seed(site: MixSite, position: int) -> int:
    """Of the signs of one rotation: the layer, the site's name and the factor's position decide."""
    return (site.layer * len(MIXED) + MIXED.index(site.name)) * 2 + position


def _sides(block: Block, site: MixSite) -> tuple[int, int]:
    """Sizes of two factors: heads and a head's channels before o_proj, else as equal as possible."""
    heads = [edge for edge in block.edges() if edge.kind == "heads" and site.readers[0] in edge.readers]
    for edge in heads:
        if edge.layout.query * edge.layout.dim == site.width:
            return edge.layout.query, edge.layout.dim
    return sides(site.width)
