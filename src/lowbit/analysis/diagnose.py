"""``lowbit.diagnose``: where a run lost what it lost, what more bits would bring there, and a scheme for a budget.

What a run recorded about each linear (see ``sensitivity``) is enough for a ranking, and nothing is computed. With the
float model at hand, sensitivity is also measured as what counts in the end: KL divergence of next-token distributions,
each block as it ships with all others in float, and each linear alone where the run left its block's float weights
as they were (a recipe that only rounds). Elsewhere a linear has the share of its block's divergence that its error
predicts: for small errors, divergence is proportional to the error at the block's output.
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
from lowbit.checkpoints.resolve import Source, load_config, load_tokenizer, resolve
from lowbit.checkpoints.safetensors_folder import write_bytes
from lowbit.data.text import evaluation
from lowbit.errors import LowbitError, check_least, check_seed
from lowbit.metrics.sensitivity import divergences_alone
from lowbit.models.device import check_device
from lowbit.models.forward import run_all
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import check_ids
from lowbit.quant.integer import integer
from lowbit.quant.scheme import override_text
from lowbit.runs.folder import run_formats, run_scheme
from lowbit.runs.manifest import MANIFEST, Manifest, manifest_of
from lowbit.runs.plan import linear_shapes
from lowbit.runs.streamed_model import StreamedModel

FORMAT = "lowbit-diagnosis-1"
ERROR, KL = "relative error at the block's output", "KL divergence in nats per token"


@dataclass(frozen=True)
class Diagnosis:
    """Where a run lost what it lost; ``to_dict`` is what ``--json`` prints.

    Attributes:
        run: the run folder.
        measure: what ``sensitivity`` and ``gain`` are in: ``ERROR`` or ``KL``.
        protocol: what the figures depend on: text, windows, length and seed, or the run's first calibration window.
        blocks: most damaged first: ``block``, ``sensitivity`` (the block alone, all that is rounded in it), ``gain`` (what
            its linears would gain at 8 bits, each alone, together), ``error``.
        linears: most damaging first: ``linear``, ``block``, ``format``, ``sensitivity`` (alone), ``gain`` (at 8 bits),
            ``error``, ``measured`` (false: a share of its block's divergence).
        proposal: overrides for the budget; ``None`` without one.
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
    """A finished run that recorded its sensitivity."""

    source: Source
    manifest: Manifest
    skeleton: Skeleton
    linears: list[Linear]

    @property
    def error(self) -> list[float]:
        """Each block's error at its output, everything in it rounded."""
        return [row.sensitivity["error"] for row in self.manifest.blocks]

    @property
    def only_rounds(self) -> bool:
        """The recipe is its rounding step alone, so the float weights are the model's own."""
        return len(self.manifest.identity.steps) == 1


def diagnose(
    run: str | Path,
    *,
    exact: str | None = None,
    data: str = "builtin",
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
    """Rank a run's blocks and linears by the sensitivity each does alone and by what it would gain at 8 bits.

    Args:
        run: the run folder.
        exact: the float model it was made from; measures KL divergence. Without it, errors that the run recorded.
        data, samples, length, seed: with ``exact``: so many windows of so many tokens of an evaluation text, drawn by
            the seed.
        budget: effective bits per rounded weight to propose overrides for, scales and zeros counted.
        bits: the widths that the proposal chooses among.
        out: a YAML file to write the proposal to, for ``quantize(scheme=...)``.
        device, dtype, revision, allow_pickle, trust_remote_code: as for ``quantize``.

    Raises:
        LowbitError: no run, a run without recorded sensitivity, another float model, a budget that no choice fits into.
    """
    began = time.monotonic()
    _check_given(budget, bits, out)
    found = _opened(run, trust_remote_code)
    blocks, linears, measure = found.error, found.linears, ERROR
    protocol: dict[str, Any] = {"tokens": found.manifest.blocks[0].sensitivity["tokens"], "text": "calibration"}
    # Before anything is measured, so that a budget which nothing fits into is refused at once.
    proposal = None if budget is None else propose(found.skeleton, found.manifest, linears, budget, bits)
    if exact is not None:
        source = resolve(exact, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
        if source.identity != found.manifest.identity.fingerprint:
            raise LowbitError(
                f"{run} was not made from {exact}, whose weights differ: give the model it was made from"
            )
        models = [
            StreamedModel(one.folder, device, check_device(device, dtype), trust_remote_code)
            for one in (source, found.source)
        ]
        ids, text = _windows(models[0], source, data, samples, length, seed, trust_remote_code)
        blocks, linears = _measured(found, models[0], models[1], ids)
        protocol, measure = {"text": text, "windows": samples, "length": length, "seed": seed}, KL
        protocol |= {"device": device, "dtype": dtype}
        proposal = None if budget is None else propose(found.skeleton, found.manifest, linears, budget, bits)
    if out is not None and proposal is not None:
        head = f"# lowbit inspect {shlex.quote(str(run))} --budget {budget:g}\n"
        write_bytes(Path(out), (head + yaml.safe_dump(proposal.scheme, sort_keys=False)).encode())
    rows = _rows(found, blocks, linears, measured=exact is None or found.only_rounds)
    return Diagnosis(str(run), measure, protocol, *rows, proposal, time.monotonic() - began)


def _check_given(budget: float | None, bits: Sequence[int], out: str | Path | None) -> None:
    if budget is not None:
        check_budget(budget, bits)
    if out is None:
        return
    if budget is None:
        raise LowbitError("--out takes a proposal, and there is none without --budget")
    if Path(out).suffix not in (".yaml", ".yml"):
        raise LowbitError(f"--out {out} given; name a .yaml file, as 'quantize --scheme' takes it")
    if Path(out).exists():
        raise LowbitError(f"--out {out} exists; name a file that is new")
    if not Path(out).absolute().parent.is_dir():
        raise LowbitError(f"--out {out} is in a folder that is not there; make it, or name another file")


def _opened(run: str | Path, trust_remote_code: bool) -> _Run:
    source = resolve(str(run), trust_remote_code=trust_remote_code)
    manifest = manifest_of(source.folder)
    if manifest is None:
        raise LowbitError(f"{run} is no finished run folder: give what 'lowbit quantize' wrote")
    if any(not row.sensitivity for row in manifest.blocks):
        raise LowbitError(f"{run} was made before runs recorded sensitivity: quantize again into another folder")
    skeleton = Skeleton(load_config(source.folder, trust_remote_code), trust_remote_code)
    shapes = linear_shapes(skeleton)
    weights = run_formats(manifest, run_scheme(manifest), skeleton.family.embed).weights
    linears = []
    try:
        for row in manifest.blocks:
            for name, told in row.sensitivity["linears"].items():
                full = f"{skeleton.family.blocks}.{row.block}.{name}"
                errors = float(told["error"]), float(told["input"])
                rtn = {int(b): float(error) for b, error in told["rtn"].items()}
                format = integer(weights[full], "a bit allocation")
                linears.append(Linear(full, row.block, shapes[full], format, *errors, rtn))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise LowbitError(
            f"the sensitivity recorded in {MANIFEST} of {run} is broken ({error!r}): quantize again"
        ) from error
    return _Run(source, manifest, skeleton, linears)


def _windows(
    model: StreamedModel, source: Source, data: str, samples: int, length: int, seed: int, trust_remote_code: bool
) -> tuple[Tensor, str]:
    """``samples`` of a text's windows ``(samples, length)``, drawn by the seed without repetition."""
    model.check_length(length)
    check_least("--samples", samples, 1, "give the number of windows to measure on")
    check_seed(seed)
    text = evaluation(data, load_tokenizer(source.folder, trust_remote_code), length)
    if samples > len(text.ids):
        raise LowbitError(
            f"--samples {samples} given; '{data}' has {len(text.ids)} windows of {length} tokens: give no more"
        )
    check_ids(text.ids, model.skeleton, source.folder)
    order = torch.randperm(len(text.ids), generator=torch.Generator().manual_seed(seed))
    return text.ids[order[:samples]], text.corpus


def _measured(
    found: _Run, exact: StreamedModel, ours: StreamedModel, ids: Tensor
) -> tuple[list[float], list[Linear]]:
    """KL divergence of each block alone, and the linears with theirs in the place of their error."""
    names: list[list[str]] = [[] for _ in range(exact.blocks)]
    if found.only_rounds:
        for one in found.linears:
            names[one.block].append(one.name)

    ours.enter(ids)  # what the model passes to its blocks beside the hidden states

    def changed(index: int, x: Tensor) -> Iterator[Tensor]:
        yield ours.through(index, [x])[0]
        block, rounded = exact.block(index), ours.block(index)
        for full in names[index]:
            name = full.removeprefix(f"{block.family.blocks}.")
            params = {**block.params, f"{name}.weight": rounded.qweights[name].dequantize()}
            alone = replace(block, formats={name: rounded.formats[name]}, ops=rounded.ops)
            yield run_all(alone, x, params, quantized=True, batch=len(x))

    kls = divergences_alone(exact, [1 + len(some) for some in names], changed, ids)
    alone = {
        full: kl for some, (_, *rest) in zip(names, kls, strict=True) for full, kl in zip(some, rest, strict=True)
    }
    linears = []
    for one in found.linears:
        whole, error = kls[one.block][0], found.error[one.block]
        kl = alone.get(one.name, whole * one.sensitivity / error if error else 0.0)
        share = one.input / one.sensitivity if one.sensitivity else 0.0
        linears.append(replace(one, sensitivity=kl, input=kl * min(share, 1.0)))
    return [first for first, *_ in kls], linears


def _rows(
    found: _Run, blocks: Sequence[float], linears: Sequence[Linear], measured: bool
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    gains = {one.name: one.sensitivity - one.sensitivity_at(8) for one in linears}
    by_block: list[dict[str, Any]] = [
        {
            "block": index,
            "sensitivity": sensitivity,
            "gain": sum(gains[one.name] for one in linears if one.block == index),
            "error": error,
        }
        for index, (sensitivity, error) in enumerate(zip(blocks, found.error, strict=True))
    ]
    by_linear: list[dict[str, Any]] = [
        {
            "linear": one.name,
            "block": one.block,
            "format": override_text(one.spec),
            "sensitivity": one.sensitivity,
            "gain": gains[one.name],
            "error": recorded.sensitivity,
            "measured": measured,
        }
        for one, recorded in zip(linears, found.linears, strict=True)
    ]
    by_block.sort(key=_worst_first)
    by_linear.sort(key=_worst_first)
    return by_block, by_linear


def _worst_first(row: dict[str, Any]) -> float:
    return -float(row["sensitivity"])
