"""What a run folder holds, read back: blocks, quantized weights, runtime ops, formats."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError, one_line, shown
from lowbit.models.architecture import Architecture, LayerKind
from lowbit.models.block import Block
from lowbit.models.kv_ratios import RATIOS, read_ratios
from lowbit.models.ops import OPS
from lowbit.models.prefix import KEYS, VALUES
from lowbit.models.runtime_ops import RuntimeOp, linear_behind, parse_tensor_name
from lowbit.models.skeleton import Skeleton
from lowbit.quant.format import QTensor
from lowbit.quant.rotated_kv import RotatedTokens
from lowbit.quant.scheme import ModelFormats, ModuleFormats, Scheme
from lowbit.quant.scheme_files import scheme_from_dict
from lowbit.runs.manifest import MANIFEST, Manifest
from lowbit.runs.prefix import layer_prefix
from lowbit.runs.static_inputs import read_input_qparams


def read_qtensors(checkpoint: Checkpoint, modules: Mapping[str, ModuleFormats]) -> dict[str, QTensor]:
    """Quantized weights by the module's full name; raises ``LowbitError`` for tensors that are no such weights."""
    out = {}
    for module, formats in modules.items():
        stored = checkpoint.read(tensor_names(module, formats))
        own = {name.removeprefix(f"{module}."): value for name, value in stored.items()}
        try:
            out[module] = formats.layout.unpack(own, formats.weight)
        except ValueError as error:
            raise LowbitError(
                f"'{module}' in {checkpoint.folder} is broken: {one_line(error)}: copy the folder again, or quantize "
                "again"
            ) from error
    return out


def tensor_names(module: str, formats: ModuleFormats) -> list[str]:
    """Full names of the tensors of a quantized module's weight, that of the codes first."""
    return [f"{module}.{name}" for name in formats.layout.tensors(formats.weight)]


def read_block(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    index: int,
    formats: ModelFormats,
    device: torch.device | str = "cpu",
) -> Block:
    """Layer ``index`` from its shard: quantized weights in ``qweights``, other parameters in ``params``."""
    prefix = f"{skeleton.architecture.blocks}."
    shapes = skeleton.parameter_shapes(index)
    names = [f"{prefix}{index}.{name}" for name in shapes]
    modules = {name: own for name, own in formats.modules.items() if name.startswith(f"{prefix}{index}.")}
    quantized = read_qtensors(checkpoint, modules)
    floats = checkpoint.read([n for n in names if n.removesuffix(".weight") not in modules], torch.float32)
    if skeleton.prefix:
        own = layer_prefix(checkpoint, f"{prefix}{index}", skeleton.prefix)
        floats |= {f"{prefix}{index}.{key}": value for key, value in zip((KEYS, VALUES), own, strict=True)}
    if isinstance(formats.kv, RotatedTokens) and skeleton.architecture.layers[index].attention is not None:
        floats[f"{prefix}{index}.{RATIOS}"] = read_ratios(checkpoint, f"{prefix}{index}")
    params = {name.removeprefix(prefix): value.to(device) for name, value in floats.items()}
    qweights = {name.removeprefix(prefix): q.to(device) for name, q in quantized.items()}
    inputs = read_input_qparams(checkpoint, modules, device)
    input_qparams = {name.removeprefix(prefix): own for name, own in inputs.items()}
    block = skeleton.block(index, params, formats=formats)
    layer_ops = read_ops(checkpoint, skeleton.architecture, shapes, index)
    ops = {f"{index}.{name}": op.to(device) for name, op in layer_ops.items()}
    return replace(block, qweights=qweights, input_qparams=input_qparams, ops=ops)


def read_ops(
    checkpoint: Checkpoint, architecture: Architecture, shapes: Mapping[str, torch.Size], index: int
) -> dict[str, RuntimeOp]:
    """The runtime ops of layer ``index``, by module names within the layer; ``shapes`` are its parameters'.

    An op at an unsuitable module, of an unknown kind or of another shape is refused.
    """
    prefix, own = f"{architecture.blocks}.{index}.", architecture.layers[index]
    names: dict[tuple[str, str], dict[str, str]] = {}
    for full in checkpoint.names:
        if full.startswith(prefix) and (parsed := parse_tensor_name(full)) is not None:
            module, kind, tensor = parsed
            names.setdefault((module.removeprefix(prefix), kind), {})[tensor] = full
    out: dict[str, RuntimeOp] = {}
    for (name, kind), tensors in names.items():
        op = OPS.get(kind)
        if op is None or not _fits(op, name, own) or name in out:
            first = next(iter(tensors.values()))
            raise LowbitError(f"{checkpoint.folder} has a tensor '{first}' that no module can have: it is broken")
        module = linear_behind(name) or name
        shape = shapes[f"{module}.weight"]
        width = shape[0] if module in own.transposed else shape[-1]
        stored = {tensor: checkpoint.read([full])[full] for tensor, full in tensors.items()}
        try:
            out[name] = op.from_tensors(stored, width)
        except ValueError as error:
            raise LowbitError(f"'{prefix}{name}' in {checkpoint.folder}: its {kind} {error}: it is broken") from error
    return out


def _fits(op: type[RuntimeOp], name: str, kind: LayerKind) -> bool:
    """Whether an op may stand at a place within a layer: behind a norm, on a linear's input, or before a linear."""
    if (linear := linear_behind(name)) is not None:
        return op.on_inputs and linear in kind.linears
    return name in (kind.norm_offsets if op.place == "behind a norm" else kind.linears)


def run_scheme(manifest: Manifest) -> Scheme:
    """The scheme of a finished run."""
    return scheme_from_dict(manifest.identity.scheme, MANIFEST)


def run_formats(manifest: Manifest, scheme: Scheme, architecture: Architecture) -> ModelFormats:
    """The formats of a finished run's modules.

    Args:
        manifest: the run's.
        scheme: the run's, or with the inputs of another runtime.
        architecture: the model's; the embedding's input is token ids.
    """
    modules: dict[str, ModuleFormats] = {}
    outside, dense = (architecture.embed, architecture.head), manifest.transformers.dense
    known = {*architecture.linears(), *outside}
    if unknown_names := [name for name in manifest.quantized if name not in known]:
        raise LowbitError(
            f"{MANIFEST} lists {shown(unknown_names[0])} as quantized, which this model does not have: the file is "
            "broken; quantize again into another folder"
        )
    for name in manifest.quantized:
        module = scheme.outside(name) if name in outside else scheme.module(name)
        if module is None:
            raise LowbitError(f"{MANIFEST} lists '{name}' as quantized and overrides it to float: the file is broken")
        inputs = None if name == architecture.embed else module.input
        modules[name] = replace(module, input=inputs, expert=architecture.is_experts(name), dense=dense)
    return ModelFormats(modules, scheme.kv)


def read_dequantized(
    checkpoint: Checkpoint, names: Iterable[str], modules: Mapping[str, ModuleFormats]
) -> dict[str, Tensor]:
    """Parameters by the model's names in float32, quantized ones dequantized."""
    out: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in modules:
            out[name] = read_qtensors(checkpoint, {module: modules[module]})[module].dequantize()
        else:
            out.update(checkpoint.read([name], torch.float32))
    return out
