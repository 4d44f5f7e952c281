"""The recipe of ``lowbit quantize MODEL --target T`` without scheme and recipe, and the sentence that says why.

The format is the first of the target's schemes that divides the model's widths (``quant/runtimes.py``). The recipe is
that of this table for a model of that size. A sentence says *measured* where a table in docs/ has the format and the
recipe on a model of that class, and *estimated* everywhere else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lowbit.models.skeleton import Skeleton
from lowbit.quant.runtimes import RUNTIMES
from lowbit.runs.plan import linear_shapes


@dataclass(frozen=True)
class Default:
    """A recipe for models of a size.

    Attributes:
        below: weights of the blocks' linears, up to which it is taken.
        recipe: its name.
        measured: by scheme's name, what a table in docs/ says of it.
        estimated: why it is taken with other schemes.
    """

    below: float
    recipe: str
    measured: dict[str, str]
    estimated: str


SMALL, LARGE = (
    Default(
        1e9,
        "awq+gptq",
        {
            "w4a16g64-sym": "measured on SmolLM2-135M (docs/results.md): KL on WikiText-2 0.1475, 0.4854 of rtn",
        },
        "estimated from groups of 64, where it has the least divergence of the recipes in docs/results.md",
    ),
    Default(math.inf, "gptq", {}, "estimated: the search of awq doubles the time, and large models lose less"),
)
# Rows in ascending size, by target runtime.
DEFAULTS_OF: dict[str, tuple[Default, ...]] = dict.fromkeys(RUNTIMES, (SMALL, LARGE))


def default_of(target: str, weights: int) -> Default:
    """The row for a target runtime and a model with ``weights`` weights in its blocks' linears.

    >>> default_of("llama.cpp", 106_168_320).recipe, default_of("vllm", 7_000_000_000).recipe
    ('awq+gptq', 'gptq')
    """
    return next(row for row in DEFAULTS_OF[target] if weights < row.below)


def weights_of(skeleton: Skeleton) -> int:
    """Weights in the linears of a model's blocks."""
    return sum(rows * columns for rows, columns in linear_shapes(skeleton).values())


def sentence(target: str, scheme: str, row: Default) -> str:
    """What was chosen and why, on one line.

    >>> sentence("vllm", "w4a16g128-sym", LARGE)
    'vllm: w4a16g128-sym with gptq; estimated: the search of awq doubles the time, and large models lose less'
    """
    return f"{target}: {scheme} with {row.recipe}; {row.measured.get(scheme, row.estimated)}"
