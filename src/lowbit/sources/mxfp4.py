"""MXFP4 as gpt-oss publishes it (``quant_method: mxfp4``).

=========== =========================================== =====================================================
``_blocks`` uint8 ``(experts, out, in / 32, 16)``       two E2M1 codes a byte, even columns in the low half
``_scales`` uint8 ``(experts, out, in / 32)``           E8M0
=========== =========================================== =====================================================

The parameter is ``(experts, in, out)``. A linear's pair, ``weight_blocks`` and ``weight_scales``, lacks the dimension
of experts; its parameter is ``(out, in)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lowbit.quant.elements import E2M1
from lowbit.quant.floating import MXFP4
from lowbit.sources.floats import grouped, halves, powers, values
from lowbit.sources.layout import Decoded, FloatOnly, Headers, Read, SourceLayout, StoredWeight, expect, parts_of

BLOCKS, SCALES = "_blocks", "_scales"
GROUP, BYTES = 32, 16


@dataclass(frozen=True)
class Mxfp4(SourceLayout):
    """A folder with MXFP4 weights."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Self:
        """See ``SourceLayout``; there is nothing to choose."""
        return cls()

    @property
    def summary(self) -> str:
        """The format."""
        return "MXFP4 (E2M1, groups of 32)"

    def weights(self, headers: Headers, read: Read) -> list[StoredWeight]:
        """See ``SourceLayout``."""
        return [self._weight(headers, name.removesuffix(BLOCKS)) for name in headers if name.endswith(BLOCKS)]

    def _weight(self, headers: Headers, name: str) -> StoredWeight:
        parts = parts_of(headers, name, (BLOCKS, SCALES))
        shape = headers[parts[BLOCKS]].shape
        if len(shape) not in (3, 4) or min(shape) < 1 or shape[-1] != BYTES:
            raise ValueError(f"'{parts[BLOCKS]}' has the shape {list(shape)}, allowed is [out, in / 32, {BYTES}]")
        *experts, rows, groups, _ = shape
        columns = groups * GROUP
        return StoredWeight(name, (*experts, columns, rows) if experts else (rows, columns), parts)

    def unpack(self, weight: StoredWeight, parts: Mapping[str, Tensor]) -> Decoded:
        """See ``SourceLayout``."""
        *experts, rows, columns = (
            weight.shape if len(weight.shape) == 2 else (*weight.shape[:1], *weight.shape[:0:-1])
        )
        groups = [*experts, rows, columns // GROUP]
        expect(f"{weight.name}{BLOCKS}", parts[BLOCKS], [torch.uint8], [*groups, BYTES])
        expect(f"{weight.name}{SCALES}", parts[SCALES], [torch.uint8], groups)
        codes, scale = halves(parts[BLOCKS]), powers(parts[SCALES])
        if not experts:
            return grouped(codes.flatten(-2), scale, MXFP4)
        value = (values(codes, E2M1) * scale[..., None]).flatten(-2)
        return FloatOnly(value.transpose(-1, -2).contiguous(), "its experts are one tensor")
