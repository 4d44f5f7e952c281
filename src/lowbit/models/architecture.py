"""What the pipeline needs to know of a model: where its layers are, and the structure of each of them.

An architecture is a value, declared by hand (``families/``) or discovered. It refers to modules by name, relative to
a layer (``DeclaredEdge``, ``Part``); a block resolves the names into ``Projection``, ``Norm`` and ``Edge``
(``edges.py``), which know their parameters. Methods use only the resolved types. Nothing here runs a model; the
library's own layers do that.

Layers of one model may differ: a ``LayerKind`` is the value of a layer's own linears, edges and head layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from lowbit.models.listed_experts import ListedExperts

EdgeKind = Literal["norm", "heads", "channels", "qk"]
Limit = Literal["matrix", "rotation", "diagonal", "positive"]
Origin = Literal["declared", "discovered"]
Indices = range | tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """The heads on both sides of an edge.

    Attributes:
        query: number of query heads.
        kv: number of key/value heads; it divides ``query``.
        dim: width of a head at the edge (``dim * query`` need not be the hidden size, nor values as wide as keys).
    """

    query: int
    kv: int
    dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query // self.kv


@dataclass(frozen=True)
class Part:
    """A part of a linear, such as ``v`` in a fused ``qkv_proj``.

    Attributes:
        module: name of the linear within the layer.
        rows: its output rows, in the order of the edge's channels (head by head); ``None``: all of them.
        columns: of a reader, the input columns that read the source's channels, in their order; ``None``: all.
        name: what the part holds, for people.

    Rows that follow one another are stored as a ``range``, however they are given:

    >>> Part("qkv", rows=(4, 5, 6), name="k")
    Part(module='qkv', rows=range(4, 7), columns=None, name='k')
    >>> Part("qkv", rows=(0, 1, 6, 7)).rows  # the queries of heads that are interleaved with keys and values
    (0, 1, 6, 7)
    """

    module: str
    rows: Indices | None = None
    columns: Indices | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for side in ("rows", "columns"):
            if (given := getattr(self, side)) is not None:
                object.__setattr__(self, side, compact(given))


def compact(indices: Sequence[int]) -> Indices:
    """Indices as a ``range`` if they follow one another, else as a tuple.

    >>> compact([2, 3, 4]), compact([2, 4])
    (range(2, 5), (2, 4))
    """
    if isinstance(indices, range) and indices.step == 1:
        return indices
    whole = range(indices[0], indices[0] + len(indices)) if indices else range(0)
    return whole if all(a == b for a, b in zip(indices, whole, strict=True)) else tuple(indices)


Ref = str | Part


@dataclass(frozen=True)
class DeclaredEdge:
    """A place where an invertible map folds into ``src`` and ``dst`` without changing the layer's function.

    * ``norm``: ``src`` is a norm, ``dst`` are all readers of its output. A diagonal folds; a matrix needs a runtime
      op.
    * ``heads``: ``src`` is v, ``dst`` is o. One map per KV head, shared by its query heads.
    * ``channels``: ``src`` -> an elementwise product or a homogeneous function -> ``dst``. A diagonal folds.
    * ``qk``: ``src`` is q, ``dst`` is k (or their norms). Only maps that commute with the rotary embedding fold.

    Attributes:
        kind, src, dst: see above; the first of ``dst`` is one of the layer's quantizable linears.
        limit: the largest group of maps that folds. ``matrix``: any; between q and k, scaled rotations of ``pairs``
            and any matrix over ``free``. ``rotation``: orthogonal ones. ``diagonal``: one factor a channel, of either
            sign; between q and k, one a pair and one a free dimension. ``positive``: the same, above 0.
        heads: of ``heads`` and ``qk`` edges, and of a norm whose gain all heads share, which are then its ``query``.
        offset: the source is a norm (or both ends are) that multiplies by ``offset + weight``.
        power: of ``channels``: rows of ``src`` times ``s`` scale what ``dst`` reads by ``s ** power`` (2 for relu^2).
        pairs: of ``qk``: dimensions of a head that the rotary embedding rotates together.
        free: of ``qk``: dimensions of a head that it leaves alone.
        partner: of ``channels``: the linear that ``src`` is multiplied with elementwise before ``dst``: a gate.
        gathers: the channels may be repeated and reordered (those of ``partner`` alike), behind a norm also mixed, if
            the readers' columns follow.
        shift: a constant may be subtracted from the channels where every end has a bias that takes it back.
    """

    kind: EdgeKind
    src: Ref
    dst: tuple[Ref, ...]
    limit: Limit = "diagonal"
    heads: Heads | None = None
    offset: float = 0.0
    power: int = 1
    pairs: tuple[tuple[int, int], ...] = ()
    free: tuple[int, ...] = ()
    partner: Ref | None = None
    gathers: bool = False
    shift: bool = False


@dataclass(frozen=True)
class ExpertLinear:
    """One of the linears that every expert of a mixture has.

    Attributes:
        name: its name in checkpoints, behind the expert's number: ``gate_proj``.
        parameter: the library's parameter that holds it for all experts: ``gate_up_proj``, ``(experts, ...)``.
        rows: its output rows within an expert's matrix of that parameter, in order.
        bias: the parameter that holds its biases ``(experts, out)``, if it has any.
    """

    name: str
    parameter: str
    rows: Indices
    bias: str | None = None


@dataclass(frozen=True)
class Experts:
    """A module that holds all experts of a mixture in parameters of three dimensions.

    For lowbit each expert's matrices are linears of their own, under the names that checkpoints give them:
    ``mlp.experts.3.gate_proj`` is a linear of expert 3.

    Attributes:
        module: the module's name within the layer: ``mlp.experts``.
        count: number of experts.
        reads: the linears that read the layer's hidden states: gate and up, or up alone.
        writes: the linear behind them: down.
        transposed: the parameters hold an expert's matrices as ``(in, out)``.
        apart: checkpoints that the library loads have a linear for each expert, which it puts together; ``False``:
            they have the library's own parameters.
        own_code: code of the model's own multiplies with the parameters; ``False``: the function that the library's
            registry of experts functions has.
    """

    module: str
    count: int
    reads: tuple[ExpertLinear, ...]
    writes: ExpertLinear
    transposed: bool = False
    apart: bool = True
    own_code: bool = False

    @property
    def linears(self) -> tuple[ExpertLinear, ...]:
        """The linears of an expert, in execution order."""
        return (*self.reads, self.writes)

    def name(self, expert: int, linear: ExpertLinear) -> str:
        """An expert's linear within the layer: ``mlp.experts.3.gate_proj``."""
        return f"{self.module}.{expert}.{linear.name}"

    def stack(self, linear: ExpertLinear) -> str:
        """The parameter within the layer that holds a linear of every expert: ``mlp.experts.gate_up_proj``."""
        return f"{self.module}.{linear.parameter}"

    @property
    def stages(self) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Groups of linears that share an input, in two stages: no group depends on another of its stage."""
        numbers = range(self.count)
        first = tuple(tuple(self.name(number, linear) for linear in self.reads) for number in numbers)
        return first, tuple((self.name(number, self.writes),) for number in numbers)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """All experts' linears, grouped by shared input: gate and up of every expert, then down of every expert."""
        return tuple(group for stage in self.stages for group in stage)

    def place(self, name: str) -> tuple[int, ExpertLinear] | None:
        """The expert and the linear that a name within the layer means; ``None`` for the name of anything else."""
        number, _, own = name.removeprefix(f"{self.module}.").partition(".")
        linear = next((linear for linear in self.linears if linear.name == own), None)
        if not name.startswith(f"{self.module}.") or not number.isdecimal() or linear is None:
            return None
        return int(number), linear


@dataclass(frozen=True)
class LayerKind:
    """The structure of one decoder layer; module names are relative to the layer.

    Attributes:
        groups: the linears to quantize, in execution order, grouped by shared input.
        edges: see ``DeclaredEdge``.
        attention: the module whose attention function, looked up in transformers' registry, gets q, k and v; ``None``
            for a layer without one, whose mixer is opaque: its linears are quantized, the rest is the library's code.
        flat: linears that the layer calls with ``(tokens, hidden)`` in place of ``(sequences, length, hidden)``.
        transposed: linears that store their matrix as ``(in, out)``, as GPT-2 does.
        experts: the mixture of experts, whose linears are in ``groups``; ``None`` for a layer without one.
        listed: the same for experts that are modules of their own.
        routers: linears that stay float unless an override names them: those that choose the experts.
        kept: parameters that hold experts and stay float, since code of the model's own computes with them.
    """

    groups: tuple[tuple[str, ...], ...]
    edges: tuple[DeclaredEdge, ...]
    attention: str | None = "self_attn"
    flat: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    experts: Experts | None = None
    listed: ListedExperts | None = None
    routers: frozenset[str] = frozenset()
    kept: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """The linears to quantize, in execution order."""
        return tuple(name for group in self.groups for name in group)

    def expert_of(self, name: str) -> int | None:
        """The number of the expert that a linear belongs to, if it belongs to one."""
        own = self.experts or self.listed
        place = None if own is None else own.place(name)
        return None if place is None else place[0]

    @property
    def experts_of_own_code(self) -> str | None:
        """The module whose experts code of the model's own runs; ``None``: the layer has none."""
        if self.experts is not None and self.experts.own_code:
            return self.experts.module
        return None if self.listed is None else self.listed.module

    def is_stacked(self, name: str) -> bool:
        """Whether a linear is a part of a parameter for all experts."""
        return self.experts is not None and self.experts.place(name) is not None

    def stage_of(self, name: str) -> str:
        """What linears have in common that do not depend on each other: the same position in different experts."""
        if self.experts is not None and (place := self.experts.place(name)) is not None:
            return "down" if place[1] == self.experts.writes else "up"
        if self.listed is not None and (own := self.listed.place(name)) is not None:
            return next(str(at) for at, group in enumerate(self.listed.own_groups) if own[1] in group)
        return name

    @property
    def norm_offsets(self) -> dict[str, float]:
        """The norms that have a norm edge, and what they add to their gains."""
        return {module_of(edge.src): edge.offset for edge in self.edges if edge.kind == "norm"}


def module_of(ref: Ref) -> str:
    """The module that holds an end of an edge."""
    return ref.module if isinstance(ref, Part) else ref


@dataclass(frozen=True)
class Architecture:
    """A model's structure.

    Attributes:
        name: the name in messages.
        blocks: module path of the list of decoder layers.
        head: the output head.
        embed: the token embedding.
        layers: one entry per decoder layer; entries repeat.
        origin: whether it is written down in ``families/`` or was found by experiment.
        text_model: module path of the text model in a model that has other parts too; empty: it has none.
    """

    name: str
    blocks: str
    head: str
    embed: str
    layers: tuple[LayerKind, ...]
    origin: Origin = "declared"
    text_model: str = ""

    def is_outside(self, name: str) -> bool:
        """Whether a module or tensor is of another part than the text model and its head, as a vision encoder's are.

        >>> wrapped = Architecture("llama", "m.text.layers", "lm_head", "m.text.embed", (), text_model="m.text")
        >>> [wrapped.is_outside(name) for name in ("m.vision.proj.weight", "m.text.norm.weight", "lm_head.weight")]
        [True, False, False]
        """
        inside = (f"{self.text_model}.", f"{self.head}.")
        return bool(self.text_model) and not f"{name}.".startswith(inside)

    def within(self, text_model: str, head: str) -> Architecture:
        """The architecture of a model that holds this one's, ``model``, as its module ``text_model``.

        >>> Architecture("llama", "model.layers", "lm_head", "model.embed", ()).within("m.text", "lm_head").blocks
        'm.text.layers'
        """
        blocks, embed = (f"{text_model}.{path.partition('.')[2]}" for path in (self.blocks, self.embed))
        return replace(self, blocks=blocks, head=head, embed=embed, text_model=text_model)

    def linears(self) -> list[str]:
        """Full names of the linears of all layers, in execution order."""
        return [f"{self.blocks}.{index}.{name}" for index, kind in enumerate(self.layers) for name in kind.linears]

    def transposed(self) -> set[str]:
        """Full names of the linears that store their matrix as ``(in, out)``."""
        return {f"{self.blocks}.{index}.{name}" for index, kind in enumerate(self.layers) for name in kind.transposed}

    def routers(self) -> set[str]:
        """Full names of the linears that stay float unless an override names them."""
        return {f"{self.blocks}.{index}.{name}" for index, kind in enumerate(self.layers) for name in kind.routers}

    def kept(self) -> list[str]:
        """Full names of the parameters of experts that stay float."""
        return [f"{self.blocks}.{index}.{name}" for index, kind in enumerate(self.layers) for name in kind.kept]

    def is_experts(self, name: str) -> bool:
        """Whether a linear, by its full name, is a part of a parameter that holds a layer's experts."""
        index, _, own = name.removeprefix(f"{self.blocks}.").partition(".")
        inside = name.startswith(f"{self.blocks}.") and index.isdecimal()
        return inside and self.layers[int(index)].is_stacked(own)

    def kinds(self) -> dict[LayerKind, list[int]]:
        """The different kinds of layers, and the indices of the layers of each."""
        out: dict[LayerKind, list[int]] = {}
        for index, kind in enumerate(self.layers):
            out.setdefault(kind, []).append(index)
        return out
