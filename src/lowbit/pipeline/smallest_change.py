"""What of a run does not fit into memory, and the smallest change with which it does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lowbit.methods.rtn import RTN
from lowbit.pipeline.estimate import Calibration, Model
from lowbit.pipeline.machine import Machine
from lowbit.pipeline.memory_needs import Needs, Place, needs_of
from lowbit.pipeline.recipe import Recipe

LEAST_SAMPLES, LEAST_TOKENS = 8, 128


@dataclass(frozen=True)
class Choice:
    """What a user may change about a run.

    Attributes:
        recipe: its steps.
        calibration: the windows.
        machine: where it runs.
    """

    recipe: Recipe
    calibration: Calibration
    machine: Machine

    def needs(self, model: Model) -> Needs:
        """The memory of a rank."""
        data = self.calibration.on(self.machine)
        return needs_of(model.shapes, self.recipe, data, self.machine, model.shared, model.vocabulary)


@dataclass(frozen=True)
class Misfit:
    """A memory that is too small.

    Attributes:
        place: whose.
        needed, given: bytes.
        largest: the item that takes most of it.
    """

    place: Place
    needed: int
    given: int
    largest: str

    def __str__(self) -> str:
        return (
            f"does not fit: {self.needed / 1e9:.1f} GB of the {self.place}'s {self.given / 1e9:.1f} GB are needed, "
            f"most of them for {self.largest}"
        )


def misfits(needs: Needs, machine: Machine) -> list[Misfit]:
    """Memories that are too small for what a rank holds; none where nothing is known of a memory."""
    limits: dict[Place, int | None] = {"host": machine.host_memory, "device": machine.device_memory}
    out = []
    for place, given in limits.items():
        if given is not None and (needed := needs.of(place)) > given:
            own = [item for item in needs.items if item.place == place]
            out.append(Misfit(place, needed, given, max(own, key=lambda item: item.size).what))
    return out


def smallest_change(model: Model, choice: Choice) -> str:
    """The first change, of those that change the result least to those that change it most, with which a run fits.

    Fewer windows, then 16 bits, shorter windows, single blocks, recipes without their steps in order, and plain
    rounding at last; where none of them fits, how much memory that takes.
    """
    last = choice
    for text, changed in _changes(choice):
        if not misfits(changed.needs(model), choice.machine):
            return text
        last = changed
    needs = last.needs(model)
    short = [f"{miss.needed / 1e9:.1f} GB of the {miss.place}" for miss in misfits(needs, choice.machine)]
    return f"no change of options fits: 'rtn' with {LEAST_SAMPLES} windows takes {' and '.join(short)}"


def _changes(choice: Choice) -> Iterator[tuple[str, Choice]]:
    for samples in _halves(choice.calibration.samples, LEAST_SAMPLES):
        own = replace(choice.calibration, samples=samples)
        yield f"--samples {samples}", replace(choice, calibration=own)
    also = ""
    if choice.machine.has_device and choice.machine.value_bytes == 4:
        choice, also = replace(choice, machine=replace(choice.machine, value_bytes=2)), "--dtype bfloat16 "
        yield also.strip(), choice
    for length in _halves(choice.calibration.length, LEAST_TOKENS):
        yield f"{also}--length {length}", replace(choice, calibration=replace(choice.calibration, length=length))
    if choice.recipe.window > 1:
        yield f"{also}and a recipe with window: 1", replace(choice, recipe=replace(choice.recipe, window=1))
    *others, last = choice.recipe.steps
    if choice.recipe.tune is not None:
        others, last = list(choice.recipe.steps[:-2]), choice.recipe.steps[-2]
        yield (
            f"{also}and the recipe without tune",
            replace(choice, recipe=replace(choice.recipe, steps=(*others, last))),
        )
    if others:
        alone = replace(choice.recipe, steps=(last,), window=1)
        yield f"{also}--recipe {last[0]}", replace(choice, recipe=alone)
    plain = replace(choice, recipe=Recipe("rtn", (("rtn", RTN()),)))
    yield f"{also}--recipe rtn", plain
    few = replace(choice.calibration, samples=min(LEAST_SAMPLES, choice.calibration.samples))
    yield f"{also}--recipe rtn --samples {few.samples}", replace(plain, calibration=few)


def _halves(number: int, least: int) -> Iterator[int]:
    while (number := number // 2) >= least:
        yield number
