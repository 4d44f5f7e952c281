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
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.models.architecture import DeclaredEdge, Edge, Family, Heads, Norm, Part, Projection, Ref
from lowbit.models.attention import quantized_attention
from lowbit.models.offload import joined, parts
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.scheme import ModuleFormats

Tap = Callable[[Tensor], None]


@dataclass(frozen=True)
class Note:
    """What a reader of the report must know of a layer: a damping raised, a fit that gave up."""

    layer: int
    text: str


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
        formats: the formats of each linear that is to be quantized, as the plan settled them.
        kv: the format of queries, keys and values inside the attention; ``None``: float.
        clips: for a linear's name the clipping ratios ``(low, high)`` on the ends of its groups' ranges, each
            ``(rows, groups)``, for the qparams that a rounding step will choose.
        qweights: quantized weights by the linear's name; they take the place of ``params`` in the quantized block.
        ops: runtime operations by the module's name: behind a norm, or before a linear.
        notes: what a reader of the report must know.
        record: figures for the report, plain data by layer index and the step's name: losses, conditions.
        pictures: small matrices for the report by layer index, step and site: ``7.affinequant.heads``.
    """

    layers: tuple[nn.Module, ...]
    start: int
    kwargs: tuple[Mapping[str, Any], ...]
    family: Family
    heads: Heads
    params: Mapping[str, Tensor]
    formats: Mapping[str, ModuleFormats] = field(default_factory=dict)
    kv: ActFormat | None = None
    clips: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    qweights: Mapping[str, QTensor] = field(default_factory=dict)
    ops: Mapping[str, RuntimeOp] = field(default_factory=dict)
    notes: tuple[Note, ...] = ()
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

    def quantized_linears(self) -> list[str]:
        """Names of those that have a format, in execution order."""
        return [name for name in self.linears() if name in self.formats]

    @cached_property
    def _edges(self) -> tuple[Edge, ...]:
        return tuple(self._edge(edge, i) for i in self.indices for edge in self.family.edges)

    def edges(self) -> tuple[Edge, ...]:
        """Where maps can move in this block: the family's edges for each of its layers."""
        return self._edges

    def _edge(self, edge: DeclaredEdge, index: int) -> Edge:
        src, dst = self._end(edge.src, index), tuple(self._end(ref, index) for ref in edge.dst)
        return Edge(edge.kind, src, dst, edge.positive, self._partner(edge, index))

    def _end(self, ref: Ref, index: int) -> Projection | Norm:
        linears = {name for group in self.family.linears for name in group}
        if isinstance(ref, str) and ref not in linears:
            return Norm(f"{index}.{ref}")
        return self._projection(ref, index)

    def _projection(self, ref: Ref, index: int) -> Projection:
        name = ref.module if isinstance(ref, Part) else ref
        module = f"{index}.{name}"
        count = self.layers[index - self.start].get_parameter(f"{name}.weight").shape[0]
        if isinstance(ref, Part):
            return Projection(module, ref.rows(self.heads, count), whole=False)
        return Projection(module, slice(0, count))

    def _partner(self, edge: DeclaredEdge, index: int) -> Projection | None:
        """The other projection that reads what ``src`` reads, if any: a gate."""
        if edge.kind != "channels":
            return None
        if isinstance(edge.src, Part):
            return self._projection(Part(edge.src.module, "gate"), index)
        group = next(group for group in self.family.linears if edge.src in group)
        others = [name for name in group if name != edge.src]
        return self._projection(others[0], index) if others else None

    def full_name(self, name: str) -> str:
        """The name in the model: ``7.mlp.up_proj`` -> ``model.layers.7.mlp.up_proj``."""
        return f"{self.family.blocks}.{name}"

    def weight(self, linear: str) -> Tensor:
        """The float weight ``(out, in)`` of a linear."""
        return self.params[f"{linear}.weight"]

    def weight_format(self, linear: str) -> Format:
        """The format of a linear that is to be quantized."""
        return self.formats[linear].weight

    def input_format(self, linear: str) -> ActFormat | None:
        """The format of a linear's input; ``None``: float."""
        return self.formats[linear].input if linear in self.formats else None

    def qparams(self, linear: str) -> QParams:
        """Of a linear's weight as it is now: its groups' ranges, shrunk by the clipping ratios found so far."""
        return self.weight_format(linear).qparams(self.weight(linear), *self.clips.get(linear, (1.0, 1.0)))

    def quantized_params(self) -> dict[str, Tensor]:
        """``params`` with the quantized weights in their places."""
        quantized = {f"{name}.weight": q.dequantize() for name, q in self.qweights.items()}
        return {**self.params, **quantized}

    def with_notes(self, step: str, *texts: str, layer: int | None = None) -> Block:
        """The block with notes of a step on a layer, given by its index in the model; by default on the first."""
        at = self.start if layer is None else layer
        return replace(self, notes=(*self.notes, *(Note(at, f"{step}: {text}") for text in texts)))

    def with_record(self, step: str, figures: Mapping[str, Any]) -> Block:
        """The block with a step's figures, kept under its first layer."""
        own = {**self.record.get(self.start, {}), step: figures}
        return replace(self, record={**self.record, self.start: own})

    def part(self, start: int, stop: int) -> Block:
        """The layers ``start`` to ``stop`` (counted from 0 within the block) as a block of their own.

        Its notes, record and pictures start empty: they are its own.
        """
        prefixes = tuple(f"{index}." for index in self.indices[start:stop])

        def own(content: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in content.items() if name.startswith(prefixes)}

        return replace(
            self,
            layers=self.layers[start:stop],
            start=self.start + start,
            kwargs=self.kwargs[start:stop],
            params=own(self.params),
            formats=own(self.formats),
            clips=own(self.clips),
            qweights=own(self.qweights),
            ops=own(self.ops),
            notes=(),
            record={},
            pictures={},
        )

    def with_part(self, part: Block) -> Block:
        """The block with what was done to ``part``, some of its layers: it takes the place of what was there."""
        prefixes = tuple(f"{index}." for index in part.indices)

        def merge(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
            return {**{n: v for n, v in ours.items() if not n.startswith(prefixes)}, **theirs}

        record = {index: {**self.record.get(index, {}), **rows} for index, rows in part.record.items()}
        return replace(
            self,
            params={**self.params, **part.params},
            clips=merge(self.clips, part.clips),
            qweights=merge(self.qweights, part.qweights),
            ops=merge(self.ops, part.ops),
            notes=(*self.notes, *part.notes),
            record={**self.record, **record},
            pictures={**self.pictures, **part.pictures},
        )


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


def run(
    block: Block,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
    *,
    quantized: bool = False,
    taps: Mapping[str, Tap] | None = None,
) -> Tensor:
    """The block's output for hidden states ``x`` ``(sequences, length, hidden)``; differentiable in ``params``.

    Args:
        block: the block.
        x: hidden states; everything is computed in their dtype.
        params: parameters to run with; the block's float ones by default (``quantized_params()`` for the
            quantized ones).
        quantized: inputs of the linears and Q, K, V are quantized as ``block.formats`` and ``block.kv`` say.
        taps: for a linear's name a function that is shown the linear's input as the linear sees it.
    """
    params = block.params if params is None else params
    for layer, index, kwargs in zip(block.layers, block.indices, block.kwargs, strict=True):
        prefix = f"{index}."
        own = {name.removeprefix(prefix): p.to(x.dtype) for name, p in params.items() if name.startswith(prefix)}
        with ExitStack() as stack:
            attention = layer.get_submodule(block.family.attention)
            stack.enter_context(quantized_attention(attention.config, block.kv if quantized else None))
            for name, hook in _hooks(block, index, quantized, taps or {}):
                handle = layer.get_submodule(name).register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            for name, op in block.ops.items():
                if op.place == "behind a norm" and name.startswith(prefix):
                    norm = layer.get_submodule(name.removeprefix(prefix))
                    stack.callback(norm.register_forward_hook(apply_behind(op)).remove)
            x = torch.func.functional_call(layer, own, args=(x,), kwargs=dict(kwargs))
    return x


def apply_behind(op: RuntimeOp) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook that applies a runtime op to a norm's output."""

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        return op(out)

    return hook


class _Seen(Exception):
    """Ends a forward pass whose rest nobody needs; private, so that it can be taken for nothing else."""


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
    """Show the linears' inputs to ``taps``, all sequences, ``batch`` at a time, without gradients.

    As ``run``, but each pass ends where the last of the taps has seen its tensor.
    """
    last = [name for name in block.linears() if name in taps][-1]

    def stop(value: Tensor) -> None:
        taps[last](value)
        raise _Seen

    for part in parts(x, batch, block.device):
        try:
            run(block, part, params, quantized=quantized, taps={**taps, last: stop})
        except _Seen:
            continue


def _hooks(
    block: Block, index: int, quantized: bool, taps: Mapping[str, Tap]
) -> Iterator[tuple[str, Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...] | None]]]:
    """For the linears of a layer that need it: quantize the input, then show it to the tap.

    Linears that read one tensor share its quantization where they have the same format.
    """
    for group in block.family.linears:
        cache: dict[ActFormat, tuple[Tensor, Tensor]] = {}
        for name in group:
            linear = f"{index}.{name}"
            format = block.input_format(linear) if quantized else None
            tap, op = taps.get(linear), block.ops.get(linear)
            if format is None and tap is None:
                continue

            def hook(
                module: nn.Module,
                args: tuple[Any, ...],
                format: ActFormat | None = format,
                tap: Tap | None = tap,
                op: RuntimeOp | None = op,
                cache: dict[ActFormat, tuple[Tensor, Tensor]] = cache,
            ) -> tuple[Any, ...] | None:
                x = args[0]
                if format is not None and op is not None:
                    x = op(x, format)
                elif format is not None:
                    if format not in cache or cache[format][0] is not x:
                        cache[format] = (x, format.fake_quant(x))
                    x = cache[format][1]
                if tap is not None:
                    tap(x)
                return (x, *args[1:])

            yield name, hook


@torch.no_grad()
def run_all(
    block: Block,
    x: Tensor,
    params: Mapping[str, Tensor] | None = None,
    *,
    quantized: bool = False,
    taps: Mapping[str, Tap] | None = None,
    batch: int = 4,
) -> Tensor:
    """``run`` over all sequences, ``batch`` at a time, without gradients; the result lives where ``x`` does."""
    done = (run(block, part, params, quantized=quantized, taps=taps) for part in parts(x, batch, block.device))
    return joined(done, len(x), x.device)


def run_quantized(block: Block, x: Tensor, batch: int = 4) -> Tensor:
    """The output of the block as it ships, for all sequences: quantized weights, inputs, Q, K and V."""
    return run_all(block, x, block.quantized_params(), quantized=True, batch=batch)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """``||got - wanted||^2 / ||wanted||^2`` over everything, summed in float64.

    >>> relative_error(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0]))
    0.5
    """
    return float((got - wanted).double().square().sum() / wanted.double().square().sum().clamp(min=1e-300))
