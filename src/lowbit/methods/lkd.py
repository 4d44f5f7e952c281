"""Layer-by-layer knowledge distillation: each quantized layer is trained to give the float layer's output.

Source: ZeroQuant, Yao et al., NeurIPS 2022, arXiv 2206.01861, section 4.3. Layers are trained one after another, each
against the float layer as its teacher:

    L_k = MSE(layer_k(x), Q(layer_k)(x'))

All weights and biases of the layer and the gains of its norms are trained through the quantizers, whose rounding
passes gradients straight through; ``rtn`` then chooses the codes that training ended with. The rest of ZeroQuant is a
scheme: weights in groups, one range for each token of the inputs (``w4a8g128``).

Differences from the paper, each an option:

* ``inputs``: the paper gives the student the float model's hidden states, ``x' = x``. By default it gets those of the
  model quantized so far, so that a layer also makes up for the errors of those before it.
* ``loss``: the paper's is a plain mean, of which tokens with massive activations take the most; by default each
  token's error is relative to its output.
* Learning rates are in units of each matrix's root mean square, so that one value suits models of any size, and the
  weights of the best epoch on the validation split are kept, which may be the start.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.methods.fit_state import Fitted
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.layer_by_layer import layer_by_layer
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds, check_choices
from lowbit.methods.training import Schedule, fit, loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.edges import Norm
from lowbit.models.forward import run
from lowbit.models.offload import Rows
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat

CHOICES = {"inputs": ("quantized", "float"), "loss": ("token", "mse")}


@dataclass(frozen=True)
class LayerDistillation(Method):
    """Weights trained through their quantizers against the float layer's output, layer by layer.

    Attributes:
        inputs: the student's hidden states: ``quantized``, those of the model quantized so far, or the ``float``
            model's (the paper's).
        loss: ``token``, each token relative to its output, or ``mse`` (the paper's); see ``AffineQuant``.
        norms: also train the norms' gains and biases.
        lr: learning rate in units of the root mean square of a matrix or a gain; a bias has that of its weight.
        schedule: epochs, batches, validation split, gradient clipping and learning-rate decay.
    """

    inputs: str = "quantized"
    loss: str = "token"
    norms: bool = True
    lr: float = 3e-3
    schedule: Schedule = Schedule()
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "both"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choices("lkd", self, CHOICES)
        check_bounds("lkd", self, {"lr": "0 or more"})

    @property
    def passes(self) -> int:
        """One for the starting point, then forward and backward in each epoch."""
        return 1 + 4 * self.schedule.epochs

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: only parameters change."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with every layer trained; its float function changes, so that its quantized output improves."""
        return layer_by_layer(self._layer, block, calib) if block.formats else block

    def _layer(self, layer: Block, calib: Calib) -> Block:
        if not layer.formats:
            return layer
        student = Student(self, with_input_ranges(layer, calib), calib)
        fitted = fit(
            student.groups(),
            student.loss,
            len(calib.x_q),
            self.schedule,
            layer.start,
            ahead=student.rows.prepare,
            share=student.rows.share,
        )
        return student.fold(fitted)


class Student:
    """Training of one layer: its parameters, and the loss against the teacher's output."""

    def __init__(self, options: LayerDistillation, block: Block, calib: Calib) -> None:
        self.options, self.block = options, block
        self.learned = {name: block.params[name].clone().requires_grad_() for name in self._names()}
        self.unit = loss_unit(calib.y_fp, options.loss, block.device, calib.batch)
        x = calib.x_q if options.inputs == "quantized" else calib.x_fp
        self.rows = Rows(block.device, x, calib.y_fp, self.unit)

    def _names(self) -> list[str]:
        """The trained parameters: weights and biases of quantized linears, and of norms."""
        modules = self.block.quantized_linears()
        if self.options.norms:
            modules += sorted({edge.src.module for edge in self.block.edges() if isinstance(edge.src, Norm)})
        names = (f"{module}.{kind}" for module in modules for kind in ("weight", "bias"))
        return [name for name in names if name in self.block.params]

    def groups(self) -> list[tuple[list[Tensor], float]]:
        """Each trained tensor with its learning rate."""
        return [([value], self.options.lr * self._unit_of(name)) for name, value in self.learned.items()]

    def _unit_of(self, name: str) -> float:
        """The root mean square of the weight that a parameter is, or belongs to."""
        weight = self.block.params[f"{name.rpartition('.')[0]}.weight"]
        return float(weight.float().square().mean().sqrt())

    def params(self) -> dict[str, Tensor]:
        """Float parameters as trained so far; differentiable."""
        return {**self.block.params, **self.learned}

    def quantized(self) -> Mapping[str, Tensor]:
        """Quantized parameters, as they are stored; differentiable."""
        return self.block.fake_quant_clipped(self.params(), self.block.clips)

    def loss(self, indices: Tensor) -> Tensor:
        """The layer's output error on the sequences ``indices``, relative to the teacher's output."""
        x, y_fp, unit = self.rows(indices)
        return relative_loss(run(self.block, x, self.quantized(), quantized=True), y_fp, unit)

    @torch.no_grad()
    def fold(self, fitted: Fitted) -> Block:
        """The layer with the trained parameters."""
        record: dict[str, Any] = {
            "loss": fitted.train,
            "held_out": [value if math.isfinite(value) else None for value in fitted.held_out],
            "best_epoch": fitted.best,
            "skipped_steps": fitted.skipped,
            "relative_change": self._change(),
        }
        notes = list(fitted.notes)
        if self.options.schedule.epochs and not fitted.best:
            notes.append("no epoch improves the validation loss; the weights stay as they are")
        done = replace(self.block, params={name: value.detach() for name, value in self.params().items()})
        return done.with_notes("lkd", *notes).with_record("lkd", record)

    def _change(self) -> dict[str, float]:
        """The squared change of each matrix relative to its own size."""
        out = {}
        for name in self.block.quantized_linears():
            before, now = self.block.weight(name), self.learned[f"{name}.weight"]
            out[name] = float((now - before).square().sum() / before.square().sum().clamp(min=1e-30))
        return out
