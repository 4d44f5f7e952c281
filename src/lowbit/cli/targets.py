"""The schemes that each export target supports, computed from the targets' limits, as compact patterns and names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

from transformers import LlamaConfig

from lowbit.errors import MissingExtra
from lowbit.exporters import ALIASES, EXPORTERS, exporter_of
from lowbit.exporters.run import Subject
from lowbit.exporters.target import Exporter
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import Recipe, load_recipe
from lowbit.pipeline.target import subject_of
from lowbit.quant.scheme import Scheme
from lowbit.quant.scheme_names import ACT_BITS, KV_BITS, NAMED, WEIGHT_BITS, parse_scheme
from lowbit.runs.plan import Plan, make_plan

GROUPS = (None, 16, 32, 64, 128, 256)
FLOAT_ACTS = ("16", "fp8")
ACTS = (*map(str, ACT_BITS), "fp8")
SUFFIXES = ("-sym", "-asym", "-sym-asym")
STATIC_ACTS, STATIC_SUFFIXES = ("16", "8"), ("-sym-static", "-asym-static", "-static")
Key = tuple[str, int | None, str]  # inputs, kv bits, suffix


def installed() -> tuple[dict[str, Exporter], dict[str, str]]:
    """Exporters by name, and of those whose packages are missing what to install."""
    found: dict[str, Exporter] = {}
    needs: dict[str, str] = {}
    for name in EXPORTERS:
        try:
            found[name] = exporter_of(name)
        except MissingExtra as error:
            needs[name] = str(error)
    return found, needs


def targets() -> list[dict[str, Any]]:
    """Each target of ``lowbit export``: names, patterns and names of supported schemes, and missing packages."""
    exporters, needs = installed()
    accepted: dict[str, list[tuple[Key, int | None, int]]] = {name: [] for name in EXPORTERS}
    named: dict[str, list[str]] = {name: [] for name in EXPORTERS}
    for key, group, bits in _integer_schemes():
        for name in _fitting(exporters, scheme_name(key, group, bits)):
            accepted[name].append((key, group, bits))
    for scheme in NAMED:
        for name in _fitting(exporters, scheme):
            named[name].append(scheme)
    aliases = {name: [name, *(alias for alias, of in ALIASES.items() if of == name)] for name in EXPORTERS}
    return [
        {
            "name": " or ".join(aliases[name]),
            "schemes": [*patterns(accepted[name]), *named[name]],
            "needs": needs.get(name, ""),
        }
        for name in EXPORTERS
    ]


def _integer_schemes() -> Iterator[tuple[Key, int | None, int]]:
    """Every scheme of integers, for the usual group sizes."""
    for act, kv, suffix, group, bits in product(ACTS[::-1], (None, *KV_BITS), SUFFIXES, GROUPS, WEIGHT_BITS):
        if suffix != "-sym-asym" or act not in FLOAT_ACTS:
            yield (act, kv, suffix), group, bits
    for act, kv, suffix, group, bits in product(STATIC_ACTS, (None, *KV_BITS), STATIC_SUFFIXES, GROUPS, WEIGHT_BITS):
        yield (act, kv, suffix), group, bits


def scheme_name(key: Key, group: int | None, bits: int) -> str:
    """The name of a scheme of integers.

    >>> scheme_name(("8", None, "-sym"), 64, 4)
    'w4a8g64-sym'
    """
    act, kv, suffix = key
    return f"w{bits}a{act}" + (f"kv{kv}" if kv else "") + (f"g{group}" if group else "") + suffix


def _fitting(exporters: Mapping[str, Exporter], name: str) -> list[str]:
    """The targets that support a scheme."""
    _, subject = planned(parse_scheme(name))
    return [target for target, exporter in exporters.items() if exporter.misfit(subject) is None]


def planned(scheme: Scheme) -> tuple[Plan, Subject]:
    """A scheme resolved for a model with the widths of Llama 7B and one layer; limits depend on widths."""
    skeleton, recipe = _llama_7b()
    plan = make_plan(skeleton, scheme)
    return plan, subject_of(plan, scheme, recipe, skeleton)


@cache
def _llama_7b() -> tuple[Skeleton, Recipe]:
    return Skeleton(LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=1)), load_recipe("rtn")


def patterns(accepted: Iterable[tuple[Key, int | None, int]]) -> Iterator[str]:
    """Scheme names with sets in braces, similar ones combined.

    >>> key = ("16", None, "-sym")
    >>> list(patterns([(key, None, 4), (key, None, 8), (key, 32, 4), (key, 32, 8), (key, 64, 4)]))
    ['w{4,8}a16[g32]-sym', 'w4a16g64-sym']
    """
    bits: dict[tuple[Key, int | None], list[int]] = {}
    for key, group, width in accepted:
        bits.setdefault((key, group), []).append(width)
    groups: dict[tuple[Key, tuple[int, ...]], list[int | None]] = {}
    for (key, group), widths_of_key in bits.items():
        groups.setdefault((key, tuple(widths_of_key)), []).append(group)
    acts: dict[tuple[tuple[int, ...], int | None, str, str], list[str]] = {}
    for ((act, kv, suffix), widths), sizes in groups.items():
        acts.setdefault((widths, kv, _groups(sizes), suffix), []).append(act)
    for (widths, kv, group_part, suffix), inputs in acts.items():
        act_part = f"a{_braces(sorted(inputs, key=ACTS.index))}{f'kv{kv}' if kv else ''}"
        yield f"w{_set(widths)}{act_part}{group_part}{suffix}"


def _groups(sizes: Sequence[int | None]) -> str:
    grouped = [size for size in sizes if size is not None]
    if not grouped:
        return ""
    text = "g{n}" if len(grouped) == len(GROUPS) - 1 else f"g{_set(grouped)}"
    return f"[{text}]" if None in sizes else text


def _set(values: Iterable[int]) -> str:
    """One value as it is, several in braces.

    >>> _set([4]), _set([4, 8]), _set([2, 3, 4])
    ('4', '{4,8}', '{2..4}')
    """
    items = list(values)
    if len(items) > 2 and items == list(range(items[0], items[-1] + 1)):
        return f"{{{items[0]}..{items[-1]}}}"
    return _braces([str(item) for item in items])


def _braces(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{{{','.join(items)}}}"
