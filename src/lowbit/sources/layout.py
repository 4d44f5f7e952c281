"""The interface of a source's layout: which stored tensors make up a weight, and what they decode to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lowbit.checkpoints.stored import Header
from lowbit.errors import LowbitError, shown
from lowbit.quant.format import QTensor

Headers = Mapping[str, Header]
Read = Callable[[Iterable[str]], Mapping[str, Tensor]]  # stored tensors by name


@dataclass(frozen=True)
class StoredWeight:
    """A quantized weight as a source stores it.

    Attributes:
        name: of the float parameter in the model.
        shape: of that parameter.
        parts: names of the stored tensors by their role.
    """

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, str]


@dataclass(frozen=True)
class FloatOnly:
    """A weight whose values are known but that no ``Format`` holds.

    Attributes:
        value: float32, in the parameter's shape.
        why: the reason, for messages.
    """

    value: Tensor
    why: str

    def dequantize(self) -> Tensor:
        """The values."""
        return self.value


Decoded = QTensor | FloatOnly


class SourceLayout(ABC):
    """How a tool stores quantized weights, as its ``quantization_config`` describes it."""

    @classmethod
    @abstractmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Self:
        """The layout of a ``quantization_config``; ``where`` names the file.

        Raises:
            LowbitError: the config asks for something that is not read.
        """

    @property
    @abstractmethod
    def summary(self) -> str:
        """What the weights are, for ``lowbit inspect`` and the screen."""

    @property
    def dropped(self) -> str | None:
        """What the source quantizes beside weights, which is not read; ``None``: nothing."""
        return None

    @property
    def dropped_tensors(self) -> tuple[str, ...]:
        """Names, behind a module's, of the tensors that belong to what is ``dropped``."""
        return ()

    @abstractmethod
    def weights(self, headers: Headers, read: Read) -> list[StoredWeight]:
        """The quantized weights among stored tensors; ``read`` is for what headers do not say.

        Raises:
            ValueError: a tensor of a weight is missing, or its shape fits no weight.
        """

    @abstractmethod
    def unpack(self, weight: StoredWeight, parts: Mapping[str, Tensor]) -> Decoded:
        """A weight from its stored tensors by role.

        Raises:
            ValueError: a tensor has a dtype, shape or value that the layout does not allow.
        """


def parts_of(headers: Headers, prefix: str, required: Sequence[str], optional: Sequence[str] = ()) -> dict[str, str]:
    """Stored names by role, ``prefix + role`` each; raises ``ValueError`` if a required one is missing."""
    for role in required:
        if prefix + role not in headers:
            raise ValueError(f"'{prefix}{role}' is missing")
    return {role: prefix + role for role in (*required, *optional) if prefix + role in headers}


def expect(name: str, found: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int]) -> None:
    """Raise ``ValueError`` unless a stored tensor has one of the dtypes and that shape."""
    if found.dtype not in dtypes or list(found.shape) != list(shape):
        allowed = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} is {str(found.dtype).removeprefix('torch.')} {list(found.shape)}, allowed is {allowed} "
            f"{list(shape)}"
        )


def matrix(headers: Headers, name: str) -> tuple[int, int]:
    """The shape of a stored matrix; raises ``ValueError`` for a tensor that is none."""
    shape = headers[name].shape
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"'{name}' has the shape {list(shape)}, allowed are two sizes of 1 or more")
    return shape[0], shape[1]


def whole(config: Mapping[str, Any], key: str, allowed: Sequence[int], where: str, default: int | None = None) -> int:
    """A whole number of a ``quantization_config``; raises ``LowbitError`` for another value."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        what = f"{min(allowed)} to {max(allowed)}" if isinstance(allowed, range) else ", ".join(map(str, allowed))
        raise LowbitError(
            f"{where} has {key} = {shown(value)} in quantization_config; read are {what}: give the float model"
        )
    return value


def row_group(config: Mapping[str, Any], key: str, where: str) -> int | None:
    """The group size of a ``quantization_config``, where -1, like nothing, means whole rows: ``None``."""
    value = config.get(key)
    if value is None or value == -1:
        return None
    return whole(config, key, range(2, 1 << 24), where)
