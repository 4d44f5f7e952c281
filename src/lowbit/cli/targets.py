"""The schemes that each export target supports, computed from the targets' limits, as compact patterns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any

from transformers import LlamaConfig

from lowbit.errors import MissingExtra
from lowbit.exporters import ALIASES, EXPORTERS, exporter_of
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.recipe import load_recipe
from lowbit.pipeline.target import subject_of
from lowbit.quant.scheme import ACT_BITS, KV_BITS, WEIGHT_BITS, parse_scheme
from lowbit.runs.plan import make_plan

GROUPS = (None, 16, 32, 64, 128, 256)
Key = tuple[int, int | None, str]  # activation bits, kv bits, suffix


def targets() -> list[dict[str, Any]]:
    """Each target of ``lowbit export``: names, patterns of supported schemes, and missing packages."""
    accepted: dict[str, list[tuple[Key, int | None, int]]] = {}
    needs = dict.fromkeys(EXPORTERS, "")
    limits = {}
    for name in EXPORTERS:
        accepted[name] = []
        try:
            limits[name] = exporter_of(name).limits
        except MissingExtra as error:
            needs[name] = str(error)
    skeleton, recipe = Skeleton(_config()), load_recipe("rtn")
    for act, kv, suffix, group, bits in product(
        ACT_BITS[::-1], (None, *KV_BITS), ("-sym", "-asym"), GROUPS, WEIGHT_BITS
    ):
        head = f"w{bits}a{act}" + (f"kv{kv}" if kv else "") + (f"g{group}" if group else "")
        scheme = parse_scheme(head + suffix)
        subject = subject_of(make_plan(skeleton, scheme), scheme, recipe, skeleton)
        for name, limit in limits.items():
            if limit(subject) is None:
                accepted[name].append(((act, kv, suffix), group, bits))
    aliases = {name: [name, *(alias for alias, of in ALIASES.items() if of == name)] for name in EXPORTERS}
    return [
        {"name": " or ".join(aliases[name]), "schemes": list(patterns(accepted[name])), "needs": needs[name]}
        for name in EXPORTERS
    ]


def _config() -> Any:
    """A model with the widths of Llama 7B and one layer; limits depend on widths."""
    return LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=1)


def patterns(accepted: Iterable[tuple[Key, int | None, int]]) -> Iterator[str]:
    """Scheme names with sets in braces, similar ones combined.

    >>> key = (16, None, "-sym")
    >>> list(patterns([(key, None, 4), (key, None, 8), (key, 32, 4), (key, 32, 8), (key, 64, 4)]))
    ['w{4,8}a16[g32]-sym', 'w4a16g64-sym']
    """
    bits: dict[tuple[Key, int | None], list[int]] = {}
    for key, group, width in accepted:
        bits.setdefault((key, group), []).append(width)
    groups: dict[tuple[Key, tuple[int, ...]], list[int | None]] = {}
    for (key, group), widths_of_key in bits.items():
        groups.setdefault((key, tuple(widths_of_key)), []).append(group)
    acts: dict[tuple[tuple[int, ...], int | None, str, str], list[int]] = {}
    for ((act, kv, suffix), widths), sizes in groups.items():
        acts.setdefault((widths, kv, _groups(sizes), suffix), []).append(act)
    for (widths, kv, group_part, suffix), inputs in acts.items():
        yield f"w{_set(widths)}a{_set(sorted(inputs))}{f'kv{kv}' if kv else ''}{group_part}{suffix}"


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
    if len(items) == 1:
        return str(items[0])
    if len(items) > 2 and items == list(range(items[0], items[-1] + 1)):
        return f"{{{items[0]}..{items[-1]}}}"
    return f"{{{','.join(map(str, items))}}}"
