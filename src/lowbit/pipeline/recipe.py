"""Recipes: a list of steps with their options, as YAML or as frozen dataclasses.

.. code-block:: yaml

    steps:
      - awq: {clip: true}
      - rtn

A recipe's last block step quantizes; ``tune``, the only step on the whole model, may follow it. A recipe may specify
the protocol that it is meant for, as defaults for omitted arguments:

.. code-block:: yaml

    run: {scheme: w3a16-asym, data: wikitext2, samples: 128, length: 2048, seed: 2, effort: paper}

``description`` and ``schemes`` (the schemes that it suits) are printed by ``lowbit recipes``.

Unknown steps and fields are refused with the nearest known name, and every value is checked against its field's type.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from lowbit.errors import LowbitError, canonical, check_least, unknown
from lowbit.methods import AFTER, METHODS
from lowbit.methods.gptq import GPTQ
from lowbit.methods.lkd import LayerDistillation
from lowbit.methods.lowrank import LowRank
from lowbit.methods.method import Method
from lowbit.methods.options import option_types, options_of, with_options
from lowbit.methods.qronos import Qronos
from lowbit.methods.refit import Refit
from lowbit.methods.rounding import Rounding
from lowbit.methods.sparsegpt import SparseGPT
from lowbit.methods.tune import Tune
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.paths import user_path
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format
from lowbit.yaml_text import parse_yaml

Step = Method | Tune
Named = tuple[str, Step]
# Training budgets: shares of the epochs in a recipe, and how many training sequences an epoch takes (0: all). More
# calibration text then makes no more steps, but steps on other sequences.
EFFORTS = {"quick": (0.3, 28), "normal": (0.5, 28), "paper": (1.0, 0)}
SAMPLES, SAMPLES_LEARNING = 32, 128  # default number of calibration windows; where epochs take a part of them
PROTOCOL: dict[str, type] = {
    "scheme": str,
    "data": str,
    "samples": int,
    "length": int,
    "seed": int,
    "bos": str,
    "prefix": str,
    "effort": str,
}
KEYS = ("description", "schemes", "steps", "window", "run")
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
# Steps that fit weights to the quantized hidden states, with the float layer's output as the target.
CORRECTIONS: tuple[type[Method], ...] = (Refit, LowRank, LayerDistillation)
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 parses 1e-3 as text


@dataclass(frozen=True)
class Recipe:
    """The steps applied to every block.

    Attributes:
        name: name in results.
        steps: ``(method name, method)`` in order.
        window: number of consecutive blocks that a step works on together.
        run: the protocol that the recipe is meant for; see ``PROTOCOL``.
        description, schemes: for ``lowbit recipes``; not part of a run's identity.
    """

    name: str
    steps: tuple[Named, ...]
    window: int = 1
    run: Mapping[str, Any] = field(default_factory=dict)
    description: str = field(default="", compare=False)
    schemes: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        if not self.steps:
            raise LowbitError(f"recipe '{self.name}' has no steps: list at least one that quantizes, such as rtn")
        if misplaced := [name for name, step in self.steps[:-1] if isinstance(step, Tune)]:
            raise LowbitError(f"recipe '{self.name}': {misplaced[0]} comes last, once, after the step that quantizes")
        rounds = [method.rounds for _, method in self.block_steps]
        if sum(rounds) != 1 or not rounds[-1]:
            known = ", ".join(name for name, method in METHODS.items() if method.rounds)
            raise LowbitError(f"recipe '{self.name}': exactly one step quantizes, and it comes last; one of {known}")
        self.check_order(None)
        self._check_pairs()
        check_least(f"recipe '{self.name}': window", self.window, 1, "give the number of blocks per step")

    def _check_pairs(self) -> None:
        """Refuse steps that undo what an earlier one has done."""
        names = [name for name, _ in self.steps]
        last_name, last = self.block_steps[-1]
        if isinstance(last, SparseGPT) and isinstance(self.steps[-1][1], Tune):
            raise LowbitError(
                f"recipe '{self.name}': tune would take {last_name}'s zeros away; leave one of the two out"
            )
        changes = next((name for name, step in self.block_steps[:-1] if isinstance(step, CORRECTIONS)), None)
        if changes and isinstance(last, Rounding) and last.options.correct < 1:
            raise LowbitError(
                f"recipe '{self.name}': {changes} corrects the block's float function, from which {last_name} takes "
                f"its target with correct {last.options.correct:g}: set {last_name}.correct=1"
            )
        corrects = isinstance(last, Qronos) or (isinstance(last, GPTQ) and last.target == "output")
        if corrects and (first := next((name for name in names if METHODS.get(name) in CORRECTIONS), None)):
            what = last_name if isinstance(last, Qronos) else f"{last_name} with target: output"
            raise LowbitError(
                f"recipe '{self.name}': {first} and {what} both correct weights for the quantized inputs, twice if "
                "together; leave one of the two out"
            )

    def check_order(self, inputs: ActFormat | None) -> None:
        """Refuse a step that folds maps into norms after one that leaves runtime ops behind norms or on inputs.

        Args:
            inputs: format of the linears' inputs, on which some ops depend; ``None``: not known, or float.
        """
        for position, (name, method) in enumerate(self.block_steps):
            after = next((later for later, step in self.block_steps[position + 1 :] if step.moves_norms), None)
            if after and any(op.place == "behind a norm" for op in method.runtime_ops(inputs)):
                raise LowbitError(
                    f"recipe '{self.name}': {after} cannot come after {name} as configured here: {name} leaves "
                    f"runtime ops behind norms or on inputs, across which {after} folds its maps; put {after} first"
                )

    def check_formats(self, weights: Iterable[tuple[str, Format, int]]) -> None:
        """Refuse formats that a step does not quantize to; of each weight its name, its format and its inputs."""
        known = {(format, columns): module for module, format, columns in weights}
        for (format, columns), module in known.items():
            for name, method in self.block_steps:
                if (why := method.refusal(format, columns)) is not None:
                    raise LowbitError(
                        f"{name}: {format.name}, a format of {module}, {why}; choose another format or recipe"
                    )

    @property
    def block_steps(self) -> tuple[tuple[str, Method], ...]:
        """The steps that work on one block or window."""
        return tuple((name, step) for name, step in self.steps if isinstance(step, Method))

    @property
    def tune(self) -> Tune | None:
        """The end-to-end step, if there is one with epochs."""
        last = self.steps[-1][1]
        return last if isinstance(last, Tune) and last.schedule.epochs else None


def runtime_ops(recipe: Recipe, inputs: ActFormat | None) -> dict[type[RuntimeOp], str]:
    """The kinds of runtime ops that a recipe may leave, each with the step that leaves it.

    Args:
        recipe: the recipe.
        inputs: format of the linears' inputs; ``None``: inputs stay float, without ranges to clip or shift.
    """
    out: dict[type[RuntimeOp], str] = {}
    for name, method in recipe.block_steps:
        for op in sorted(method.runtime_ops(inputs), key=lambda op: op.kind):
            out.setdefault(op, name)
    return out


def recipe_names() -> list[str]:
    """Names of the packaged recipes; those that reproduce published results come last, as ``paper/...``."""
    root = files("lowbit") / "recipes"
    here, papers = (
        sorted(
            prefix + entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
        )
        for folder, prefix in ((root, ""), (root / "paper", "paper/"))
    )
    return here + papers


def load_recipe(name_or_path: str) -> Recipe:
    """Load a recipe by name or from a YAML file."""
    if name_or_path.lower().endswith((".yaml", ".yml")):
        name = Path(name_or_path).stem
        try:
            text = user_path(name_or_path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise LowbitError(f"cannot read the recipe {name_or_path}: {error}") from error
    else:
        published = name_or_path.casefold().startswith("paper/")  # nearly a hundred: suggested only for such names
        name = canonical("recipe", name_or_path, [name for name in recipe_names() if ("/" in name) == published])
        text = (files("lowbit") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")
    return recipe_from_dict(parse_yaml(text, f"recipe {name_or_path}"), name)


def with_effort(recipe: Recipe, effort: str) -> Recipe:
    """``recipe`` with the budget of its learned steps scaled; a learned step keeps at least one epoch.

    ``quick`` is 0.3 of the recipe's epochs, ``normal`` 0.5, both of 28 sequences each (what 32 windows leave for
    training) unless the recipe says how many; ``paper`` is all epochs, of all sequences.
    """
    share, sequences = EFFORTS[canonical("effort", effort, EFFORTS)]
    return replace(recipe, steps=tuple((name, _budgeted(step, share, sequences)) for name, step in recipe.steps))


def _budgeted(step: Step, share: float, sequences: int) -> Step:
    if step.schedule is None:
        return step
    sequences = step.schedule.sequences or sequences
    return with_options(step, epochs=step.schedule.scaled(share).epochs, sequences=sequences)


def default_samples(recipe: Recipe) -> int:
    """Calibration windows where none are asked for: more where a learned step's epochs take a part of them.

    >>> [default_samples(with_effort(load_recipe(name), "quick")) for name in ("gptq", "affinequant")]
    [32, 128]
    >>> default_samples(with_effort(load_recipe("affinequant"), "paper"))
    32
    """
    learned = (step.schedule for _, step in recipe.steps if step.schedule is not None)
    return SAMPLES_LEARNING if any(s.epochs and s.sequences for s in learned) else SAMPLES


def recipe_from_dict(content: Any, name: str) -> Recipe:
    """The inverse of ``recipe_to_dict``."""
    if not isinstance(content, Mapping) or not isinstance(content.get("steps"), list):
        raise LowbitError(f"recipe '{name}': expected a key 'steps' with a list of steps")
    for key in content:
        if key not in KEYS:
            raise unknown(f"key in recipe '{name}'", str(key), KEYS)
    window = content.get("window", 1)
    if not isinstance(window, int) or isinstance(window, bool):
        raise LowbitError(f"recipe '{name}': window must be a whole number, got {window!r}")
    texts = {key: _typed(f"recipe '{name}': {key}", content.get(key, ""), str) for key in ("description", "schemes")}
    steps = tuple(_step(entry, name) for entry in content["steps"])
    return Recipe(name, steps, window, _protocol(content.get("run", {}), name), **texts)


def _protocol(content: Any, recipe: str) -> dict[str, Any]:
    if not isinstance(content, Mapping):
        raise LowbitError(f"recipe '{recipe}': run must be 'field: value' pairs of {', '.join(PROTOCOL)}")
    for key in content:
        if key not in PROTOCOL:
            raise unknown(f"field of run in recipe '{recipe}'", str(key), PROTOCOL)
    return {key: _typed(f"run.{key}", value, PROTOCOL[key]) for key, value in content.items()}


def _step(entry: Any, recipe: str) -> Named:
    """A step from ``rtn`` or ``{gptq: {damping: 0.01}}``."""
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise LowbitError(
            f"recipe '{recipe}': a step is a method's name, or one name with its options; got {entry!r}"
        )
    name, options = next(iter(entry.items()))
    known: dict[str, type[Step]] = {**METHODS, **AFTER}
    name = canonical("step", str(name), known)
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise LowbitError(f"recipe '{recipe}': the options of {name} must be 'field: value' pairs; got {options!r}")
    return name, _build(name, known[name](), options)


def _build(name: str, step: Step, options: Mapping[str, Any]) -> Step:
    """A step with options set by their flat names."""
    hints, known = option_types(step), options_of(step)
    values = {}
    for key, value in options.items():
        if key not in known:
            raise unknown(f"field of {name}", str(key), known)
        values[key] = _typed(f"{name}.{key}", value, hints[key], known[key])
    return with_options(step, **values)


def _typed(where: str, value: Any, expected: Any, default: Any = None) -> Any:
    """``value`` as the field's type; conversions: whole numbers and ``1e-3`` to float, false to ``off``.

    Infinity and NaN are refused, since range checks by comparison miss them.
    """
    allowed = typing.get_args(expected) or (expected,)
    if float in allowed and (type(value) is int or (isinstance(value, str) and _EXPONENT.fullmatch(value))):
        value = float(value)
    if value is False and str in allowed:
        value = "off"  # YAML 1.1 parses a bare off as false
    if type(value) in allowed and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    names = " or ".join(_KINDS.get(kind, str(kind)) for kind in allowed)
    hint = "" if default is None else f" (default: {default!r})"
    raise LowbitError(f"{where}: {value!r} given; {names} is allowed{hint}")


def with_settings(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """``recipe`` with ``step.field=value`` settings applied to every step of that name."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        step, dot, key = path.partition(".")
        if not (equals and dot and key):
            raise LowbitError(f"--set {setting}: give step.field=value, for example gptq.damping=0.05")
        names = [name for name, _ in recipe.steps]
        step = canonical(f"step in recipe '{recipe.name}'", step, set(names))
        value = parse_yaml(text, f"--set {setting}: the value")
        steps = tuple((n, _build(n, m, {key: value}) if n == step else m) for n, m in recipe.steps)
        recipe = replace(recipe, steps=steps)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data with every option explicit, for manifests and YAML files."""
    return {"steps": [{name: options_of(step)} for name, step in recipe.steps], "window": recipe.window}
