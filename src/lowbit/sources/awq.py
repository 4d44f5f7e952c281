"""AWQ folders, as AutoAWQ writes them in its GEMM order (``quant_method: awq``).

For a linear ``(out, in)``; the eight 4-bit values of an int32 word, low bits first, are those of eight adjacent
outputs in the order 0, 2, 4, 6, 1, 3, 5, 7:

=========== ==================================== ===========================================
``qweight`` int32 ``(in, out / 8)``              codes, packed along the output
``qzeros``  int32 ``(groups, out / 8)``          zero points, packed in the same way
``scales``  float ``(groups, out)``
=========== ==================================== ===========================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lowbit.errors import LowbitError, shown
from lowbit.sources.integers import SCALES, integers
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

BITS, WORD = 4, 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # by output: its place in a word


@dataclass(frozen=True)
class Awq(SourceLayout):
    """An AWQ folder.

    Attributes:
        group: values that share a scale; ``None``: whole rows.
    """

    group: int | None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Self:
        """See ``SourceLayout``; older folders call bits and groups ``w_bit`` and ``q_group_size``."""
        order = str(config.get("version") or config.get("format") or "gemm").lower()
        if order != "gemm" or config.get("backend") == "llm-awq":
            raise LowbitError(
                f"{where} has AWQ codes in the order {shown(order)}; read is gemm: give the float model"
            )
        named = {"bits": config.get("w_bit", BITS), "group_size": config.get("q_group_size"), **config}
        whole(named, "bits", (BITS,), where)
        return cls(row_group(named, "group_size", where))

    @property
    def summary(self) -> str:
        """Bits and groups."""
        return f"AWQ, {BITS} bits, {'whole rows' if self.group is None else f'groups of {self.group}'}"

    def weights(self, headers: Headers, read: Read) -> list[StoredWeight]:
        """See ``SourceLayout``."""
        return [self._weight(headers, name.removesuffix("qweight")) for name in headers if name.endswith(".qweight")]

    def _weight(self, headers: Headers, prefix: str) -> StoredWeight:
        parts = parts_of(headers, prefix, ("qweight", "qzeros", "scales"))
        columns, words = matrix(headers, parts["qweight"])
        return StoredWeight(f"{prefix}weight", (words * WORD, columns), parts)

    def unpack(self, weight: StoredWeight, parts: Mapping[str, Tensor]) -> Decoded:
        """See ``SourceLayout``."""
        rows, columns = weight.shape
        groups = -(-columns // (self.group or columns))
        expect("qweight", parts["qweight"], [torch.int32], [columns, rows // WORD])
        expect("qzeros", parts["qzeros"], [torch.int32], [groups, rows // WORD])
        expect("scales", parts["scales"], SCALES, [groups, rows])
        codes, zeros = _unpacked(parts["qweight"]), _unpacked(parts["qzeros"])
        return integers(codes.T, parts["scales"].T, zeros.T, BITS, self.group)


def _unpacked(words: Tensor) -> Tensor:
    """Codes ``int16 (n, out)`` of words ``(n, out / 8)``.

    >>> _unpacked(torch.tensor([[0x75316420]], dtype=torch.int32)).tolist()
    [[0, 1, 2, 3, 4, 5, 6, 7]]
    """
    shifts = BITS * torch.tensor(PLACES)
    return (words.long()[:, :, None] >> shifts & 2**BITS - 1).flatten(1).to(torch.int16)
