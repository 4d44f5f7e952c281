"""Overrides for a bit budget: a scheme made from what a run's linears sensitivity alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lowbit.analysis.bit_allocation import Linear, fused, with_formats, within_budget
from lowbit.analysis.linear_error import BITS
from lowbit.errors import LowbitError
from lowbit.models.skeleton import Skeleton
from lowbit.quant.scheme import override_text, scheme_to_dict
from lowbit.runs.folder import run_scheme
from lowbit.runs.manifest import Manifest
from lowbit.runs.plan import make_plan

WIDTHS = (3, 4, 5, 6, 8)  # what a proposal chooses among by default


@dataclass(frozen=True)
class Proposal:
    """A scheme within a budget.

    Attributes:
        budget: what was asked for, in effective bits per rounded weight.
        widths: what was chosen among.
        bits_per_weight: what a run with the scheme will report.
        sensitivity_now: sum of what the linears sensitivity alone, as they are.
        sensitivity_proposed: the same in the scheme, as predicted.
        changes: for each group of linears that changes: ``linears``, ``from`` and ``to``.
        scheme: what a scheme file holds.
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
    """Refuse what no proposal can be made for."""
    if wrong := [b for b in bits if b not in BITS]:
        raise LowbitError(f"--bits {wrong[0]} given; allowed: {', '.join(map(str, BITS))}")
    if not bits:
        raise LowbitError(f"--bits is empty; give some of {', '.join(map(str, BITS))}")
    if not 0 < budget <= 32:
        raise LowbitError(f"--budget {budget:g} given; give bits per weight, for example 4.5")


def propose(
    skeleton: Skeleton, manifest: Manifest, linears: Sequence[Linear], budget: float, bits: Sequence[int]
) -> Proposal:
    """The scheme of least sensitivity whose ``bits_per_weight`` is at most ``budget``.

    The budget is that of the whole run: rounded embeddings and head, and what stays online, are counted and left
    alone.

    Args:
        skeleton: the run's model.
        manifest: the run's.
        linears: its blocks' rounded linears.
        budget: effective bits per rounded weight.
        bits: widths to choose among.
    """
    scheme = run_scheme(manifest)
    plan = make_plan(skeleton, scheme)
    online = (manifest.bits_per_weight - plan.bits_per_weight) * plan.quantized_weights
    outside = plan.stored_bits - sum(one.bits_at(one.spec) for one in linears) + online
    groups, widths = fused(linears, skeleton.family.linears), sorted(set(bits))
    # Sums of floats may miss a whole number of bits by a little.
    picked = within_budget(groups, scheme.weight, widths, int(budget * plan.quantized_weights - outside + 1e-3))
    proposed = with_formats(scheme, groups, picked)
    then = make_plan(skeleton, proposed)
    pairs = list(zip(groups, picked, strict=True))
    return Proposal(
        budget=budget,
        widths=widths,
        bits_per_weight=(then.stored_bits + online) / then.quantized_weights,
        sensitivity_now=sum(one.sensitivity for one in linears),
        sensitivity_proposed=sum(one.sensitivity_at(spec.bits) for group, spec in pairs for one in group),
        changes=[
            {
                "linears": [one.name for one in group],
                "from": [override_text(one.spec) for one in group],
                "to": override_text(spec),
            }
            for group, spec in pairs
            if any(one.spec != spec for one in group)
        ],
        scheme=scheme_to_dict(proposed),
        transformers=then.stock,
    )
