"""A decoder block as a value: the library's own layers and their parameters.

``Block`` holds one layer, or a window of consecutive layers that a method treats as one. The layers are the
library's modules and may be on the ``meta`` device; their parameters are in a dict under names such as
``7.mlp.up_proj.weight`` (the layer's index in the model, then the name within the layer). ``forward.run`` calls the
layers with ``torch.func.functional_call``, so nothing is forked or patched. A method takes a ``Block`` and returns a
new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain, count
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.models.architecture import LayerKind
from lowbit.models.edges import Edge, resolve
from lowbit.models.experts import parameter_shapes
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.models.shard import States
from lowbit.models.stream import PLAIN, Stream
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.integer import integer
from lowbit.quant.range_estimators import MSE, RangeEstimator
from lowbit.quant.scales import TwoLevel
from lowbit.quant.scheme import ModuleFormats
from lowbit.quant.weight_kernel import Diagonals, fake_quant

LEAST_TOKENS = 64  # see docs/experts.md


@dataclass(frozen=True)
class Note:
    """A note on a layer for the report: a raised damping, a fallback."""

    layer: int
    text: str


class ComputedWhenRead(Mapping[str, Tensor]):
    """Parameters by name, some of which are computed each time that they are read."""

    def __init__(self, params: Mapping[str, Tensor], later: Mapping[str, Callable[[], Tensor]]) -> None:
        self._params, self._later = params, later

    def __getitem__(self, name: str) -> Tensor:
        return self._later[name]() if name in self._later else self._params[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._params, **self._later})

    def __len__(self) -> int:
        return len({**self._params, **self._later})


@dataclass(frozen=True)
class Block:
    """One decoder layer, or a window of consecutive layers, as a value.

    Attributes:
        layers: the library's layer modules, never modified.
        start: index of the first layer in the model.
        kwargs: the keyword arguments that the model passes to each layer (masks, rotary embeddings).
        kinds: the structure of each layer.
        blocks: module path of the model's list of layers.
        streams: how what goes into each layer, and out of the last, is laid out in one tensor; none for a block of
            plain hidden states.
        params: float parameters and stored buffers by name, with the transforms so far folded in; matrices are
            ``(out, in)``, also those that the library stores transposed.
        formats: formats of the linears to be quantized, as resolved by the plan.
        kv: format of queries, keys and values inside the attention; ``None``: float.
        prefix: tokens in front of every text, whose float keys and values are among ``params``: see ``prefix.py``.
        clips: clipping ratios ``(low, high)`` of the groups' ranges by linear name, each ``(rows, groups)``, for the
            qparams that a rounding step chooses.
        input_qparams: calibrated qparams of static inputs by linear name; linears that share an input share them.
        qweights: quantized weights by linear name; they replace ``params`` in the quantized block.
        ops: runtime ops by module name: after a norm, or before a linear.
        importance: weights of the columns in searches of scales by linear name, ``(in,)``, in place of those that a
            method finds in the calibration data.
        every_token: the inputs of experts' linears are observed for all tokens, not for those that reach an expert;
            what the block computes is the same.
        least_tokens: an expert that fewer calibration tokens reach is quantized without calibration data.
        notes: notes for the report.
        record: figures for the report, plain data by layer index and ``record_key``: losses, condition numbers.
        pictures: small matrices for the report by layer index, ``record_key`` and site: ``7.affinequant.heads``.
    """

    layers: tuple[nn.Module, ...]
    start: int
    kwargs: tuple[Mapping[str, Any], ...]
    kinds: tuple[LayerKind, ...]
    blocks: str
    params: Mapping[str, Tensor]
    streams: tuple[Stream, ...] = ()
    formats: Mapping[str, ModuleFormats] = field(default_factory=dict)
    kv: ActFormat | None = None
    prefix: int = 0
    clips: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    input_qparams: Mapping[str, QParams] = field(default_factory=dict)
    qweights: Mapping[str, QTensor] = field(default_factory=dict)
    ops: Mapping[str, RuntimeOp] = field(default_factory=dict)
    importance: Mapping[str, Tensor] = field(default_factory=dict)
    every_token: bool = False
    least_tokens: int = LEAST_TOKENS
    notes: tuple[Note, ...] = ()
    record: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)
    pictures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """The device that holds all of the block's parameters."""
        codes = (own.codes for own in self.qweights.values())  # of a layer with nothing but quantized linears
        return next(chain(self.params.values(), codes)).device

    @property
    def enters(self) -> Stream:
        """How the block's input is laid out."""
        return self.streams[0] if self.streams else PLAIN

    @property
    def leaves(self) -> Stream:
        """How its output is laid out."""
        return self.streams[-1] if self.streams else PLAIN

    @property
    def indices(self) -> range:
        """The layers' indices in the model."""
        return range(self.start, self.start + len(self.layers))

    def linear_groups(self) -> list[tuple[str, ...]]:
        """Names of the linears in execution order, grouped by shared input."""
        pairs = zip(self.indices, self.kinds, strict=True)
        return [tuple(f"{i}.{name}" for name in group) for i, kind in pairs for group in kind.groups]

    def linears(self) -> list[str]:
        """Names of all linears in execution order."""
        return [name for group in self.linear_groups() for name in group]

    def quantized_linears(self) -> list[str]:
        """Names of the linears that have a format, in execution order."""
        return [name for name in self.linears() if name in self.formats]

    @cached_property
    def _edges(self) -> tuple[Edge, ...]:
        layers = zip(self.kinds, self.layers, self.indices, strict=True)
        return tuple(
            edge for kind, layer, index in layers for edge in resolve(kind, parameter_shapes(kind, layer), index)
        )

    def edges(self) -> tuple[Edge, ...]:
        """The edges of this block: those of each layer's kind, with their parameters."""
        return self._edges

    def kind_of(self, name: str) -> LayerKind:
        """The structure of the layer that a module belongs to: of layer 7 for ``7.mlp.up_proj``."""
        return self.kinds[int(name.partition(".")[0]) - self.start]

    def expert_of(self, linear: str) -> int | None:
        """The number of the expert that a linear belongs to, if it belongs to one."""
        return self.kind_of(linear).expert_of(linear.partition(".")[2])

    def is_stacked(self, linear: str) -> bool:
        """Whether a linear is a part of a parameter that holds all experts of its layer."""
        return self.kind_of(linear).is_stacked(linear.partition(".")[2])

    def is_router(self, linear: str) -> bool:
        """Whether a linear stays float unless an override names it."""
        return linear.partition(".")[2] in self.kind_of(linear).routers

    def full_name(self, name: str) -> str:
        """The module's name in the model: ``7.mlp.up_proj`` -> ``model.layers.7.mlp.up_proj``."""
        return f"{self.blocks}.{name}"

    def weight(self, linear: str) -> Tensor:
        """The float weight ``(out, in)`` of a linear."""
        return self.params[f"{linear}.weight"]

    def is_transposed(self, parameter: str) -> bool:
        """Whether the library stores a parameter as ``(in, out)``."""
        name = parameter.partition(".")[2]
        return name.endswith(".weight") and name.removesuffix(".weight") in self.kind_of(parameter).transposed

    def as_stored(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the block as the library stores them; of what the library stores, those of a block."""
        return {name: value.mT.contiguous() if self.is_transposed(name) else value for name, value in params.items()}

    def weight_format(self, linear: str) -> Format:
        """The weight format of a linear that is to be quantized."""
        return self.formats[linear].weight

    def input_format(self, linear: str) -> ActFormat | None:
        """The format of a linear's input; ``None``: float."""
        return self.formats[linear].input if linear in self.formats else None

    def qparams(self, linear: str) -> QParams:
        """Qparams of a linear's current weight: its groups' ranges, shrunk by the current clipping ratios."""
        low, high = self.clips.get(linear, (1.0, 1.0))
        return self.weight_format(linear).qparams(self.weight(linear), low, high, self.tensor_peak(linear))

    def fused_with(self, linear: str) -> list[str]:
        """Linears of equal formats that read the same input, ``linear`` among them: runtimes fuse them."""
        group = next(group for group in self.linear_groups() if linear in group)
        return [name for name in group if self.formats.get(name) == self.formats.get(linear)]

    def tensor_peak(self, linear: str, weights: Mapping[str, Tensor] | None = None) -> Tensor | None:
        """The largest absolute value of the weights that share a scale of the whole tensor with a linear's.

        ``weights``, or their groups' largest values, by linear replace the block's. ``None`` for formats without such
        a scale.
        """
        if not isinstance(self.weight_format(linear).scales, TwoLevel):
            return None
        own = weights or {}
        fused = (own[name] if name in own else self.weight(name) for name in self.fused_with(linear))
        peaks = [weight.detach().abs().max() for weight in fused]
        return torch.stack(peaks).max()

    def fake_quant_clipped(
        self,
        params: Mapping[str, Tensor],
        clips: Mapping[str, tuple[Tensor, Tensor]],
        maps: Mapping[str, Diagonals] | None = None,
    ) -> Mapping[str, Tensor]:
        """``params`` with the weights of the linears that have a format rounded to nearest; differentiable.

        Those of experts are rounded whenever they are read, as in ``quantized_params``.

        Args:
            params: parameters by name, in place of the block's.
            clips: clipping ratios by linear, in place of the block's; 1 for others.
            maps: by linear, diagonals that a kernel folds into its weight, see ``weight_kernel``.
        """
        maps = maps or {}
        weights = {name: params[f"{name}.weight"] for name in self.quantized_linears()}
        quantized: dict[str, Callable[[], Tensor]] = {}
        for name, weight in weights.items():
            low, high = clips.get(name, (1.0, 1.0))
            format, peak = self.weight_format(name), self.tensor_peak(name, weights)
            if (own := maps.get(name)) is not None:
                quantized[name] = partial(fake_quant, weight, integer(format, "a kernel with maps"), low, high, own)
            else:
                quantized[name] = partial(format.fake_quant_clipped, weight, low, high, peak)
        return self.with_weights(params, quantized)

    def quantized_params(self) -> Mapping[str, Tensor]:
        """``params`` with the dequantized values of the quantized weights.

        Those of experts are dequantized whenever they are read: a layer may have hundreds, and runs one at a time.
        """
        return self.with_weights(self.params, {name: partial(self.dequantized, name) for name in self.qweights})

    def dequantized(self, linear: str) -> Tensor:
        """The weight ``(out, in)`` that a quantized linear computes with, runtime op included."""
        weight, op = self.qweights[linear].dequantize(), self.ops.get(linear)
        return weight if op is None else op.weight(weight)

    def with_weights(
        self, params: Mapping[str, Tensor], weights: Mapping[str, Callable[[], Tensor]]
    ) -> Mapping[str, Tensor]:
        """``params`` with other weights by linear: computed now, or for experts whenever they are read."""
        later = {f"{name}.weight": weight for name, weight in weights.items() if self.is_stacked(name)}
        now = {f"{n}.weight": weight() for n, weight in weights.items() if f"{n}.weight" not in later}
        return ComputedWhenRead({**params, **now}, later) if later else {**params, **now}

    def with_notes(self, step: str, *texts: str, layer: int | None = None) -> Block:
        """The block with a step's notes on a layer, by its index in the model; by default the first."""
        index = self.start if layer is None else layer
        return replace(self, notes=(*self.notes, *(Note(index, f"{step}: {text}") for text in texts)))

    def record_key(self, step: str) -> str:
        """The name of a step's next figures: ``awq``, then ``awq-2`` behind an earlier step ``awq``, and so on."""
        taken = {name for steps in self.record.values() for name in steps}
        names = (step if position == 1 else f"{step}-{position}" for position in count(1))
        return next(name for name in names if name not in taken)

    def with_record(self, step: str, figures: Mapping[str, Any]) -> Block:
        """The block with a step's figures, recorded once and under its first layer; earlier figures stay."""
        steps = {**self.record.get(self.start, {}), self.record_key(step): figures}
        return replace(self, record={**self.record, self.start: steps})

    def part(self, start: int, stop: int) -> Block:
        """Layers ``start`` to ``stop`` (counted from 0 within the block) as a block.

        Its notes and pictures start empty; its record is the whole block's.
        """
        prefixes = tuple(f"{index}." for index in self.indices[start:stop])

        def select(content: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in content.items() if name.startswith(prefixes)}

        return replace(
            self,
            layers=self.layers[start:stop],
            start=self.start + start,
            kwargs=self.kwargs[start:stop],
            kinds=self.kinds[start:stop],
            streams=self.streams[start : stop + 1],
            params=select(self.params),
            formats=select(self.formats),
            clips=select(self.clips),
            input_qparams=select(self.input_qparams),
            qweights=select(self.qweights),
            importance=select(self.importance),
            ops=select(self.ops),
            notes=(),
            pictures={},
        )

    def with_part(self, part: Block) -> Block:
        """The block with the content of ``part``, some of its layers, in place of its own for those layers."""
        prefixes = tuple(f"{index}." for index in part.indices)

        def merge(current: Mapping[str, Any], updated: Mapping[str, Any]) -> dict[str, Any]:
            return {**{n: v for n, v in current.items() if not n.startswith(prefixes)}, **updated}

        figures = {index: part.record[index] for index in part.indices if index in part.record}
        record = {index: {**self.record.get(index, {}), **steps} for index, steps in figures.items()}
        return replace(
            self,
            params={**self.params, **part.params},
            clips=merge(self.clips, part.clips),
            input_qparams=merge(self.input_qparams, part.input_qparams),
            qweights=merge(self.qweights, part.qweights),
            ops=merge(self.ops, part.ops),
            notes=(*self.notes, *part.notes),
            record={**self.record, **record},
            pictures={**self.pictures, **part.pictures},
        )


@dataclass(frozen=True)
class Calib:
    """A block's calibration data: streams ``(sequences, length, width)`` in the compute dtype.

    A process of a job has a ``Shard`` of each.

    They are stored on ``offload.storage_device``, which is the host for a block on a GPU: ``offload.batches`` and
    ``offload.Rows`` copy the sequences in use to the block's device.

    Attributes:
        x_fp: the block's input in the float model.
        x_q: its input in the model with all preceding blocks quantized.
        y_fp: its output in the float model, for ``x_fp``.
        batch: number of sequences to run at once.
        input_range: how the ranges of static inputs follow from the values seen.
    """

    x_fp: States
    x_q: States
    y_fp: States
    batch: int = 4
    input_range: RangeEstimator = MSE
