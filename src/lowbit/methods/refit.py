"""Refit: every linear fitted again, in closed form, to the float model's output from the input that it will get.

A linear of the quantized model reads an input that differs from the float model's: it is rounded, and it carries what
the layers before have lost. Its weight was trained for the exact input; for the inexact one another weight is better.
At four bits much of an input's variance lies in directions in which rounding noise is stronger than the signal, and a
weight that listens less there loses less. The best weight is a ridge regression away: no gradient, no rounding in the
objective, one factorisation for the linears that read one input. What is learned or rounded behind starts there.

Source: the objective is that of asymmetric calibration in GPTAQ, Li et al., arXiv 2504.02692, without its rounding;
the ridge towards the given weight holds what few calibration tokens do not decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.statistics import Statistics, paired_statistics
from lowbit.models.block import Block, Calib
from lowbit.models.offload import select_sequences
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat

FIGURES = {"unweighted": ("gram", "cross"), "normalized": ("normalized_gram", "normalized_cross")}
CHOICES = {"tokens": tuple(FIGURES)}
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # that are tried, in units of ``Refit.ridge``
EVERY = 4  # every fourth sequence validates them
Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Refit(Method):
    """Weights for the inputs that the quantized model has; merged, since they are all that changes.

    Attributes:
        ridge: regularization towards the given weight, in units of the mean square of the input's channels: the
            larger, the less the few calibration tokens decide.
        search: try ``RIDGES`` times ``ridge`` for each input, and take the one with the least error on a validation
            split (a quarter of the sequences; the fit that is kept uses all).
        tokens: ``unweighted`` sums the error over tokens as they are; ``normalized`` divides each token by its root
            mean square first, so that a few tokens with massive activations do not decide alone.
    """

    ridge: float = 1.0
    search: bool = True
    tokens: str = "normalized"
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "both"
    closed_form: ClassVar[bool] = True
    moves_norms: ClassVar[bool] = False
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 8

    def __post_init__(self) -> None:
        check_choices("refit", self, CHOICES)
        check_bounds("refit", self, {"ridge": "above 0"})

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: weights are all that changes."""
        return NO_OPS

    @torch.no_grad()
    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with every linear refitted, in execution order, behind those before it, refitted and quantized.

        Its float function changes, towards one whose quantized form is nearer to the float model.
        """
        done, shipped = block, dict(block.params)
        figures: dict[str, dict[str, float]] = {}
        shares = self._parts(calib)
        for group in block.linear_groups():
            wanted = [name for name in group if name in block.formats]
            if not wanted:
                continue
            quantized = replace(done, params=shipped)
            want = FIGURES[self.tokens]
            seen = [paired_statistics(quantized, block, share, wanted[0], want) for share in shares]
            ridge = self.ridge
            if len(seen) > 1:
                weight = torch.cat([block.weight(name) for name in wanted])
                pulls = [self.ridge * factor for factor in RIDGES]
                ridge = best_ridge(weight, self._moments(seen[0]), self._moments(seen[1]), pulls)
                seen[0].merge(seen[1])
            gram, cross = self._moments(seen[0])
            for name in wanted:
                weight = block.weight(name)
                found = output_target(weight, gram, cross, ridge)
                done = replace(done, params={**done.params, f"{name}.weight": found})
                shipped[f"{name}.weight"] = done.weight_format(name).fake_quant(found, done.qparams(name))
                change = (found - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
                figures[name] = {"ridge": ridge, "relative_change": float(change)}
        return done.with_record("refit", figures) if figures else block

    def _moments(self, seen: Statistics) -> Moments:
        gram, cross = (seen[name] for name in FIGURES[self.tokens])
        return gram, cross

    def _parts(self, calib: Calib) -> list[Calib]:
        """The training and the validation split that choose a ridge strength; or all sequences as one."""
        count = len(calib.x_q)
        if not self.search or count < 2:
            return [calib]
        validates = torch.arange(count) % EVERY == min(EVERY, count) - 1
        return [self._share(calib, torch.nonzero(share).flatten()) for share in (~validates, validates)]

    def _share(self, calib: Calib, chosen: Tensor) -> Calib:
        x_fp, x_q, y_fp = (select_sequences(states, chosen) for states in (calib.x_fp, calib.x_q, calib.y_fp))
        return replace(calib, x_fp=x_fp, x_q=x_q, y_fp=y_fp)


def best_ridge(weight: Tensor, fitted: Moments, judge: Moments, pulls: Sequence[float]) -> float:
    """The ridge whose ``output_target`` of the ``fitted`` moments has the least squared error by those of ``judge``.

    With the eigenvectors ``Q`` and eigenvalues ``l`` of the fitted ``gram``, the change of the weight is
    ``W (cross - gram) Q diag(1 / (l + hold)) Q^T``: one decomposition serves all pulls. For a change ``D`` the error
    ``sum |W x - (W + D) x_q|^2`` is ``tr(D gram D^T) - 2 tr(D (W (cross - gram))^T)`` and what no ridge changes.

    Where fitted and judging tokens say the same, holding back gains nothing:

    >>> one, two = torch.eye(1), torch.full((1, 1), 2.0)
    >>> best_ridge(one, (one, two), (one, two), [0.1, 1.0, 10.0])
    0.1
    >>> best_ridge(one, (one, two), (one, one), [0.1, 1.0, 10.0])
    10.0
    """
    values, vectors = torch.linalg.eigh(fitted[0].double())
    mean = values.mean().clamp(min=1e-30)
    change, wanted = (weight.double() @ (cross - gram).double() @ vectors for gram, cross in (fitted, judge))
    gram = vectors.T @ judge[0].double() @ vectors
    errors = []
    for ridge in pulls:
        step = change / (values.clamp(min=0) + ridge * mean)
        errors.append(float((step * (step @ gram - 2 * wanted)).sum()))
    return pulls[errors.index(min(errors))]


def output_target(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The weight ``V`` ``(out, in)`` of least ``|W x - V x_q|^2 + ridge * mean |V - W|^2``, before any rounding.

    Args:
        weight: ``W`` ``(out, in)``.
        gram: ``sum x_q x_q^T``.
        cross: ``sum x x_q^T``, ``x`` the same input in the float model.
        ridge: in units of ``gram``'s mean diagonal.

    Half of what the input should be asks for twice the weight:

    >>> output_target(torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), 2.0), 1e-9)
    tensor([[2.]])
    """
    hold = ridge * gram.diagonal().double().mean().clamp(min=1e-30)
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    right = weight.double() @ (cross.double() + hold * eye)
    return torch.linalg.solve(gram.double() + hold * eye, right, left=False).to(weight.dtype)
