"""Experts that a model's own code multiplies with: which parameters hold them, and in what order it reads them.

One pass shows every product with a view of a parameter of three dimensions (``expert_views``): whose matrix, whether
it is stored as ``(in, out)``, and what it is multiplied with. Parameters of one module that read the same tensor come
first, the one that reads what was made of their products last. That lowbit can compute these products is shown by
doing so: the layer runs with parameters that have no memory, and gives the output that it gave with them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lowbit.errors import one_line
from lowbit.models.architecture import DeclaredEdge, ExpertLinear, Experts, Indices, Part, module_of
from lowbit.models.discovery.capture import Call, output_of
from lowbit.models.discovery.proof import SAME, relative
from lowbit.models.discovery.sites import InFloat64
from lowbit.models.expert_views import ExpertProducts, Product
from lowbit.models.experts_function import ExpertParts
from lowbit.models.own_experts import OwnExpertsCall


@dataclass(frozen=True)
class OwnCode:
    """A mixture whose parameters the model's own code multiplies with.

    Attributes:
        module: the module that holds all of them; not always one that is called.
        reads: the parameters that read hidden states, by name within the layer.
        writes: the parameter behind them.
        transposed: they hold an expert's matrices as ``(in, out)``.
        routed: an expert's matrices are multiplied with the tokens that reach it; else with all.
    """

    module: str
    reads: tuple[str, ...]
    writes: str
    transposed: bool
    routed: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        """All of them, in execution order."""
        return (*self.reads, self.writes)


@dataclass
class _Use:
    """What a pass does with one parameter.

    Attributes:
        transposed: whether matrices are stored as ``(in, out)``, as each product has it.
        inputs: by expert, what its matrix is multiplied with, ``(tokens, in)``.
        routed: some product is with one expert's matrix.
    """

    transposed: set[bool] = field(default_factory=set)
    inputs: dict[int, Tensor] = field(default_factory=dict)
    routed: bool = False

    def add(self, product: Product) -> None:
        self.transposed.add(product.transposed)
        self.routed |= not product.view.batched
        x = product.x
        for at, number in enumerate(product.view.experts):
            own = x[at if len(x) > 1 else 0] if product.view.batched else x.flatten(0, -2)
            self.inputs.setdefault(number, own)

    def reads_like(self, other: _Use) -> bool:
        """Whether every expert reads here what it reads there."""
        return self.inputs.keys() == other.inputs.keys() and all(
            torch.equal(value, other.inputs[number]) for number, value in self.inputs.items()
        )


def own_code_in(layer: nn.Module, call: Call, stacks: Sequence[str]) -> tuple[OwnCode | None, dict[str, str]]:
    """The last mixture of a layer that its own code multiplies with; and of other parameters, why each is none.

    Args:
        layer: a small layer.
        call: what the model calls it with.
        stacks: parameters ``(experts, ., .)`` outside the library's registry of experts functions.
    """
    why: dict[str, str] = {}
    uses = _uses(layer, call, stacks)
    in_order = [*uses, *(name for name in stacks if name not in uses)]
    for home, names in reversed(list(_homes(in_order))):
        found = _mixture(layer, home, {name: uses[name] for name in uses if name in names}, names)
        reason = found if isinstance(found, str) else _unlike(layer, call, found)
        if not reason and isinstance(found, OwnCode):
            others = [name for name in stacks if name not in found.parameters]
            return found, why | {name: why.get(name, "a layer has one mixture") for name in others}
        why |= dict.fromkeys(names, reason)
    return None, why


@torch.no_grad()
def _uses(layer: nn.Module, call: Call, stacks: Sequence[str]) -> dict[str, _Use]:
    """By parameter in execution order; what no product reads is missing."""
    found: dict[str, _Use] = {}

    def noted(product: Product) -> Tensor:
        found.setdefault(product.view.parameter, _Use()).add(product)
        return product.multiply(product.x, _value(stored[product.view.parameter], product))

    stored = {name: value for name in stacks if (value := layer.get_parameter(name)).ndim == 3}
    args, kwargs = call.arguments(1)
    with InFloat64(), ExpertProducts(stored, noted):
        layer(*args, **kwargs)
    return found


def _value(parameter: Tensor, product: Product) -> Tensor:
    """The view of a product, made anew."""
    view = product.view
    own = parameter[view.experts.start : view.experts.stop]
    own = own.mT if view.turned else own
    return own if view.batched else own[0]


def _homes(stacks: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Modules that hold at least two parameters, and those, each in the innermost.

    >>> list(_homes(["a.experts.up", "a.experts.down", "b.up.weight", "b.down.weight", "c.weight"]))
    [('a.experts', ['a.experts.up', 'a.experts.down']), ('b', ['b.up.weight', 'b.down.weight'])]
    """
    found: dict[str, list[str]] = {}
    for name in stacks:
        path = name.split(".")
        outer = [".".join(path[:depth]) for depth in range(len(path) - 1, 0, -1)]
        home = next((one for one in outer if sum(other.startswith(f"{one}.") for other in stacks) > 1), None)
        if home is not None:
            found.setdefault(home, []).append(name)
    yield from found.items()


def _mixture(layer: nn.Module, home: str, uses: dict[str, _Use], names: Sequence[str]) -> OwnCode | str:
    """The mixture that the uses of a module's parameters are, or why they are none."""
    order = list(uses)
    counts = {len(layer.get_parameter(name)) for name in names}
    transposed = {one for use in uses.values() for one in use.transposed}
    biases = [f"{name.removesuffix('.weight')}{end}" for name in names for end in ("_bias", ".bias")]
    if any(name in dict(layer.named_parameters()) for name in biases):
        return f"the experts of {home} have biases"
    if set(order) != set(names):
        return "code of its own reads it in another way than by a product"
    if len(counts) > 1:
        return f"the parameters of {home} hold different numbers of experts ({', '.join(map(str, sorted(counts)))})"
    if len(transposed) > 1:
        return f"some parameters of {home} hold matrices as (in, out) and some as (out, in)"
    reads = tuple(name for name in order if uses[name].reads_like(uses[order[0]]))
    if len(reads) != len(order) - 1 or order[-1] in reads:
        return f"the experts of {home} are not one product behind others that read the same"
    return OwnCode(home, reads, order[-1], transposed.pop(), any(use.routed for use in uses.values()))


@torch.no_grad()
def _unlike(layer: nn.Module, call: Call, own: OwnCode) -> str:
    """Why the layer does not run with each expert's product computed apart; empty if it does, in float64."""
    experts = at_size_of(own, layer, ())
    parts = dict(ExpertParts(experts, layer.get_submodule(own.module)))
    empty = {name: layer.get_parameter(name).to("meta") for name in own.parameters}
    try:
        args, kwargs = call.arguments(1)
        with InFloat64():
            wanted = output_of(layer(*args, **kwargs))
        args, kwargs = call.arguments(1)
        with InFloat64(), ExpertProducts(empty, OwnExpertsCall(experts, parts)):
            found = output_of(torch.func.functional_call(layer, empty, args=args, kwargs=kwargs))
    except Exception as error:  # of code of any form
        return f"its experts do not run one after the other: {one_line(error)}"
    left = relative(found, wanted)
    return "" if left < SAME else f"its own code computes something else than products with experts ({left:.0e})"


def at_size_of(own: OwnCode, layer: nn.Module, edges: Sequence[DeclaredEdge]) -> Experts:
    """The layout of a layer's experts.

    Where an edge inside them shows which rows of a parameter are multiplied with the product of the others, these are
    ``up_proj`` and ``gate_proj``. Other parameters are linears of their own, under their names.

    Args:
        own: the mixture, of a small layer like this one.
        layer: the layer, possibly without memory.
        edges: of the layer, between parameters.
    """
    writes = own.writes.removeprefix(f"{own.module}.")
    columns = 2 if own.transposed else 1
    rows = {name: layer.get_parameter(name).shape[columns] for name in own.parameters}
    reads = [linear for name in own.reads for linear in _linears(own, name, rows[name], edges)]
    last = ExpertLinear(_plain(writes), writes, range(rows[own.writes]))
    count = len(layer.get_parameter(own.writes))
    return Experts(own.module, count, tuple(reads), last, own.transposed, apart=False, own_code=True)


def _linears(own: OwnCode, name: str, rows: int, edges: Sequence[DeclaredEdge]) -> list[ExpertLinear]:
    parameter = name.removeprefix(f"{own.module}.")
    for edge in edges:
        up, gate = edge.src, edge.partner
        both = isinstance(up, Part) and isinstance(gate, Part) and {up.module, gate.module} == {name}
        if both and module_of(edge.dst[0]) == own.writes:
            parts: list[tuple[str, Indices]] = [("gate_proj", _rows(gate)), ("up_proj", _rows(up))]
            if sorted(row for _, part in parts for row in part) == list(range(rows)):
                return [ExpertLinear(own_name, parameter, part) for own_name, part in parts]
    return [ExpertLinear(_plain(parameter), parameter, range(rows))]


def _rows(end: object) -> Indices:
    assert isinstance(end, Part)
    assert end.rows is not None
    return end.rows


def _plain(parameter: str) -> str:
    """The name of a linear that has a parameter for itself.

    >>> _plain("down_proj"), _plain("output_linear.weight")
    ('down_proj', 'output_linear')
    """
    return parameter.removesuffix(".weight")
