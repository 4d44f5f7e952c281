"""``lowbit.diagnose``: sensitivity of a run's blocks and linears, the gain of more bits, and a scheme for a budget.

The sensitivities that a run records (see ``analysis.linear_error``) suffice for a ranking without computation. With
the float model, sensitivity is measured as KL divergence of next-token distributions: for each block as it ships with
all others in float, and for each linear alone where the recipe does not change float weights before quantizing them.
Elsewhere a linear gets the share of its block's divergence that its error predicts: for small errors, divergence is
proportional to the error at the block's output.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lowbit.analysis.bit_allocation import Linear
from lowbit.analysis.mixed_precision import WIDTHS, Proposal, check_budget, propose
from lowbit.checkpoints.kinds import no_run
from lowbit.checkpoints.resolve import Source, load_config, load_tokenizer, resolve
from lowbit.checkpoints.writing import write_bytes
from lowbit.data.text import evaluation
from lowbit.data.windows import Bos
from lowbit.errors import LowbitError, check_least, check_seed
from lowbit.metrics.sensitivity import divergences_alone
from lowbit.models.device import check_device
from lowbit.models.families import architecture_of
from lowbit.models.forward import run_all
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import check_ids, check_model, open_weights
from lowbit.paths import user_path
from lowbit.quant.rotated_kv import RotatedTokens
from lowbit.quant.scheme_names import override_text
from lowbit.runs.manifest import MANIFEST, Manifest, manifest_of
from lowbit.runs.plan import linear_shapes
from lowbit.runs.reading import run_formats, run_scheme
from lowbit.runs.streamed_model import StreamedModel
from lowbit.torch_state import own_torch_state

FORMAT = "lowbit-diagnosis-1"
ERROR, KL = "relative error at the block's output", "KL divergence in nats per token"


@dataclass(frozen=True)
class Diagnosis:
    """Sensitivities of a run's blocks and linears; ``--json`` prints ``to_dict``.

    Attributes:
        run: the run folder.
        measure: the measure of ``sensitivity`` and ``gain``: ``ERROR`` or ``KL``.
        protocol: text, windows, length and seed of the measurement, or the run's first calibration window.
        blocks: most sensitive first: ``block``, ``sensitivity`` (only this block quantized), ``gain`` (sum of its
            linears' gains), ``error``.
        linears: most sensitive first: ``linear``, ``block``, ``format``, ``sensitivity`` (only this linear
            quantized), ``gain`` (decrease of sensitivity with integers of 8 bits), ``error``, ``measured`` (false: a
            share of its block's divergence).
        proposal: overrides for the budget; ``None`` without a budget.
        seconds: wall time.
    """

    run: str
    measure: str
    protocol: dict[str, Any]
    blocks: list[dict[str, Any]]
    linears: list[dict[str, Any]]
    proposal: Proposal | None
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the format's name."""
        return {"format": FORMAT, **asdict(self)}


@dataclass(frozen=True)
class _Run:
    """A finished run with recorded sensitivities."""

    source: Source
    manifest: Manifest
    skeleton: Skeleton
    linears: list[Linear]

    @property
    def error(self) -> list[float]:
        """Error at each block's output, with all of the block quantized."""
        return [row.sensitivity["error"] for row in self.manifest.blocks]

    @property
    def only_rounds(self) -> bool:
        """Nothing precedes the step that quantizes, neither a step nor a rotation: weights are the model's own."""
        rotated = isinstance(run_scheme(self.manifest).kv, RotatedTokens)
        return len(self.manifest.identity.steps) == 1 and not rotated


@own_torch_state
def diagnose(
    run: str | Path,
    *,
    exact: str | None = None,
    data: str | Path = "builtin",
    samples: int = 2,
    length: int = 128,
    seed: int = 0,
    budget: float | None = None,
    bits: Sequence[int] = WIDTHS,
    out: str | Path | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Diagnosis:
    """Rank a run's blocks and linears by their sensitivity when quantized alone, with their gain at 8 bits.

    Args:
        run: the run folder.
        exact: the float model of the run, to measure KL divergence; default: use the errors that the run recorded.
        data, samples, length, seed: evaluation text, number of windows, tokens per window and the seed that draws
            them; used with ``exact`` only.
        budget: effective bits per quantized weight of a proposal, including scales and zero points.
        bits: candidate bit widths of the proposal.
        out: a YAML file to write the proposal to, for ``quantize(scheme=...)``.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.

    Raises:
        LowbitError: no run, no recorded sensitivity, a different float model, or an infeasible budget.
    """
    began = time.monotonic()
    out = None if out is None else user_path(out)
    _check_arguments(budget, bits, out)
    recorded = _open_run(run, trust_remote_code)
    blocks, linears, measure = recorded.error, recorded.linears, ERROR
    protocol: dict[str, Any] = {"tokens": recorded.manifest.blocks[0].sensitivity["tokens"], "text": "calibration"}
    # Before any measurement, so that an infeasible budget is refused at once.
    proposal = None if budget is None else propose(recorded.skeleton, recorded.manifest, linears, budget, bits)
    if exact is not None and recorded.manifest.prefix_ids:
        raise LowbitError(
            f"--float {exact} given, and {run} has a prefix, whose keys and values fit none of the float model's "
            "blocks: leave it out, for the sensitivity that the run recorded"
        )
    if exact is not None:
        source = resolve(exact, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        if source.identity != recorded.manifest.identity.fingerprint:
            raise LowbitError(
                f"{run} was not made from {exact}, whose weights differ: give the float model of the run"
            )
        models = [
            StreamedModel(origin.folder, device, check_device(device, dtype), trust_remote_code)
            for origin in (source, recorded.source)
        ]
        bos = recorded.manifest.identity.data.bos
        ids, text = _windows(models[0], source, data, samples, length, seed, bos, trust_remote_code)
        blocks, linears = _measured(recorded, models[0], models[1], ids)
        protocol, measure = {"text": text, "windows": samples, "length": length, "seed": seed}, KL
        protocol |= {"device": device, "dtype": dtype}
        proposal = None if budget is None else propose(recorded.skeleton, recorded.manifest, linears, budget, bits)
    if out is not None and proposal is not None:
        head = f"# lowbit inspect {shlex.quote(str(run))} --budget {budget:g}\n"
        write_bytes(out, (head + yaml.safe_dump(proposal.scheme, sort_keys=False)).encode())
    rows = _rows(recorded, blocks, linears, measured=exact is None or recorded.only_rounds)
    return Diagnosis(str(run), measure, protocol, *rows, proposal, time.monotonic() - began)


def _check_arguments(budget: float | None, bits: Sequence[int], out: Path | None) -> None:
    if budget is not None:
        check_budget(budget, bits)
    if out is None:
        return
    if budget is None:
        raise LowbitError("--out writes a proposal, which needs --budget")
    if out.suffix not in (".yaml", ".yml"):
        raise LowbitError(f"--out {out} given; name a .yaml file, as 'quantize --scheme' reads it")
    if out.exists():
        raise LowbitError(f"--out {out} exists; name a new file")
    if not out.absolute().parent.is_dir():
        raise LowbitError(f"--out {out} is in a folder that does not exist; create it, or name another file")


def _open_run(run: str | Path, trust_remote_code: bool) -> _Run:
    source = resolve(str(run), trust_remote_code=trust_remote_code)
    manifest = manifest_of(source.folder)
    if manifest is None:
        raise no_run(source.folder)
    if manifest.identity.recipe_name == "keep":
        raise LowbitError(f"{run} keeps its source's codes, so nothing was measured: give a run of its float model")
    if any(not row.sensitivity for row in manifest.blocks):
        raise LowbitError(f"{run} has no recorded sensitivity: quantize again into another folder")
    config = load_config(source.folder, trust_remote_code)
    formats = run_formats(manifest, run_scheme(manifest), architecture_of(config))
    checkpoint, _ = open_weights(source.folder, config, True, trust_remote_code)
    check_model(checkpoint, config, formats.modules, trust_remote_code)
    skeleton = Skeleton(config, trust_remote_code)
    shapes = linear_shapes(skeleton)
    linears = []
    try:
        for row in manifest.blocks:
            for name, record in row.sensitivity["linears"].items():
                full = f"{skeleton.architecture.blocks}.{row.block}.{name}"
                errors = float(record["error"]), float(record["input"])
                rtn = {int(b): float(error) for b, error in record["rtn"].items()}
                own = float(record["own"])
                linears.append(Linear(full, row.block, shapes[full], formats.weights[full], *errors, rtn, own))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LowbitError(
            f"the sensitivity recorded in {MANIFEST} of {run} is broken ({error!r}): quantize again"
        ) from error
    return _Run(source, manifest, skeleton, linears)


def _windows(
    model: StreamedModel,
    source: Source,
    data: str | Path,
    samples: int,
    length: int,
    seed: int,
    bos: Bos,
    trust_remote_code: bool,
) -> tuple[Tensor, str]:
    """``samples`` windows of a text, ``(samples, length)``, drawn without replacement."""
    model.check_length(length)
    check_least("--samples", samples, 1, "give the number of windows to measure on")
    check_seed(seed)
    text = evaluation(data, load_tokenizer(source.folder, trust_remote_code), length, bos=bos)
    if samples > len(text.ids):
        raise LowbitError(
            f"--samples {samples} given; '{data}' has {len(text.ids)} windows of {length} tokens: give no more"
        )
    check_ids(text.ids, model.skeleton, source.folder)
    order = torch.randperm(len(text.ids), generator=torch.Generator().manual_seed(seed))
    return text.ids[order[:samples]], text.corpus


def _measured(
    recorded: _Run, exact: StreamedModel, ours: StreamedModel, ids: Tensor
) -> tuple[list[float], list[Linear]]:
    """KL divergence of each block alone, and the linears with KL divergence as their sensitivity."""
    names: list[list[str]] = [[] for _ in range(exact.blocks)]
    if recorded.only_rounds:
        for linear in recorded.linears:
            names[linear.block].append(linear.name)

    ours.enter(ids)  # sets up the block inputs other than hidden states

    def changed(index: int, x: Tensor) -> Iterator[Tensor]:
        yield ours.through(index, [x])[0]
        block, quantized = exact.block(index), ours.block(index)
        for full in names[index]:
            name = full.removeprefix(f"{block.blocks}.")
            params = {**block.params, f"{name}.weight": quantized.dequantized(name)}
            alone = replace(block, formats={name: quantized.formats[name]}, ops=quantized.ops)
            yield run_all(alone, x, params, quantized=True, batch=len(x))

    kls = divergences_alone(exact, [1 + len(block_names) for block_names in names], changed, ids)
    alone = {
        full: kl
        for block_names, (_, *linear_kls) in zip(names, kls, strict=True)
        for full, kl in zip(block_names, linear_kls, strict=True)
    }
    linears = []
    for linear in recorded.linears:
        whole, error = kls[linear.block][0], recorded.error[linear.block]
        kl = alone.get(linear.name, whole * linear.sensitivity / error if error else 0.0)
        share = linear.input / linear.sensitivity if linear.sensitivity else 0.0
        linears.append(replace(linear, sensitivity=kl, input=kl * min(share, 1.0)))
    return [first for first, *_ in kls], linears


def _rows(
    run: _Run, blocks: Sequence[float], linears: Sequence[Linear], measured: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    gains = {linear.name: linear.sensitivity - linear.sensitivity_at(8) for linear in linears}
    by_block: list[dict[str, Any]] = [
        {
            "block": index,
            "sensitivity": sensitivity,
            "gain": sum(gains[linear.name] for linear in linears if linear.block == index),
            "error": error,
        }
        for index, (sensitivity, error) in enumerate(zip(blocks, run.error, strict=True))
    ]
    by_linear: list[dict[str, Any]] = [
        {
            "linear": linear.name,
            "block": linear.block,
            "format": override_text(linear.spec),
            "sensitivity": linear.sensitivity,
            "gain": gains[linear.name],
            "error": before.sensitivity,
            "measured": measured,
        }
        for linear, before in zip(linears, run.linears, strict=True)
    ]
    by_block.sort(key=_worst_first)
    by_linear.sort(key=_worst_first)
    return by_block, by_linear


def _worst_first(row: dict[str, Any]) -> float:
    return -float(row["sensitivity"])
