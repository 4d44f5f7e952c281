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
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.checkpoints.safetensors_folder import PARTIAL, Checkpoint, read_json, write_index, write_json
from lowbit.errors import LowbitError
from lowbit.models.architecture import Family, module_of
from lowbit.models.block import Block
from lowbit.models.skeleton import Skeleton
from lowbit.quant.affine import QTensor, QuantSpec
from lowbit.quant.compressed_tensors import layout_of, packed_names, unpack
from lowbit.quant.scheme import Scheme, scheme_from_dict

MANIFEST, TIMING, RUN, IDENTITY = "lowbit.json", "lowbit-timing.json", ".run", "identity.json"
REST = "model-rest.safetensors"
ONLINE = ".online"  # behind a module's name: what runs beside it since no parameter could absorb it
FORMAT = 1
_FOLLOWS = ("fingerprint", "versions.")  # differ because something else does
State = Literal["new", "running", "finished"]
# What readers of a manifest rely on.
_NEEDED: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("identity", "recipe", "scheme", "transformers", "files"), dict),
    **dict.fromkeys(("quantized", "blocks"), list),
    "bits_per_weight": (int, float),
}


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


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished run folder; ``None`` for any other folder."""
    path = folder / MANIFEST
    if not path.exists():
        return None
    manifest = read_json(path)
    if manifest.get("format") != FORMAT:
        raise LowbitError(f"{path} has format {manifest.get('format')!r}; this lowbit reads {FORMAT}: update lowbit")
    for key, kind in _NEEDED.items():
        if not isinstance(manifest.get(key), kind):
            raise LowbitError(f"{path} has no valid '{key}': it is broken; quantize again into another folder")
    return manifest


def look(out: Path, identity: Mapping[str, Any]) -> State:
    """What ``out`` is to a run: new, this same run half done, or finished. Nothing is written.

    Raises ``LowbitError`` for a folder of another run or with anything else in it, and for a finished run of which
    something is missing.
    """
    try:
        if out.exists() and not out.is_dir():
            raise LowbitError(f"--out {out} is a file; name a folder that is new, empty or of this same run")
        running = out / RUN / IDENTITY
        if (manifest := manifest_of(out)) is not None:
            _same_run(out, manifest["identity"], identity)
            if gone := [name for name in manifest["files"] if not (out / name).is_file()]:
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


def claim(out: Path, identity: Mapping[str, Any]) -> None:
    """Make ``out`` the folder of a run, or take it up again; half-written files of a killed run go."""
    try:
        (out / RUN).mkdir(parents=True, exist_ok=True)
        for leftover in [*out.glob(f"*{PARTIAL}"), *(out / RUN).glob(f"*{PARTIAL}")]:
            leftover.unlink()
    except OSError as error:
        raise _unusable(out, error) from error
    if not (out / RUN / IDENTITY).exists():
        write_json(out / RUN / IDENTITY, identity)


def _unusable(out: Path, error: OSError) -> LowbitError:
    return LowbitError(f"cannot use --out {out}: {error.strerror or error}; choose a folder you may write")


def _same_run(out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse a run that differs; what a person chose is named before digests and versions that follow from it."""
    ours, theirs = _leaves(wanted), _leaves(found)
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


def read_qtensors(checkpoint: Checkpoint, specs: Mapping[str, QuantSpec], layout: str) -> dict[str, QTensor]:
    """Rounded weights by the linear's full name."""
    out = {}
    for linear, spec in specs.items():
        stored = checkpoint.read(packed_names(linear, spec, layout))
        out[linear] = unpack({name.removeprefix(f"{linear}."): value for name, value in stored.items()}, spec)
    return out


def read_block(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    index: int,
    specs: Mapping[str, QuantSpec],
    layout: str,
    device: torch.device | str = "cpu",
) -> Block:
    """Layer ``index`` from a run folder's shard: what was rounded in ``qweights``, everything else in ``params``.

    ``specs`` gives the format of each rounded linear by its full name.
    """
    prefix = f"{skeleton.family.blocks}."
    shapes = dict(skeleton.layers[index].named_parameters())
    names = [f"{prefix}{index}.{name}" for name in shapes]
    own = {name: spec for name, spec in specs.items() if name.startswith(f"{prefix}{index}.")}
    rounded = read_qtensors(checkpoint, own, layout)
    floats = checkpoint.read([n for n in names if n.removesuffix(".weight") not in own], torch.float32)
    params = {name.removeprefix(prefix): value.to(device) for name, value in floats.items()}
    qweights = {name.removeprefix(prefix): on_device(q, device) for name, q in rounded.items()}
    kept = read_online(checkpoint, skeleton.family, skeleton.layers[index], index)
    online = {f"{index}.{name}": value.to(device) for name, value in kept.items()}
    return replace(skeleton.block(index, params), qweights=qweights, online=online)


def read_online(checkpoint: Checkpoint, family: Family, layer: nn.Module, index: int) -> dict[str, Tensor]:
    """What stays online in layer ``index``, by module names within the layer; see ``Block.online``.

    A tensor for a module that cannot have one, or of another shape, is refused.
    """
    prefix = f"{family.blocks}.{index}."
    norms = {module_of(edge.src) for edge in family.edges if edge.kind == "norm"}
    linears = {name for group in family.linears for name in group}
    out = {}
    for full in checkpoint.names:
        if not (full.startswith(prefix) and full.endswith(ONLINE)):
            continue
        name = full.removeprefix(prefix).removesuffix(ONLINE)
        value = checkpoint.read([full], torch.float32)[full]
        width = layer.get_parameter(f"{name}.weight").shape[0] if name in norms else 0
        wanted: list[tuple[int, ...]] = [(width, width), (2, width), (3, width)] if width else [(2,)]
        if name in linears:
            wanted.append((2 + layer.get_parameter(f"{name}.weight").shape[1],))
        if name not in norms and name not in linears:
            raise LowbitError(f"{checkpoint.folder} has a tensor '{full}' that no module can have: it is broken")
        if tuple(value.shape) not in wanted:
            allowed = " or ".join(map(str, wanted))
            raise LowbitError(
                f"'{full}' in {checkpoint.folder} is {tuple(value.shape)}; {allowed} is expected: it is broken"
            )
        if value.ndim == 2 and value.shape[0] < width and not _channels_are_there(value):
            raise LowbitError(f"'{full}' in {checkpoint.folder} names channels that are not there: it is broken")
        out[name] = value
    return out


def _channels_are_there(gather: Tensor) -> bool:
    """Row 0 names channels, row 2, if any, channels or -1."""
    width = gather.shape[1]
    whole = bool((gather[[0, *range(2, len(gather))]].frac() == 0).all())
    return whole and all(
        bool(((gather[row] >= least) & (gather[row] < width)).all())
        for row, least in ((0, 0), (2, -1))
        if row < len(gather)
    )


def refuse_online(manifest: Mapping[str, Any], target: str) -> None:
    """For what can carry a plain model only: refuse a run that left maps or clips beside the model's own graph."""
    if online := manifest["online"]:
        raise LowbitError(
            f"{target} cannot carry what this run left online ({len(online)} tensors, {online[0]} first): quantize "
            "again with diagonal maps after norms (qkv and mlp), without act_clip, and with reassemble.sites 'down' "
            "and without offsets 'both'"
        )


def on_device(q: QTensor, device: torch.device | str) -> QTensor:
    """The same weight on another device."""
    return QTensor(q.codes.to(device), type(q.grid)(*(t.to(device) for t in q.grid)), q.spec)


def manifest_specs(manifest: Mapping[str, Any]) -> tuple[Scheme, dict[str, QuantSpec], str]:
    """Scheme, format by full name of each rounded module, and layout, of a finished run."""
    scheme = scheme_from_dict(manifest["scheme"], MANIFEST)
    specs = {}
    for name in manifest["quantized"]:
        found = scheme.override(name)
        spec = found[1] if found else scheme.weight
        if spec is None:
            raise LowbitError(f"{MANIFEST} lists '{name}' as quantized and overrides it to float: the file is broken")
        specs[name] = spec
    return scheme, specs, layout_of(scheme)


def dequantized(
    checkpoint: Checkpoint, names: Iterable[str], specs: Mapping[str, QuantSpec], layout: str
) -> dict[str, Tensor]:
    """Parameters by the model's names, rounded ones as the values that their codes stand for, in float32."""
    out: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in specs:
            out[name] = read_qtensors(checkpoint, {module: specs[module]}, layout)[module].dequantize()
        else:
            out.update(checkpoint.read([name], torch.float32))
    return out
