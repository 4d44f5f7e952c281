"""The public functions: ``quantize``, ``evaluate``. The command line calls these and nothing below them."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoint import Checkpoint
from lowbit.checks import building, check_finite, check_tensors, check_tied, refuse_foreign_quantization, shapes_of
from lowbit.compiled import check_compiler
from lowbit.compiled import on as fused
from lowbit.data import Tokens, calibration, evaluation, self_sample
from lowbit.errors import LowbitError, unknown
from lowbit.evaluate.perplexity import perplexity
from lowbit.finish import finish, versions
from lowbit.loading import load
from lowbit.making_for import settle
from lowbit.observed import write_observed
from lowbit.plan import Plan, check_length, check_sizes, linear_shapes, make_plan
from lowbit.progress import say
from lowbit.recipe import Recipe, load_recipe, recipe_to_dict, with_effort, with_settings
from lowbit.runfolder import claim, look, manifest_of
from lowbit.runner import Walk, check_space, peak_memory_bytes
from lowbit.runtimes import RUNTIMES
from lowbit.scheme import Scheme, load_scheme, scheme_to_dict, with_overrides
from lowbit.skeleton import Skeleton
from lowbit.source import Source, load_config, load_tokenizer, resolve
from lowbit.stream import StreamedModel
from lowbit.tuning import tune

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULTS: dict[str, Any] = {
    "scheme": "w4a16g64-sym",
    "data": "builtin",
    "samples": 32,
    "length": 512,
    "seed": 0,
    "effort": "normal",
}
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


@dataclass(frozen=True)
class Quantized:
    """What ``quantize`` made.

    Attributes:
        out: the run folder.
        bits_per_weight: effective bits of the rounded weights: codes, scales, zeros, online maps, over weights.
        seconds: wall time of this call (a run that was resumed spent more before).
        peak_memory_bytes: the most memory that the process has held.
        warnings: what the run had to do differently, and what the folder needs to load.
        manifest: the content of ``lowbit.json``.
    """

    out: Path
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    warnings: list[str]
    manifest: dict[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """What ``evaluate`` measured.

    Attributes:
        perplexity: by data name.
        tokens: how many tokens of each were scored, by data name.
        length: tokens in a window.
        seconds: wall time.
        data_hash: hash of the evaluated tokens, by data name.
        runs_on: the runtime whose rounding of inputs was simulated, if any.
        special: the special tokens that the tokenizer puts before a text (once, not before each window).
        scheme, bits_per_weight: a run's; ``None`` for a float model.
        fingerprint: digest of the model's weights, as a run of it has in its identity.
    """

    perplexity: dict[str, float]
    tokens: dict[str, int]
    length: int
    seconds: float
    data_hash: dict[str, str]
    runs_on: str | None = None
    special: str = ""
    scheme: str | None = None
    bits_per_weight: float | None = None
    fingerprint: str = ""


def quantize(
    model: str,
    out: str | Path,
    scheme: str | Scheme | None = None,
    recipe: str | Recipe = "gptq",
    data: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    settings: Iterable[str] = (),
    overrides: Mapping[str, str] | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    effort: str | None = None,
    runs_on: str | None = None,
    compiled: bool = False,
) -> Quantized:
    """Quantize a model into a folder that is a Hugging Face checkpoint; a run that was stopped goes on.

    What is left out is what the recipe's ``run`` says, or else ``DEFAULTS``.

    Args:
        model: a folder, a hub id, a ``.gguf`` file or ``demo``.
        out: the run folder; new, empty, or of this same run.
        scheme: a name such as ``w4a16g64-sym``, a YAML file, or a ``Scheme``.
        recipe: a name such as ``gptq``, a YAML file, or a ``Recipe``.
        data: calibration text: ``builtin``, ``wikitext2``, ``ptb``, ``c4``, ``self`` or a file.
        samples, length, seed: how many windows of how many tokens, and how they are drawn.
        device, dtype: where and in what the blocks run; a CPU computes in float32 only.
        settings: ``step.field=value`` for the recipe's steps.
        overrides: ``{glob: format}`` over module names, such as ``{"*.down_proj": "w8"}`` or ``{"lm_head": "w8"}``.
        revision: of a hub model.
        allow_pickle, trust_remote_code: both off unless asked for.
        effort: ``quick``, ``normal`` or ``paper``: how much of a recipe's epochs learned steps spend. A ``Recipe``
            that is given as one keeps its epochs unless this is given; ``settings`` are exact.
        runs_on: the runtime that the result is for: ``llama.cpp``, ``vllm``, ``executorch`` or ``onnxruntime``. It
            gives the default scheme, what it cannot carry is refused now, and its own rounding of the linears' inputs
            is simulated in calibration and evaluation.
        compiled: round in fused kernels while learning, on an NVIDIA GPU: see ``lowbit.compiled``.

    Raises:
        LowbitError: for anything that a person can mend, before any work where it can be known then.
    """
    began = time.monotonic()
    torch_dtype = check_device(device, dtype)
    if compiled:
        check_compiler(device)
    chosen = load_recipe(recipe) if isinstance(recipe, str) else recipe
    given = {"data": data, "samples": samples, "length": length, "seed": seed, "effort": effort}
    protocol = {**DEFAULTS, **chosen.run, **{key: value for key, value in given.items() if value is not None}}
    data, samples, length, seed = (protocol[key] for key in ("data", "samples", "length", "seed"))
    check_sizes(samples, length, seed)
    if isinstance(recipe, str) or effort is not None:
        chosen = with_effort(chosen, protocol["effort"])
    chosen = with_settings(chosen, settings)
    if runs_on is not None and runs_on not in RUNTIMES:
        raise unknown("runtime", runs_on, RUNTIMES)
    if scheme is None and (runs_on is None or "scheme" in chosen.run):
        scheme = protocol["scheme"]
    named = load_scheme(scheme) if isinstance(scheme, str) else scheme
    formats = None if named is None else with_overrides(named, overrides or {})
    source = resolve(model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    config = load_config(source.folder, trust_remote_code)
    refuse_foreign_quantization(config, None, source.folder)
    with building(source.folder):
        skeleton = Skeleton(config, trust_remote_code)
    checkpoint = Checkpoint(source.folder)
    formats = _settled(formats, runs_on, overrides or {}, chosen, skeleton)
    plan = make_plan(skeleton, formats)
    check_length(config, length)
    shapes = shapes_of(skeleton)
    check_tensors(checkpoint, shapes, skeleton.family.blocks, {})
    check_tied(checkpoint, skeleton)
    tokens = _calibration(source, data, samples, length, seed, device, trust_remote_code)
    check_ids(tokens.ids, skeleton, source.folder)
    identity = {
        # A local path says nothing to anyone else, and the same run elsewhere should give the same bytes.
        "model": Path(source.name).resolve().name if Path(source.name).exists() else source.name,
        "fingerprint": source.identity,
        "recipe": recipe_to_dict(chosen),
        "recipe_name": chosen.name,
        "scheme": scheme_to_dict(formats),
        "data": {"corpus": tokens.corpus, "samples": samples, "length": length, "hash": tokens.hash},
        "seed": seed,
        "device": device,
        "dtype": dtype,
        "versions": versions(),
        **({"compiled": True} if compiled else {}),
    }
    out = Path(out)
    if (state := look(out, identity)) != "finished":
        if state == "new":
            check_finite(checkpoint, shapes)
        check_space(out, _size_on_disk(plan, chosen, skeleton))
        claim(out, identity)
        torch.manual_seed(seed)
        run = Walk(checkpoint, skeleton, chosen, formats, plan, out, device, torch_dtype)
        with fused() if compiled else nullcontext():
            if chosen.tune is not None:
                tune(chosen.tune, run, tokens.ids)
            run.walk(tokens.ids)
        write_observed(out, run.observed)
        manifest = finish(out, source.folder, plan, formats, identity, run.rows)
    else:
        say(f"{out} holds this run already, finished")
        manifest = manifest_of(out) or {}
    seconds = time.monotonic() - began
    return Quantized(out, manifest["bits_per_weight"], seconds, peak_memory_bytes(), _warnings(manifest), manifest)


def _settled(
    given: Scheme | None, runs_on: str | None, overrides: Mapping[str, str], recipe: Recipe, skeleton: Skeleton
) -> Scheme:
    """The scheme, made for a runtime where one is asked for, here or in the scheme itself."""
    runtime = runs_on or (given.runs_on if given else None)
    if runtime is not None:
        return settle(runtime, given, overrides, recipe, skeleton)
    assert given is not None  # it is left out for a runtime only
    return given


def evaluate(
    model: str,
    data: str | Sequence[str] = "builtin",
    length: int = 2048,
    tokens: int | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    runs_on: str | None = None,
) -> Evaluated:
    """Perplexity of a float model or of a run folder, read block by block; several texts share one pass.

    Args:
        model: as for ``quantize``, or a run folder.
        data: one or several of ``builtin``, ``wikitext2``, ``ptb``, ``c4`` or a file.
        length: tokens in a window. Perplexities of different lengths do not compare.
        tokens: how many tokens of each text at most; all by default.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.
        runs_on: a runtime whose rounding of inputs is simulated, or ``float``; by default the one of the run.
    """
    began = time.monotonic()
    torch_dtype = check_device(device, dtype)
    source = resolve(model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(source.folder, trust_remote_code)
    names = [data] if isinstance(data, str) else list(dict.fromkeys(data))
    windows = {name: evaluation(name, tokenizer, length, tokens) for name in names}
    streamed = StreamedModel(source.folder, device, torch_dtype, trust_remote_code, runs_on)
    for found in windows.values():
        check_ids(found.ids, streamed.skeleton, source.folder)
    batches = streamed.logits_of([found.ids for found in windows.values()])
    results = {
        names[which]: perplexity((ids, logits) for _, ids, logits in some)
        for which, some in groupby(batches, key=lambda found: found[0])
    }
    return Evaluated(
        results,
        {name: found.ids.numel() for name, found in windows.items()},
        length,
        time.monotonic() - began,
        {name: found.hash for name, found in windows.items()},
        streamed.scheme.runs_on if streamed.scheme else None,
        special_before(tokenizer),
        streamed.scheme.name if streamed.scheme else None,
        bits_of(source.folder),
        source.identity,
    )


def special_before(tokenizer: Any) -> str:
    """The special tokens, if any, that a tokenizer puts before a text."""
    with_, without = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    at = next((i for i in range(len(with_)) if with_[i : i + len(without)] == without), 0)
    return str(tokenizer.decode(with_[:at]))


def bits_of(folder: Path) -> float | None:
    """A run folder's effective bits per weight; ``None`` for a float model."""
    manifest = manifest_of(folder)
    return float(manifest["bits_per_weight"]) if manifest else None


def check_device(device: str, dtype: str) -> torch.dtype:
    """The dtype to compute in; a device that is not there or a slow combination is refused."""
    if dtype not in DTYPES:
        raise LowbitError(f"--dtype {dtype} given; allowed: {', '.join(DTYPES)}")
    if not _DEVICE.fullmatch(device):
        raise LowbitError(f"--device '{device}' given; allowed: cpu, cuda, cuda:N (such as cuda:0), mps")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise LowbitError(f"--device {device} cannot be used here ({reason}); use --device cpu") from error
    if device == "cpu" and dtype != "float32":
        raise LowbitError(f"--dtype {dtype} on a CPU: 16-bit arithmetic may be a hundred times slower; use float32")
    return DTYPES[dtype]


def check_ids(ids: torch.Tensor, skeleton: Skeleton, folder: Path) -> None:
    """Refuse tokens that the model has no embedding for."""
    rows = skeleton.model.get_input_embeddings().weight.shape[0]
    if ids.max() >= rows:
        raise LowbitError(
            f"the tokenizer in {folder} gives token {int(ids.max())}, the model has {rows} embeddings: they do not "
            "belong together"
        )


def _calibration(
    source: Source, data: str, samples: int, length: int, seed: int, device: str, trust_remote_code: bool
) -> Tokens:
    tokenizer = load_tokenizer(source.folder, trust_remote_code)

    def sampler(n: int, window: int, draw: int) -> torch.Tensor:
        say(f"sampling {n} x {window} tokens from the model itself")
        whole = load(source.folder, device, trust_remote_code=trust_remote_code)
        return self_sample(whole, tokenizer, n, window, draw)

    return calibration(data, tokenizer, samples, length, seed, sampler=sampler)


def _size_on_disk(plan: Plan, recipe: Recipe, skeleton: Skeleton) -> int:
    """An upper bound: codes as stored plus the float part at 32 bits, and what a run keeps until it ends."""
    stored = plan.stored_bits if plan.layout == "pack-quantized" else plan.stored_bits + 8 * plan.quantized_weights
    result = int(stored / 8) + 4 * plan.float_weights
    if recipe.tune is None:
        return result
    state = 4 * 5 * recipe.tune.learned(linear_shapes(skeleton).values())  # as ``learn.fit`` keeps it
    return 2 * (result + plan.quantized_weights) + state


def _warnings(manifest: Mapping[str, Any]) -> list[str]:
    out = [f"block {row['block']}: {note}" for row in manifest["blocks"] for note in row["notes"]]
    if reason := manifest["transformers"]["why_not"]:
        out.append(f"stock transformers does not run this folder ({reason}): use lowbit.load")
    if inputs := manifest["transformers"].get("inputs"):
        out.append(f"stock transformers computes with {inputs}")
    return out
