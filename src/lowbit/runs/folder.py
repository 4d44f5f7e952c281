"""A run folder: what a run leaves behind, and how it is read again.

It is a Hugging Face checkpoint in the ``compressed-tensors`` format, plus a manifest:

=============================== ================================================================================
``block-00007.safetensors``     decoder layer 7: packed linears, norms, biases, what stays online
``model-rest.safetensors``      embeddings, final norm, head
``model.safetensors.index.json`` which tensor is in which file
``config.json``, tokenizer      as in the source, plus ``quantization_config``
``README.md``                   the model card
``lowbit-observed.safetensors`` each channel's largest activation, and pictures of learned matrices, for the report
``lowbit-evaluations.json``     what ``lowbit evaluate`` measured on the finished run, if it did
``lowbit-timing.json``          seconds and memory for each block; the one file that differs between equal runs
``lowbit.json``                 the manifest, written last: a folder that has it is finished
``.run/``                       while it is running: who is running what, and each block's notes and pictures
=============================== ================================================================================

Shards are the only state of a run, but for ``tune``, which keeps its own in ``.run/``. A run that starts again
replays the finished ones and goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.checkpoints.safetensors_folder import PARTIAL, Checkpoint, read_json, write_index, write_json
from lowbit.errors import LowbitError
from lowbit.models.architecture import Family
from lowbit.models.block import Block
from lowbit.models.runtime_ops import OPS, RuntimeOp, parse_tensor_name
from lowbit.models.skeleton import Skeleton
from lowbit.quant.compressed_tensors import layout_of, packed_names, unpack
from lowbit.quant.format import Format, QTensor
from lowbit.quant.scheme import ModelFormats, ModuleFormats, Scheme, scheme_from_dict
from lowbit.runs.manifest import MANIFEST, Identity, Manifest, manifest_of

TIMING, RUN, IDENTITY = "lowbit-timing.json", ".run", "identity.json"
REST = "model-rest.safetensors"
_FOLLOWS = ("fingerprint", "versions.")  # differ because something else does
State = Literal["new", "running", "finished"]


def block_file(index: int) -> str:
    """The shard of decoder layer ``index``.

    >>> block_file(7)
    'block-00007.safetensors'
    """
    return f"block-{index:05d}.safetensors"


def notes_file(index: int) -> str:
    """Where a running run keeps layer ``index``'s notes, seconds and memory, relative to the folder."""
    return f"{RUN}/block-{index:05d}.json"


def pictures_file(index: int) -> str:
    """Where a running run keeps layer ``index``'s pictures for the report, if it has any."""
    return f"{RUN}/block-{index:05d}.safetensors"


def look(out: Path, identity: Identity) -> State:
    """What ``out`` is to a run: new, this same run half done, or finished. Nothing is written.

    Raises ``LowbitError`` for a folder of another run or with anything else in it, and for a finished run of which
    something is missing.
    """
    try:
        if out.exists() and not out.is_dir():
            raise LowbitError(f"--out {out} is a file; name a folder that is new, empty or of this same run")
        running = out / RUN / IDENTITY
        if (manifest := manifest_of(out)) is not None:
            _same_run(out, asdict(manifest.identity), identity)
            if gone := [name for name in manifest.files if not (out / name).is_file()]:
                raise LowbitError(f"--out {out} lacks {gone[0]} of its finished run: delete the folder and run again")
            return "finished"
        if running.exists():
            _same_run(out, read_json(running), identity)
            return "running"
        if out.exists() and any(entry.name != RUN for entry in out.iterdir()):
            raise LowbitError(f"--out {out} exists and is no lowbit run; name a folder that is new or empty")
    except OSError as error:
        raise _unusable(out, error) from error
    return "new"


def claim(out: Path, identity: Identity) -> None:
    """Make ``out`` the folder of a run, or take it up again; half-written files of a killed run go."""
    try:
        (out / RUN).mkdir(parents=True, exist_ok=True)
        for leftover in [*out.glob(f"*{PARTIAL}"), *(out / RUN).glob(f"*{PARTIAL}")]:
            leftover.unlink()
    except OSError as error:
        raise _unusable(out, error) from error
    if not (out / RUN / IDENTITY).exists():
        write_json(out / RUN / IDENTITY, asdict(identity))


def _unusable(out: Path, error: OSError) -> LowbitError:
    return LowbitError(f"cannot use --out {out}: {error.strerror or error}; choose a folder you may write")


def _same_run(out: Path, found: Mapping[str, Any], wanted: Identity) -> None:
    """Refuse a run that differs; what a person chose is named before digests and versions that follow from it."""
    ours, theirs = _leaves(asdict(wanted)), _leaves(found)
    names = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if names:
        first, *others = sorted(names, key=lambda n: (n.endswith("hash"), n.startswith(_FOLLOWS), n.count("."), n))
        too = f" ({', '.join(others)[:100]} too)" if others else ""
        raise LowbitError(
            f"--out {out} holds another run: its {first} is {_short(theirs.get(first))}, this one's "
            f"{_short(ours.get(first))}{too}; choose another folder, or delete that one"
        )


def _leaves(content: Any, at: str = "") -> dict[str, Any]:
    """Nested settings by path: ``{"data.length": 512, "recipe.steps.0.gptq.damping": 0.01, ...}``."""
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    out: dict[str, Any] = {}
    for key, value in items:
        out |= _leaves(value, f"{at}{key}.") if isinstance(value, Mapping | list) else {f"{at}{key}": value}
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def write_folder_index(folder: Path, layers: int) -> None:
    """Write the index over all shards, from what they really hold."""
    files = [*(block_file(i) for i in range(layers)), REST]
    shards = {file: Checkpoint(folder, [file]).names for file in files}
    write_index(folder, shards)


def read_qtensors(checkpoint: Checkpoint, weights: Mapping[str, Format], layout: str) -> dict[str, QTensor]:
    """Quantized weights by the linear's full name."""
    out = {}
    for linear, format in weights.items():
        stored = checkpoint.read(packed_names(linear, format, layout))
        out[linear] = unpack({name.removeprefix(f"{linear}."): value for name, value in stored.items()}, format)
    return out


def read_block(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    index: int,
    formats: ModelFormats,
    layout: str,
    device: torch.device | str = "cpu",
) -> Block:
    """Layer ``index`` from its shard: what was quantized in ``qweights``, everything else in ``params``."""
    prefix = f"{skeleton.family.blocks}."
    shapes = dict(skeleton.layers[index].named_parameters())
    names = [f"{prefix}{index}.{name}" for name in shapes]
    own = {name: format for name, format in formats.weights.items() if name.startswith(f"{prefix}{index}.")}
    quantized = read_qtensors(checkpoint, own, layout)
    floats = checkpoint.read([n for n in names if n.removesuffix(".weight") not in own], torch.float32)
    params = {name.removeprefix(prefix): value.to(device) for name, value in floats.items()}
    qweights = {name.removeprefix(prefix): q.to(device) for name, q in quantized.items()}
    block = skeleton.block(index, params, formats=formats)
    kept = read_ops(checkpoint, skeleton.family, skeleton.layers[index], index)
    ops = {f"{index}.{name}": op.to(device) for name, op in kept.items()}
    return replace(block, qweights=qweights, ops=ops)


def read_ops(checkpoint: Checkpoint, family: Family, layer: nn.Module, index: int) -> dict[str, RuntimeOp]:
    """The runtime ops of layer ``index``, by module names within the layer.

    One at a module that cannot have it, of an unknown kind or of another shape is refused.
    """
    prefix = f"{family.blocks}.{index}."
    norms = {edge.src for edge in family.edges if edge.kind == "norm"}
    linears = {name for group in family.linears for name in group}
    found: dict[tuple[str, str], dict[str, str]] = {}
    for full in checkpoint.names:
        if full.startswith(prefix) and (parsed := parse_tensor_name(full)) is not None:
            module, kind, tensor = parsed
            found.setdefault((module.removeprefix(prefix), kind), {})[tensor] = full
    out: dict[str, RuntimeOp] = {}
    for (name, kind), tensors in found.items():
        op = OPS.get(kind)
        fits = name in (norms if op is not None and op.place == "behind a norm" else linears)
        if op is None or not fits or name in out:
            wrong = next(iter(tensors.values()))
            raise LowbitError(f"{checkpoint.folder} has a tensor '{wrong}' that no module can have: it is broken")
        shape = layer.get_parameter(f"{name}.weight").shape
        stored = {tensor: checkpoint.read([full])[full] for tensor, full in tensors.items()}
        try:
            out[name] = op.from_tensors(stored, shape[-1])
        except ValueError as error:
            raise LowbitError(f"'{prefix}{name}' in {checkpoint.folder}: its {kind} {error}: it is broken") from error
    return out


def run_scheme(manifest: Manifest) -> Scheme:
    """The scheme of a finished run."""
    return scheme_from_dict(manifest.identity.scheme, MANIFEST)


def run_formats(manifest: Manifest, scheme: Scheme, embed: str) -> ModelFormats:
    """The formats of a finished run's modules.

    Args:
        manifest: the run's.
        scheme: its own, or with the inputs of another runtime.
        embed: the embedding's name; its input is token ids.
    """
    modules: dict[str, ModuleFormats] = {}
    for name in manifest.quantized:
        found = scheme.module(name)
        if found is None:
            raise LowbitError(f"{MANIFEST} lists '{name}' as quantized and overrides it to float: the file is broken")
        modules[name] = ModuleFormats(found.weight) if name == embed else found
    return ModelFormats(modules, scheme.kv)


def run_layout(manifest: Manifest, embed: str) -> str:
    """How a finished run stores its codes."""
    return layout_of(run_formats(manifest, run_scheme(manifest), embed))


def read_dequantized(
    checkpoint: Checkpoint, names: Iterable[str], weights: Mapping[str, Format], layout: str
) -> dict[str, Tensor]:
    """Parameters by the model's names, quantized ones as the values that their codes stand for, in float32."""
    out: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in weights:
            out[name] = read_qtensors(checkpoint, {module: weights[module]}, layout)[module].dequantize()
        else:
            out.update(checkpoint.read([name], torch.float32))
    return out
