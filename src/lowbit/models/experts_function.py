"""Running the experts of a mixture one after the other, through transformers' registry of experts functions.

``transformers`` looks the function that computes a layer's experts up by a name in the config. The one that lowbit
registers takes each expert's matrices from the block that is running, so that no parameter for all experts exists,
quantizes the inputs of each expert's linears, and shows them to taps. It computes what the library's own loop over
experts does, in its order, and so equals it bit for bit. An expert that no token reaches is not computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lowbit.models.architecture import ExpertLinear, Experts
from lowbit.models.experts import matrix, part_of, stored_in
from lowbit.models.linear_input import Cache, LinearInput, Tap

NAME = "lowbit"
FLOAT = LinearInput()


@dataclass
class ExpertsReplay:
    """A pass through one layer's experts, kept so that another, in which one expert differs, runs that one alone.

    Attributes:
        only: the expert that differs; ``None``: the pass is kept.
        parts: by expert the tokens that reach it, the ranks at which they chose it, and what it adds to the output.
        total: the output ``(tokens, hidden)``.
    """

    only: int | None = None
    parts: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    total: Tensor | None = None

    def alone(self, expert: int) -> ExpertsReplay:
        """For a pass in which ``expert`` differs from the one that is kept."""
        return replace(self, only=expert)


@dataclass(frozen=True)
class ExpertsCall:
    """What an experts module computes with.

    Attributes:
        experts: its layout.
        params: parameters of each expert's linears by name; read, and converted to the compute dtype, when the expert
            runs.
        inputs: what happens to the inputs of linears, by name within the layer.
        tap: receives the module's hidden states ``(tokens, hidden)``, all of them.
        routing: receives the experts of each token ``(tokens, k)``.
        every_token: taps of ``inputs`` see all tokens, as if each expert were reached by every token.
        prefix: of the names in ``params``, before those within the layer.
        replay: keeps the pass, or runs one expert and takes all others from the one that is kept.
    """

    experts: Experts
    params: Mapping[str, Tensor]
    inputs: Mapping[str, LinearInput] = field(default_factory=dict)
    tap: Tap | None = None
    routing: Tap | None = None
    every_token: bool = False
    prefix: str = ""
    replay: ExpertsReplay | None = None

    def __call__(self, module: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """The sum of the experts' outputs ``(tokens, hidden)``.

        Args:
            module: the library's module, for what is between the linears.
            x: hidden states ``(tokens, hidden)``.
            chosen: the experts of each token ``(tokens, k)``.
            weights: the factors of their outputs, the same shape.
        """
        if self.tap is not None:
            self.tap(x)
        if self.routing is not None:
            self.routing(chosen)
        if self.replay is not None and self.replay.only is not None:
            return self._with_one_changed(module, x, weights, self.replay, self.replay.only)
        out = torch.zeros_like(x)
        reached = set(chosen.unique().tolist())
        for number in range(self.experts.count):
            if self.every_token and self._tapped(number):
                with torch.no_grad():
                    self._expert(module, number, x, taps=True)
            if number in reached:
                at, token = torch.where(chosen.T.eq(number))
                y = self._reached(module, number, x[token])
                part = (y * weights[token, at, None]).to(out.dtype)
                out.index_add_(0, token, part)
                if self.replay is not None:
                    self.replay.parts[number] = (token, at, part)
        if self.replay is not None:
            self.replay.total = out
        return out

    def _with_one_changed(
        self, module: Any, x: Tensor, weights: Tensor, replay: ExpertsReplay, number: int
    ) -> Tensor:
        """The output of the pass that is kept, with one expert computed anew."""
        assert replay.total is not None
        if number not in replay.parts:
            return replay.total
        token, at, before = replay.parts[number]
        part = (self._expert(module, number, x[token], taps=True) * weights[token, at, None]).to(x.dtype)
        return replay.total.index_add(0, token, part - before)

    def _reached(self, module: Any, number: int, x: Tensor) -> Tensor:
        """An expert's output for the tokens that reach it.

        For gradients it is computed a second time, so that no more than one expert's matrices, which may be rounded
        ones, are held at a time.
        """
        again = torch.is_grad_enabled() and not self._tapped(number)
        if again and not module.has_post_expert_norm:  # whose parameters are the block's during the call alone
            args = (module, number, x, False)
            return cast(Tensor, checkpoint(self._expert, *args, use_reentrant=False, preserve_rng_state=False))
        return self._expert(module, number, x, taps=not self.every_token)

    def _tapped(self, number: int) -> bool:
        names = (self.experts.name(number, own) for own in self.experts.linears)
        return any(self.inputs.get(name, FLOAT).tap is not None for name in names)

    def _expert(self, module: Any, number: int, x: Tensor, taps: bool) -> Tensor:
        """One expert's output ``(tokens, hidden)``."""
        read = self._project(number, self.experts.reads, x, taps)
        product = module._apply_gate(read) if module.has_gate else module.act_fn(read)
        out = self._project(number, (self.experts.writes,), product, taps)
        return module.post_expert_norm(out) if module.has_post_expert_norm else out

    def _project(self, number: int, linears: tuple[ExpertLinear, ...], x: Tensor, taps: bool) -> Tensor:
        """The output of linears that share a parameter and an input, as the library has it."""
        names = [self.experts.name(number, own) for own in linears]
        cache: Cache = {}
        calls = [self.inputs.get(name, FLOAT) for name in names]
        inputs = [call(x, cache) if taps else call.quantized(x, cache) for call in calls]
        if all(value is inputs[0] for value in inputs):
            return self._matmul(names, linears, inputs[0])
        apart = [
            self._matmul([name], (alone(own),), own_input)
            for name, own, own_input in zip(names, linears, inputs, strict=True)
        ]
        return matrix(linears, [out.T for out in apart]).T

    def _matmul(self, names: list[str], linears: tuple[ExpertLinear, ...], x: Tensor) -> Tensor:
        weight = matrix(linears, [self.params[f"{self.prefix}{name}.weight"].to(x.dtype) for name in names])
        bias = None
        if linears[0].bias is not None:
            bias = matrix(linears, [self.params[f"{self.prefix}{name}.bias"].to(x.dtype) for name in names])
        if not self.experts.transposed:
            return linear(x, weight, bias)
        out = x @ weight.mT.contiguous()  # in the library's memory order, which decides the order of sums
        return out if bias is None else out + bias


def alone(own: ExpertLinear) -> ExpertLinear:
    """A linear as if it had its parameter for itself."""
    return ExpertLinear(own.name, own.parameter, range(len(own.rows)), own.bias)


_running: ContextVar[Mapping[nn.Module, ExpertsCall]] = ContextVar("experts calls by module")
_KEPT = "lowbit_experts"  # attribute of a loaded model's experts modules


def _experts_function(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    kept: _Kept | None = getattr(module, _KEPT, None)
    call = _running.get().get(module) if kept is None else kept.call(module)
    if call is None:  # of a second mixture with the same config, which stays float: the library's own loop
        out: Tensor = type(module).forward.__wrapped__(module, hidden_states, top_k_index, top_k_weights)
        return out
    return call(module, hidden_states, top_k_index, top_k_weights)


@dataclass(frozen=True)
class _Kept:
    """What a loaded model's experts compute with; an attribute, and so pickled and copied with the model."""

    experts: Experts
    inputs: Mapping[str, LinearInput]

    def call(self, module: Any) -> ExpertsCall:
        return ExpertsCall(self.experts, ExpertParts(self.experts, module), self.inputs)


class ExpertParts(Mapping[str, Tensor]):
    """Each expert's parameters as parts of those of an experts module, by name within the layer."""

    def __init__(self, experts: Experts, module: nn.Module) -> None:
        self.experts, self.module = experts, module

    def __getitem__(self, name: str) -> Tensor:
        found = stored_in(self.experts, name)
        if found is None:
            raise KeyError(name)
        parameter, number, own = found
        whole = self.module.get_parameter(parameter.removeprefix(f"{self.experts.module}."))
        return part_of(whole[number], own.rows, self.experts.transposed)

    def __iter__(self) -> Iterator[str]:
        names = (name for group in self.experts.groups for name in group)
        return (f"{name}.weight" for name in names)

    def __len__(self) -> int:
        return self.experts.count * len(self.experts.linears)


def run_experts_apart(module: Any, experts: Experts, inputs: Mapping[str, LinearInput]) -> None:
    """Make a loaded model's experts module compute one expert after the other, with quantized inputs if any."""
    setattr(module, _KEPT, _Kept(experts, dict(inputs)))
    module.config._experts_implementation = NAME


ALL_EXPERTS_FUNCTIONS.register(NAME, _experts_function)


@contextmanager
def experts_computed_by(module: Any, call: ExpertsCall) -> Iterator[None]:
    """Within the context, an experts module of the library's computes what ``call`` does."""
    config = module.config
    before, token = config._experts_implementation, _running.set({module: call})
    config._experts_implementation = NAME
    try:
        yield
    finally:
        config._experts_implementation = before
        _running.reset(token)
