"""The interface of a layout: the tensors that a quantized weight is stored as. See ``layouts.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.quant.format import Format, QTensor


@dataclass(frozen=True)
class Stored:
    """How one tensor of a quantized weight is stored."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Layout(ABC):
    """The tensors of a quantized weight, by name relative to its module."""

    name: str

    @abstractmethod
    def tensors(self, format: Format) -> tuple[str, ...]:
        """The names of the tensors, that of the codes first."""

    @abstractmethod
    def stored(self, format: Format, rows: int, columns: int) -> dict[str, Stored]:
        """Dtypes and shapes of the tensors of a weight ``(rows, columns)``, in the order of ``tensors``."""

    def bits_per_value(self, format: Format, columns: int) -> float:
        """Bits of a value on disk: the format's, unless codes or scales take more."""
        return format.bits_per_value(columns)

    @abstractmethod
    def pack(self, q: QTensor, exponent: int | None = None) -> dict[str, Tensor]:
        """A weight as its tensors.

        Args:
            q: the weight.
            exponent: of the power of two that several fused modules share as their tensors' scale; by default the
                weight's own.
        """

    def unpack(self, stored: Mapping[str, Tensor], format: Format) -> QTensor:
        """The inverse of ``pack``; the qparams are in float32.

        Raises:
            ValueError: a tensor has another dtype or shape than ``pack`` gives it; they may come from a broken file.
        """
        names = self.tensors(format)
        if "weight_shape" in names:
            shape = stored["weight_shape"].flatten()[:3].tolist()
        else:
            shape = list(stored[names[0]].shape)
            if len(shape) == 2 and names[0] == "weight_packed":
                shape[1] = shape[1] * 8 // format.elements.bits
        if len(shape) != 2 or min(shape) < 1:
            raise ValueError(f"the weight's shape is {shape}; two sizes of 1 or more are allowed")
        for name, expected in self.stored(format, int(shape[0]), int(shape[1])).items():
            found = Stored(stored[name].dtype, tuple(stored[name].shape))
            if found != expected:
                raise ValueError(
                    f"{name} is {found.dtype} {found.shape}; for a weight of {shape} only {expected.dtype} "
                    f"{expected.shape} is allowed"
                )
        return self._unpack(stored, format)

    @abstractmethod
    def _unpack(self, stored: Mapping[str, Tensor], format: Format) -> QTensor:
        """``unpack`` of tensors with the right dtypes and shapes."""
