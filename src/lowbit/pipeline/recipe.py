"""Recipes: a list of steps with their options, as YAML or as frozen dataclasses.

.. code-block:: yaml

    steps:
      - awq: {clip: true}
      - rtn

A recipe ends with a step that rounds; behind it may stand ``tune``, the one step that works on the whole model. It
may name the protocol that it is meant for, which counts where a person gave nothing:

.. code-block:: yaml

    run: {scheme: w3a16-asym, data: wikitext2, samples: 128, length: 2048, seed: 2, effort: paper}

Unknown steps and fields are refused with the nearest known name, and every
value is checked against the type of the field that it sets.
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from lowbit.errors import LowbitError, unknown
from lowbit.methods import AFTER, METHODS
from lowbit.methods.tune import Tune

Named = tuple[str, Any]  # a method's name and its dataclass
MOVERS = ("smoothquant", "signs", "awq", "affinequant")  # steps that move maps from norms into linears
# How much of the epochs that a recipe asks for is spent.
EFFORTS = {"quick": 0.3, "normal": 0.5, "paper": 1.0}
PROTOCOL: dict[str, type] = {"scheme": str, "data": str, "samples": int, "length": int, "seed": int, "effort": str}
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word"}
_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")  # YAML 1.1 takes 1e-3 for text


@dataclass(frozen=True)
class Recipe:
    """What is done to every block.

    Attributes:
        name: what results call it.
        steps: ``(method name, method)`` in order.
        window: how many consecutive blocks a step gets as one.
        run: the protocol that it is meant for; see ``PROTOCOL``.
    """

    name: str
    steps: tuple[Named, ...]
    window: int = 1
    run: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.steps:
            raise LowbitError(f"recipe '{self.name}' has no steps: list at least one that rounds, such as rtn")
        rounding = [name for name, method in self.steps if method.rounds]
        if misplaced := [name for name, _ in self.block_steps if name in AFTER]:
            raise LowbitError(f"recipe '{self.name}': {misplaced[0]} comes last, behind the step that rounds, once")
        if len(rounding) != 1 or not self.block_steps[-1][1].rounds:
            known = ", ".join(name for name, method in METHODS.items() if method.rounds)
            raise LowbitError(f"recipe '{self.name}': exactly one step rounds, and it comes last; one of {known}")
        for at, (name, method) in enumerate(self.steps):
            after = next((later for later, _ in self.steps[at + 1 :] if later in MOVERS), None)
            if after and _stays_after_norms(method):
                raise LowbitError(
                    f"recipe '{self.name}': {after} cannot come after {name} as it is set here: what {name} leaves "
                    f"after norms is not where {after} moves its maps; put {after} first"
                )
        if self.window < 1:
            raise LowbitError(f"recipe '{self.name}': window {self.window} given; it must be 1 or more")

    @property
    def block_steps(self) -> tuple[Named, ...]:
        """The steps that work on a block or a window."""
        return self.steps[:-1] if len(self.steps) > 1 and self.steps[-1][0] in AFTER else self.steps

    @property
    def tune(self) -> Tune | None:
        """The step behind them, if there is one that does anything."""
        last = self.steps[-1][1]
        return last if isinstance(last, Tune) and last.epochs else None


def _stays_after_norms(method: Any) -> bool:
    """Whether a step leaves a gather or a matrix after norms, online."""
    return getattr(method, "sites", "down") != "down" or "matrix" in (
        getattr(method, "qkv", ""),
        getattr(method, "mlp", ""),
    )


def stays_online(recipe: Recipe, rounds_inputs: bool) -> str | None:
    """What a recipe leaves beside the model's graph, in words, known before any work; ``None`` for nothing.

    Args:
        recipe: the recipe.
        rounds_inputs: the scheme has a format for activations; without one there are no ranges to clip or shift.
    """
    for name, method in recipe.steps:
        if _stays_after_norms(method):
            return f"{name} leaves maps after norms online as it is set here"
        if rounds_inputs and (getattr(method, "act_clip", False) or getattr(method, "offsets", "") == "both"):
            return f"{name} leaves something before linears online as it is set here"
    return None


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package; those of published rows as ``paper/...`` behind the others."""
    root = files("lowbit") / "recipes"
    here, papers = (
        sorted(
            prefix + entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")
        )
        for folder, prefix in ((root, ""), (root / "paper", "paper/"))
    )
    return here + papers


def load_recipe(given: str) -> Recipe:
    """A recipe from its name or from a YAML file."""
    if given.endswith((".yaml", ".yml")):
        name = Path(given).stem
        try:
            text = Path(given).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise LowbitError(f"cannot read the recipe {given}: {error}") from error
    elif given in recipe_names():
        name, text = given, (files("lowbit") / "recipes" / f"{given}.yaml").read_text()
    else:
        rows = given.startswith("paper/")  # nearly a hundred: shown to those only who look for one
        raise unknown("recipe", given, [name for name in recipe_names() if ("/" in name) == rows])
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise LowbitError(f"recipe {given} is no YAML: {' '.join(str(error).split())}") from error
    return recipe_from_dict(content, name)


def with_effort(recipe: Recipe, effort: str) -> Recipe:
    """``recipe`` with the epochs of its learned steps scaled; one that learns at all keeps at least one epoch.

    ``quick`` is 0.3 of what the recipe says, ``normal`` 0.5, ``paper`` all of it.
    """
    if effort not in EFFORTS:
        raise unknown("effort", effort, EFFORTS)
    steps = tuple(
        (
            name,
            replace(method, epochs=math.ceil(method.epochs * EFFORTS[effort]))
            if hasattr(method, "epochs")
            else method,
        )
        for name, method in recipe.steps
    )
    return replace(recipe, steps=steps)


def recipe_from_dict(content: Any, name: str) -> Recipe:
    """The inverse of ``recipe_to_dict``."""
    if not isinstance(content, Mapping) or not isinstance(content.get("steps"), list):
        raise LowbitError(f"recipe '{name}': expected a key 'steps' with a list of steps")
    for key in content:
        if key not in ("steps", "window", "run"):
            raise unknown(f"key in recipe '{name}'", str(key), ["steps", "window", "run"])
    window = content.get("window", 1)
    if not isinstance(window, int) or isinstance(window, bool):
        raise LowbitError(f"recipe '{name}': window must be a whole number, got {window!r}")
    steps = tuple(_step(entry, name) for entry in content["steps"])
    return Recipe(name, steps, window, _protocol(content.get("run", {}), name))


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
    known = METHODS | AFTER
    if name not in known:
        raise unknown("step", str(name), known)
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise LowbitError(f"recipe '{recipe}': the options of {name} must be 'field: value' pairs; got {options!r}")
    return name, _build(name, known[name](), options)


def _build(step: str, method: Any, options: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(type(method))
    known = [field.name for field in fields(method)]
    values = {}
    for key, value in options.items():
        if key not in known:
            raise unknown(f"field of {step}", str(key), known)
        values[key] = _typed(f"{step}.{key}", value, hints[key], getattr(method, key))
    return replace(method, **values)


def _typed(where: str, value: Any, wanted: Any, usual: Any = None) -> Any:
    """``value`` as the field's type; whole numbers and ``1e-3`` are taken for a float, false for ``off``, no more.

    Infinity and NaN are refused: they slip through comparisons.
    """
    allowed = typing.get_args(wanted) or (wanted,)
    if float in allowed and (type(value) is int or (isinstance(value, str) and _EXPONENT.fullmatch(value))):
        value = float(value)
    if value is False and str in allowed:
        value = "off"  # what YAML makes of a bare off
    if type(value) in allowed and not (isinstance(value, float) and not math.isfinite(value)):
        return value
    names = " or ".join(_KINDS.get(kind, str(kind)) for kind in allowed)
    default = "" if usual is None else f" (default: {usual!r})"
    raise LowbitError(f"{where}: {value!r} given; {names} is allowed{default}")


def with_settings(recipe: Recipe, settings: Iterable[str]) -> Recipe:
    """``recipe`` with ``step.field=value`` settings; every step of that name is set."""
    for setting in settings:
        path, equals, text = setting.partition("=")
        step, dot, key = path.partition(".")
        if not (equals and dot and key):
            raise LowbitError(f"--set {setting}: give step.field=value, for example gptq.damping=0.05")
        names = [name for name, _ in recipe.steps]
        if step not in names:
            raise unknown(f"step in recipe '{recipe.name}'", step, names)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise LowbitError(f"--set {setting}: '{text}' is no value") from error
        steps = tuple((n, _build(n, m, {key: value}) if n == step else m) for n, m in recipe.steps)
        recipe = replace(recipe, steps=steps)
    return recipe


def recipe_to_dict(recipe: Recipe) -> dict[str, Any]:
    """Plain data with every option written out, for manifests and YAML files."""
    return {"steps": [{name: asdict(method)} for name, method in recipe.steps], "window": recipe.window}
