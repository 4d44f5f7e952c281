"""A request is checked: it becomes all that a run needs, or an error before any work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lowbit.checkpoints.identity import companions_digest
from lowbit.checkpoints.pypi import sha256_of
from lowbit.checkpoints.resolve import Source, load_tokenizer
from lowbit.data.sampling import self_sample
from lowbit.data.text import calibration
from lowbit.data.tokenization import decode
from lowbit.data.windows import Tokens, WindowShape
from lowbit.errors import LowbitError
from lowbit.exporters.imatrix import read_imatrix
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import check_ids, shapes_of
from lowbit.pipeline.opened import Opened, computed, open_model
from lowbit.pipeline.prefix import Wanted, check_prefix, wanted
from lowbit.pipeline.recipe import recipe_to_dict
from lowbit.pipeline.request import Request
from lowbit.pipeline.target import settle
from lowbit.progress import say
from lowbit.quant.scheme import Scheme
from lowbit.quant.scheme_files import scheme_to_dict
from lowbit.runs.load import load
from lowbit.runs.manifest import Calibration, Identity
from lowbit.runs.plan import Plan, check_length, linear_shapes, make_plan
from lowbit.runs.versions import versions


@dataclass(frozen=True)
class Resolved:
    """A request that passed every check, with everything the run needs.

    Attributes:
        request: the checked arguments.
        opened: the model.
        scheme: the scheme, adapted to the target runtime.
        plan: formats and layout of every module.
        shapes: shapes of the checkpoint's tensors, by name.
        tokens: calibration tokens.
        special: the special tokens in front of each calibration window, as text.
        prefix: the prefix that is wanted; ``None``: none.
        importance: of the columns in searches of scales, by full name of a linear.
    """

    request: Request
    opened: Opened
    scheme: Scheme
    plan: Plan
    shapes: Mapping[str, torch.Size]
    tokens: Tokens
    special: str
    prefix: Wanted | None
    importance: Mapping[str, torch.Tensor]

    def identity(self) -> Identity:
        """What distinguishes this run from others: independent of the machine."""
        request, tokens = self.request, self.tokens
        return Identity(
            model=request.model_name,
            fingerprint=self.opened.source.identity,
            recipe=recipe_to_dict(request.recipe),
            recipe_name=request.recipe.name,
            scheme=scheme_to_dict(self.scheme),
            data=_recorded(tokens, self.special),
            seed=request.seed,
            device=request.device,
            dtype=request.dtype,
            versions=versions(),
            compiled=request.compiled,
            input_range=None if request.input_range is None else request.input_range.name,
            expert_tokens=request.expert_tokens,
            all_experts=request.all_experts,
            imatrix=None if request.imatrix is None else sha256_of(request.imatrix),
            source_files=companions_digest(self.opened.source.folder),
            prefix=request.prefix,
        )


def _recorded(tokens: Tokens, special: str) -> Calibration:
    """Calibration tokens as the manifest records them."""
    (samples, length), kinds = tokens.ids.shape, dict(Counter(tokens.kinds))
    return Calibration(tokens.corpus, samples, length, tokens.bos, special, tokens.hash, kinds, tokens.held_out)


def check(request: Request) -> Resolved:
    """Open the model and the calibration text, and check that model, scheme and text are compatible."""
    trusted = request.trust_remote_code
    opened = open_model(request.model, request.revision, request.allow_pickle, trusted)
    source, skeleton = opened.source, opened.skeleton
    own = next((k.experts_of_own_code for k in skeleton.architecture.layers if k.experts_of_own_code), None)
    if request.all_experts and own is not None:
        raise LowbitError(
            f"--all-experts given, and the experts of {own} are run by code of the model's own, with the tokens that "
            "reach them: leave it out; --expert-tokens sets when one goes without data"
        )
    scheme = _scheme(request, skeleton)
    request.recipe.check_order(scheme.act)
    plan = make_plan(skeleton, scheme)
    linears = [name for name in plan.formats.modules if name not in (plan.embed, plan.head)]
    weights = plan.formats.weights
    request.recipe.check_formats((name, weights[name], plan.shapes[name][1]) for name in linears)
    check_length(opened.config, request.length)
    shapes = shapes_of(skeleton)
    tokenizer = load_tokenizer(source.folder, trusted)
    tokens = _calibration(request, source, tokenizer)
    check_ids(tokens.ids, skeleton, source.folder)
    prefix = wanted(request.prefix, tokenizer, tokens.prefix)
    if prefix is not None:
        check_prefix(prefix, skeleton, request.length)
    if computed(opened).reads_text and plan.embed in plan.formats.modules:
        raise LowbitError(
            f"a format for {plan.embed} given: the layers of this model read more than their input of it; leave the "
            "embedding out of the overrides"
        )
    special = decode(tokenizer, tokens.prefix)
    importance: Mapping[str, torch.Tensor] = {}
    if request.imatrix is not None:
        widths = {name: columns for name, (_, columns) in linear_shapes(skeleton).items()}
        importance = read_imatrix(request.imatrix, opened.config, widths)
    return Resolved(request, opened, scheme, plan, shapes, tokens, special, prefix, importance)


def _scheme(request: Request, skeleton: Skeleton) -> Scheme:
    """The scheme of the request, adapted to its target runtime if there is one."""
    if request.target is not None:
        return settle(request.target, request.scheme, request.overrides, request.recipe, skeleton)
    assert request.scheme is not None  # omitted only with a target runtime
    return request.scheme


def _calibration(request: Request, source: Source, tokenizer: Any) -> Tokens:
    def sampler(n: int, shape: WindowShape, draw: int) -> torch.Tensor:
        say(f"sampling {n} x {shape.length} tokens from the model itself")
        whole = load(source.folder, device=request.device, trust_remote_code=request.trust_remote_code)
        # Without a BOS each window starts with a random token, so that samples spread over what the model has seen.
        return self_sample(whole, tokenizer, n, shape.length, draw, start=shape.prefix)

    return calibration(
        request.data,
        tokenizer,
        request.samples,
        request.length,
        request.seed,
        bos=request.bos,
        sampler=sampler,
    )
