"""A block is a value: the library's own decoder layers and their parameters, run without changing either.

``Block`` holds one layer, or a window of consecutive ones that a method treats as one. The layers are the
library's modules and may sit on the ``meta`` device; their parameters live in a dict under names such as
``7.mlp.up_proj.weight`` (the layer's index in the model, then its own name). ``run`` calls the layers with
``torch.func.functional_call``, so nothing is forked, patched or left behind. A method takes a ``Block`` and
returns a new one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.models.architecture import DeclaredEdge, Edge, Family, Heads, Norm, Part, Projection, Ref
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.scheme import ModuleFormats


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

    They live where ``offload.storage_device`` says, which for a block on a GPU is the host: ``offload.batches`` and
    ``offload.Rows`` bring what is at work to the block's device.

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
