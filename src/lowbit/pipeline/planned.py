"""The facts of ``lowbit inspect`` on a run that has not begun: what it takes, whether it fits, and what would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.checkpoints.positions import positions_of
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.estimate import Calibration, Estimate, Model, estimate, with_own_rates
from lowbit.pipeline.machine import Machine
from lowbit.pipeline.recipe import default_samples, load_recipe, with_effort
from lowbit.pipeline.request import DEFAULTS
from lowbit.pipeline.smallest_change import Choice, misfits, smallest_change
from lowbit.quant.scheme_files import load_scheme
from lowbit.runs.plan import check_length, make_plan

NO_RATES = "not estimated: give --flops and --bandwidth of the device"


@dataclass(frozen=True)
class Planned:
    """The arguments of a run that is to be estimated.

    Attributes:
        scheme, recipe: their names or files.
        effort: the recipe's training budget.
        samples, length: of the calibration text; ``None``: what ``quantize`` takes.
        machine: where it is to run; without rates and a device of its own, at the rates of this one, measured.
    """

    scheme: str
    recipe: str
    effort: str
    samples: int | None
    length: int | None
    machine: Machine

    def facts(self, skeleton: Skeleton) -> dict[str, Any]:
        """Sizes, memory of a rank, time and, where it does not fit, the smallest change with which it does."""
        recipe, scheme = with_effort(load_recipe(self.recipe), self.effort), load_scheme(self.scheme)
        plan = make_plan(skeleton, scheme)
        calibration = self._calibration(skeleton, default_samples(recipe))
        model = Model.of(skeleton, plan)
        machine = self.machine
        if machine.rates is None and not machine.has_device:
            machine = with_own_rates(machine, model, calibration)
        found = estimate(model, recipe, calibration, machine)
        return {
            "parameters": plan.quantized_weights + plan.float_weights,
            "scheme": scheme.name,
            "recipe": recipe.name,
            "bits_per_weight": round(plan.bits_per_weight, 4),
            "ranks": machine.ranks,
            "samples": calibration.samples,
            "length": calibration.length,
            **_memory(found, machine),
            "estimated_disk_bytes": found.disk_bytes,
            **_time(found),
            **_fits(model, Choice(recipe, calibration, machine), found),
        }

    def _calibration(self, skeleton: Skeleton, samples: int) -> Calibration:
        most = positions_of(skeleton.text_config) or DEFAULTS["length"]
        length = min(DEFAULTS["length"], most) if self.length is None else self.length
        check_length(skeleton.config, length)
        return Calibration(samples if self.samples is None else self.samples, length)


def _memory(found: Estimate, machine: Machine) -> dict[str, Any]:
    """Bytes of a rank, on its host and on its device, and what they consist of."""
    facts: dict[str, Any] = {"estimated_memory_bytes": found.needs.of("host")}
    if machine.has_device:
        facts["estimated_device_bytes"] = found.needs.of("device")
    facts["memory_of"] = {f"{item.place}: {item.what}": item.size for item in found.needs.items}
    return facts


def _time(found: Estimate) -> dict[str, Any]:
    """Seconds of the busiest rank by step; a lower bound says so in its name."""
    if found.seconds is None or found.total_seconds is None:
        return {"estimated_time": NO_RATES}
    lower = "_at_least" if found.uncounted else ""
    facts: dict[str, Any] = {f"estimated_seconds{lower}": round(found.total_seconds, 1)}
    facts["seconds_of"] = {name: round(own, 1) for name, own in found.seconds.items()}
    if found.uncounted:
        facts["passes_alone_are_counted_of"] = ", ".join(found.uncounted)
    return facts


def _fits(model: Model, choice: Choice, found: Estimate) -> dict[str, Any]:
    """Whether it fits, where a memory is stated."""
    if choice.machine.host_memory is None and not choice.machine.has_device:
        return {}
    missing = misfits(found.needs, choice.machine)
    if not missing:
        return {"fits": "yes"}
    return {"fits": "; ".join(map(str, missing)), "smallest_change": smallest_change(model, choice)}
