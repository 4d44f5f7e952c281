"""A layer's mixture of experts: which module lowbit can run, what stays float, what chooses the experts.

``transformers`` looks the function that computes a module of experts up in a registry, and lowbit registers its own.
Whether that computes what the module's own code does is not taken on trust: both are run. Parameters of three
dimensions that other code multiplies with are a matter of ``own_code``; what neither understands stays as it is.

Discovery knows experts by the library's parameters, an edge ends in ``mlp.experts.gate_up_proj``. ``of_each_expert``
turns it into edges between the linears of each expert.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from lowbit.errors import one_line
from lowbit.models.architecture import (
    DeclaredEdge,
    ExpertLinear,
    Experts,
    Part,
    Ref,
    compact,
    module_of,
)
from lowbit.models.discovery.capture import Call, output_of
from lowbit.models.discovery.layout import Mismatch
from lowbit.models.discovery.own_code import OwnCode, own_code_in
from lowbit.models.discovery.proof import SAME, relative
from lowbit.models.discovery.readers import Owners
from lowbit.models.discovery.sites import InFloat64
from lowbit.models.experts import experts_of
from lowbit.models.experts_function import ExpertParts, ExpertsCall, experts_computed_by
from lowbit.models.listed_experts import ListedExperts


@dataclass(frozen=True)
class Mixture:
    """What a layer has of experts.

    Attributes:
        module: the module whose experts lowbit runs one after the other; ``None``: there is none.
        parameters: its parameters that hold experts.
        kept: parameters that hold experts, are not its own, and stay float.
        why: by kept parameter, why lowbit cannot run it.
        own_code: how code of the model's own uses the parameters, where the module is not of the registry.
    """

    module: str | None
    parameters: tuple[str, ...]
    kept: tuple[str, ...]
    why: Mapping[str, str]
    own_code: OwnCode | None = None

    @property
    def transposed(self) -> tuple[str, ...]:
        """Parameters that code of the model's own reads as ``(in, out)``."""
        return self.parameters if self.own_code is not None and self.own_code.transposed else ()

    @property
    def routed(self) -> tuple[str, ...]:
        """Parameters of which it multiplies one expert's matrix with the tokens that reach it."""
        return self.parameters if self.own_code is not None and self.own_code.routed else ()


def mixture_in(layer: nn.Module, call: Call) -> Mixture:
    """The mixture of a small layer; a layer runs one module of experts, others stay float."""
    stacks = stacks_of(layer)
    found: str | None = None
    why: dict[str, str] = {}
    for name, module in layer.named_modules():
        experts = experts_of(name, module, "")
        if experts is None:
            continue
        reason = "a layer has one mixture" if found is not None else _unlike(layer, call, experts)
        if not reason:
            found = name
            continue
        why |= {stack: reason for stack in stacks if stack.startswith(f"{name}.")}
    own = tuple(name for name in stacks if name.rpartition(".")[0] == found)
    kept = tuple(name for name in stacks if name not in own)
    if found is not None or not kept:
        return Mixture(found, own, kept, why)
    code, reasons = own_code_in(layer, call, [name for name in kept if name not in why])
    if code is None:
        return Mixture(None, (), kept, reasons | why)
    rest = tuple(name for name in kept if name not in code.parameters)
    return Mixture(code.module, code.parameters, rest, reasons | why, code)


def stacks_of(layer: nn.Module) -> list[str]:
    """Parameters that hold several matrices: those of three dimensions, and those of modules called experts.

    Weights of convolutions have three dimensions, too, and are none.
    """
    found = []
    for path, module in layer.named_modules():
        if isinstance(module, _ConvNd | nn.Linear | nn.Embedding | Conv1D):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            several = parameter.ndim == 3 or (parameter.ndim == 2 and "experts" in path.split("."))
            if several and min(parameter.shape) > 1:
                found.append(f"{path}.{key}".lstrip("."))
    return found


@torch.no_grad()
def _unlike(layer: nn.Module, call: Call, experts: Experts) -> str:
    """Why one expert after the other is not what the module computes; empty if it is, in float64."""
    module = layer.get_submodule(experts.module)
    outputs = []
    for computed in (nullcontext(), experts_computed_by(module, ExpertsCall(experts, ExpertParts(experts, module)))):
        args, kwargs = call.arguments(1)
        try:
            with InFloat64(), computed:
                outputs.append(output_of(layer(*args, **kwargs)))
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # of code of any form
            return f"its experts do not run one after the other: {one_line(error)}"
    left = relative(outputs[1], outputs[0])
    return "" if left < SAME else f"its own code computes something else than expert after expert ({left:.0e})"


def routers_of(inputs: Mapping[str, Tensor], owners: Owners, stacks: Mapping[str, int]) -> frozenset[str]:
    """The matrices that choose experts or weigh their outputs.

    They stand beside the experts and have an output for each or the name of a router, or read the experts' input and
    are no layer of width: the gate of a shared expert has one output.

    Args:
        inputs: by owner, what it read first.
        owners: of the layer.
        stacks: number of experts by what holds them, a parameter or a list. 0: it is not known.
    """
    found = set()
    for stack, count in stacks.items():
        beside = _beside(stack)
        for name, value in inputs.items():
            one = owners[name]
            if one.kind not in ("linear", "router"):
                continue
            near = name.startswith(beside)
            chooses = "router" in name.split(".") or one.rows == count
            reads = stack in inputs and same_values(value, inputs[stack])
            if (near and chooses) or (reads and (one.kind == "router" or one.rows == 1)):
                found.add(name)
    return frozenset(found)


def _beside(stack: str) -> str:
    """What names of modules beside a module of experts begin with.

    >>> _beside("mlp.experts.gate_up_proj"), _beside("ffn.experts.mlp.w1"), _beside("mlp.input_linear.weight")
    ('mlp.', 'ffn.', 'mlp.')
    """
    path = stack.split(".")[:-1]
    outer = path[: path.index("experts")] if "experts" in path else path[:-1]
    return "".join(f"{part}." for part in outer)


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two inputs are the same numbers for the same tokens, however they are shaped."""
    flat = [value.reshape(-1, value.shape[-1]) for value in (one, other)]
    return flat[0].shape == flat[1].shape and bool((flat[0] == flat[1]).all())


def with_each_expert(
    groups: Iterable[tuple[str, ...]], experts: Experts | ListedExperts | None
) -> tuple[tuple[str, ...], ...]:
    """Groups of linears with those of every expert in place of their module."""
    own = () if experts is None else (experts.module,)
    return tuple(inner for group in groups for inner in (experts.groups if experts and group == own else (group,)))


def of_each_expert(edge: DeclaredEdge, experts: Experts) -> tuple[DeclaredEdge, ...]:
    """An edge with the linears of each expert in place of the module's parameters; any other edge as it is.

    From up to down every expert has an edge of its own. Channels inside an expert are scaled, not gathered or
    shifted, and neither are those that experts read.

    Raises:
        Mismatch: the edge's channels are not those of a linear.
    """
    first, last = set(map(experts.stack, experts.reads)), experts.stack(experts.writes)
    source, ends = module_of(edge.src), {module_of(end) for end in edge.dst}
    if not {source, *ends} & {*first, last}:
        return (edge,)
    plain = replace(edge, gathers=False, shift=False)
    if edge.kind == "channels" and source in first and ends == {last}:
        return tuple(_up_and_down(plain, experts, number) for number in range(experts.count))
    if source in (*first, last) or last in ends:
        raise Mismatch("it crosses experts")
    if ends <= first:  # methods take a norm's statistics from one of its readers
        raise Mismatch("only experts read it, and none of them sees all tokens")
    return (replace(plain, partner=None, dst=_readers(edge.dst, experts)),)


def _within_parameter(end: Ref, experts: Experts) -> list[ExpertLinear]:
    """The linears of an expert whose parameter an end is of."""
    return [linear for linear in experts.reads if experts.stack(linear) == module_of(end)]


def _readers(ends: Sequence[Ref], experts: Experts) -> tuple[Ref, ...]:
    out: list[Ref] = []
    for end in ends:
        if not (linears := _within_parameter(end, experts)):
            out.append(end)
            continue
        names = [experts.name(number, linear) for number in range(experts.count) for linear in linears]
        columns = end.columns if isinstance(end, Part) else None
        out += [name if columns is None else Part(name, columns=columns) for name in names]
    return tuple(out)


def _up_and_down(edge: DeclaredEdge, experts: Experts, number: int) -> DeclaredEdge:
    """The edge of one expert."""

    def source(end: Ref) -> Ref:
        linears = _within_parameter(end, experts)
        said = end.rows if isinstance(end, Part) else None
        rows = sorted(row for linear in linears for row in linear.rows) if said is None else list(said)
        own = next((linear for linear in linears if set(rows) <= set(linear.rows)), None)
        if own is None:
            raise Mismatch("its channels are of several linears of an expert")
        return _within(experts.name(number, own), own, rows)

    def reader(end: Ref) -> Ref:
        name = experts.name(number, experts.writes)
        return Part(name, columns=end.columns) if isinstance(end, Part) else name

    partner = None if edge.partner is None else source(edge.partner)
    return replace(edge, src=source(edge.src), dst=tuple(map(reader, edge.dst)), partner=partner)


def _within(name: str, linear: ExpertLinear, rows: Sequence[int]) -> Ref:
    """Rows of the parameter as those of a linear, or all of it."""
    place = {row: at for at, row in enumerate(linear.rows)}
    own = [place[row] for row in rows]
    return name if own == list(range(len(linear.rows))) else Part(name, rows=compact(own))


def touches(edge: DeclaredEdge, parameters: Collection[str]) -> str:
    """The first end of an edge that is one of ``parameters``; empty if none is."""
    ends = (module_of(edge.src), *map(module_of, edge.dst))
    return next((end for end in ends if end in parameters), "")
