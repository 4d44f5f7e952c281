"""Mixed-precision proposals: overrides within a bit budget, from the sensitivities of a run's linears."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.analysis.bit_allocation import Linear, fused, with_formats, within_budget
from lowbit.analysis.linear_error import BITS
from lowbit.errors import LowbitError
from lowbit.models.skeleton import Skeleton
from lowbit.quant.integer import IntFormat, integer
from lowbit.quant.scheme_files import scheme_to_dict
from lowbit.quant.scheme_names import override_text
from lowbit.runs.manifest import Manifest
from lowbit.runs.plan import make_plan
from lowbit.runs.reading import run_scheme

WIDTHS = (3, 4, 5, 6, 8)  # default candidates of a proposal


@dataclass(frozen=True)
class Proposal:
    """A scheme within a budget.

    Attributes:
        budget: the requested effective bits per quantized weight.
        widths: candidate bit widths.
        bits_per_weight: effective bits per quantized weight of a run with the proposed scheme.
        sensitivity_now: sum of the linears' sensitivities in their current formats.
        sensitivity_proposed: the same in the proposed formats, as predicted.
        changes: for each group of linears that changes: ``linears``, ``from`` and ``to``.
        scheme: the proposed scheme, as in a scheme file.
        transformers: why stock ``transformers`` will not load the result, or ``None``.
    """

    budget: float
    widths: list[int]
    bits_per_weight: float
    sensitivity_now: float
    sensitivity_proposed: float
    changes: list[dict[str, Any]]
    scheme: dict[str, Any]
    transformers: str | None


def check_budget(budget: float, bits: Sequence[int]) -> None:
    """Check that ``budget`` and ``bits`` are valid."""
    if unsupported := [b for b in bits if b not in BITS]:
        raise LowbitError(f"--bits {unsupported[0]} given; allowed: {', '.join(map(str, BITS))}")
    if not bits:
        raise LowbitError(f"--bits is empty; give one or more of {', '.join(map(str, BITS))}")
    if not 0 < budget <= 32:
        raise LowbitError(f"--budget {budget:g} given; give bits per weight, for example 4.5")


def propose(
    skeleton: Skeleton, manifest: Manifest, linears: Sequence[Linear], budget: float, bits: Sequence[int]
) -> Proposal:
    """The scheme of least sensitivity whose ``bits_per_weight`` is at most ``budget``.

    The budget covers the whole run: quantized embeddings and head, and runtime ops, are counted but not changed.

    Args:
        skeleton: the run's model.
        manifest: the run's manifest.
        linears: the quantized linears of its blocks.
        budget: effective bits per quantized weight.
        bits: candidate bit widths.

    Raises:
        LowbitError: a linear is not stored in integers, or the budget is too small.
    """
    for linear in linears:
        if not isinstance(linear.spec, IntFormat):
            raise LowbitError(
                f"--budget given: a proposal chooses among widths of integers, and {linear.name} is stored in "
                f"{linear.spec.name}: quantize with a scheme of integers such as w4a16g64-sym, or omit --budget"
            )
    scheme = run_scheme(manifest)
    plan = make_plan(skeleton, scheme)
    online = (manifest.bits_per_weight - plan.bits_per_weight) * plan.quantized_weights
    outside = plan.stored_bits - sum(linear.bits_at(linear.spec) for linear in linears) + online
    groups, widths = fused(linears, skeleton.architecture), sorted(set(bits))
    # The tolerance covers rounding errors in sums of floats.
    picked = within_budget(
        groups,
        integer(scheme.weight, "a bit allocation"),
        widths,
        int(budget * plan.quantized_weights - outside + 1e-3),
    )
    proposed = with_formats(scheme, groups, picked)
    proposed_plan = make_plan(skeleton, proposed)
    pairs = list(zip(groups, picked, strict=True))
    return Proposal(
        budget=budget,
        widths=widths,
        bits_per_weight=(proposed_plan.stored_bits + online) / proposed_plan.quantized_weights,
        sensitivity_now=sum(linear.sensitivity for linear in linears),
        sensitivity_proposed=sum(linear.sensitivity_at(spec.bits) for group, spec in pairs for linear in group),
        changes=[
            {
                "linears": [linear.name for linear in group],
                "from": [override_text(linear.spec) for linear in group],
                "to": override_text(spec),
            }
            for group, spec in pairs
            if any(linear.spec != spec for linear in group)
        ],
        scheme=scheme_to_dict(proposed),
        transformers=proposed_plan.stock,
    )
