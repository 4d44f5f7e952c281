"""``lowbit.quantize``: a model, a scheme and a recipe in; a run folder out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoints.resolve import Source, load_config, load_tokenizer, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.data.text import Tokens, calibration, self_sample
from lowbit.errors import unknown
from lowbit.models.device import check_device
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import (
    building,
    check_finite,
    check_ids,
    check_tensors,
    check_tied,
    refuse_foreign_quantization,
    shapes_of,
)
from lowbit.pipeline.end_to_end import tune
from lowbit.pipeline.finalize import finish
from lowbit.pipeline.recipe import Recipe, load_recipe, recipe_to_dict, with_effort, with_settings
from lowbit.pipeline.runner import Walk, check_space, peak_memory_bytes
from lowbit.pipeline.target import settle
from lowbit.progress import say
from lowbit.quant.inductor import check_compiler
from lowbit.quant.inductor import on as fused
from lowbit.quant.runtimes import RUNTIMES
from lowbit.quant.scheme import Scheme, load_scheme, scheme_to_dict, with_overrides
from lowbit.runs.activation_stats import write_observed
from lowbit.runs.folder import claim, look, manifest_of
from lowbit.runs.load import load
from lowbit.runs.plan import Plan, check_length, check_sizes, linear_shapes, make_plan
from lowbit.runs.versions import versions

DEFAULTS: dict[str, Any] = {
    "scheme": "w4a16g64-sym",
    "data": "builtin",
    "samples": 32,
    "length": 512,
    "seed": 0,
    "effort": "normal",
}


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
    target: str | None = None,
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
        target: the runtime that the result is for: ``llama.cpp``, ``vllm``, ``executorch`` or ``onnxruntime``. It
            gives the default scheme, what it cannot carry is refused now, and its own rounding of the linears' inputs
            is simulated in calibration and evaluation.
        compiled: round in fused kernels while learning, on an NVIDIA GPU: see ``lowbit.quant.inductor``.

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
    if target is not None and target not in RUNTIMES:
        raise unknown("runtime", target, RUNTIMES)
    if scheme is None and (target is None or "scheme" in chosen.run):
        scheme = protocol["scheme"]
    named = load_scheme(scheme) if isinstance(scheme, str) else scheme
    formats = None if named is None else with_overrides(named, overrides or {})
    source = resolve(model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    config = load_config(source.folder, trust_remote_code)
    refuse_foreign_quantization(config, None, source.folder)
    with building(source.folder):
        skeleton = Skeleton(config, trust_remote_code)
    checkpoint = Checkpoint(source.folder)
    formats = _settled(formats, target, overrides or {}, chosen, skeleton)
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
    given: Scheme | None, target: str | None, overrides: Mapping[str, str], recipe: Recipe, skeleton: Skeleton
) -> Scheme:
    """The scheme, made for a runtime where one is asked for, here or in the scheme itself."""
    runtime = target or (given.target if given else None)
    if runtime is not None:
        return settle(runtime, given, overrides, recipe, skeleton)
    assert given is not None  # it is left out for a runtime only
    return given


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
