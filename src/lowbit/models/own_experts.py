"""Running experts that a model's own code multiplies with, each with its own matrices and its own inputs.

The code runs as it is. Its products with the parameters that hold the experts are computed here, one expert at a
time, with the matrices of the block that is running; so the parameters themselves may be without memory, inputs can
be quantized for each expert, and taps see what reaches an expert.

Some code sends all tokens to every expert and multiplies those with 0 that the router sends elsewhere (Llama 4). What
reaches an expert are then the rows that are not 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lowbit.models.architecture import ExpertLinear, Experts
from lowbit.models.expert_views import ExpertProducts, Product
from lowbit.models.experts import matrix
from lowbit.models.experts_function import FLOAT, ExpertParts, alone
from lowbit.models.linear_input import Cache, LinearInput, Tap


@dataclass(frozen=True)
class OwnExpertsCall:
    """What products with experts are computed with.

    Attributes:
        experts: their layout.
        params: parameters of each expert's linears by name; read when the expert runs.
        inputs: what happens to the inputs of linears, by name within the layer.
        routing: receives an expert's number once for each token that reaches it, ``(tokens, 1)``.
        prefix: of the names in ``params``, before those within the layer.
    """

    experts: Experts
    params: Mapping[str, Tensor]
    inputs: Mapping[str, LinearInput] = field(default_factory=dict)
    routing: Tap | None = None
    prefix: str = ""

    def __call__(self, product: Product) -> Tensor:
        """The product, expert by expert."""
        view = product.view
        linears = tuple(own for own in self.experts.linears if self.experts.stack(own) == view.parameter)
        if not view.batched:
            return self._one(linears, view.experts[0], product.x, product)
        x = product.x.expand(len(view.experts), *product.x.shape[-2:])
        return torch.cat([self._one(linears, e, x[i : i + 1], product) for i, e in enumerate(view.experts)])

    def _one(self, linears: tuple[ExpertLinear, ...], number: int, x: Tensor, product: Product) -> Tensor:
        """An expert's part of the product: the outputs of its linears that share the parameter."""
        own = [self.inputs.get(self.experts.name(number, linear), FLOAT) for linear in linears]
        cache: Cache = {}
        seen = [one.quantized(x, cache) for one in own]
        self._show(linears, number, x, [(one.tap, value) for one, value in zip(own, seen, strict=True)])
        if all(value is seen[0] for value in seen):
            return self._multiplied(linears, number, seen[0], product)
        apart = [
            self._multiplied((alone(linear),), number, value, product)
            for linear, value in zip(linears, seen, strict=True)
        ]
        return matrix(linears, [out.movedim(-1, 0) for out in apart]).movedim(0, -1)

    def _show(
        self, linears: tuple[ExpertLinear, ...], number: int, x: Tensor, taps: list[tuple[Tap | None, Tensor]]
    ) -> None:
        """Pass the rows that reach an expert to taps, and how many they are to ``routing``."""
        routing = self.routing if self.experts.reads[0] in linears else None
        if routing is None and not any(tap for tap, _ in taps):
            return
        reached = x.flatten(0, -2).any(-1)
        if routing is not None:
            routing(torch.full((int(reached.sum()), 1), number))
        for tap, value in taps:
            if tap is not None and bool(reached.any()):
                tap(value.flatten(0, -2)[reached])

    def _multiplied(self, linears: tuple[ExpertLinear, ...], number: int, x: Tensor, product: Product) -> Tensor:
        """The product with an expert's matrix; for gradients it is read, and maybe rounded, a second time."""
        if not torch.is_grad_enabled():
            return self._product(linears, number, x, product)
        args = (linears, number, x, product)
        return cast(Tensor, checkpoint(self._product, *args, use_reentrant=False, preserve_rng_state=False))

    def _product(self, linears: tuple[ExpertLinear, ...], number: int, x: Tensor, product: Product) -> Tensor:
        names = [self.experts.name(number, linear) for linear in linears]
        whole = matrix(linears, [self.params[f"{self.prefix}{name}.weight"].to(x.dtype) for name in names])
        # In the memory order of the code's own view, which decides the order of sums.
        stored = (whole.mT if self.experts.transposed else whole).contiguous()
        weight = stored.mT if product.view.turned else stored
        return product.multiply(x, weight[None] if product.view.batched else weight)


def own_experts_computed_by(layer: nn.Module, call: OwnExpertsCall) -> ExpertProducts:
    """A context in which a layer's products with experts are what ``call`` computes."""
    return ExpertProducts(_stacks_of(layer, call.experts), call)


def _stacks_of(layer: nn.Module, experts: Experts) -> dict[str, Tensor]:
    return {name: layer.get_parameter(name) for name in map(experts.stack, experts.linears)}


@dataclass(frozen=True)
class _Enter:
    """A forward pre-hook of a loaded layer; an object and no closure, so that the model can be pickled."""

    experts: Experts
    inputs: Mapping[str, LinearInput]

    def __call__(self, layer: nn.Module, args: Any, kwargs: Any) -> None:
        call = OwnExpertsCall(
            self.experts, ExpertParts(self.experts, layer.get_submodule(self.experts.module)), self.inputs
        )
        context = own_experts_computed_by(layer, call)
        context.__enter__()
        _entered.set((*_entered.get(), context))


_entered: ContextVar[tuple[ExpertProducts, ...]] = ContextVar("contexts of the layers that run", default=())


def _leave(layer: nn.Module, args: Any, out: Any) -> None:
    *outer, own = _entered.get()
    own.__exit__(None, None, None)
    _entered.set(tuple(outer))


def quantize_own_experts(layer: nn.Module, experts: Experts, inputs: Mapping[str, LinearInput]) -> None:
    """Make a loaded layer's experts compute with quantized inputs, if any are."""
    if inputs:
        layer.register_forward_pre_hook(_Enter(experts, dict(inputs)), with_kwargs=True)
        layer.register_forward_hook(_leave, always_call=True)
