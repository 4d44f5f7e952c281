"""Facts and estimates that ``lowbit inspect MODEL`` prints before a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lowbit.checkpoints.resolve import load_config, resolve, resolve_config
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.models.architecture import Architecture
from lowbit.models.build import empty_model
from lowbit.models.description import described
from lowbit.models.discovery.known import discovered
from lowbit.models.families import architecture_of
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import (
    check_model,
    open_weights,
    report_build_errors,
)
from lowbit.pipeline.machine import Machine
from lowbit.pipeline.planned import Planned
from lowbit.pipeline.recipe import SAMPLES
from lowbit.pipeline.request import DEFAULTS
from lowbit.quant.scheme import ModuleFormats
from lowbit.runs.carried import carried
from lowbit.runs.manifest import Manifest, manifest_of, require_trust
from lowbit.runs.online_cost import online_cost
from lowbit.runs.plan import check_sizes, linear_shapes
from lowbit.runs.reading import run_formats, run_scheme
from lowbit.sources.codes import codes_of
from lowbit.torch_state import own_torch_state

HERE = Machine(None)


@own_torch_state
def inspect_model(
    model: str,
    scheme: str,
    recipe: str,
    *,
    samples: int | None = None,
    length: int | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    effort: str = "normal",
    config_only: bool = False,
    machine: Machine = HERE,
) -> dict[str, Any]:
    """Facts and estimates as plain data; for a run folder, its manifest's facts instead of estimates.

    Without ``samples`` there are as many windows as ``quantize`` takes for the recipe; without a ``length`` they have
    its default, or all positions of a model that has fewer.

    Args:
        model: the model.
        scheme, recipe: what is to be estimated.
        samples, length: of the calibration text.
        revision, allow_pickle, trust_remote_code: as for ``quantize``.
        effort: the recipe's training budget.
        config_only: read the config alone, of a model whose weights need not be there.
        machine: where it is to run; by default on this machine's CPU, whose rates are measured.
    """
    check_sizes(SAMPLES if samples is None else samples, DEFAULTS["length"] if length is None else length)
    plan_of = Planned(scheme, recipe, effort, samples, length, machine)
    if config_only:
        return _from_config(model, revision, trust_remote_code, plan_of)
    source = resolve(model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    config = load_config(source.folder, trust_remote_code)
    manifest = manifest_of(source.folder)
    require_trust(source.folder, manifest, trust_remote_code)
    checkpoint, _ = open_weights(source.folder, config, manifest is not None, trust_remote_code)
    formats = _stored_formats(manifest, architecture_of(config))
    unlisted = check_model(checkpoint, config, formats, trust_remote_code)
    with report_build_errors(source.folder):
        skeleton = Skeleton(config, trust_remote_code)
    architecture = skeleton.architecture
    facts: dict[str, Any] = {
        "model": source.name,
        **_structure(skeleton),
        "checkpoint_bytes": sum(path.stat().st_size for path in checkpoint.files),
    }
    if architecture.origin == "discovered":
        facts |= _record(config)
    if manifest is None and (codes := codes_of(source, checkpoint, ())) is not None:
        facts["quantized"] = codes.summary
        if codes.dropped is not None:
            facts["read_as_float"] = codes.dropped
    listed = empty_model(config, trust_remote_code).state_dict()
    if notes := _notes(manifest, checkpoint, architecture, listed, unlisted):
        facts["carried_over"] = "; ".join(notes)
    if manifest is not None:
        steps = manifest.identity.steps
        quantized = {name: own for name, own in linear_shapes(skeleton).items() if name in formats}
        if (cost := online_cost(checkpoint, manifest, quantized)) is not None:
            facts |= {
                "runtime_ops": ", ".join(f"{count} {kind}" for kind, count in cost.counts.items()),
                "runtime_op_share_of_linears": round(cost.share, 4),
                "runtime_op_bits_per_weight": round(cost.bits / sum(a * b for a, b in quantized.values()), 4),
            }
        return facts | {
            "scheme": manifest.identity.scheme["scheme"],
            "recipe": " -> ".join(steps),
            "bits_per_weight": round(manifest.bits_per_weight, 4),
            "loads_in_transformers": manifest.transformers.loads,
            "relative_error_of_last_block": manifest.blocks[-1].relative_error,
            **({} if manifest.prefix is None else {"prefix": manifest.prefix.sentence()}),
        }
    return facts | plan_of.facts(skeleton)


def _structure(skeleton: Skeleton) -> dict[str, Any]:
    """What the config says of the model's layers."""
    architecture = skeleton.architecture
    return {
        "architecture": skeleton.config.architectures[0],
        "family": architecture.name,
        "origin": architecture.origin,
        "blocks": len(skeleton.layers),
        "hidden": skeleton.text_config.hidden_size,
        "tied_embeddings": skeleton.tied,
        "kinds": described(architecture),
        **({"experts_in_float": architecture.kept()} if architecture.kept() else {}),
    }


def _from_config(model: str, revision: str | None, trusted: bool, plan_of: Planned) -> dict[str, Any]:
    """Facts of a model whose weights are not read."""
    folder = resolve_config(model, revision=revision, trust_remote_code=trusted)
    config = load_config(folder, trusted)
    with report_build_errors(folder):
        skeleton = Skeleton(config, trusted)
    return {"model": model, **_structure(skeleton), **plan_of.facts(skeleton)}


def _record(config: Any) -> dict[str, Any]:
    """What discovery offered to its proofs and did not find, and what it could not try."""
    record = discovered(config).record
    refuted = [one for one in record.findings if one.offered and one.limit is None]
    return {"refuted": [f"{one.edge}: {one.reason}" for one in refuted], "notes": list(record.notes)}


def _notes(
    manifest: Manifest | None,
    checkpoint: Checkpoint,
    architecture: Architecture,
    listed: Iterable[str],
    unlisted: Iterable[str],
) -> Sequence[str]:
    """What a run carries over as it is; of a float model what it would."""
    return carried(checkpoint, architecture, listed, unlisted).notes if manifest is None else manifest.carried


def _stored_formats(manifest: Manifest | None, architecture: Architecture) -> Mapping[str, ModuleFormats]:
    """Formats of a run folder's quantized modules; a float model has none."""
    return {} if manifest is None else run_formats(manifest, run_scheme(manifest), architecture).modules
