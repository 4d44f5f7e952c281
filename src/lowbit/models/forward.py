"""Running a block: the library's layers through ``torch.func.functional_call``, with temporary hooks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from lowbit.distributed.exchange import fill, from_first
from lowbit.distributed.tree import divided
from lowbit.distributed.world import here
from lowbit.models.architecture import Experts, LayerKind
from lowbit.models.arguments import for_batch
from lowbit.models.attention import quantized_attention
from lowbit.models.block import Block
from lowbit.models.experts_function import ExpertsCall, ExpertsReplay, experts_computed_by
from lowbit.models.handed_on import mappings_in
from lowbit.models.kv_ratios import RATIOS, ratios_at
from lowbit.models.linear_input import Cache, LinearInput, Tap
from lowbit.models.listed_experts import ListedExperts
from lowbit.models.offload import batches, concatenate
from lowbit.models.own_experts import OwnExpertsCall, own_experts_computed_by
from lowbit.models.prefix import KEYS, VALUES, with_prefix
from lowbit.models.recorder import hidden_of
from lowbit.models.runtime_ops import RuntimeOp, at_input, linear_behind
from lowbit.models.shard import Shard, States
from lowbit.models.stream import State

Inputs = list[dict[str, LinearInput]]


def run(
    block: Block,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
    *,
    quantized: bool = False,
    taps: Mapping[str, Tap] | None = None,
    replay: ExpertsReplay | None = None,
) -> Tensor:
    """The block's output for a stream ``x`` ``(sequences, length, width)``; differentiable in ``params``.

    Args:
        block: the block.
        x: hidden states, as ``block.stream`` lays them out; their dtype is the compute dtype.
        params: parameters to run with; by default the block's float parameters (``quantized_params()`` gives the
            quantized ones).
        quantized: quantize the linears' inputs and Q, K, V according to ``block.formats`` and ``block.kv``.
        taps: functions by linear name; each receives the input of its linear as the linear sees it, ``(tokens, in)``
            for a linear of an expert, of the tokens that reach the expert. The name of an experts module is one,
            too: its tap receives all tokens; and so is ``routing_of`` it, for the experts of each token.
        replay: of one layer's experts: keeps the pass, or runs one expert and takes all others from it. Experts that
            the model's own code runs are computed anew, all of them.
    """
    params = block.params if params is None else params
    stream = block.enters.unpack(x)
    hidden, handed = stream.hidden, dict(stream.handed)
    for layer, index, kind, kwargs in zip(block.layers, block.indices, block.kinds, block.kwargs, strict=True):
        state = _state(block, index, kind, params, x)
        with ExitStack() as stack:
            _prepare(stack, block, layer, index, kind, params, quantized, taps or {}, replay)
            arguments = for_batch(kwargs, x, stream.digits)
            if block.prefix:
                arguments = with_prefix(arguments, index, params)
            hidden = _called(layer, state, hidden, arguments, handed)
    return block.leaves.pack(State(hidden, stream.digits, handed))


def _state(block: Block, index: int, kind: LayerKind, params: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """A layer's parameters as the library names and stores them, without those of experts, in the dtype of ``x``."""
    prefix = f"{index}."
    own = {f"{prefix}{name}" for name in (KEYS, VALUES, RATIOS)}  # not of the library's layer
    names = [name for name in params if name.startswith(prefix) and name not in own]
    if kind.experts is not None:
        names = [n for n in names if not kind.is_stacked(n.removeprefix(prefix).rpartition(".")[0])]
    stored = block.as_stored({name: _like(params[name], x) for name in names})
    return {name.removeprefix(prefix): value for name, value in stored.items()}


def _prepare(
    stack: ExitStack,
    block: Block,
    layer: nn.Module,
    index: int,
    kind: LayerKind,
    params: Mapping[str, Tensor],
    quantized: bool,
    taps: Mapping[str, Tap],
    replay: ExpertsReplay | None,
) -> None:
    """Make a layer quantize and show the inputs of its linears and apply its runtime ops, while ``stack`` is open."""
    prefix, inputs = f"{index}.", _inputs(block, index, kind, quantized, taps)
    if kind.attention is not None:
        attention = layer.get_submodule(kind.attention)
        stack.enter_context(quantized_attention(attention.config, block.kv if quantized else None, block.prefix))
        stack.enter_context(ratios_at(attention, params.get(f"{prefix}{RATIOS}") if quantized else None))
    if kind.experts is not None:
        stack.enter_context(_experts(layer, kind.experts, params, inputs, index, taps, block.every_token, replay))
        inputs = [{n: own for n, own in group.items() if not kind.is_stacked(n)} for group in inputs]
    if kind.listed is not None and (tap := taps.get(routing_of(f"{index}.{kind.listed.module}"))) is not None:
        _show_routing(stack, layer, kind.listed, tap)
    for name, hook in _hooks(inputs):
        handle = layer.get_submodule(name).register_forward_pre_hook(hook)
        stack.callback(handle.remove)
    for name, op in block.ops.items():
        if op.place == "behind a norm" and name.startswith(prefix) and linear_behind(name) is None:
            norm = layer.get_submodule(name.removeprefix(prefix))
            stack.callback(norm.register_forward_hook(apply_behind(op)).remove)


def _experts(
    layer: nn.Module,
    experts: Experts,
    params: Mapping[str, Tensor],
    inputs: Inputs,
    index: int,
    taps: Mapping[str, Tap],
    every_token: bool,
    replay: ExpertsReplay | None,
) -> AbstractContextManager[object]:
    """A context in which a layer's experts compute with ``params``; a tap of their module sees all of its tokens."""
    own, name = {name: found for group in inputs for name, found in group.items()}, f"{index}.{experts.module}"
    routing, prefix = taps.get(routing_of(name)), f"{index}."
    if experts.own_code:
        return own_experts_computed_by(layer, OwnExpertsCall(experts, params, own, routing, prefix))
    call = ExpertsCall(experts, params, own, taps.get(name), routing, every_token, prefix, replay)
    return experts_computed_by(layer.get_submodule(experts.module), call)


def _show_routing(stack: ExitStack, layer: nn.Module, listed: ListedExperts, tap: Tap) -> None:
    """Pass the number of an expert to ``tap`` once for each token that reaches it, ``(tokens, 1)``."""
    for number in range(listed.count):

        def hook(module: nn.Module, args: tuple[Any, ...], number: int = number) -> None:
            tap(torch.full((args[0].shape[:-1].numel(), 1), number))

        stack.callback(layer.get_submodule(listed.expert(number)).register_forward_pre_hook(hook).remove)


def routing_of(experts: str) -> str:
    """The name of an experts module's tap that receives the experts of each token ``(tokens, k)``.

    Experts that the model's own code calls, or multiplies with, show their number, once for each of their tokens.
    """
    return f"{experts}:routing"


def _like(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter in the dtype of ``x``; a buffer of integers as it is."""
    return parameter.to(x.dtype) if parameter.is_floating_point() else parameter


def _called(
    layer: nn.Module,
    state: dict[str, Tensor],
    x: Tensor,
    arguments: dict[str, Any],
    handed: dict[tuple[str, str], tuple[Tensor, ...]],
) -> Tensor:
    """The layer's hidden states; what it hands on is added to ``handed``, and what earlier ones do is there."""
    shared = {name: copy.copy(arguments[name]) for name in mappings_in(arguments)}
    for (name, key), value in handed.items():
        if name in shared:
            shared[name][key] = value
    out = hidden_of(torch.func.functional_call(layer, state, args=(x,), kwargs={**arguments, **shared}))
    handed |= {(name, key): value for name, own in shared.items() for key, value in own.items()}
    return out


def apply_behind(op: RuntimeOp) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that applies a runtime op to a norm's output."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return op(out)

    return hook


class _LastTapReached(Exception):
    """Ends a forward pass after its last tap; private, so that it cannot be mistaken for another exception."""


@torch.no_grad()
def observe(
    block: Block,
    x: Tensor,
    taps: Mapping[str, Tap],
    params: Mapping[str, Tensor] | None = None,
    *,
    quantized: bool = False,
    batch: int = 4,
) -> None:
    """Pass the linears' inputs to ``taps`` for all sequences, ``batch`` at a time, without gradients.

    Like ``run``, except that each pass ends as soon as every tap has had an input.
    """
    for part in batches(x, batch, block.device):
        waiting = set(taps)

        def reached(value: Tensor, name: str, waiting: set[str] = waiting) -> None:
            taps[name](value)
            waiting.discard(name)
            if not waiting:
                raise _LastTapReached

        try:
            run(block, part, params, quantized=quantized, taps={name: partial(reached, name=name) for name in taps})
        except _LastTapReached:
            continue


def _inputs(block: Block, index: int, kind: LayerKind, quantized: bool, taps: Mapping[str, Tap]) -> Inputs:
    """What happens to the inputs of a layer's linears, by name within the layer, grouped by shared input."""

    def input_of(linear: str) -> LinearInput:
        format = block.input_format(linear) if quantized else None
        qparams, mix = block.input_qparams.get(linear), block.ops.get(at_input(linear))
        return LinearInput(format, block.ops.get(linear), taps.get(linear), qparams, mix)

    groups = ({name: input_of(f"{index}.{name}") for name in group} for group in kind.groups)
    return [{name: found for name, found in group.items() if found} for group in groups]


def _hooks(inputs: Inputs) -> Iterator[tuple[str, Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]]]:
    """Pre-hooks for linears; those that share an input and its format share its quantization."""
    for group in inputs:
        cache: Cache = {}
        for name, own in group.items():

            def hook(
                module: nn.Module, args: tuple[Any, ...], own: LinearInput = own, cache: Cache = cache
            ) -> tuple[Any, ...]:
                return (own(args[0], cache), *args[1:])

            yield name, hook


@overload
def run_all(
    block: Block,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
    *,
    quantized: bool = False,
    taps: Mapping[str, Tap] | None = None,
    batch: int = 4,
) -> Tensor: ...
@overload
def run_all(
    block: Block,
    x: Shard,
    params: Mapping[str, Tensor] | None = None,
    *,
    quantized: bool = False,
    taps: Mapping[str, Tap] | None = None,
    batch: int = 4,
) -> Shard: ...
@torch.no_grad()
def run_all(
    block: Block,
    x: States,
    params: Mapping[str, Tensor] | None = None,
    *,
    quantized: bool = False,
    taps: Mapping[str, Tap] | None = None,
    batch: int = 4,
) -> States:
    """``run`` over all sequences, ``batch`` at a time, without gradients; the result is on the device of ``x``.

    Of a shard each process runs its own sequences. Of a tensor, which all of them have, processes share the batches,
    and each gets the whole result. Taps see the inputs of this process's batches.
    """
    if isinstance(x, Shard):
        return _run_shard(block, x, params, quantized, taps, batch)
    if here().size > 1:
        return _run_shared(block, x, params, quantized, taps, batch)
    outputs = (run(block, part, params, quantized=quantized, taps=taps) for part in batches(x, batch, block.device))
    return concatenate(outputs, len(x), x.device)


def _run_shard(
    block: Block,
    x: Shard,
    params: Mapping[str, Tensor] | None,
    quantized: bool,
    taps: Mapping[str, Tap] | None,
    batch: int,
) -> Shard:
    """``run_all`` over a process's own sequences."""
    assert batch == x.micro_batch, "a shard goes through blocks in the batches that it was divided by"
    out: Tensor | None = None
    if len(x.own):
        pieces = x.own.split(batch)
        outputs = (run(block, piece, params, quantized=quantized, taps=taps) for piece in pieces)
        out = concatenate(outputs, len(x.own), x.device)
    # The first process has a batch if there is any; a block may hand on more channels than it was given.
    shape: list[int] = from_first(lambda: [] if out is None else list(out.shape[1:]))
    return x.with_own(torch.empty((0, *shape), dtype=x.dtype) if out is None else out)


def _run_shared(
    block: Block,
    x: Tensor,
    params: Mapping[str, Tensor] | None,
    quantized: bool,
    taps: Mapping[str, Tap] | None,
    batch: int,
) -> Tensor:
    """``run_all`` by all processes of a job; consecutive batches of each, the same for every number of processes."""
    world, pieces = here(), x.split(batch)
    parts = divided(len(pieces), world.size)
    outputs = [run(block, pieces[at], params, quantized=quantized, taps=taps) for at in parts[world.rank]]
    like = torch.cat(outputs) if outputs else x[:0]
    # The first process has a batch if there is any; a block may hand on more channels than it was given.
    shape: list[int] = from_first(lambda: list(like.shape[1:]))
    out = torch.empty((len(x), *shape), dtype=x.dtype)
    rows = [range(part.start * batch, min(part.stop * batch, len(x))) if part else range(0) for part in parts]
    if outputs:
        out[rows[world.rank].start : rows[world.rank].stop] = like
    fill(out, rows)
    return out


@overload
def run_quantized(block: Block, x: Tensor, batch: int = 4) -> Tensor: ...
@overload
def run_quantized(block: Block, x: Shard, batch: int = 4) -> Shard: ...
def run_quantized(block: Block, x: States, batch: int = 4) -> States:
    """The output of the quantized block for all sequences: quantized weights, inputs, Q, K and V."""
    return run_all(block, x, block.quantized_params(), quantized=True, batch=batch)


def relative_error(output: Tensor, reference: Tensor) -> float:
    """``||output - reference||^2 / ||reference||^2`` over all elements, summed in float64.

    >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    0.5
    """
    return float((output - reference).double().square().sum() / reference.double().square().sum().clamp(min=1e-300))
