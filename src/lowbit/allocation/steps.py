"""The steps of a fit behind the choice of formats: ordinary commands, each printed before it runs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from lowbit.allocation.losses import least_formats
from lowbit.allocation.scheme import scheme_of
from lowbit.allocation.solution import Solution
from lowbit.allocation.target import TARGETS
from lowbit.checkpoints.positions import positions_of
from lowbit.checkpoints.tokenizer import load_tokenizer
from lowbit.checkpoints.writing import write_bytes
from lowbit.data.text import Data, calibration, corpora, evaluation
from lowbit.errors import LowbitError
from lowbit.evaluation.compare import compare
from lowbit.exporters import exporter_of
from lowbit.exporters.api import export, verify
from lowbit.exporters.footprint import Footprint
from lowbit.exporters.target import Options
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.opened import Opened
from lowbit.pipeline.quantize import quantize
from lowbit.pipeline.recipe import runtime_ops
from lowbit.pipeline.request import Request, make_request
from lowbit.pipeline.target import settle
from lowbit.progress import say
from lowbit.quant.scheme_files import scheme_from_dict
from lowbit.runs.plan import check_length, linear_shapes

RUN, SCHEME, MODEL = "run", "scheme.yaml", "model"
WEIGHTS = ("*.safetensors", "*.onnx", "*.onnx.data", "*.pte")  # what a folder's size counts
WINDOW = 512  # tokens of a window of the comparison


@dataclass(frozen=True)
class Recipe:
    """How a run is made; attributes as for ``lowbit.quantize``, ``None``: its default."""

    name: str
    effort: str | None
    given: tuple[str, ...]
    data: Data | None
    samples: int | None
    length: int | None
    seed: int

    @property
    def settings(self) -> tuple[str, ...]:
        """Options of steps; GPTQ searches scales, as formats with tables and sub-scales need, and takes the head."""
        return self.given or (("gptq.search=true", "gptq.head=true") if self.name == "gptq" else ())

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        data = None if self.data is None else [str(corpus) for corpus in corpora(self.data)]
        return {**asdict(self), "given": list(self.given), "data": data}


@dataclass(frozen=True)
class Measured:
    """What the result is measured on: text, ``None``: the default of ``compare``, and tokens of each."""

    text: Data | None
    tokens: int


@dataclass(frozen=True)
class Made:
    """What the steps made; see ``api.Fitted``."""

    file: Path
    size_bytes: int
    verified: bool
    perplexity: dict[str, float]
    kl: dict[str, float]
    float_perplexity: dict[str, float]
    commands: list[list[str]]


def make(
    model: str,
    out: Path,
    target: str,
    solution: Solution,
    recipe: Recipe,
    skeleton: Skeleton,
    options: Options,
    on: Measured,
    permits: Mapping[str, Any],
) -> Made:
    """Quantize, export, verify, compare; what is there from an earlier call is used again.

    Raises:
        LowbitError: a step refuses its input, the export differs from the run, or it is larger than computed.
    """
    run, scheme = out / RUN, out / SCHEME
    text = yaml.safe_dump(scheme_of(solution.formats, _outside(skeleton)), sort_keys=False)
    if not scheme.is_file() or scheme.read_text(encoding="utf-8") != text:
        write_bytes(scheme, text.encode())
    commands = [_quantize(model, run, scheme, target, recipe, permits)]
    trusted, file = bool(permits["trust_remote_code"]), _file(out, target)
    files = [] if file == run else [file]
    if files:
        commands.append(_export(run, file, target, options, trusted))
    commands.append(_said(["lowbit", "verify", str(run), *map(str, files)]))
    (checked,) = verify(run, files, trust_remote_code=trusted)
    size = weight_bytes(file)
    if size > solution.size:
        raise LowbitError(f"{file} has {size:,} bytes where {solution.size:,} were computed: this is a fault of fit")
    length = window(skeleton, on.tokens)
    words = ["lowbit", "compare", model, str(run), "--length", str(length), "--tokens", str(on.tokens)]
    words += [word for corpus in _corpora(on.text) for word in ("--data", corpus)]
    commands.append(_said(words))
    told = compare(model, [run], data=on.text, length=length, tokens=on.tokens, **permits)
    rows = {name: one["runs"][0] for name, one in told.texts.items()}
    return Made(
        file,
        size,
        checked.ok,
        {name: row["perplexity"] for name, row in rows.items()},
        {name: row["kl_mean"] for name, row in rows.items()},
        {name: one["perplexity"] for name, one in told.texts.items()},
        commands,
    )


def check(
    model: str,
    opened: Opened,
    recipe: Recipe,
    on: Measured,
    permits: Mapping[str, Any],
    target: str,
    footprint: Footprint,
) -> None:
    """Refuse at once what the steps would refuse behind hours of work: the recipe, its options, and texts.

    The formats are not chosen yet; the smallest ones stand for them.

    Raises:
        LowbitError: a step refuses its input, or the target what the recipe leaves at run time.
    """
    smallest = scheme_of(least_formats(footprint.choices), _outside(opened.skeleton))
    protocol = {"data": recipe.data, "samples": recipe.samples, "length": recipe.length, "seed": recipe.seed}
    request = make_request(
        model,
        scheme=scheme_from_dict(smallest),
        recipe=recipe.name,
        settings=recipe.settings,
        overrides={},
        target=(runtime := TARGETS[target].runtime),
        protocol={**protocol, "effort": recipe.effort, "bos": None, "prefix": None},
        device="cpu",
        dtype="float32",
        compiled=False,
        **permits,
    )
    _check_recipe(runtime, request, opened.skeleton)
    shapes = linear_shapes(opened.skeleton)
    request.recipe.check_formats(
        (name, option.format, shapes[name][1])
        for choice in footprint.choices
        for name in choice.modules
        for option in choice.options
        if name in shapes and option.format is not None
    )
    check_length(opened.config, request.length)
    tokenizer = load_tokenizer(opened.source.folder, bool(permits["trust_remote_code"]))
    calibration(request.data, tokenizer, request.samples, request.length, request.seed)
    length = window(opened.skeleton, on.tokens)
    for corpus in () if on.text is None else corpora(on.text):
        evaluation(corpus, tokenizer, length, on.tokens)


def _check_recipe(runtime: str | None, request: Request, skeleton: Skeleton) -> None:
    """Refuse a recipe that cannot have such formats, or that leaves what the target does not run."""
    assert request.scheme is not None
    request.recipe.check_order(request.scheme.act)
    if runtime is not None:
        settle(runtime, request.scheme, {}, request.recipe, skeleton)
    elif ops := runtime_ops(request.recipe, request.scheme.act):
        op, step = next(iter(ops.items()))
        raise LowbitError(
            f"transformers does not run recipe {request.recipe.name}: {step} leaves {op.why} at run time; choose "
            "another, such as gptq"
        )


def _said(words: list[str]) -> list[str]:
    say(shlex.join(words))
    return words


def _outside(skeleton: Skeleton) -> tuple[str, ...]:
    return skeleton.architecture.embed, skeleton.architecture.head


def window(skeleton: Skeleton, tokens: int) -> int:
    """Tokens of a window: no more than the model has positions, or the comparison tokens."""
    return min(WINDOW, tokens, positions_of(skeleton.text_config) or WINDOW)


def _file(out: Path, target: str) -> Path:
    """The export, or the run folder where the target reads that."""
    export = TARGETS[target].export
    return out / RUN if export is None else out / f"{MODEL}{exporter_of(export).suffix}"


def weight_bytes(path: Path) -> int:
    """Bytes of a file, or of those files of a folder that hold the model: not of config and tokenizer."""
    files = [path] if path.is_file() else [file for glob in WEIGHTS for file in path.glob(glob)]
    return sum(file.stat().st_size for file in files if not file.name.startswith("lowbit-"))


def _quantize(
    model: str, run: Path, scheme: Path, target: str, recipe: Recipe, permits: Mapping[str, Any]
) -> list[str]:
    words = ["lowbit", "quantize", model, "--out", str(run), "--scheme", str(scheme)]
    runtime = TARGETS[target].runtime
    words += [] if runtime is None else ["--target", runtime]
    words += ["--recipe", recipe.name, *(f"--set={setting}" for setting in recipe.settings)]
    words += [word for corpus in _corpora(recipe.data) for word in ("--data", corpus)]
    numbers = {"effort": recipe.effort, "samples": recipe.samples, "length": recipe.length, "seed": recipe.seed}
    for name, value in numbers.items():
        words += [] if value is None else [f"--{name}", str(value)]
    words += [word for name, value in permits.items() for word in _permit(name, value)]
    _said(words)
    quantize(
        model,
        run,
        scheme=str(scheme),
        target=runtime,
        recipe=recipe.name,
        settings=recipe.settings,
        data=recipe.data,
        samples=recipe.samples,
        length=recipe.length,
        seed=recipe.seed,
        effort=recipe.effort,
        **permits,
    )
    return words


def _corpora(data: Data | None) -> list[str]:
    return [] if data is None else [str(corpus) for corpus in corpora(data)]


def _permit(name: str, value: Any) -> list[str]:
    option = f"--{name.replace('_', '-')}"
    if value is True:
        return [option]
    return [option, str(value)] if value else []


def _export(run: Path, file: Path, target: str, options: Options, trusted: bool) -> list[str]:
    words = ["lowbit", "export", str(run), "--to", target, "--out", str(file)]
    words += ["--pre", options.pre] if options.pre else []
    words += [] if options.context is None else ["--context", str(options.context)]
    _said(words)
    if not file.exists():  # an export is whole or not there
        made = export(run, target, out=file, pre=options.pre, context=options.context, trust_remote_code=trusted)
        for warning in made.warnings:
            say(f"warning: {warning}")
    return words
