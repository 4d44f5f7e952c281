"""Experts that are modules of their own in a list, as in models with code of their own.

Each is called with the tokens that reach it. In a batch of perturbed samples these differ in number, so their linears
are no sites of responses: no edge ends in them, and none in the norm that they read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lowbit.models.discovery.mixture import same_values
from lowbit.models.listed_experts import ListedExperts


def expert_lists(layer: nn.Module) -> dict[str, nn.ModuleList]:
    """Lists of modules of one class with equal linears, by name; lists within others are left out."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in layer.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) > 1 and not inside:
            forms = [_linears(member) for member in module]
            if forms[0] and all(form == forms[0] for form in forms) and len({type(own) for own in module}) == 1:
                found[name] = module
    return found


def _linears(module: nn.Module) -> dict[str, Any]:
    return {name: own.weight.shape for name, own in module.named_modules() if name and isinstance(own, nn.Linear)}


def listed_in(layer: nn.Module, inputs: Mapping[str, Tensor], tokens: int) -> ListedExperts | None:
    """The list whose members see some of the tokens, if the layer has one.

    Args:
        layer: a small layer.
        inputs: by linear, what it read first; what no pass calls is missing.
        tokens: of the sequence.
    """
    for name, module in expert_lists(layer).items():
        own = [f"{name}.{number}.{linear}" for number in range(len(module)) for linear in _linears(module[number])]
        seen = [inputs[linear] for linear in own if linear in inputs]
        routed = len(seen) < len(own) or any(value[..., 0].numel() < tokens for value in seen)
        if seen and routed and (groups := _groups(name, len(module), inputs)):
            return ListedExperts(name, len(module), groups)
    return None


def _groups(name: str, count: int, inputs: Mapping[str, Tensor]) -> tuple[tuple[str, ...], ...]:
    """The linears of the expert that most tokens reach, by equal input, in execution order."""

    def own(number: int) -> dict[str, Tensor]:
        prefix = f"{name}.{number}."
        return {one.removeprefix(prefix): value for one, value in inputs.items() if one.startswith(prefix)}

    busiest = max(map(own, range(count)), key=lambda found: sum(value.numel() for value in found.values()))
    groups: list[tuple[Tensor, list[str]]] = []
    for linear, value in busiest.items():
        same = next((names for first, names in groups if same_values(first, value)), None)
        if same is None:
            groups.append((value, [linear]))
        else:
            same.append(linear)
    return tuple(tuple(names) for _, names in groups)


def at_real_size(listed: ListedExperts, layer: nn.Module) -> ListedExperts:
    """The same list with as many experts as a layer of the model has."""
    module = layer.get_submodule(listed.module)
    assert isinstance(module, nn.ModuleList)
    return ListedExperts(listed.module, len(module), listed.own_groups)
