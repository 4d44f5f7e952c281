"""Experts of a mixture as linears of their own: names, shapes and values on both sides.

The library holds all experts of a layer in parameters of three dimensions (``gate_up_proj`` ``(experts, 2 * width,
hidden)``), and most checkpoints have one linear for each (``experts.3.gate_proj``), which the library's loader puts
together. A block has the checkpoints' names, so that plans, formats and methods see ordinary linears.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.models.architecture import Architecture, ExpertLinear, Experts, Indices, LayerKind, compact
from lowbit.models.edges import index_of

GATED = ("gate_proj", "up_proj", "down_proj")


def gated_experts(module: str, count: int, width: int, hidden: int, names: tuple[str, str, str] = GATED) -> Experts:
    """Experts of gate, up and down, as most models have them: the gate's rows in front of up's, no biases.

    >>> [name for group in gated_experts("mlp.experts", 2, 24, 64).groups[:2] for name in group]
    ['mlp.experts.0.gate_proj', 'mlp.experts.0.up_proj', 'mlp.experts.1.gate_proj', 'mlp.experts.1.up_proj']

    Args:
        module: name of the module within a layer.
        count: number of experts.
        width: of an expert's product of gate and up.
        hidden: width of the layer's hidden states.
        names: of gate, up and down in checkpoints.
    """
    gate, up, down = names
    reads = (
        ExpertLinear(gate, "gate_up_proj", range(width)),
        ExpertLinear(up, "gate_up_proj", range(width, 2 * width)),
    )
    return Experts(module, count, reads, ExpertLinear(down, "down_proj", range(hidden)))


def parameter_shapes(kind: LayerKind, layer: nn.Module) -> dict[str, torch.Size]:
    """Shapes of a layer's parameters and stored buffers as the library stores them, by the names that a block has."""
    shapes = {name: value.shape for name, value in layer.state_dict().items()}
    return _apart(kind.experts, shapes) if kind.experts is not None else shapes


def state_shapes(architecture: Architecture, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    """Shapes of a model's tensors, by the library's names, with each expert's in place of the library's."""
    out = dict(shapes)
    for index, kind in enumerate(architecture.layers):
        prefix = f"{architecture.blocks}.{index}."
        if kind.experts is not None:
            own = {name.removeprefix(prefix): out.pop(name) for name in shapes if name.startswith(prefix)}
            out |= {f"{prefix}{name}": shape for name, shape in _apart(kind.experts, own).items()}
    return out


def _apart(experts: Experts, shapes: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
    whole = {
        f"{experts.module}.{name}" for linear in experts.linears for name in (linear.parameter, linear.bias) if name
    }
    out = {name: shape for name, shape in shapes.items() if name not in whole}
    for linear in experts.linears:
        _, rows, columns = shapes[f"{experts.module}.{linear.parameter}"]
        columns = rows if experts.transposed else columns
        for number in range(experts.count):
            name = experts.name(number, linear)
            out[f"{name}.weight"] = torch.Size((len(linear.rows), columns))
            if linear.bias is not None:
                out[f"{name}.bias"] = torch.Size((len(linear.rows),))
    return out


def stored_in(experts: Experts, name: str) -> tuple[str, int, ExpertLinear] | None:
    """Of a parameter of an expert's linear: the library's parameter that holds it, the expert and the linear.

    >>> stored_in(gated_experts("mlp.experts", 4, 2, 8), "mlp.experts.3.up_proj.weight")[:2]
    ('mlp.experts.gate_up_proj', 3)
    """
    module, _, kind = name.rpartition(".")
    if (place := experts.place(module)) is None:
        return None
    number, linear = place
    parameter = linear.parameter if kind == "weight" else linear.bias
    return None if parameter is None else (f"{experts.module}.{parameter}", number, linear)


def taken_apart(kind: LayerKind, params: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Parameters with each expert's in place of the library's; those that are apart already stay.

    Args:
        kind: the structure of a layer.
        params: parameters as the library or a checkpoint has them.
        prefix: of the layer's names: ``7.``.
    """
    out = dict(params)
    if kind.experts is None:
        return out
    for linear in kind.experts.linears:
        for parameter, ending in ((linear.parameter, "weight"), (linear.bias, "bias")):
            if (whole := params.get(f"{prefix}{kind.experts.module}.{parameter}")) is not None:
                out.pop(f"{prefix}{kind.experts.module}.{parameter}", None)
                for number, value in enumerate(whole):
                    name = f"{prefix}{kind.experts.name(number, linear)}.{ending}"
                    out[name] = part_of(value, linear.rows, kind.experts.transposed)
    return out


def matrix(linears: tuple[ExpertLinear, ...], parts: list[Tensor]) -> Tensor:
    """One matrix, or one bias, of an expert's linears that share a parameter: their rows where that one has them.

    ``parts`` ``(out, ...)`` are in the order of ``linears``; differentiable in them.

    >>> gate, up = ExpertLinear("gate", "gate_up", (0, 2)), ExpertLinear("up", "gate_up", (1, 3))
    >>> matrix((gate, up), [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0])]).tolist()
    [1.0, 10.0, 2.0, 20.0]
    """
    rows = [row for linear in linears for row in linear.rows]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    if rows == list(range(len(rows))):
        return whole
    return whole[torch.tensor(rows, device=whole.device).argsort()]


def put_together(experts: Experts, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The library's parameters of an experts module, by name within it, from those of each expert by name."""
    out: dict[str, Tensor] = {}
    for parameter in dict.fromkeys(linear.parameter for linear in experts.linears):
        linears = tuple(linear for linear in experts.linears if linear.parameter == parameter)
        for kind, name in (("weight", parameter), ("bias", linears[0].bias)):
            if name is not None:
                each = [
                    matrix(linears, [params[f"{experts.name(number, linear)}.{kind}"] for linear in linears])
                    for number in range(experts.count)
                ]
                out[name] = torch.stack(
                    [value.mT if kind == "weight" and experts.transposed else value for value in each]
                )
    return out


def as_the_library_stores(architecture: Architecture, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's tensors by the library's names, from those with each expert's own."""
    out = dict(state)
    for index, kind in enumerate(architecture.layers):
        if kind.experts is not None:
            prefix = f"{architecture.blocks}.{index}."
            inside = [name.removeprefix(prefix) for name in state if name.startswith(prefix)]
            names = [name for name in inside if kind.experts.place(name.rpartition(".")[0]) is not None]
            whole = put_together(kind.experts, {name: out.pop(f"{prefix}{name}") for name in names})
            out |= {f"{prefix}{kind.experts.module}.{name}": value for name, value in whole.items()}
    return out


def part_of(value: Tensor, rows: Indices, transposed: bool) -> Tensor:
    """An expert's linear ``(out, in)``, or its bias ``(out,)``, from its expert's share of a parameter."""
    matrix = value.mT if transposed and value.ndim == 2 else value
    return matrix[index_of(rows)]


def experts_of(name: str, module: nn.Module, model_type: str) -> Experts | None:
    """The layout of an experts module of a model type, from what the library says of both.

    Args:
        name: the module's name within its layer.
        module: the module, of a class that the library's registry of experts functions serves.
        model_type: of the config, which decides the names in checkpoints.

    Returns:
        ``None`` for a module whose class does not use the registry.
    """
    said: Any = module
    if not hasattr(module, "has_gate"):
        return None
    first = "gate_up_proj" if said.has_gate else "up_proj"
    rows_at = 2 if said.is_transposed else 1  # of a matrix (out, in) in the parameter of three dimensions
    out, hidden = said.get_parameter(first).shape[rows_at], said.down_proj.shape[rows_at]
    names, last = _sources(model_type, first), _sources(model_type, "down_proj")
    apart = names is not None and last is not None
    names = names or (["gate_proj", "up_proj"] if said.has_gate else ["up_proj"])
    biases = (f"{first}_bias", "down_proj_bias") if said.has_bias else (None, None)
    reads = tuple(
        ExpertLinear(own, first, compact(_share(at, len(names), out, said.is_concatenated)), biases[0])
        for at, own in enumerate(names)
    )
    writes = ExpertLinear((last or ["down_proj"])[0], "down_proj", range(hidden), biases[1])
    return Experts(name, int(said.num_experts), reads, writes, bool(said.is_transposed), apart)


def _share(at: int, parts: int, rows: int, one_behind_another: bool) -> tuple[int, ...]:
    """The rows of part ``at`` of equal ones, which are one behind another or take turns.

    >>> _share(1, 2, 6, True), _share(1, 2, 6, False)
    ((3, 4, 5), (1, 3, 5))
    """
    size = rows // parts
    return tuple(range(at * size, (at + 1) * size) if one_behind_another else range(at, rows, parts))


def _sources(model_type: str, parameter: str) -> list[str] | None:
    """Names of the linears that the library's loader puts together into a parameter of an experts module.

    ``None`` where it does not, since checkpoints hold the parameter itself.
    """
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    for rule in get_checkpoint_conversion_mapping(model_type) or []:
        puts_together = isinstance(rule, WeightConverter)
        if puts_together and any(target.endswith(f"experts.{parameter}") for target in rule.target_patterns):
            found = [re.search(r"experts\.\*\.(.+)\.weight$", pattern) for pattern in rule.source_patterns]
            if all(found):
                return [match[1] for match in found if match]
    return None
