"""Runtime (online) operations: transforms that no parameter absorbs, computed in addition to the model's own graph.

Each kind is one class that defines where the op is attached, what it computes, what it costs and how it is stored.
Loaders and exporters list the kinds that they support (``lowbit.load``: all; exporters: see ``Exporter.ops``) and
refuse all others before any work.

================== ================== ==============================================================================
``Matrix``         norm or input      ``x P``
``Gather``         after a norm       ``x[idx] * factor``, merged channels added first
``Reorder``        after a norm       ``x[idx]``, every channel once (``reorder.py``)
``Hadamard``       norm or input      ``x`` with random signs times a Hadamard matrix (``hadamard.py``)
``FixedHadamard``  norm or input      ``x`` times a Hadamard matrix, without signs (``fixed_hadamard.py``)
``Kronecker``      norm or input      ``x (L (x) R)`` (``kronecker.py``)
``DiagonalBlocks`` norm or input      ``x`` times a block-diagonal matrix (``diagonal_blocks.py``)
``Clip``           before a linear    clipping ratios for the ranges of its quantized input, offsets before rounding
``OutlierColumns`` before a linear    some channels and the weight's columns stay in float (``outlier_columns.py``)
================== ================== ==============================================================================

``ops.py`` lists them by name.

Up to three stand between a norm and a linear, and this is their order: one behind the norm, whose result all readers
share; one on the linear's input (``at_input``), for what no norm precedes, such as the inputs of ``o_proj`` and
``down_proj``; then one before the linear itself, where the input is rounded. So a range is clipped, an offset added
and an outlier column chosen among mixed channels, and a gather acts on the norm's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat, IntTokens

Place = Literal["behind a norm", "before a linear"]
PREFIX = "runtime"  # in tensor names: ``model.layers.3.input_layernorm.runtime.gather.factor``


class RuntimeOp(ABC):
    """One operation attached to one module of a block; a frozen dataclass of its tensors.

    Attributes:
        kind: the name in files and messages.
        place: the modules to which it can be attached.
        why: its description in messages, such as ``matrices after norms``.
        on_inputs: it may also stand on the input of a linear, under the name ``at_input``; the linear's weight holds
            its inverse, and its input is rounded behind it.
    """

    kind: ClassVar[str]
    place: ClassVar[Place]
    why: ClassVar[str]
    on_inputs: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """Apply the op to ``x`` ``(..., width)``; ``format``: of the linear's input, for ops before a linear."""

    def weight(self, dequantized: Tensor) -> Tensor:
        """The weight ``(out, in)`` of the linear that it stands before, from its dequantized codes: as they are."""
        return dequantized

    @property
    @abstractmethod
    def macs(self) -> int:
        """Multiplications or multiply-adds per token."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Stored bits of its tensors."""

    @abstractmethod
    def to_tensors(self) -> dict[str, Tensor]:
        """The stored tensors, by name within the op."""

    @classmethod
    @abstractmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """The inverse of ``to_tensors``.

        Args:
            tensors: as stored; tensors from a file are checked.
            width: number of channels where the op is attached.

        Raises:
            ValueError: the tensors are no valid op of this kind and width; the message gives the reason.
        """

    @classmethod
    def fields(cls) -> tuple[str, ...]:
        """Names of its tensors in the order of the class's arguments; a tensor may be ``None``."""
        dataclass_type: Any = cls
        return tuple(field.name for field in fields(dataclass_type))

    def to(self, device: torch.device | str) -> Self:
        """The op on another device."""
        moved = {name: value.to(device) for name, value in self.to_tensors().items()}
        return type(self).from_tensors(moved, self.width)

    def float(self) -> Self:
        """The op with its numbers in float32, as they are stored; differentiable."""
        tensors = {name: value for name in self.fields() if (value := getattr(self, name)) is not None}
        floats = {name: value.float() for name, value in tensors.items() if value.is_floating_point()}
        dataclass_value: Any = self
        changed: Self = replace(dataclass_value, **floats)
        return changed

    @property
    @abstractmethod
    def width(self) -> int:
        """Number of channels where the op is attached."""


@dataclass(frozen=True)
class Matrix(RuntimeOp):
    """A norm's output times a matrix: ``x P``.

    Attributes:
        matrix: ``P`` ``(width, width)``.
    """

    kind: ClassVar[str] = "matrix"
    place: ClassVar[Place] = "behind a norm"
    on_inputs: ClassVar[bool] = True
    why: ClassVar[str] = "matrices after norms"

    matrix: Tensor

    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``x P``, in the dtype of ``x``."""
        return x @ self.matrix.to(x.dtype)

    @property
    def width(self) -> int:
        """Rows of the matrix."""
        return self.matrix.shape[0]

    @property
    def macs(self) -> int:
        """One per entry."""
        return self.matrix.numel()

    @property
    def bits(self) -> int:
        """Stored as float32."""
        return 32 * self.matrix.numel()

    def to_tensors(self) -> dict[str, Tensor]:
        """``matrix`` float32."""
        return {"matrix": self.matrix.detach().float().contiguous()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """``matrix`` ``(width, width)``."""
        expect_shapes(tensors, {"matrix": (width, width)})
        return cls(tensors["matrix"].float())


@dataclass(frozen=True)
class Gather(RuntimeOp):
    """A norm's output with channels repeated, dropped or merged: ``x[idx] * factor``.

    Source: channel reassembly, QLLM, Liu et al., ICLR 2024, arXiv 2310.08041, section 3.2.

    Attributes:
        idx: int64 ``(width,)``, the source channel of each output channel.
        factor: ``(width,)``.
        into: int64 ``(width,)``, for each source channel the output channel to which it is added before the factor,
            or -1; ``None`` if no channel is merged.

    >>> Gather(torch.tensor([0, 0]), torch.tensor([0.5, 0.5]))(torch.tensor([8.0, 1.0])).tolist()
    [4.0, 4.0]
    >>> merging = Gather(torch.tensor([3, 1, 2, 3]), torch.tensor([0.5, 0.5, 1, 0.5]), torch.tensor([1, -1, -1, -1]))
    >>> merging(torch.tensor([2.0, 4.0, 5.0, 8.0])).tolist()
    [4.0, 3.0, 5.0, 4.0]
    """

    kind: ClassVar[str] = "gather"
    place: ClassVar[Place] = "behind a norm"
    why: ClassVar[str] = "gathers after norms"

    idx: Tensor
    factor: Tensor
    into: Tensor | None = None

    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``(..., width) -> (..., width)``, in the dtype of ``x``."""
        out = take_channels(x, self.idx)
        if self.into is not None:
            merged = torch.nonzero(self.into >= 0).flatten()
            out = out.index_add(-1, self.into[merged], x[..., merged])
        return out * self.factor.to(x.dtype)

    @property
    def width(self) -> int:
        """Number of channels, before and after."""
        return len(self.idx)

    @property
    def macs(self) -> int:
        """One per channel."""
        return len(self.idx)

    @property
    def bits(self) -> int:
        """Indices as int32, factors as float32."""
        return 32 * len(self.idx) * (2 if self.into is None else 3)

    def to_tensors(self) -> dict[str, Tensor]:
        """``idx`` and ``into`` int32, ``factor`` float32."""
        out = {"idx": self.idx.int(), "factor": self.factor.detach().float().contiguous()}
        return out if self.into is None else {**out, "into": self.into.int()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """All ``(width,)``; indices must be valid channels."""
        expect_shapes(tensors, dict.fromkeys(("idx", "factor", *(["into"] if "into" in tensors else [])), (width,)))
        idx, into = tensors["idx"].long(), tensors["into"].long() if "into" in tensors else None
        for value, minimum in ((idx, 0), (into, -1)):
            if value is not None and not bool(((value >= minimum) & (value < width)).all()):
                raise ValueError("has channel indices out of range")
        return cls(idx, tensors["factor"].float(), into)


@dataclass(frozen=True)
class Clip(RuntimeOp):
    """Quantization of a linear's input with clipped ranges and rounding offsets.

    Attributes:
        ratios: ``(2,)``, clipping ratios of the low and the high end of every token's range.
        offset: ``(in,)``, added before rounding, in quantization steps; ``None`` for none.
    """

    kind: ClassVar[str] = "clip"
    place: ClassVar[Place] = "before a linear"
    why: ClassVar[str] = "clipped ranges or rounding offsets before linears"

    ratios: Tensor
    offset: Tensor | None = None

    def __call__(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``x`` ``(..., in)`` quantized in ``format``; without a format there is no range to clip."""
        if format is None:
            return x
        if not isinstance(format, IntTokens):
            raise LowbitError(f"a clip before a linear supports dynamic integer inputs only; {format.name} given")
        ratios = self.ratios.to(x.dtype)
        return format.fake_quant(x, ratios[0], ratios[1], None if self.offset is None else self.offset.to(x.dtype))

    @property
    def width(self) -> int:
        """Number of channels of the offset; 0 without one, since ratios fit any width."""
        return 0 if self.offset is None else len(self.offset)

    @property
    def macs(self) -> int:
        """One addition per channel with an offset."""
        return self.width

    @property
    def bits(self) -> int:
        """Stored as float32."""
        return 32 * (2 + self.width)

    def to_tensors(self) -> dict[str, Tensor]:
        """``ratios`` and ``offset`` float32."""
        out = {"ratios": self.ratios.detach().float().contiguous()}
        return out if self.offset is None else {**out, "offset": self.offset.detach().float().contiguous()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], width: int) -> Self:
        """``ratios`` ``(2,)`` and, if present, ``offset`` ``(width,)``."""
        shapes: dict[str, tuple[int, ...]] = {"ratios": (2,)}
        expect_shapes(tensors, shapes | ({"offset": (width,)} if "offset" in tensors else {}))
        return cls(tensors["ratios"].float(), tensors["offset"].float() if "offset" in tensors else None)


def expect_shapes(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ``ValueError`` if the names or shapes of stored tensors differ from ``shapes``."""
    actual = {name: tuple(value.shape) for name, value in tensors.items()}
    if actual != dict(shapes):
        raise ValueError(f"holds {actual}; {dict(shapes)} is expected")


def take_channels(x: Tensor, idx: Tensor) -> Tensor:
    """``x[..., idx]`` for ``(..., width)``; ``gather`` is several times faster than indexing on a CPU.

    >>> take_channels(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1, 1, 0])).tolist()
    [[2.0, 2.0, 1.0], [4.0, 4.0, 3.0]]
    """
    return x.gather(-1, idx.expand(*x.shape[:-1], len(idx)))


_INPUT = ".input"  # a linear has no modules of its own, so no module has such a name


def at_input(linear: str) -> str:
    """The name under which an op on a linear's input is kept and stored: ``7.mlp.down_proj.input``."""
    return f"{linear}{_INPUT}"


def linear_behind(name: str) -> str | None:
    """The linear on whose input an op of this name stands; ``None`` for an op that stands elsewhere.

    >>> linear_behind("7.mlp.down_proj.input"), linear_behind("7.mlp.down_proj")
    ('7.mlp.down_proj', None)
    """
    return name.removesuffix(_INPUT) if name.endswith(_INPUT) else None


def tensor_name(module: str, op: RuntimeOp | type[RuntimeOp], tensor: str) -> str:
    """The stored name of one of an op's tensors."""
    return f"{module}.{PREFIX}.{op.kind}.{tensor}"


def parse_tensor_name(name: str) -> tuple[str, str, str] | None:
    """The inverse of ``tensor_name``: ``(module, kind, tensor)``; ``None`` for any other name.

    >>> parse_tensor_name("model.layers.3.input_layernorm.runtime.gather.idx")
    ('model.layers.3.input_layernorm', 'gather', 'idx')
    """
    module, prefix, suffix = name.rpartition(f".{PREFIX}.")
    kind, dot, tensor = suffix.partition(".")
    return (module, kind, tensor) if prefix and dot else None
