"""A run's arguments with defaults filled in: the first stage of ``quantize``, and a key of the manifest.

A request is made and checked before the model is opened. Its plain data holds no path of this machine, and
``lowbit.reports.command`` prints it as the command that repeats the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, Unpack

from lowbit.checkpoints.resolve import DEMO
from lowbit.data.text import NAMES, SELF, Corpus, Data, corpora
from lowbit.data.windows import BOS, Bos
from lowbit.errors import LowbitError, canonical, check_least
from lowbit.methods.options import options_of
from lowbit.models.block import LEAST_TOKENS
from lowbit.models.device import check_device
from lowbit.paths import user_path
from lowbit.pipeline.merge_only import merge_only as folded
from lowbit.pipeline.recipe import (
    CORRECTIONS,
    EFFORTS,
    SAMPLES,
    Recipe,
    default_samples,
    load_recipe,
    recipe_names,
    recipe_to_dict,
    with_effort,
    with_settings,
)
from lowbit.quant.inductor import check_compiler
from lowbit.quant.range_estimators import MSE, RangeEstimator
from lowbit.quant.runtimes import RUNTIMES
from lowbit.quant.scheme import Scheme, for_runtime
from lowbit.quant.scheme_files import check_recorded, load_scheme, scheme_to_dict
from lowbit.quant.scheme_names import with_overrides
from lowbit.quant.static_activations import StaticActs
from lowbit.runs.plan import check_sizes

DEFAULTS: dict[str, Any] = {
    "scheme": "w4a16g64-sym",
    "data": "builtin",
    "samples": SAMPLES,
    "length": 512,
    "seed": 0,
    "bos": "auto",
    "effort": "normal",
    "prefix": "none",
}


class Machine(TypedDict):
    """Device, dtype and permissions of a run."""

    device: str
    dtype: str
    compiled: bool
    revision: str | None
    allow_pickle: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class Request:
    """One run's arguments, as ``lowbit.quantize`` documents them, with all checks done that need no model.

    Attributes:
        model: a folder, a hub id, a ``.gguf`` file or ``demo``.
        given: the recipe before ``effort`` and ``settings``; ``recipe`` has both applied.
        packaged: whether ``given`` is a packaged recipe, which its name identifies.
        scheme: overrides included; ``None``: the target runtime's default.
        input_range: how the ranges of static inputs are estimated; ``None`` for schemes without any.
        prefix: ``none``, ``auto``, token ids or text.
        merge_only: steps keep what folds; ``recipe`` has that applied, too.
        imatrix: llama.cpp's importance matrix, which weights columns in searches of scales; ``None``: none.
    """

    model: str
    given: Recipe
    packaged: bool
    recipe: Recipe
    effort: str
    settings: tuple[str, ...]
    scheme: Scheme | None
    overrides: Mapping[str, str]
    target: str | None
    merge_only: bool
    input_range: RangeEstimator | None
    imatrix: Path | None
    expert_tokens: int
    all_experts: bool
    data: Data
    samples: int
    length: int
    seed: int
    bos: Bos
    prefix: str
    device: str
    dtype: str
    compiled: bool
    revision: str | None
    allow_pickle: bool
    trust_remote_code: bool

    @property
    def model_name(self) -> str:
        """A machine-independent name of the model; see ``model_name``."""
        return model_name(self.model)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest, independent of the machine and its paths."""
        recipe = {"name": self.given.name, **recipe_to_dict(self.given)}
        if self.scheme is None:
            overrides = [{glob: text} for glob, text in self.overrides.items()]
        else:
            overrides = scheme_to_dict(self.scheme)["overrides"]
        return {
            "model": self.model_name,
            "revision": self.revision,
            "recipe": self.given.name if self.packaged else recipe,
            "effort": self.effort,
            "settings": list(self.settings),
            "scheme": None if self.scheme is None else self.scheme.name,
            "overrides": overrides,
            "target": self.target,
            "merge_only": self.merge_only,
            "input_range": None if self.input_range is None else self.input_range.name,
            "imatrix": None if self.imatrix is None else self.imatrix.name,
            "expert_tokens": self.expert_tokens,
            "all_experts": self.all_experts,
            "data": [_name(corpus) for corpus in corpora(self.data)],
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
            "bos": self.bos,
            "prefix": self.prefix,
            "device": self.device,
            "dtype": self.dtype,
            "compiled": self.compiled,
            "allow_pickle": self.allow_pickle,
            "trust_remote_code": self.trust_remote_code,
        }


def model_name(model: str) -> str:
    """A machine-independent name of a model: the last part of a path, or the id."""
    path = user_path(model)
    return path.resolve().name if model != DEMO and path.exists() else model


def _name(corpus: Corpus) -> str:
    """A corpus's name without the folders of this machine."""
    name = str(corpus)
    return name if not isinstance(corpus, str) or name in (*NAMES, SELF) else Path(name).name


def make_request(
    model: str,
    *,
    scheme: str | Scheme | None,
    recipe: str | Recipe,
    settings: Iterable[str],
    overrides: Mapping[str, str],
    target: str | None,
    merge_only: bool = False,
    input_range: str | None = None,
    imatrix: str | Path | None = None,
    protocol: Mapping[str, Any],
    expert_tokens: int = LEAST_TOKENS,
    all_experts: bool = False,
    **machine: Unpack[Machine],
) -> Request:
    """Fill in defaults and refuse arguments that are invalid for every model.

    Args:
        model, scheme, recipe, settings, overrides, target, merge_only, input_range, imatrix, expert_tokens,
            all_experts: as for ``lowbit.quantize``.
        protocol: ``data``, ``samples``, ``length``, ``seed``, ``bos``, ``prefix`` and ``effort``; ``None``: the
            recipe's value, else the default.
        machine: see ``Machine``.
    """
    check_device(machine["device"], machine["dtype"])
    if machine["compiled"]:
        check_compiler(machine["device"])
    base = load_recipe(recipe) if isinstance(recipe, str) else recipe
    chosen = {**DEFAULTS, **base.run, **{key: value for key, value in protocol.items() if value is not None}}
    check_least("--expert-tokens", expert_tokens, 0, "give the calibration tokens below which an expert goes without")
    chosen["bos"] = canonical("--bos", str(chosen["bos"]), BOS)
    # A ``Recipe`` object keeps its epochs unless ``effort`` is set.
    effort = chosen["effort"] if isinstance(recipe, str) or protocol["effort"] is not None else "paper"
    effort = canonical("effort", effort, EFFORTS)
    steps = with_settings(with_effort(base, effort), settings := tuple(settings))
    if merge_only:
        steps = folded(steps)
    if protocol["samples"] is None and "samples" not in base.run:
        chosen["samples"] = default_samples(steps)
    check_sizes(chosen["samples"], chosen["length"], chosen["seed"])
    target = None if target is None else canonical("runtime", target, RUNTIMES)
    if scheme is None and (target is None or "scheme" in base.run):
        scheme = chosen["scheme"]
    named = load_scheme(scheme) if isinstance(scheme, str) else scheme
    # A scheme file's target determines how scales are stored, those of overrides too.
    formats = None if named is None else for_runtime(with_overrides(named, overrides), named.target)
    if formats is not None:
        check_recorded(formats)
    runtime = target or (formats.target if formats else None)
    if chosen["prefix"] != "none" and runtime is not None:
        raise LowbitError(
            f"--prefix '{chosen['prefix'][:80]}' and --target {runtime} given: no runtime starts from keys and "
            "values that come with a model; leave one of them out"
        )
    return Request(
        model=model,
        given=base,
        packaged=base.name in recipe_names() and base == load_recipe(base.name),
        recipe=steps,
        effort=effort,
        settings=settings,
        scheme=formats,
        overrides=overrides,
        target=runtime,
        merge_only=merge_only,
        input_range=_estimator(input_range, formats),
        imatrix=None if imatrix is None else _searched(user_path(imatrix), steps),
        expert_tokens=expert_tokens,
        all_experts=all_experts,
        **{key: chosen[key] for key in ("data", "samples", "length", "seed", "bos", "prefix")},
        **machine,
    )


def _searched(imatrix: Path, recipe: Recipe) -> Path:
    """The importance matrix for a recipe; refused if no step searches scales."""
    own = next((name for name, step in recipe.block_steps[:-1] if type(step) not in CORRECTIONS), None)
    if own is not None:
        raise LowbitError(
            f"--imatrix {imatrix} given: {own} changes the channels that an importance matrix describes; choose a "
            "recipe of gptq or rtn alone, or leave it out"
        )
    # ``refit`` has an option of that name too: it searches a share of a correction.
    names = [name for name, step in recipe.block_steps if step.rounds and "search" in options_of(step)]
    if not any(options_of(step).get("search") is True for name, step in recipe.steps if name in names):
        advice = f"give --set {names[0]}.search=true" if names else "choose a recipe with gptq or rtn"
        raise LowbitError(f"--imatrix {imatrix} given: no step of {recipe.name} searches scales; {advice}")
    return imatrix


def _estimator(given: str | None, scheme: Scheme | None) -> RangeEstimator | None:
    """The estimator of static ranges; one that is given for a scheme without any is refused."""
    if scheme is not None and isinstance(scheme.act, StaticActs):
        return MSE if given is None else RangeEstimator.parse(given)
    if given is not None:
        which = "the target's scheme" if scheme is None else f"scheme {scheme.name}"
        raise LowbitError(
            f"--input-range {given} given: {which} has no static inputs; give one that has, such as w8a8-static or "
            "nvfp4, or leave the option out"
        )
    return None
