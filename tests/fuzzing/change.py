"""What a mutator returns: a line that says what it changed, and what a reader may make of the result."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Theirs:
    """A refusal, or the logits that transformers computes from the mutated folder.

    Where transformers refuses the folder, the unmutated model's logits: what was changed is then without effect.

    Attributes:
        alone: whether one thing was changed. Of two, one may be what transformers refuses, the other one with effect:
            then any logits are right.
    """

    alone: bool = True


@dataclass(frozen=True)
class Patched:
    """A refusal, or the logits of the unmutated model with these fields set in its config; none: the model's own."""

    config: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    """Nothing but a refusal: whatever is read is something else than what the writer meant."""


@dataclass(frozen=True)
class Anything:
    """A refusal or any numbers: the change may be one of a weight."""


Expect = Theirs | Patched | Refusal | Anything
SAME = Patched()


@dataclass(frozen=True)
class Change:
    """What was done to a model, in a few words, and what may come out."""

    text: str
    expect: Expect = field(default_factory=Theirs)


Random = random.Random
Mutator = Callable[[Path, Random], Change]  # changes the model (a folder, or a .gguf file) in place

# Values of every JSON type, and numbers at the ends.
WRONG: tuple[Any, ...] = (
    None,
    True,
    False,
    "",
    "x",
    "8",
    "../../etc/passwd",
    "line\nbreak",
    "\x1b[31m",
    [],
    [1],
    ["x"],
    [[[]]],
    {},
    {"a": 1},
    {"a": {"b": []}},
    1.5,
    0.0,
)
NUMBERS: tuple[Any, ...] = (
    0,
    1,
    -1,
    3,
    7,
    -(2**31),
    2**31,
    2**40,
    2**63,
    2**64,
    10**30,
    0.1,
    -0.5,
    1e-300,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
)


def short(value: object) -> str:
    """A value as one line of limited length."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
