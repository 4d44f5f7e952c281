"""Wrong variants of methods, each with the check that finds it: a contract that none of them fails holds nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from lowbit.methods import METHODS, RTN, llm_int8, lowrank, outlier_suppression, reassemble, rptq, smoothquant
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.method import DECLARED, Method
from lowbit.methods.options import with_options
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run, run_all, run_quantized
from lowbit.models.outlier_columns import OutlierColumns
from lowbit.models.runtime_ops import Matrix

Call = Callable[[Any, Block, Calib], Block]


class Mutant(NamedTuple):
    """A wrong variant.

    Attributes:
        name: of the method.
        wrong: the variant, a subclass.
        fails: the check that finds it, a name of ``CHECKS`` in ``test_contract.py``.
        why: what is wrong with it.
    """

    name: str
    wrong: type[Method]
    fails: str
    why: str


def mutant(name: str, fails: str, why: str, call: Call) -> Mutant:
    """A method with another call and the declarations of the right one."""
    base = METHODS[name]
    facts = {fact: base.__dict__[fact] for fact in DECLARED}
    return Mutant(name, type(f"Wrong{base.__name__}", (base,), {**facts, "__call__": call}), fails, why)


def patched(module: Any, function: str, wrong: Any) -> Call:
    """The call of the right method with a function of its module replaced."""

    def call(self: Any, block: Block, calib: Calib) -> Block:
        with mock.patch.object(module, function, wrong):
            return super(type(self), self).__call__(block, calib)

    return call


right_scale, right_move = smoothquant.smooth_scale, outlier_suppression.move
right_suppression, right_columns = outlier_suppression.suppression_scale, llm_int8.outlier_columns


def smooth_inverted(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    return 1 / right_scale(activations, weights, alpha)


def smooth_without_activations(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    return right_scale(torch.ones_like(activations), weights, alpha)


def smooth_without_maxima(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    return right_scale(torch.ones_like(activations), torch.ones_like(weights), alpha)


def smooth_times_random(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    return right_scale(activations, weights, alpha) * torch.rand_like(activations)


def smooth_without_biases(self: Any, block: Block, calib: Calib) -> Block:
    done = METHODS["smoothquant"].__call__(self, block, calib)
    biases = {name: value for name, value in block.params.items() if name.endswith("norm.bias")}
    return replace(done, params={**done.params, **biases})


def smooth_on_quantized(self: Any, block: Block, calib: Calib) -> Block:
    return METHODS["smoothquant"].__call__(self, block, replace(calib, x_fp=calib.x_q))


def smooth_in_place(self: Any, block: Block, calib: Calib) -> Block:
    done = METHODS["smoothquant"].__call__(self, block, calib)
    for name, value in done.params.items():
        block.params[name].copy_(value)
    return done


def smooth_with_matrix(self: Any, block: Block, calib: Calib) -> Block:
    done = METHODS["smoothquant"].__call__(self, block, calib)
    norms = [edge.src.module for edge in block.edges() if edge.kind == "norm"]
    eye = torch.eye(calib.x_fp.shape[-1])
    return replace(done, ops={name: Matrix(eye) for name in norms})


def smooth_and_clipped_notes(self: Any, block: Block, calib: Calib) -> Block:
    return replace(METHODS["smoothquant"].__call__(self, block, calib), notes=())


def rtn_without_last(self: Any, block: Block, calib: Calib) -> Block:
    done = METHODS["rtn"].__call__(self, block, calib)
    return replace(done, qweights={name: done.qweights[name] for name in list(done.qweights)[:-1]})


def suppression_inverted(peak: Tensor, threshold: float) -> Tensor:
    return 1 / right_suppression(peak, threshold)


def float_error(block: Block, calib: Calib, sequences: int) -> float:
    wanted = calib.y_fp[:sequences]
    return float(relative_loss(run_all(block, calib.x_q[:sequences]), wanted, loss_unit(wanted, "token")))


def suppression_unsearched(self: Any, block: Block, calib: Calib) -> Block:
    return METHODS["outlier-suppression+"].__call__(with_options(self, grid=1), block, calib)


def shift_with_wrong_sign(*args: Any, shift: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
    return right_move(*args, shift=None if shift is None else -shift, **kwargs)


def columns_of_zeros(block: Block, linear: str, outlier: Tensor) -> OutlierColumns:
    op = right_columns(block, linear, outlier)
    return OutlierColumns(op.kept, torch.zeros_like(op.columns))


def clusters_at_random(low: Tensor, high: Tensor, count: int) -> Tensor:
    labels = torch.arange(len(low)) % count
    return labels[torch.randperm(len(low), generator=torch.Generator().manual_seed(0))]


def distilled_at_rest(self: Any, block: Block, calib: Calib) -> Block:
    return METHODS["lkd"].__call__(with_options(self, lr=0.0), block, calib)


SMOOTH, SUPPRESSION = "smoothquant", "outlier-suppression+"
MUTANTS = [
    mutant(SMOOTH, "factor", "scale inverted", patched(smoothquant, "smooth_scale", smooth_inverted)),
    mutant(
        SMOOTH,
        "factor",
        "activations' maxima replaced by ones",
        patched(smoothquant, "smooth_scale", smooth_without_activations),
    ),
    mutant(
        SMOOTH, "factor", "all maxima replaced by ones", patched(smoothquant, "smooth_scale", smooth_without_maxima)
    ),
    mutant(SMOOTH, "seeds", "multiplied by torch.rand", patched(smoothquant, "smooth_scale", smooth_times_random)),
    mutant(SMOOTH, "function", "biases of norms forgotten", smooth_without_biases),
    mutant(SMOOTH, "needs", "maxima of the quantized model", smooth_on_quantized),
    mutant(SMOOTH, "input", "writes into the given block", smooth_in_place),
    mutant(SMOOTH, "input", "drops the notes of earlier steps", smooth_and_clipped_notes),
    mutant(SMOOTH, "ops", "leaves a runtime op that it does not declare", smooth_with_matrix),
    mutant("llm-int8", "factor", "columns forgotten", patched(llm_int8, "outlier_columns", columns_of_zeros)),
    mutant("rptq", "factor", "clusters at random", patched(rptq, "cluster_ranges", clusters_at_random)),
    mutant("lkd", "factor", "nothing is learned", distilled_at_rest),
    mutant("rtn", "codes", "the last linear is left out", rtn_without_last),
    mutant(
        SUPPRESSION,
        "factor",
        "scale inverted",
        patched(outlier_suppression, "suppression_scale", suppression_inverted),
    ),
    mutant(SUPPRESSION, "factor", "threshold never searched", suppression_unsearched),
    mutant(
        SUPPRESSION,
        "factor",
        "search with the quantizers off",
        patched(outlier_suppression, "output_error", float_error),
    ),
    mutant(
        SUPPRESSION,
        "factor",
        "shift with the wrong sign",
        patched(outlier_suppression, "move", shift_with_wrong_sign),
    ),
]


class Patch(NamedTuple):
    """A wrong part of a method, put in its place.

    Attributes:
        owner: the module or class.
        attribute: the name of the part.
        wrong: what replaces it.
        fails: the check that finds it, a name of ``LITERAL`` in ``literal.py``.
        why: what is wrong with it.
    """

    owner: Any
    attribute: str
    wrong: Any
    fails: str
    why: str


right_init, right_counts = AffineFit.__init__, reassemble.candidate_counts


def fit_in_float32(self: Any, *args: Any) -> None:
    right_init(self, *args)
    self.run_dtype = torch.float32


def change_without_rank(self: Any, rows: dict[str, int]) -> dict[str, Tensor]:
    parts = (self.up @ self.down).split([rows[name] for name in self.linears])
    return dict(zip(self.linears, parts, strict=True))


def score_with_float_inputs(block: Block, calib: Calib, sequences: int) -> float:
    wanted, params = calib.y_fp[:sequences], RTN()(block, calib).quantized_params()
    y = run_all(block, calib.x_q[:sequences], params)
    return float(relative_loss(y, wanted, loss_unit(wanted, "token")))


def score_by_a_plain_mean(block: Block, calib: Calib, sequences: int) -> float:
    wanted = calib.y_fp[:sequences]
    y = run_quantized(RTN()(block, calib), calib.x_q[:sequences])
    return float(relative_loss(y, wanted, loss_unit(wanted, "mse")))


def counts_on_another_grid(peak: Tensor, most: float, grid: int) -> list[Tensor]:
    return right_counts(peak, most, grid // 8)


def loss_with_decay_throughout(self: Any, indices: Tensor) -> Tensor:
    x, y_fp, unit = self.rows(indices)
    error = relative_loss(run(self.block, x, self.quantized(), quantized=True), y_fp, unit)
    changes = [item for pair in self.pairs for item in pair.change(self.outputs).items()]
    sizes = [change.square().sum() / self.power[name] for name, change in changes]
    return error + self.options.weight_decay * torch.stack(sizes).mean()


PATCHES = [
    Patch(AffineFit, "__init__", fit_in_float32, "double", "double without a float64 block"),
    Patch(lowrank.Pair, "change", change_without_rank, "correction", "the correction without its 1/r"),
    Patch(reassemble, "output_error", score_with_float_inputs, "theta", "theta scored with float inputs"),
    Patch(reassemble, "output_error", score_by_a_plain_mean, "theta", "theta scored by a plain mean"),
    Patch(reassemble, "candidate_counts", counts_on_another_grid, "theta", "theta scored on another grid"),
    Patch(lowrank.Correction, "loss", loss_with_decay_throughout, "decay", "weight decay in the validation loss"),
]
