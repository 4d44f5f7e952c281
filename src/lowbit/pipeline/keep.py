"""``lowbit quantize --keep``: the codes of a source that is quantized already become a run folder, unchanged.

Every weight is read twice: once to find its format, and once to write it, when the stored tensors are decoded again
and compared with the source's values. Inputs stay float, whatever the source does with them; no text is read.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.identity import companions_digest
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.checkpoints.writing import write_json, write_tensors
from lowbit.errors import LowbitError
from lowbit.finite import is_finite
from lowbit.models.validate import check_finite, shapes_of
from lowbit.pipeline.disk_space import check_space
from lowbit.pipeline.finalize import finish, finished
from lowbit.pipeline.opened import Opened, open_model
from lowbit.pipeline.peak_memory import peak_memory_bytes
from lowbit.pipeline.request import model_name
from lowbit.progress import say, track
from lowbit.quant.format import Format, QTensor
from lowbit.quant.scheme import Scheme
from lowbit.quant.scheme_files import scheme_to_dict
from lowbit.runs.folder import REST, begin, block_file, claimed, look, notes_file
from lowbit.runs.manifest import BlockRow, Calibration, Identity, Manifest
from lowbit.runs.plan import Plan, linear_shapes, make_plan
from lowbit.runs.versions import versions
from lowbit.sources.codes import Codes, codes_of
from lowbit.sources.kept import Settled, scheme_of, why_not_stored

KEEP = "keep"
NO_TEXT = Calibration("none", 0, 0, "never", "", "")
ADVICE = "leave out --keep, and the source is dequantized and quantized anew"


@dataclass(frozen=True)
class Keep:
    """A request to keep a source's codes; attributes as for ``lowbit.quantize``."""

    model: str
    revision: str | None
    allow_pickle: bool
    trust_remote_code: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain data for the manifest, independent of the machine and its paths."""
        return {**asdict(self), "model": model_name(self.model), KEEP: True}


@dataclass(frozen=True)
class _Kept:
    """A source whose codes can be kept.

    Attributes:
        opened: the model.
        codes: its quantized weights.
        scheme, plan: the formats of its modules.
        reads: the name of the parameter whose codes a module has; a tied head has the embedding's.
    """

    opened: Opened
    codes: Codes
    scheme: Scheme
    plan: Plan
    reads: Mapping[str, str]

    def qtensor(self, module: str) -> QTensor:
        """A module's weight in its format."""
        decoded = _codes(self.codes, self.reads[module])
        return QTensor(decoded.codes, decoded.qparams, self.plan.formats.weights[module])


def keep(request: Keep, out: Path) -> Manifest:
    """Write the run folder, or go on with it; returns its manifest.

    Raises:
        LowbitError: the source is float, or has a weight that no format holds; nothing is written.
    """
    opened = open_model(request.model, request.revision, request.allow_pickle, request.trust_remote_code)
    load_tokenizer(opened.source.folder, request.trust_remote_code)  # the run folder needs it
    kept = _settle(request.model, opened)
    identity = _identity(request, kept)
    if look(out, identity) == "finished":
        return finished(out)
    with claimed(out, identity) as state:
        if state == "finished":  # by another process, between the two looks
            return finished(out)
        check_finite(opened.checkpoint, [n for n in shapes_of(opened.skeleton) if n not in kept.codes.names])
        check_space(out, kept.plan.size_bytes + 4 * kept.plan.float_weights + opened.others.size_bytes)
        begin(out, identity)
        say(f"keeping {kept.codes.summary}, as {kept.scheme.name}")
        rows = _write(kept, out)
        return finish(out, opened, kept.plan, identity, rows, request.to_dict())


def _settle(model: str, opened: Opened) -> _Kept:
    """Read every weight once: its format, or why there is none."""
    skeleton, architecture = opened.skeleton, opened.skeleton.architecture
    linears = [*linear_shapes(skeleton)]
    parameters = {module: f"{module}.weight" for module in (*linears, architecture.embed, architecture.head)}
    if skeleton.tied:
        parameters[architecture.head] = parameters[architecture.embed]
    codes = codes_of(opened.source, opened.checkpoint, shapes_of(skeleton))
    if codes is None:
        raise LowbitError(f"--keep given, and the weights of {model} are float: leave it out")
    if others := sorted(codes.names - {*parameters.values()}):
        raise LowbitError(f"--keep: '{others[0]}' of {model} is quantized and no linear of a block; {ADVICE}")
    reads = {module: name for module, name in parameters.items() if name in codes.names}
    if not any(module in reads for module in linears):
        raise LowbitError(f"--keep: {model} has no quantized linear in its blocks; {ADVICE}")
    settled = Settled()
    for module, name in track(list(reads.items()), "reading codes"):
        settled.add(module, _codes(codes, name))
    formats = settled.result()
    scheme = scheme_of(formats, linears, (architecture.head, architecture.embed))
    plan = make_plan(skeleton, scheme)
    _check_plan(plan, formats)
    return _Kept(opened, codes, scheme, plan, reads)


def _codes(codes: Codes, name: str) -> QTensor:
    """A weight's codes; raises ``LowbitError`` for a weight that no format holds."""
    decoded = codes.read(name)
    numbers = decoded.qparams if isinstance(decoded, QTensor) else (decoded.value,)
    if not all(map(is_finite, numbers)):
        raise LowbitError(f"--keep: '{name}' has a value or scale that is NaN or infinite: the source is broken")
    why = why_not_stored(decoded) if isinstance(decoded, QTensor) else decoded.why
    if not isinstance(decoded, QTensor) or why is not None:
        raise LowbitError(f"--keep: no format holds '{name}' ({codes.summary}): {why}; {ADVICE}")
    return decoded


def _check_plan(plan: Plan, formats: Mapping[str, Format]) -> None:
    """Refuse formats that a run folder does not have side by side."""
    for module, format in formats.items():
        if plan.formats.weights[module] != format:
            raise LowbitError(
                f"--keep: '{module}' is {format.name} beside MX or NVFP4 weights, where scales are bfloat16, and its "
                f"own are not; {ADVICE}"
            )


def _identity(request: Keep, kept: _Kept) -> Identity:
    source = kept.opened.source
    return Identity(
        model=model_name(request.model),
        fingerprint=source.identity,
        recipe={"steps": [{KEEP: {}}], "window": 1},
        recipe_name=KEEP,
        scheme=scheme_to_dict(kept.scheme),
        data=NO_TEXT,
        seed=0,
        device="cpu",
        dtype="float32",
        versions=versions(),
        source_files=companions_digest(source.folder),
    )


def _write(kept: _Kept, out: Path) -> list[BlockRow]:
    """Write every shard that is not there yet; returns the manifest's rows, whose errors are 0: values are equal."""
    skeleton, plan, names = kept.opened.skeleton, kept.plan, kept.opened.names
    every = [*shapes_of(skeleton)]  # of experts each matrix by itself
    shared = [*skeleton.shared_names, *([f"{plan.head}.weight"] if plan.untie else [])]
    if not (out / REST).exists():
        write_tensors(out / REST, names.stored_all(_tensors(kept, shared)))
    rows = []
    notes = [f"{KEEP}: {kept.codes.dropped}, as the source has it, is float here"] if kept.codes.dropped else []
    for index in track(range(len(skeleton.layers)), "keeping"):
        began = time.monotonic()
        if not (out / block_file(index)).exists():
            tensors = _tensors(kept, [n for n in every if n.startswith(f"{skeleton.architecture.blocks}.{index}.")])
            record = {"seconds": time.monotonic() - began, "peak_memory_bytes": peak_memory_bytes()}
            write_json(out / notes_file(index), {"notes": [], "record": {}, **record})
            write_tensors(out / block_file(index), names.stored_all(tensors))
        rows.append(BlockRow(index, [] if index else notes, 0.0))
    return rows


def _tensors(kept: _Kept, names: list[str]) -> dict[str, Tensor]:
    """What a shard holds for these parameters: codes as stored in a run folder, and floats in their own dtype."""
    modules, out = kept.plan.formats.modules, dict[str, Tensor]()
    for name in names:
        module = name.removesuffix(".weight")
        if name == module or module not in modules:
            out |= kept.opened.checkpoint.read([name])
            continue
        formats, q = modules[module], kept.qtensor(module)
        stored = formats.layout.pack(q)
        source = kept.reads[module]
        exact = kept.opened.checkpoint.read([source], torch.float32)[source]
        if not torch.equal(formats.layout.unpack(stored, formats.weight).dequantize(), exact):
            raise LowbitError(f"--keep: '{name}' would not keep its values as {formats.weight.name}; {ADVICE}")
        out |= {f"{module}.{key}": value for key, value in stored.items()}
    return out
