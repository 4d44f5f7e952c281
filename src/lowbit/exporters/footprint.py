"""Bytes of a model in a target's file, for every choice of formats: what an allocation chooses among.

Some of a file does not depend on formats: metadata, the tokenizer, norms, what stays in float. The rest is a sum over
*choices*: modules that a target stores in one tensor, or fuses and so needs in one format, each with the formats that
the target has for them and the bytes that these take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.quant.format import Format


@dataclass(frozen=True)
class Option:
    """A format, and the bytes that a choice takes in it; ``None``: float."""

    format: Format | None
    size: int


@dataclass(frozen=True)
class Choice:
    """Modules that have one format.

    Attributes:
        modules: full names; of a tied embedding both names of the one tensor.
        weights: number of their weights, a tied one counted once.
        options: the formats that the target has for them.
    """

    modules: tuple[str, ...]
    weights: int
    options: tuple[Option, ...]

    @property
    def least(self) -> int:
        """Bytes in the smallest of its formats."""
        return min(option.size for option in self.options)

    @property
    def has_formats(self) -> bool:
        """Whether there is any but float."""
        return any(option.format is not None for option in self.options)


@dataclass(frozen=True)
class Footprint:
    """A model in a target's file.

    Attributes:
        fixed: bytes that no choice changes.
        choices: everything that has a format.
        floats: the largest tensors among ``fixed`` and their bytes, largest first, for messages.
    """

    fixed: int
    choices: tuple[Choice, ...]
    floats: tuple[tuple[str, int], ...] = ()

    @property
    def least(self) -> int:
        """Bytes of the smallest file."""
        return self.fixed + sum(choice.least for choice in self.choices)

    def without_formats(self, module: str) -> Footprint:
        """The same where the choice that has ``module`` stays float.

        Raises:
            LowbitError: the target has no float for it.
        """
        choices = tuple(_float_alone(one) if module in one.modules else one for one in self.choices)
        return replace(self, choices=choices)

    @property
    def weights(self) -> int:
        """Weights that may have a format; a choice that the target has in float alone has none.

        >>> from lowbit.quant.integer import IntFormat
        >>> packed = Choice(("a",), 8, (Option(None, 32), Option(IntFormat(4), 6)))
        >>> footprint = Footprint(10, (packed, Choice(("b",), 4, (Option(None, 16),))))
        >>> footprint.weights, footprint.beside
        (8, 26)
        """
        return sum(choice.weights for choice in self.choices if choice.has_formats)

    @property
    def beside(self) -> int:
        """Bytes of everything that has no format: ``fixed``, and choices that are float alone."""
        return self.fixed + sum(choice.least for choice in self.choices if not choice.has_formats)


def _float_alone(choice: Choice) -> Choice:
    options = tuple(option for option in choice.options if option.format is None)
    if not options:
        raise LowbitError(f"{choice.modules[0]} has to stay float, for which the target has no place: choose another")
    return replace(choice, options=options)


@dataclass(frozen=True)
class FloatModel:
    """The model that a footprint is of.

    Attributes:
        config: its config.
        folder: where its tokenizer is.
        name: its name in the file's metadata.
        checkpoint: its weights.
        shapes: of all its tensors, by the model's names.
        modules: ``(out, in)`` of the linears of its blocks, by full name.
        embed, head: names of embedding and head.
        tied: they are one tensor.
        carried: bytes of the file of what a run folder carries over as it is, such as a vision encoder.
    """

    config: Any
    folder: Path
    name: str
    checkpoint: Checkpoint
    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, tuple[int, int]]
    embed: str
    head: str
    tied: bool
    carried: int = 0

    def module_of(self, name: str) -> str | None:
        """The module that a parameter is the weight of, if it may have a format."""
        module = name.removesuffix(".weight")
        known = module in self.modules or module in (self.embed, self.head)
        return module if known and name.endswith(".weight") else None

    def shape(self, module: str) -> tuple[int, int]:
        """``(out, in)`` of a module."""
        if module in self.modules:
            return self.modules[module]
        rows, columns = self.shapes[f"{self.embed}.weight"]
        return rows, columns
