"""A model's architecture from its config alone: found on a small random model, proven there, carried to real size."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import nn

from lowbit.errors import LowbitError, one_line
from lowbit.models.architecture import Architecture, DeclaredEdge, Experts, LayerKind
from lowbit.models.build import is_composite, text_config
from lowbit.models.discovery.carry import carried, matched
from lowbit.models.discovery.empty import empty_model
from lowbit.models.discovery.kinds import signature
from lowbit.models.discovery.layer import Analysis
from lowbit.models.discovery.layout import Mismatch, Sizes, measures, numbers_of
from lowbit.models.discovery.listed import at_real_size
from lowbit.models.discovery.mixture import of_each_expert, stacks_of, with_each_expert
from lowbit.models.discovery.own_code import at_size_of
from lowbit.models.discovery.properties import partner_of
from lowbit.models.discovery.prove import Kind, found_in, prove
from lowbit.models.discovery.real import RealLayers, bytes_needed, checked
from lowbit.models.discovery.result import Discovery, Finding, Record, label
from lowbit.models.discovery.shrink import fewer_experts, fewer_layers, shrunk
from lowbit.models.discovery.sites import owners_of
from lowbit.models.discovery.small import small_of
from lowbit.models.discovery.small_model import SmallModel
from lowbit.models.experts import experts_of
from lowbit.models.text_part import text_part

MOST_BYTES = 6 * 2**30  # for the proof at real shape


def discover(config: Any, trust_remote_code: bool = False, most_bytes: int = MOST_BYTES) -> Discovery:
    """Find and prove a model's structure; no weights are needed.

    Args:
        config: the model's Hugging Face config.
        trust_remote_code: run the model's own code.
        most_bytes: memory for the proof at real shape; kinds of layers that need more are proven on the small model
            only, and a note says so.

    Raises:
        LowbitError: no small model can be built, it does not run, or it has no decoder layers.
    """
    start = time.monotonic()
    config = copy.deepcopy(config)  # building a model writes its implementations of attention and experts there
    try:
        search = _Search(config, trust_remote_code)
        layers = search.at_real_size(most_bytes)
    except LowbitError:
        raise
    except Exception as error:  # a model's own code, called in a way that it does not expect
        raise LowbitError(f"the layers of {type(config).__name__} cannot be asked: {one_line(error)}") from error
    small = search.small
    record = Record(
        findings=tuple(search.findings),
        notes=tuple(dict.fromkeys(search.notes)),
        checked=tuple(sorted(search.checked)),
        experts=tuple(kind.analysis.experts for kind in search.kinds),
        kept=tuple(kind.analysis.kept for kind in search.kinds),
        unseen=tuple(kind.analysis.unseen for kind in search.kinds),
        seconds=round(time.monotonic() - start, 1),
        versions={"transformers": transformers.__version__, "torch": torch.__version__},
    )
    name = str(getattr(config, "model_type", "") or type(config).__name__)
    part = text_part(search.real) if is_composite(config) else None
    found = Architecture(name, small.blocks, small.head, small.embed, layers, "discovered", part[0] if part else "")
    return Discovery(found, record)


@dataclass
class _Search:
    """One discovery: the small models, and what is noted on the way."""

    config: Any
    trusted: bool
    notes: list[str] = field(default_factory=list)
    checked: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.real = empty_model(self.config, self.trusted)
        found = small_of(self.config, self.real, self.trusted)
        self.kept, self.small_config, self.small = found.kept, found.config, found.model
        self.kinds = found_in(self.small)
        self.notes += [
            f"{name} of layer {kind.layers[0]} and its like stays float: its model's code reads the weight itself, "
            "which a packed linear does not have"
            for kind in self.kinds
            for name in kind.analysis.direct
            if name not in kind.analysis.unseen
        ]
        prove(self.small, self.kinds)
        self.findings: list[Finding] = [one for kind in self.kinds for one in kind.findings]
        self.other = self._second_size()

    def _second_size(self) -> tuple[SmallModel, Any, Sequence[Kind]] | None:
        """The other small model and its candidates."""
        try:
            config = shrunk(self.config, 1, self.kept)
            small = SmallModel(config, self.real, self.trusted)
            return small, config, found_in(small, [kind.layers[0] for kind in self.kinds])
        except LowbitError as error:
            self.notes.append(f"no second small size, so no layout is carried: {one_line(error)}")
            return None

    def at_real_size(self, most_bytes: int) -> tuple[LayerKind, ...]:
        """One entry per layer of the real model."""
        real: list[nn.Module] = list(self.real.get_submodule(self.small.blocks))
        by_form = {signature(self.small.layers[i], sizes=False): kind for kind in self.kinds for i in kind.layers}
        entries: dict[Any, LayerKind] = {}
        out = []
        for index, layer in enumerate(real):
            exact = signature(layer)
            if exact not in entries:
                kind = by_form.get(signature(layer, sizes=False))
                entries[exact] = self._entry(kind, index, layer, most_bytes) if kind else self._unknown(index, layer)
            out.append(entries[exact])
        return tuple(out)

    def _unknown(self, index: int, layer: nn.Module) -> LayerKind:
        """A layer that the small model has no like of: its linears, each alone."""
        self.notes.append(f"the small model has no layer like layer {index}: it has no edge")
        names = [name for name, one in owners_of(layer).items() if one.kind in ("linear", "conv1d")]
        return LayerKind(tuple((name,) for name in names), (), kept=tuple(stacks_of(layer)))

    def _entry(self, kind: Kind, index: int, layer: nn.Module, most_bytes: int) -> LayerKind:
        own = kind.analysis
        edges = self._carried(kind, layer)
        proven = self._checked(kind, self._with_few_experts(kind, index, layer), edges, most_bytes)
        experts = self._experts(own, layer, proven)
        listed = None if own.listed is None else at_real_size(own.listed, layer)
        return LayerKind(
            groups=with_each_expert(own.groups, experts or listed),
            edges=self._of_each_expert(kind, proven, experts),
            attention=own.attention,
            flat=own.flat,
            transposed=own.transposed,
            experts=experts,
            listed=listed,
            routers=own.routers,
            kept=own.kept,
        )

    def _with_few_experts(self, kind: Kind, index: int, layer: nn.Module) -> nn.Module:
        """The layer with few experts if it has any: all are alike, and the proof holds several copies of a layer."""
        own = kind.analysis
        if own.mixture is None and own.listed is None and not own.kept:
            return layer
        return self._few_experts[index]

    @cached_property
    def _few_experts(self) -> list[nn.Module]:
        return list(empty_model(fewer_experts(self.config), self.trusted).get_submodule(self.small.blocks))

    def _experts(self, own: Analysis, layer: nn.Module, edges: Sequence[DeclaredEdge]) -> Experts | None:
        if own.own_code is not None:
            return at_size_of(own.own_code, layer, edges)
        model_type = str(getattr(self.config, "model_type", ""))
        module = own.mixture
        return None if module is None else experts_of(module, layer.get_submodule(module), model_type)

    def _of_each_expert(
        self, kind: Kind, edges: list[DeclaredEdge], experts: Experts | None
    ) -> tuple[DeclaredEdge, ...]:
        found: list[DeclaredEdge] = []
        for edge in edges:
            try:
                found += (edge,) if experts is None else of_each_expert(edge, experts)
            except Mismatch as error:
                self._refute(self.kinds.index(kind), edge, one_line(error))
        return tuple(found)

    def _carried(self, kind: Kind, layer: nn.Module) -> list[DeclaredEdge]:
        number = self.kinds.index(kind)
        if self.other is None:
            plain = [edge for edge in kind.edges.values() if edge.heads is None and isinstance(edge.src, str)]
            return [edge for edge in plain if all(isinstance(end, str) for end in edge.dst)]
        second, config, kinds = self.other
        theirs = kinds[number].analysis
        layers = (self.small.layers[kind.layers[0]], second.layers[kind.layers[0]], layer)
        configs = map(text_config, (self.small_config, config, self.config))
        numbers = (numbers_of(one, own) for one, own in zip(layers, configs, strict=True))
        sizes = Sizes(far=measures(*numbers))
        owners = (kind.analysis.owners, theirs.owners, owners_of(layer, kind.analysis.transposed_stacks))
        others = matched(kind.analysis.candidates, theirs.candidates)
        found = []
        for index, edge in kind.edges.items():
            try:
                if index not in others:
                    raise Mismatch("the second small size does not show it")
                other = replace(others[index], partner=partner_of(others[index], theirs.owners, theirs.responses))
                found.append(carried(edge, other, owners, sizes))
            except Mismatch as error:
                self._refute(number, edge, f"its layout cannot be carried: {one_line(error)}")
        return found

    def _checked(
        self, kind: Kind, layer: nn.Module, edges: list[DeclaredEdge], most_bytes: int
    ) -> list[DeclaredEdge]:
        """The edges that pass at real shape, or all where nothing could be run."""
        number = self.kinds.index(kind)
        needed = bytes_needed(layer)
        real: RealLayers | str = (
            f"a layer needs {needed / 2**30:.1f} GiB in float64, {most_bytes / 2**30:.1f} are allowed"
        )
        if needed <= most_bytes:
            real = self._real_layers()
        results = real if isinstance(real, str) else checked(real, layer, edges, kind.analysis.transposed_stacks)
        if isinstance(results, str):
            self.notes.append(f"kind {number} is not proven at real shape: {results}")
            return edges
        self.checked.add(number)
        for edge, why in results:
            if why:
                self._refute(number, edge, f"at real shape {why}")
        return [edge for edge, why in results if not why]

    def _real_layers(self) -> RealLayers | str:
        if not hasattr(self, "_alone"):
            self._alone: RealLayers | str
            try:
                self._alone = RealLayers(
                    fewer_layers(self.config, self.kept), self.small.blocks, self.small.outputs, self.trusted
                )
            except LowbitError as error:
                self._alone = one_line(error)
        return self._alone

    def _refute(self, number: int, edge: DeclaredEdge, why: str) -> None:
        for at, one in enumerate(self.findings):
            if (one.layer, one.edge) == (number, label(edge)) and one.limit:
                self.findings[at] = replace(one, limit=None, reason=why)
                return
