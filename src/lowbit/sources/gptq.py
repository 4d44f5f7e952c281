"""GPTQ folders, as AutoGPTQ and GPTQModel write them (``quant_method: gptq``).

For a linear ``(out, in)``, with values packed densely into int32 words, low bits first:

=========== ======================================= ===================================================
``qweight`` int32 ``(in * bits / 32, out)``         codes, packed along the input
``qzeros``  int32 ``(groups, out * bits / 32)``     zero points, packed along the output
``scales``  float ``(groups, out)``
``g_idx``   int32 ``(in,)``, may be missing         the group of each input channel
=========== ======================================= ===================================================

``value = (code - zero) * scale``. The convention ``gptq`` (v1, the default) stores ``zero - 1`` modulo ``2**bits``,
``gptq_v2`` the zero point itself. With activation order (``desc_act``) groups are not consecutive channels: such a
weight is dequantized, but no format holds it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lowbit.errors import LowbitError, shown
from lowbit.sources.integers import SCALES, dense, integers
from lowbit.sources.layout import (
    Decoded,
    Headers,
    Read,
    SourceLayout,
    StoredWeight,
    expect,
    matrix,
    parts_of,
    row_group,
    whole,
)

BITS = (2, 3, 4, 8)
CONVENTIONS = {"gptq": 1, "gptq_v2": 0}  # what is missing from a stored zero point


@dataclass(frozen=True)
class Gptq(SourceLayout):
    """A GPTQ folder.

    Attributes:
        bits, group: of modules without settings of their own; ``group`` ``None``: whole rows.
        missing: what is to be added to a stored zero point.
        own: settings of single modules: a pattern of names, bits and group.
    """

    bits: int
    group: int | None
    missing: int = 1
    own: tuple[tuple[re.Pattern[str], int, int | None], ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Self:
        """See ``SourceLayout``; ``dynamic`` holds settings of single modules, as GPTQModel writes them."""
        convention = config.get("checkpoint_format") or config.get("format") or "gptq"
        if convention not in CONVENTIONS:
            raise LowbitError(
                f"{where} has the GPTQ format {shown(convention)}; read are {', '.join(CONVENTIONS)}: give the float "
                "model"
            )
        bits, group = whole(config, "bits", BITS, where), row_group(config, "group_size", where)
        dynamic = config.get("dynamic") or {}
        own = []
        for pattern, settings in dynamic.items() if isinstance(dynamic, Mapping) else ():
            if not str(pattern).startswith("-:"):  # those stay float: they have no codes
                merged = {"bits": bits, "group_size": group, **(settings if isinstance(settings, Mapping) else {})}
                pair = whole(merged, "bits", BITS, where), row_group(merged, "group_size", where)
                own.append((_pattern(str(pattern), where), *pair))
        return cls(bits, group, CONVENTIONS[convention], tuple(own))

    @property
    def summary(self) -> str:
        """Bits and groups."""
        size = "whole rows" if self.group is None else f"groups of {self.group}"
        return f"GPTQ, {self.bits} bits, {size}"

    def weights(self, headers: Headers, read: Read) -> list[StoredWeight]:
        """See ``SourceLayout``."""
        return [self._weight(headers, name.removesuffix("qweight")) for name in headers if name.endswith(".qweight")]

    def _weight(self, headers: Headers, prefix: str) -> StoredWeight:
        parts = parts_of(headers, prefix, ("qweight", "qzeros", "scales"), ("g_idx",))
        words, rows = matrix(headers, parts["qweight"])
        bits, _ = self._settings(prefix.removesuffix("."))
        return StoredWeight(f"{prefix}weight", (rows, words * 32 // bits), parts)

    def _settings(self, module: str) -> tuple[int, int | None]:
        return next(((bits, group) for p, bits, group in self.own if p.match(module)), (self.bits, self.group))

    def unpack(self, weight: StoredWeight, parts: Mapping[str, Tensor]) -> Decoded:
        """See ``SourceLayout``."""
        rows, columns = weight.shape
        bits, group = self._settings(weight.name.removesuffix(".weight"))
        groups = -(-columns // (group or columns))
        expect("qweight", parts["qweight"], [torch.int32], [columns * bits // 32, rows])
        expect("qzeros", parts["qzeros"], [torch.int32], [groups, -(-rows * bits // 32)])
        expect("scales", parts["scales"], SCALES, [groups, rows])
        codes = dense(parts["qweight"].T, bits, rows, columns)
        zeros = (dense(parts["qzeros"], bits, groups, rows) + self.missing) & (2**bits - 1)
        return integers(codes, parts["scales"].T, zeros.T, bits, group, parts.get("g_idx"))


def _pattern(text: str, where: str) -> re.Pattern[str]:
    try:
        return re.compile(text.removeprefix("+:"))
    except re.error as error:
        raise LowbitError(f"{where} has the pattern {shown(text)} under 'dynamic', which is none: {error}") from error
