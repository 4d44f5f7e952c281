"""Refit: closed-form (ridge) refit of each linear to its quantized inputs.

A linear of the quantized model reads an input that differs from the float model's: it is quantized and carries the
error of the layers before it. The weight that is best for this input differs from the trained one: at four bits, much
of an input's variance lies in directions where quantization noise exceeds the signal, and smaller weights there
reduce the error. Ridge regression gives the best weight: no gradients, no quantization of the weight in the
objective, one factorisation for all linears that read one input. Steps that train or quantize follow.

Source: the objective is that of asymmetric calibration (GPTAQ, Li et al., arXiv 2504.02692) without its quantization;
the ridge towards the original weight regularizes what few calibration tokens do not determine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.methods.cold import is_cold, with_cold_note
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.inputs import stages
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.statistics import Statistics, paired_statistics
from lowbit.models.block import Block, Calib
from lowbit.models.offload import select_sequences
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat

FIGURES = {"unweighted": ("gram", "cross"), "normalized": ("normalized_gram", "normalized_cross")}
CHOICES = {"tokens": tuple(FIGURES)}
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)  # candidates of the search, in units of ``Refit.ridge``
EVERY = 4  # every fourth sequence belongs to the validation split
Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Refit(Method):
    """Closed-form refit of the weights to the quantized model's inputs.

    Attributes:
        ridge: ridge strength towards the original weight, in units of the mean square of the input's channels.
        search: choose the ridge strength per input among ``RIDGES`` times ``ridge``, by the error on a validation
            split (a quarter of the sequences); the final fit uses all sequences.
        tokens: ``unweighted`` or per-token ``normalized`` second moments, as in ``gptq``; with ``normalized``, a few
            tokens with massive activations do not dominate.
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
        """None: only weights change."""
        return NO_OPS

    @torch.no_grad()
    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with every linear refitted in execution order, after its refitted and quantized predecessors.

        Its float function changes, so that its quantized output is closer to the float model's.
        """
        block = with_input_ranges(block, calib)
        done, quantized_params = block, dict(block.params)
        figures: dict[str, dict[str, float]] = {}
        splits = self._splits(calib)
        cold: dict[str, int] = {}
        for groups in stages(block, 2 * len(splits)):
            quantized = replace(done, params=quantized_params)
            firsts, names = [linears[0] for linears in groups], FIGURES[self.tokens]
            paired = [paired_statistics(quantized, block, split, firsts, names) for split in splits]
            for linears in groups:
                seen = [split.pop(linears[0]) for split in paired]
                refitted: dict[str, Tensor] = {}
                if is_cold(block, linears[0], tokens := sum(stats.count for stats in seen)):
                    cold[linears[0]] = tokens
                else:
                    ridge, refitted = self._refitted(block, linears, seen)
                # All of them first: linears that a runtime fuses may share a scale.
                done = replace(done, params={**done.params, **{f"{n}.weight": new for n, new in refitted.items()}})
                for name in linears:
                    new, format = done.weight(name), done.weight_format(name)
                    quantized_params[f"{name}.weight"] = format.fake_quant(new, done.qparams(name))
                for name, new in refitted.items():
                    weight = block.weight(name)
                    change = (new - weight).square().sum() / weight.square().sum().clamp(min=1e-30)
                    figures[name] = {"ridge": ridge, "relative_change": float(change)}
        done = with_cold_note(done, "refit", cold, "not refitted")
        return done.with_record("refit", figures) if figures else done

    def _refitted(
        self, block: Block, linears: Sequence[str], seen: Sequence[Statistics]
    ) -> tuple[float, dict[str, Tensor]]:
        """The ridge strength for linears that share an input, and their refitted weights.

        ``seen`` is of the training and the validation split, or of all sequences.
        """
        ridge = self.ridge
        if len(seen) > 1 and any(is_cold(block, linears[0], stats.count) for stats in seen):
            seen[0].merge(seen[1])  # too few to choose a strength by: one part may have none
        elif len(seen) > 1:
            weight = torch.cat([block.weight(name) for name in linears])
            ridges = [self.ridge * factor for factor in RIDGES]
            ridge = best_ridge(weight, self._moments(seen[0]), self._moments(seen[1]), ridges)
            seen[0].merge(seen[1])
        gram, cross = self._moments(seen[0])
        return ridge, {name: output_target(block.weight(name), gram, cross, ridge) for name in linears}

    def _moments(self, seen: Statistics) -> Moments:
        gram, cross = (seen[name] for name in FIGURES[self.tokens])
        return gram, cross

    def _splits(self, calib: Calib) -> list[Calib]:
        """Training and validation split for the choice of a ridge strength, or all sequences as one part."""
        count = len(calib.x_q)
        if not self.search or count < 2:
            return [calib]
        validates = torch.arange(count) % EVERY == min(EVERY, count) - 1
        return [self._select(calib, torch.nonzero(split).flatten()) for split in (~validates, validates)]

    def _select(self, calib: Calib, indices: Tensor) -> Calib:
        x_fp, x_q, y_fp = (select_sequences(states, indices) for states in (calib.x_fp, calib.x_q, calib.y_fp))
        return replace(calib, x_fp=x_fp, x_q=x_q, y_fp=y_fp)


def best_ridge(weight: Tensor, training: Moments, validation: Moments, ridges: Sequence[float]) -> float:
    """The ridge whose ``output_target`` on the ``training`` moments has the least squared error on ``validation``.

    With the eigenvectors ``Q`` and eigenvalues ``l`` of the training ``gram``, the change of the weight is
    ``W (cross - gram) Q diag(1 / (l + strength)) Q^T``: one decomposition serves all ridges. For a change ``D`` the
    error ``sum |W x - (W + D) x_q|^2`` is ``tr(D gram D^T) - 2 tr(D (W (cross - gram))^T)`` plus a constant.

    Where both splits agree, the weakest regularization is best:

    >>> one, two = torch.eye(1), torch.full((1, 1), 2.0)
    >>> best_ridge(one, (one, two), (one, two), [0.1, 1.0, 10.0])
    0.1
    >>> best_ridge(one, (one, two), (one, one), [0.1, 1.0, 10.0])
    10.0
    """
    values, vectors = torch.linalg.eigh(training[0].double())
    mean = values.mean().clamp(min=1e-30)
    change, target = (weight.double() @ (cross - gram).double() @ vectors for gram, cross in (training, validation))
    gram = vectors.T @ validation[0].double() @ vectors
    errors = []
    for ridge in ridges:
        step = change / (values.clamp(min=0) + ridge * mean)
        errors.append(float((step * (step @ gram - 2 * target)).sum()))
    return ridges[errors.index(min(errors))]


def output_target(weight: Tensor, gram: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """The weight ``V`` ``(out, in)`` of least ``|W x - V x_q|^2 + ridge * mean |V - W|^2``, before quantization.

    Args:
        weight: ``W`` ``(out, in)``.
        gram: ``sum x_q x_q^T``.
        cross: ``sum x x_q^T``, ``x`` the same input in the float model.
        ridge: in units of ``gram``'s mean diagonal.

    An input of half the float model's value gets twice the weight:

    >>> output_target(torch.ones(1, 1), torch.ones(1, 1), torch.full((1, 1), 2.0), 1e-9)
    tensor([[2.]])
    """
    strength = ridge * gram.diagonal().double().mean().clamp(min=1e-30)
    eye = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    right = weight.double() @ (cross.double() + strength * eye)
    return torch.linalg.solve(gram.double() + strength * eye, right, left=False).to(weight.dtype)
