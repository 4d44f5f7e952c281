"""The ``quantization_config`` of compressed-tensors: which config group a module belongs to, and what it says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lowbit.errors import LowbitError, shown
from lowbit.sources.layout import row_group, whole

INTEGERS = ("pack-quantized", "int-quantized")
FLOATS = (
    "float-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp6-pack-quantized",
    "mxfp8-quantized",
)
NAIVE, OWN, MIXED, DENSE = "naive-quantized", "lowbit-packed", "mixed-precision", "dense"
READ = (*INTEGERS, *FLOATS, NAIVE, OWN)
STRATEGIES = ("tensor", "channel", "group", "tensor_group", "block")


@dataclass(frozen=True)
class Group:
    """A config group.

    Attributes:
        targets: names of modules, ``re:`` patterns of such names, and names of module classes.
        format: the layout's name.
        bits: of a code, or the name of a format of ours (``lowbit-packed``).
        floats: codes are floating-point numbers.
        symmetric: there are no zero points.
        strategy: what shares a scale: ``tensor``, ``channel`` (a row), ``group``, ``tensor_group`` or ``block``.
        group: values that share a scale; ``None``: a row.
        block: rows and columns that share a scale, of the strategy ``block``.
    """

    targets: tuple[str, ...]
    format: str
    bits: int | str
    floats: bool = False
    symmetric: bool = True
    strategy: str = "channel"
    group: int | None = None
    block: tuple[int, int] = (128, 128)

    @property
    def summary(self) -> str:
        """``pack-quantized, 4 bits, groups of 128``."""
        if isinstance(self.bits, str):
            return f"{self.format}, {self.bits}"
        shared = {"channel": "rows", "block": f"blocks of {self.block[0]} x {self.block[1]}"}
        size = shared.get(self.strategy, f"groups of {self.group}" if self.group else self.strategy)
        return f"{self.format}, {self.bits} bits{' (float)' if self.floats else ''}, {size}"

    def names(self, module: str) -> bool:
        """Whether a target is this module's name, or a pattern of it."""
        return any(_names(target, module) for target in self.targets)

    def covers(self, module: str) -> bool:
        """Whether a target is the class of such modules: an embedding's, or any other for the rest."""
        embedding = "embed" in module.rpartition(".")[2]
        return any(_is_class(target) and (target == "Embedding") == embedding for target in self.targets)


def _names(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), module) is not None
    return target == module


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target and target[:1].isupper()


def read_groups(config: Mapping[str, Any], where: str) -> tuple[Group, ...]:
    """The config groups; raises ``LowbitError`` for what is not read."""
    if (config.get("sparsity_config") or {}).get("format", DENSE) != DENSE:
        raise LowbitError(
            f"{where} describes sparse weights (sparsity_config), which are not read: give the float model"
        )
    if (config.get("transform_config") or {}).get("config_groups"):
        raise LowbitError(
            f"{where} has transforms of inputs (transform_config), which are not read: give the float model"
        )
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise LowbitError(f"{where} has no config_groups in quantization_config: fetch it again")
    return tuple(_group(group, str(config.get("format")), f"{where} ({name})") for name, group in groups.items())


def _group(content: Any, outer: str, where: str) -> Group:
    args = content.get("weights") if isinstance(content, Mapping) else None
    targets = content.get("targets") if isinstance(content, Mapping) else None
    if not isinstance(args, Mapping) or not isinstance(targets, list) or not all(isinstance(t, str) for t in targets):
        raise LowbitError(f"{where} lacks targets or weights in its config group: fetch it again")
    for target in targets:
        _check_pattern(target, where)
    format = content.get("format") or outer
    if format not in READ:
        raise LowbitError(
            f"{where} has the compressed-tensors format {shown(format)}; read are {', '.join(READ)}: give the float "
            "model"
        )
    if format == OWN:
        return Group(tuple(targets), format, str(args.get("num_bits")))
    strategy = args.get("strategy") or ("group" if args.get("group_size") else "tensor")
    if strategy not in STRATEGIES or args.get("type", "int") not in ("int", "float"):
        raise LowbitError(
            f"{where} has weights of the type {shown(args.get('type'))} and strategy {shown(strategy)}; read are int "
            f"and float, {', '.join(STRATEGIES)}: give the float model"
        )
    floats = args.get("type", "int") == "float"
    return Group(
        targets=tuple(targets),
        format=format if format != NAIVE else "float-quantized" if floats else "int-quantized",
        bits=whole(args, "num_bits", range(1, 9), where),
        floats=floats,
        symmetric=bool(args.get("symmetric", True)),
        strategy=strategy,
        group=row_group(args, "group_size", where) if strategy in ("group", "tensor_group") else None,
        block=_block(args.get("block_structure"), where) if strategy == "block" else (128, 128),
    )


def _check_pattern(target: str, where: str) -> None:
    try:
        re.compile(target.removeprefix("re:"))
    except re.error as error:
        if target.startswith("re:"):
            raise LowbitError(f"{where} has the target {shown(target)}, no regular expression: {error}") from error


def _block(value: Any, where: str) -> tuple[int, int]:
    parts = value.lower().split("x") if isinstance(value, str) else value
    try:
        rows, columns = (int(part) for part in parts)
    except (TypeError, ValueError):
        rows = columns = 0
    if min(rows, columns) < 1:
        raise LowbitError(f"{where} has block_structure = {shown(value)}; allowed are two sizes: correct it")
    return rows, columns
