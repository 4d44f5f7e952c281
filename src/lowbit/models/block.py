"""A block is a value: the library's own decoder layers and their parameters, run without changing either.

``Block`` holds one layer, or a window of consecutive ones that a method treats as one. The layers are the
library's modules and may sit on the ``meta`` device; their parameters live in a dict under names such as
``7.mlp.up_proj.weight`` (the layer's index in the model, then its own name). ``run`` calls the layers with
``torch.func.functional_call``, so nothing is forked, patched or left behind. A method takes a ``Block`` and
returns a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lowbit.models.architecture import Edge, Family, Heads, Part, Ref
from lowbit.models.attention import quantized_attention
from lowbit.models.offload import joined, parts
from lowbit.quant.affine import Grid, QTensor, QuantSpec, minmax_grid
from lowbit.quant.inductor import fake_quant_tokens
from lowbit.quant.runtimes import Inputs
from lowbit.quant.scheme import Scheme

Tap = Callable[[Tensor], None]


@dataclass(frozen=True)
class Block:
    """One decoder layer, or a window of consecutive ones, as a value.

    Attributes:
        layers: the library's layer modules, never changed.
        start: index of the first one in the model.
        kwargs: what the model passes to each layer beside the hidden states (masks, rotary embeddings).
        family: the architecture's facts.
        heads: the attention's shape.
        params: float parameters by name, transformed so far.
        clips: for a linear's name the factors ``(low, high)`` on the ends of its groups' ranges, each ``(rows,
            groups)``, for the grid that a rounding step will choose.
        qweights: rounded weights by the linear's name; they take the place of ``params`` in the quantized block.
        online: what nothing could absorb, by the module's name; exporters that cannot carry it refuse. For a norm a
            matrix ``(width, width)`` that its output is multiplied by, ``x @ P``, or ``(2, width)``, index and factor
            of each channel that is gathered, ``x[idx] * factor``, or ``(3, width)``, where the third row has for each
            old channel the new one that it is added to before the factor, or -1; for a linear the factors ``(low,
            high)`` ``(2,)`` that shrink the ends of its rounded input's ranges, and behind them, if any, the offsets
            of its channels ``(in,)``, in steps.
        notes: what a reader of the report must know: a damping raised, a layer left in float.
        record: figures for the report, plain data by layer index and the step's name: losses, conditions.
        pictures: small matrices for the report by layer index, step and site: ``7.affinequant.heads``.
    """

    layers: tuple[nn.Module, ...]
    start: int
    kwargs: tuple[Mapping[str, Any], ...]
    family: Family
    heads: Heads
    params: Mapping[str, Tensor]
    clips: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    qweights: Mapping[str, QTensor] = field(default_factory=dict)
    online: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    record: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the block is computed: its parameters are all on one device."""
        return next(iter(self.params.values())).device

    @property
    def indices(self) -> range:
        """The layers' indices in the model."""
        return range(self.start, self.start + len(self.layers))

    def linear_groups(self) -> list[tuple[str, ...]]:
        """Names of the linears in execution order, those that read one tensor together."""
        return [tuple(f"{i}.{name}" for name in group) for i in self.indices for group in self.family.linears]

    def linears(self) -> list[str]:
        """Names of all linears in execution order."""
        return [name for group in self.linear_groups() for name in group]

    def edges(self) -> list[Edge]:
        """The family's edges with the names of this block's layers."""
        return [
            replace(edge, src=_prefixed(edge.src, i), dst=tuple(_prefixed(d, i) for d in edge.dst))
            for i in self.indices
            for edge in self.family.edges
        ]

    def full_name(self, name: str) -> str:
        """The name in the model: ``7.mlp.up_proj`` -> ``model.layers.7.mlp.up_proj``."""
        return f"{self.family.blocks}.{name}"

    def weight(self, linear: str) -> Tensor:
        """The float weight ``(out, in)`` of a linear."""
        return self.params[f"{linear}.weight"]

    def weight_spec(self, linear: str, scheme: Scheme) -> QuantSpec | None:
        """The format that the scheme wants for a linear."""
        return scheme.weight_spec(self.full_name(linear))

    def quantized_params(self) -> dict[str, Tensor]:
        """``params`` with the rounded weights in their places."""
        rounded = {f"{name}.weight": q.dequantize() for name, q in self.qweights.items()}
        return {**self.params, **rounded}


def part_of(block: Block, start: int, stop: int) -> Block:
    """The layers ``start`` to ``stop`` (counted from 0 within the block) as a block of their own."""
    prefixes = tuple(f"{index}." for index in block.indices[start:stop])

    def own(content: Mapping[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in content.items() if name.startswith(prefixes)}

    return replace(
        block,
        layers=block.layers[start:stop],
        start=block.start + start,
        kwargs=block.kwargs[start:stop],
        params=own(block.params),
        clips=own(block.clips),
        qweights=own(block.qweights),
        online=own(block.online),
        notes=(),
        record={},
        pictures={},
    )


def recorded(block: Block, step: str, figures: Mapping[str, Any]) -> dict[int, Mapping[str, Any]]:
    """The block's record with a step's figures, kept under the block's first layer."""
    return {**block.record, block.start: {**block.record.get(block.start, {}), step: figures}}


class Step(Protocol):
    """A method: a frozen dataclass of options whose call returns a new block."""

    def __call__(self, block: Block, calib: Calib, scheme: Scheme) -> Block:
        """Return ``block`` transformed, clipped, rounded or corrected; ``block`` itself stays as it is."""
        ...


@dataclass(frozen=True)
class Calib:
    """What a method may look at, each ``(sequences, length, hidden)`` in the dtype that blocks run in.

    They live where ``feed.home`` says, which for a block on a GPU is the host: ``feed.parts`` and ``feed.Rows`` bring
    what is at work to the block's device.

    Attributes:
        x_fp: the block's input in the float model.
        x_q: its input in the model that is quantized up to here.
        y_fp: its output in the float model, for ``x_fp``.
        batch: how many sequences to run at once.
    """

    x_fp: Tensor
    x_q: Tensor
    y_fp: Tensor
    batch: int = 4


def _prefixed(ref: Ref, index: int) -> Ref:
    return replace(ref, module=f"{index}.{ref.module}") if isinstance(ref, Part) else f"{index}.{ref}"


def run(
    block: Block,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
    scheme: Scheme | None = None,
    taps: Mapping[str, Tap] | None = None,
) -> Tensor:
    """The block's output for hidden states ``x`` ``(sequences, length, hidden)``; differentiable in ``params``.

    Args:
        block: the block.
        x: hidden states; everything is computed in their dtype.
        params: parameters to run with; the block's float ones by default (``quantized_params()`` for the
            rounded ones).
        scheme: where given, inputs of the linears and Q, K, V are rounded as it says.
        taps: for a linear's name a function that is shown the linear's input as the linear sees it.
    """
    params = block.params if params is None else params
    for layer, index, kwargs in zip(block.layers, block.indices, block.kwargs, strict=True):
        prefix = f"{index}."
        own = {name.removeprefix(prefix): p.to(x.dtype) for name, p in params.items() if name.startswith(prefix)}
        with ExitStack() as stack:
            attention = layer.get_submodule(block.family.attention)
            stack.enter_context(quantized_attention(attention.config, scheme.kv if scheme else None))
            for name, hook in _hooks(block, index, scheme, taps or {}):
                handle = layer.get_submodule(name).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            for name, value in block.online.items():
                if value.ndim == 2 and name.startswith(prefix):
                    norm = layer.get_submodule(name.removeprefix(prefix))
                    stack.callback(norm.register_forward_hook(after_norm(value)).remove)
            x = torch.func.functional_call(layer, own, args=(x,), kwargs=dict(kwargs))
    return x


def after_norm(map: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that applies an online map to a norm's output; see ``apply_online``."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return apply_online(out, map)

    return hook


def apply_online(x: Tensor, map: Tensor) -> Tensor:
    """A norm's output ``(..., width)`` through a matrix ``(width, width)`` or a gather ``(2 or 3, width)``.

    >>> apply_online(torch.tensor([8.0, 1.0]), torch.tensor([[0.0, 0.0], [0.5, 0.5]])).tolist()
    [4.0, 4.0]
    >>> map = torch.tensor([[3.0, 1, 2, 3], [0.5, 0.5, 1.0, 0.5], [1, -1, -1, -1]])
    >>> apply_online(torch.tensor([2.0, 4.0, 5.0, 8.0]), map).tolist()
    [4.0, 3.0, 5.0, 4.0]
    """
    if map.shape[0] not in (2, 3):
        return x @ map.to(x.dtype)
    out = reorder(x, map[0].long())
    if map.shape[0] == 3:
        gone = torch.nonzero(map[2] >= 0).flatten()
        out = out.index_add(-1, map[2, gone].long(), x[..., gone])
    return out * map[1].to(x.dtype)


def reorder(x: Tensor, idx: Tensor) -> Tensor:
    """``x[..., idx]`` for ``(..., width)``; ``gather`` is several times faster than indexing on a CPU.

    >>> reorder(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 1, 0])).tolist()
    [[2.0, 2.0, 1.0], [4.0, 4.0, 3.0]]
    """
    return x.gather(-1, idx.expand(*x.shape[:-1], len(idx)))


class _Seen(Exception):
    """Ends a forward pass whose rest nobody needs; private, so that it can be taken for nothing else."""


@torch.no_grad()
def observe(
    block: Block,
    x: Tensor,
    taps: Mapping[str, Tap],
    params: Mapping[str, Tensor] | None = None,
    scheme: Scheme | None = None,
    batch: int = 4,
) -> None:
    """Show the linears' inputs to ``taps``, all sequences, ``batch`` at a time, without gradients.

    As ``run``, but each pass ends where the last of the taps has seen its tensor.
    """
    last = [name for name in block.linears() if name in taps][-1]

    def stop(value: Tensor) -> None:
        taps[last](value)
        raise _Seen

    for part in parts(x, batch, block.device):
        try:
            run(block, part, params, scheme, {**taps, last: stop})
        except _Seen:
            continue


def _hooks(
    block: Block, index: int, scheme: Scheme | None, taps: Mapping[str, Tap]
) -> Iterator[tuple[str, Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]]]:
    """For the linears of a layer that need it: round the input, then show it to the tap.

    Linears that read one tensor share its rounding where they have the same.
    """
    for group in block.family.linears:
        cache: dict[Inputs, tuple[Tensor, Tensor]] = {}
        for name in group:
            inputs = scheme.inputs(block.full_name(f"{index}.{name}")) if scheme else None
            tap = taps.get(f"{index}.{name}")
            ends = block.online.get(f"{index}.{name}")
            if inputs is None and tap is None:
                continue

            def hook(
                module: nn.Module,
                args: tuple[Any, ...],
                inputs: Inputs | None = inputs,
                tap: Tap | None = tap,
                ends: Tensor | None = ends,
                cache: dict[Inputs, tuple[Tensor, Tensor]] = cache,
            ) -> tuple[Any, ...] | None:
                x = args[0]
                if inputs is not None and ends is not None:
                    x = rounded_input(x, inputs.spec, ends)
                elif inputs is not None:
                    if inputs not in cache or cache[inputs][0] is not x:
                        cache[inputs] = (x, inputs.round(x))
                    x = cache[inputs][1]
                if tap is not None:
                    tap(x)
                return (x, *args[1:])

            yield name, hook


def rounded_input(x: Tensor, spec: QuantSpec, online: Tensor) -> Tensor:
    """A linear's input ``(..., in)`` rounded with what stays online before it: see ``Block.online``."""
    online = online.to(x.dtype)
    return fake_quant_tokens(x, spec, online[0], online[1], online[2:] if len(online) > 2 else None)


@torch.no_grad()
def run_all(
    block: Block,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
    scheme: Scheme | None = None,
    taps: Mapping[str, Tap] | None = None,
    batch: int = 4,
) -> Tensor:
    """``run`` over all sequences, ``batch`` at a time, without gradients; the result lives where ``x`` does."""
    done = (run(block, part, params, scheme, taps) for part in parts(x, batch, block.device))
    return joined(done, len(x), x.device)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """``||got - wanted||^2 / ||wanted||^2`` over everything, summed in float64.

    >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    0.5
    """
    return float((got - wanted).double().square().sum() / wanted.double().square().sum().clamp(min=1e-300))


def grid_of(block: Block, linear: str, spec: QuantSpec) -> Grid:
    """The grid of a linear's weight: its groups' ranges, shrunk by the block's clips where a step found some."""
    low, high = block.clips.get(linear, (1.0, 1.0))
    return minmax_grid(block.weight(linear), spec, low, high)
