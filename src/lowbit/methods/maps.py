"""Parametrizations of learned invertible maps: value, inverse, and a bound on the condition number.

All start at the identity; a data-dependent start (SmoothQuant's scale) is folded into the block beforehand.

============ ================================================ =====================================================
``masked``   ``A = N * M``                                    AffineQuant's: a free matrix times the gradual mask
``lu``       ``A = L (D U)``                                  unit lower times upper triangular, ``D = exp(s)``
``blocks``   ``A = blockdiag(N_1, N_2, ...)``                 free blocks of ``block_size``
``svd``      ``A = C(X) exp(s) C(Y)^T``                       two rotations (Cayley transform), bounded ``s``
``diagonal`` ``A = exp(s)``                                   OmniQuant's, positive by construction
``rotation`` ``(a, b) = exp(s) (cos t, sin t)``               scaled rotations, for rotary pairs
``turn``     ``(a, b) = (cos t, sin t)``                      the same without a scale
``orthogonal`` ``A = C(X)``                                   rotations (Cayley transform)
============ ================================================ =====================================================

Source of the mask: AffineQuant, arXiv 2403.12544, equation 6: ``M_ij = 1`` on the diagonal, the stability factor
``alpha`` where ``0 < |i - j| <= (e / T) size`` in epoch ``e`` of ``T``, 0 elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["masked", "lu", "blocks", "svd", "diagonal", "rotation", "turn", "orthogonal"]
PICTURE = 64  # largest number of rows and columns of a matrix in the report
DOMINANCE = 0.99  # largest sum of a row's off-diagonal magnitudes, as a share of its diagonal entry


def band(size: int, share: float, stability: float) -> Tensor:
    """The mask ``(size, size)`` with ``stability`` where ``0 < |i - j| <= share * size``.

    >>> band(3, 1 / 3, 0.1).tolist() == torch.tensor([[1, 0.1, 0], [0.1, 1, 0.1], [0, 0.1, 1]]).tolist()
    True
    """
    index = torch.arange(size)
    distance = (index[:, None] - index).abs()
    mask = torch.where(distance <= share * size + 1e-9, stability, 0.0)
    return mask.masked_fill(distance == 0, 1.0)


def open_share(mask: str, epoch: int, epochs: int, size: int) -> float:
    """The share of the matrix that is trained in ``epoch`` of ``epochs``: 0 the diagonal alone, 1 all entries.

    ``gradual`` is the paper's equation 6; ``released`` is its implementation's, with the diagonal alone in epoch 1.

    >>> open_share("gradual", 2, 4, 64), open_share("released", 1, 4, 64), open_share("none", 1, 4, 64)
    (0.5, 0.0, 1.0)
    """
    if epoch == 0:
        return 0.0
    if mask == "none":
        return 1.0
    if mask == "gradual":
        return epoch / epochs
    return math.floor((size - 1) / max(epochs - 1, 1) * (epoch - 1)) / size


@dataclass
class LearnedMap:
    """``count`` learned maps of one size.

    Attributes:
        kind: see the table above.
        count, size: number of maps and their width (``rotation``: number of pairs).
        condition: upper bound on the condition number.
        mask, stability: for ``masked``, ``lu`` and ``blocks``: mask schedule and factor on off-diagonal entries.
        block_size: for ``blocks``; divides ``size``.
        leaves: the learned tensors.
    """

    kind: Kind
    count: int
    size: int
    condition: float = 1e3
    mask: str = "gradual"
    stability: float = 1.0
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    device: torch.device | str = "cpu"
    leaves: dict[str, Tensor] = field(default_factory=dict)
    _ahead: tuple[Any, tuple[Tensor, Tensor | None]] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        shapes: dict[str, dict[str, tuple[int, ...]]] = {
            "masked": {"full": (self.count, self.size, self.size)},
            "blocks": {"full": (self.count * self.size // self.block_size, self.block_size, self.block_size)},
            "lu": {"full": (self.count, self.size, self.size), "log": (self.count, self.size)},
            "svd": {
                "left": (self.count, self.size, self.size),
                "right": (self.count, self.size, self.size),
                "log": (self.count, self.size),
            },
            "diagonal": {"log": (self.count, self.size)},
            "rotation": {"log": (self.count, self.size), "angle": (self.count, self.size)},
            "turn": {"angle": (self.count, self.size)},
            "orthogonal": {"left": (self.count, self.size, self.size)},
        }
        for name, shape in shapes[self.kind].items():
            leaf = torch.zeros(shape, dtype=self.dtype, device=self.device)
            if name == "full" and self.kind != "lu":
                leaf += torch.eye(shape[-1], dtype=self.dtype, device=self.device)
            self.leaves[name] = leaf.requires_grad_()
        self._mask = self._band(0.0)

    @property
    def is_matrix(self) -> bool:
        """Whether it mixes channels, so that ``value`` returns matrices."""
        return self.kind not in ("diagonal", "rotation", "turn")

    def _band(self, share: float) -> Tensor:
        size = self.block_size if self.kind == "blocks" else self.size
        return band(size, share, self.stability).to(self.device, self.dtype)

    def begin(self, epoch: int, epochs: int) -> None:
        """Set the mask for an epoch; in epoch 0, the start, only the diagonal is used."""
        self._mask = self._band(open_share(self.mask, epoch, epochs, self._mask.shape[-1]))
        self._ahead = None

    def value(self) -> tuple[Tensor, Tensor | None]:
        """The maps and, for matrices, their inverses: ``(count, size)`` or ``(count, size, size)``; rotations
        and turns ``(count, size, 2)``.

        What ``exceeding`` has computed behind a training step serves the next one's loss, once: a backward pass
        frees the graph.
        """
        if self._ahead is not None:
            version, found = self._ahead
            if version != self._version():
                self._ahead = None
            elif torch.is_grad_enabled():
                self._ahead = None
                return found
            else:
                return found[0].detach(), None if found[1] is None else found[1].detach()
        return self._value()

    def _version(self) -> tuple[Any, ...]:
        """What tells whether anything that a value depends on has changed."""
        return tuple((id(leaf), leaf._version) for leaf in self.leaves.values())

    def _value(self) -> tuple[Tensor, Tensor | None]:
        limit = math.log(self.condition) / 2
        if self.kind == "diagonal":
            return self.leaves["log"].clamp(-limit, limit).exp(), None
        if self.kind == "rotation":
            scale, angle = self.leaves["log"].clamp(-limit, limit).exp(), self.leaves["angle"]
            return torch.stack([scale * angle.cos(), scale * angle.sin()], -1), None
        if self.kind == "turn":
            return torch.stack([self.leaves["angle"].cos(), self.leaves["angle"].sin()], -1), None
        if self.kind == "orthogonal":
            rotation = _cayley(self.leaves["left"])
            return rotation, rotation.mT
        if self.kind == "svd":
            return self._svd(limit)
        if self.kind == "lu":
            return self._lu()
        full = self.leaves["full"] * self._mask
        inverse = torch.linalg.inv_ex(full)[0]
        if self.kind == "blocks":
            full, inverse = (_join(t, self.count) for t in (full, inverse))
        return full, inverse

    def _lu(self) -> tuple[Tensor, Tensor]:
        entries = self.leaves["full"] * self._mask
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        scale = self.leaves["log"].exp()
        lower, upper = entries.tril(-1) + eye, entries.triu(1) + torch.diag_embed(scale)
        half = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False, unitriangular=True)
        return lower @ upper, torch.linalg.solve_triangular(upper, half, upper=True)

    def _svd(self, limit: float) -> tuple[Tensor, Tensor]:
        left, right = _cayley(self.leaves["left"]), _cayley(self.leaves["right"])
        scale = (limit * torch.tanh(self.leaves["log"] / limit)).exp()
        # The inverse needs no factorisation: the inverse of a rotation is its transpose.
        return (left * scale[:, None]) @ right.mT, (right / scale[:, None]) @ left.mT

    @torch.no_grad()
    def conditions(self) -> Tensor:
        """An upper bound on each value's condition number ``(count,)``; exact for diagonals.

        For matrices ``||A||_2^2 <= ||A||_1 ||A||_inf``, so ``cond_2 <= sqrt(cond_1 cond_inf)``, without an SVD.
        """
        value, inverse = self.value()
        if inverse is None:
            size = value.norm(dim=-1) if self.kind in ("rotation", "turn") else value
            return size.amax(-1) / size.amin(-1)
        norms = [t.abs().sum(dim).amax(-1) for t in (value, inverse) for dim in (-1, -2)]
        bound = (norms[0] * norms[1] * norms[2] * norms[3]).sqrt()
        return bound.nan_to_num(torch.inf, torch.inf)

    def exceeding(self) -> Tensor | None:
        """Whether each map's condition number may exceed the bound ``(count,)``; ``None``: none can, by its kind."""
        if self.kind in ("diagonal", "rotation", "turn", "orthogonal", "svd"):
            return None
        with torch.enable_grad():
            found = self._value()
        self._ahead = self._version(), found
        return self.conditions() > self.condition

    @torch.no_grad()
    def margins(self) -> Tensor:
        """The least ``(|a_ii| - sum_j |a_ij|) / |a_ii|`` over each value's rows ``(count,)``; dominant above 0."""
        value, _ = self.value()
        if not self.is_matrix:
            return value.new_ones(self.count)
        diagonal = value.diagonal(dim1=-2, dim2=-1).abs()
        others = value.abs().sum(-1) - diagonal
        return (1 - others / diagonal).amin(-1)

    @torch.no_grad()
    def picture(self) -> Tensor:
        """The matrix with the largest condition number, pooled to at most ``PICTURE`` rows and columns."""
        return pooled(self.value()[0][int(self.conditions().argmax())].float(), PICTURE)

    @torch.no_grad()
    def keep_dominant(self) -> None:
        """Shrink off-diagonal entries of ``masked`` and ``blocks`` until every row is strictly diagonally dominant.

        A strictly diagonally dominant matrix is invertible (Levy-Desplanques). The diagonal is original positive.
        """
        full = self.leaves["full"]
        diagonal = full.diagonal(dim1=-2, dim2=-1)
        diagonal.clamp_(min=1e-2)
        others = (full * self._mask).abs().sum(-1) - diagonal
        factor = (DOMINANCE * diagonal / others.clamp(min=1e-30)).clamp(max=1)
        original = diagonal.clone()
        full.mul_(factor[..., None])
        diagonal.copy_(original)

    @torch.no_grad()
    def keep_condition(self) -> bool:
        """Move maps whose condition number may exceed the bound towards the identity; return whether any did.

        A row's off-diagonal share ``sum_j |a_ij| / |a_ii|`` never rises, so a strictly diagonally dominant matrix
        stays so, with its margin. With ``condition`` 16 the diagonal of ``(8, 4; 0, 1)`` is limited to 2, then taken
        to the power 0.9, 1.87; the entry 4 shrinks in the diagonal's proportion and by another tenth, to 0.84.
        """
        exceeding = self.exceeding()
        if exceeding is None or not bool(exceeding.any()):
            return False
        for _ in range(60):
            self._pull_in(exceeding)
            exceeding = self.conditions() > self.condition
            if not bool(exceeding.any()):
                return True
        self._reset(exceeding)
        return True

    def _rows(self, maps: Tensor) -> Tensor:
        """The chosen maps' places in the leaf ``full``, which holds a map's blocks one after another."""
        return maps.repeat_interleave(self.size // self.block_size) if self.kind == "blocks" else maps

    def _pull_in(self, maps: Tensor) -> None:
        """One step of the chosen maps towards the identity."""
        if self.kind == "lu":
            for leaf in self.leaves.values():
                leaf[maps] = 0.9 * leaf[maps].nan_to_num(0.0, 0.0, 0.0)
            return
        rows = self._rows(maps)
        full = self.leaves["full"][rows].nan_to_num(0.0, 0.0, 0.0)
        diagonal, spread = full.diagonal(dim1=-2, dim2=-1), self.condition**0.25
        near = diagonal.clamp(1 / spread, spread).pow(0.9)
        # A diagonal entry that shrinks takes its row along; one that grows leaves it.
        factor = 0.9 * (near / diagonal.abs().clamp(min=1e-30)).clamp(max=1)
        others = full - torch.diag_embed(diagonal)
        self.leaves["full"][rows] = torch.diag_embed(near) + factor[..., None] * others

    def _reset(self, maps: Tensor) -> None:
        """The chosen maps as they start: the identity."""
        for name, leaf in self.leaves.items():
            rows = self._rows(maps) if name == "full" else maps
            leaf[rows] = 0.0
            if name == "full" and self.kind != "lu":
                leaf[rows] += torch.eye(leaf.shape[-1], dtype=leaf.dtype, device=leaf.device)


def pooled(matrix: Tensor, most: int) -> Tensor:
    """A matrix pooled to at most ``most`` rows and columns: each tile's entry of largest absolute value.

    >>> pooled(torch.tensor([[1.0, 2.0, 0.0, 0.0], [-3.0, 0.0, 0.0, 0.5]]), most=2).tolist()
    [[2.0, 0.0], [-3.0, 0.5]]
    """
    for _ in range(2):  # rows, then columns
        parts = matrix.tensor_split(min(most, matrix.shape[0]))
        matrix = torch.cat([part.gather(0, part.abs().argmax(0, keepdim=True)) for part in parts]).mT
    return matrix.contiguous()


def _cayley(free: Tensor) -> Tensor:
    """The rotation ``(I + S)^-1 (I - S)`` of the skew part ``S`` of a free matrix; the identity for 0."""
    skew = free - free.mT
    eye = torch.eye(free.shape[-1], dtype=free.dtype, device=free.device)
    return torch.linalg.solve_ex(eye + skew, eye - skew)[0]


def _join(blocks: Tensor, count: int) -> Tensor:
    """``(count * n, b, b) -> (count, n * b, n * b)``, block-diagonal."""
    n, b = blocks.shape[0] // count, blocks.shape[-1]
    eye = torch.eye(n, dtype=blocks.dtype, device=blocks.device)
    return torch.einsum("cnij,nm->cnimj", blocks.unflatten(0, (count, n)), eye).reshape(count, n * b, n * b)
