"""``lowbit.quantize``: a model, a scheme and a recipe in; a run folder out.

Three stages: the arguments become a ``Request``, all checks turn it into a ``Resolved``, and only then is anything
written. Invalid requests are refused before any work starts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoints.resolve import resolve
from lowbit.data.text import Data
from lowbit.data.windows import Bos
from lowbit.distributed.exchange import by_first, first_then_others, from_first, wait
from lowbit.distributed.job import joined
from lowbit.distributed.world import ONE, here, within
from lowbit.errors import LowbitError, canonical
from lowbit.models.block import LEAST_TOKENS
from lowbit.models.device import DTYPES
from lowbit.models.validate import (
    check_finite,
)
from lowbit.paths import user_path
from lowbit.pipeline.claim import check_claimable, claim_blocks, claimed_in_turn, join
from lowbit.pipeline.defaults import default_of, sentence, weights_of
from lowbit.pipeline.disk_space import check_space, size_on_disk
from lowbit.pipeline.end_to_end import tune
from lowbit.pipeline.finalize import finish, finished
from lowbit.pipeline.keep import Keep
from lowbit.pipeline.keep import keep as keep_codes
from lowbit.pipeline.opened import open_model
from lowbit.pipeline.peak_memory import peak_memory_bytes
from lowbit.pipeline.prefix import settle_prefix
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.request import Request, make_request
from lowbit.pipeline.resolved import Resolved, check
from lowbit.pipeline.runner import Walk
from lowbit.pipeline.shared_run import claimed_by_first, see
from lowbit.progress import say
from lowbit.quant.inductor import on as fused
from lowbit.quant.range_estimators import MSE
from lowbit.quant.runtimes import RUNTIMES
from lowbit.quant.scheme import Scheme
from lowbit.runs.activation_stats import write_activation_stats
from lowbit.runs.agreement import check_alone_or_shared, check_same_work
from lowbit.runs.folder import IDENTITY, RUN, begin, flatten, look, refuse_in_use
from lowbit.runs.manifest import MANIFEST, Manifest, manifest_of
from lowbit.torch_state import own_torch_state

DEFAULT_RECIPE = "gptq"


@dataclass(frozen=True)
class Quantized:
    """The result of ``quantize``.

    Attributes:
        out: the run folder.
        bits_per_weight: effective bits per quantized weight: codes, scales, zero points and runtime ops.
        seconds: wall time of this call; earlier calls of a resumed run are not included.
        peak_memory_bytes: peak resident memory of the process.
        warnings: fallbacks that the run took, and restrictions on loading the folder.
        manifest: the content of ``lowbit.json``.
    """

    out: Path
    bits_per_weight: float
    seconds: float
    peak_memory_bytes: int
    warnings: list[str]
    manifest: Manifest


@own_torch_state
@joined()
def quantize(
    model: str | Path,
    out: str | Path,
    *,
    scheme: str | Scheme | None = None,
    recipe: str | Recipe | None = None,
    data: Data | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int | None = None,
    bos: Bos | None = None,
    prefix: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    settings: Iterable[str] = (),
    overrides: Mapping[str, str] | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    effort: str | None = None,
    target: str | None = None,
    merge_only: bool = False,
    input_range: str | None = None,
    imatrix: str | Path | None = None,
    compiled: bool = False,
    keep: bool = False,
    expert_tokens: int = LEAST_TOKENS,
    all_experts: bool = False,
    claim: bool = False,
) -> Quantized:
    """Quantize a model into a folder in Hugging Face checkpoint format; an interrupted run is resumed.

    The processes that torchrun started share the work, and give the bytes that one process gives: see
    ``docs/scale.md``.

    Omitted arguments fall back to the recipe's ``run`` section, then to ``lowbit.pipeline.request.DEFAULTS``.

    Args:
        model: a folder, a hub id, a ``.gguf`` file or ``demo``.
        out: the run folder; new, empty, or left by an interrupted run of the same request.
        scheme: a name such as ``w4a16g64-sym``, ``mxfp4`` or ``q4_k``, a YAML file, or a ``Scheme``.
        recipe: a name such as ``gptq``, a YAML file, or a ``Recipe``; ``None``: ``gptq``, or for a target runtime
            without ``scheme`` and ``settings`` the one that ``lowbit.pipeline.defaults`` has for the model's size.
        data: calibration text: ``builtin``, a mixture of several kinds of text, or one of them, such as
            ``builtin:wiki``; ``wikitext2``, ``ptb``, ``c4``, ``self``, a file, several of these, or a list of texts.
        samples, length, seed: number of windows, tokens per window, and the seed that draws them.
        bos: what a window starts with: ``auto``, the special tokens that the tokenizer puts before a text; ``never``,
            none; ``stream``, the papers' protocol, where a corpus has them once. See ``docs/data.md``.
        prefix: tokens in front of every text whose keys and values stay float: ``none``, the default; ``auto``, those
            that make hidden states massive, if there are any; text, or token ids such as ``13,1``. Such a run needs
            ``lowbit.load``. See ``docs/prefix.md``.
        device, dtype: device and dtype of the blocks' forward passes; a CPU computes in float32 only.
        settings: ``step.field=value`` for the recipe's steps.
        overrides: ``{glob: format}`` over module names, such as ``{"*.down_proj": "q6_k"}`` or ``{"lm_head": "w8"}``.
        revision: revision of a hub model.
        allow_pickle, trust_remote_code: permit pickle checkpoints and model code from the hub.
        effort: ``quick``, ``normal`` or ``paper``: the training budget, a share of a recipe's epochs, and with
            ``quick`` and ``normal`` 28 windows for each. A ``Recipe`` object keeps its epochs unless this is set;
            epochs in ``settings`` are not scaled.
        target: the target runtime: ``llama.cpp``, ``vllm``, ``executorch`` or ``onnxruntime``. It determines the
            default scheme; schemes and recipes that it does not support are refused, and its own quantization of the
            linears' inputs is simulated in calibration and evaluation.
        merge_only: steps keep what folds into the weights and leave out what would stay at run time, so that stock
            runtimes run the result.
        input_range: how the ranges of static inputs (schemes with ``-static``, ``nvfp4``) are estimated: ``mse``, the
            default, ``min-max``, or a percentile such as ``99.99``.
        imatrix: llama.cpp's importance matrix (a ``.gguf`` file): weights of columns for the steps that search scales
            (``rtn.search``, ``gptq.search``), in place of those of the calibration text.
        compiled: fused fake quantization in training, on an NVIDIA GPU: see ``lowbit.quant.inductor``.
        keep: the model is quantized already and keeps its codes, scales and zero points: they become the run folder
            without any rounding and without calibration. Takes none of the arguments from ``scheme`` to ``compiled``
            but those on where the model is and what is permitted.
        expert_tokens: an expert of a mixture that fewer calibration tokens reach is quantized without calibration
            data; see ``docs/experts.md``.
        all_experts: take an expert's statistics from all calibration tokens, not from those that reach it.
        claim: other processes that are started with the same arguments, whenever and on any machine that sees the
            folder, quantize blocks of the same run; for recipes whose blocks do not depend on each other.

    Raises:
        LowbitError: on user errors; detected before work starts where possible.
    """
    began = time.monotonic()
    protocol = {"data": data, "samples": samples, "length": length, "seed": seed, "bos": bos}
    protocol |= {"prefix": prefix, "effort": effort}
    check_alone_or_shared(device)
    if keep:
        if here().size > 1:
            raise LowbitError("--keep given and several processes started; it computes nothing: start one")
        given: dict[str, Any] = {
            "claim": claim or None,
            "scheme": scheme,
            "override": overrides or None,
            "set": tuple(settings) or None,
            "target": target,
        }
        given |= {"input-range": input_range, "imatrix": imatrix, "compile": compiled or None}
        given |= {"merge-only": merge_only or None, "all-experts": all_experts or None}
        defaulted = {"recipe": recipe, "device": device, "dtype": dtype, "expert-tokens": expert_tokens}
        _refuse_beside_keep({**given, **protocol}, defaulted)
        refuse_in_use(out := user_path(out))
        manifest = keep_codes(Keep(str(model), revision, allow_pickle, trust_remote_code), out)
        return _quantized(manifest, out, began)
    default, settings = None, tuple(settings)
    if recipe is None and target is not None and scheme is None and not settings:
        target = canonical("runtime", target, RUNTIMES)
        runtime, opened = target, (str(model), revision, allow_pickle, trust_remote_code)
        default = first_then_others(lambda: default_of(runtime, _weights(*opened)))
    request = make_request(
        str(model),
        scheme=scheme,
        recipe=recipe or (DEFAULT_RECIPE if default is None else default.recipe),
        settings=settings,
        overrides=overrides or {},
        target=target,
        merge_only=merge_only,
        input_range=input_range,
        imatrix=imatrix,
        expert_tokens=expert_tokens,
        all_experts=all_experts,
        protocol=protocol,
        device=device,
        dtype=dtype,
        compiled=compiled,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    out = user_path(out)
    if claim and here().size > 1:
        raise LowbitError("--claim given and several processes started by torchrun: start each by itself")
    if not claim:
        by_first(lambda: refuse_in_use(out))
    first_then_others(lambda: _fetched(request))
    with within(ONE):
        resolved = check(request)
    if default is not None:
        say(sentence(str(target), resolved.scheme.name, default))
    return _quantized(_run(resolved, out, claim), out, began)


def _weights(model: str, revision: str | None, allow_pickle: bool, trusted: bool) -> int:
    return weights_of(open_model(model, revision, allow_pickle, trusted).skeleton)


def _quantized(manifest: Manifest, out: Path, began: float) -> Quantized:
    seconds = time.monotonic() - began
    return Quantized(out, manifest.bits_per_weight, seconds, peak_memory_bytes(), _warnings(manifest), manifest)


def _refuse_beside_keep(given: Mapping[str, Any], defaulted: Mapping[str, Any]) -> None:
    """Refuse what ``keep`` has no use for: formats come from the source, and nothing is computed.

    Args:
        given: options by name; ``None``: not given.
        defaulted: options with a default by name.
    """
    defaults = {"recipe": None, "device": "cpu", "dtype": "float32", "expert-tokens": LEAST_TOKENS}
    names = [name for name, value in given.items() if value is not None]
    names += [name for name, value in defaulted.items() if value != defaults[name]]
    if names:
        raise LowbitError(
            f"--keep and --{names[0]} given: formats come from the source and nothing is computed; leave out one of "
            "them"
        )


def _fetched(request: Request) -> str:
    """The digest of the model, which is downloaded, converted or read for it where that has not been done."""
    pickle, code = request.allow_pickle, request.trust_remote_code
    return resolve(request.model, revision=request.revision, allow_pickle=pickle, trust_remote_code=code).identity


def _run(resolved: Resolved, out: Path, claim: bool) -> Manifest:
    """Run or resume the quantization; return the manifest."""
    request, plan, ids = resolved.request, resolved.plan, resolved.tokens.ids
    identity, skeleton, checkpoint = resolved.identity(), resolved.opened.skeleton, resolved.opened.checkpoint
    check_same_work(flatten(asdict(identity)))
    if claim:
        check_claimable(request.recipe, plan, request.prefix)
    if from_first(lambda: look(out, identity)) == "finished":
        return finished(out)
    with ExitStack() as stay:
        if claim:
            check_space(out, size_on_disk(plan, request.recipe, skeleton) + resolved.opened.others.size_bytes)
            if join(out, identity, lambda: check_finite(checkpoint, resolved.shapes), stay) == "finished":
                return finished(out)
            torch.manual_seed(request.seed)
            with fused() if request.compiled else nullcontext():
                claim_blocks(_walk(resolved, out), ids)
        with claimed_in_turn(out, identity) if claim else claimed_by_first(out, identity) as state:
            if state == "finished":  # by another process, between the two looks
                return finished(out)
            if state == "new":
                by_first(lambda: check_finite(checkpoint, resolved.shapes))
            needed = size_on_disk(plan, request.recipe, skeleton) + resolved.opened.others.size_bytes
            by_first(lambda: check_space(out, needed))
            by_first(lambda: begin(out, identity))
            see(out / RUN / IDENTITY)
            torch.manual_seed(request.seed)
            run = _walk(resolved, out)
            prefix = None if resolved.prefix is None else settle_prefix(run, ids, resolved.prefix)
            with fused() if request.compiled else nullcontext():
                if request.recipe.tune is not None:
                    tune(request.recipe.tune, run, ids)
                run.walk(ids)
            by_first(lambda: write_activation_stats(out, run.observed))
            wait()  # for whoever still reads notes, which the next step deletes
            by_first(lambda: finish(out, resolved.opened, plan, identity, run.rows, request.to_dict(), prefix))
            see(out / MANIFEST)
    manifest = manifest_of(out)
    assert manifest is not None  # just written
    return manifest


def _walk(resolved: Resolved, out: Path) -> Walk:
    """The walk of a request, into the folder ``out``."""
    request, opened = resolved.request, resolved.opened
    return Walk(
        opened.checkpoint,
        opened.skeleton,
        request.recipe,
        resolved.plan,
        out,
        request.device,
        DTYPES[request.dtype],
        input_range=request.input_range or MSE,
        least_tokens=request.expert_tokens,
        every_token=request.all_experts,
        importance=resolved.importance,
        names=opened.names,
    )


def _warnings(manifest: Manifest) -> list[str]:
    out = [f"block {row.block}: {note}" for row in manifest.blocks for note in row.notes]
    if (reason := manifest.transformers.why_not) is not None:
        out.append(f"stock transformers does not run this folder ({reason}): use lowbit.load")
    if (inputs := manifest.transformers.inputs) is not None:
        out.append(f"stock transformers computes with {inputs}")
    return out
