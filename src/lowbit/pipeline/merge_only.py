"""``--merge-only``: a recipe without what stays at run time, so that stock runtimes run its result.

Each step keeps what folds into weights: AffineQuant's diagonals and the matrices of v -> o, reassembly before
``down_proj``. A step of which nothing folds, such as ``hadamard``, is left out. A step whose idea is the op itself,
such as ``llm-int8``, is refused.
"""

from __future__ import annotations

from dataclasses import replace

from lowbit.errors import LowbitError
from lowbit.methods.method import Method
from lowbit.pipeline.recipe import Named, Recipe
from lowbit.quant.activations import ActFormat, IntTokens
from lowbit.quant.static_clusters import StaticClusters

# Inputs with ranges to clip and to shift, with ranges of clusters, and in floating point.
INPUTS: tuple[ActFormat | None, ...] = (IntTokens(4, symmetric=False), StaticClusters(4, False, 32), None)


def merge_only(recipe: Recipe) -> Recipe:
    """The recipe with every step in its form that folds.

    Raises:
        LowbitError: a step has none and cannot be left out.

    >>> from lowbit.pipeline.recipe import load_recipe
    >>> [name for name, _ in merge_only(load_recipe("hadamard+gptq")).steps]
    ['gptq']
    >>> step = dict(merge_only(load_recipe("flatquant")).steps)["affinequant"]
    >>> step.sites.qkv, step.sites.heads, step.clipping.act_clip
    ('diagonal', 'matrix', False)
    """
    kept: list[Named] = []
    for name, step in recipe.steps:
        folded = step.folded() if isinstance(step, Method) else step
        if folded is None:
            continue
        if isinstance(folded, Method) and (ops := {op for inputs in INPUTS for op in folded.runtime_ops(inputs)}):
            left = ", ".join(sorted(op.why for op in ops))
            raise LowbitError(
                f"--merge-only given: {name} leaves {left} at run time and has no form that folds; choose a recipe "
                "without it, or leave --merge-only out"
            )
        kept.append((name, folded))
    return replace(recipe, steps=tuple(kept))
