"""``lowbit.load``: a run folder as an ordinary ``transformers`` model, for every scheme.

Stock ``transformers`` loads most run folders by itself; ``load`` loads all of them. Weights are dequantized; a hook
quantizes the inputs of quantized linears, and a registered attention function quantizes Q, K and V.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import GenerationConfig

from lowbit.checkpoints.resolve import load_config
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError, one_line
from lowbit.models import fused_kernels
from lowbit.models.architecture import Architecture, Experts
from lowbit.models.attention import quantize_attention
from lowbit.models.build import from_config, text_config, tied_tensors
from lowbit.models.device import check_usable, float_dtype
from lowbit.models.experts import as_the_library_stores, parameter_shapes, state_shapes
from lowbit.models.experts_function import run_experts_apart
from lowbit.models.families import architecture_of
from lowbit.models.gathered_norm import GatheredRMSNorm, gathered_norm
from lowbit.models.hadamard_quantize import HadamardQuantize
from lowbit.models.kv_ratios import ATTRIBUTE, read_ratios
from lowbit.models.linear_input import LinearInput
from lowbit.models.op_readers import linears_at
from lowbit.models.own_experts import quantize_own_experts
from lowbit.models.runtime_ops import PREFIX, RuntimeOp, at_input, linear_behind
from lowbit.models.validate import (
    PROBE,
    check_model,
    open_weights,
    report_build_errors,
)
from lowbit.paths import user_path
from lowbit.quant.activations import ActFormat, IntTokens
from lowbit.quant.format import QParams
from lowbit.quant.rotated_kv import RotatedTokens
from lowbit.quant.scheme import ModelFormats, simulated_on
from lowbit.quant.static_activations import quantize_input
from lowbit.runs.manifest import manifest_of, require_trust
from lowbit.runs.prefix import stored_prefix
from lowbit.runs.prefix_forward import put_behind
from lowbit.runs.reading import read_dequantized, read_ops, run_formats, run_scheme
from lowbit.runs.saving import refuse_saving
from lowbit.runs.static_inputs import read_input_qparams
from lowbit.torch_state import own_torch_state

MIX = f"{PREFIX}_input"  # the module of a linear that holds the op on its input
STATIC = ("lowbit_input_scale", "lowbit_input_zero")  # buffers of a linear with a static input


@own_torch_state
def load(
    folder: str | Path,
    *,
    device: str = "cpu",
    dtype: torch.dtype | str = torch.float32,
    trust_remote_code: bool = False,
    target: str | None = None,
) -> Any:
    """A ``transformers`` causal language model from a run folder (or another checkpoint), ready to generate.

    It computes the evaluated model, with quantized activations and KV, behind the run's prefix.
    ``lowbit.load(DIR).generate(...)`` works as
    usual, and so do copies, ``torch.save`` and other dtypes. ``save_pretrained`` stores parameters only: of a model
    with runtime ops, quantized inputs or KV, or a prefix, it is refused.

    ``target`` names a runtime whose input quantization is simulated, or ``float``; by default the run's own.

    Raises:
        LowbitError: the folder is not a model, is broken, or is quantized in a way that is not read; a device or
            dtype that cannot be used.
    """
    check_usable(device)
    dtype = float_dtype(dtype)
    folder = user_path(folder)
    manifest = manifest_of(folder)
    config: Any = load_config(folder, trust_remote_code)
    require_trust(folder, manifest, trust_remote_code)
    checkpoint, _ = open_weights(folder, config, manifest is not None, trust_remote_code)
    architecture = architecture_of(config)
    scheme = simulated_on(run_scheme(manifest) if manifest else None, target)
    formats = ModelFormats()
    if manifest is not None and scheme is not None:
        formats = run_formats(manifest, scheme, architecture)
    check_model(checkpoint, config, formats.modules, trust_remote_code)
    with report_build_errors(folder), init_empty_weights(include_buffers=False):
        model: Any = from_config(config, trust_remote_code)
    tied = tied_tensors(model, config, architecture.head)
    shapes = {name: value.shape for name, value in model.state_dict().items() if name not in tied}
    shapes = state_shapes(architecture, shapes)
    state = read_dequantized(checkpoint, shapes, formats.modules)
    layers = list(model.get_submodule(architecture.blocks))
    layer_ops = _ops_of(checkpoint, architecture, layers)
    for index, own_ops in enumerate(layer_ops):
        for name, op in own_ops.items():
            if op.place == "before a linear":
                parameter = f"{architecture.blocks}.{index}.{name}.weight"
                state[parameter] = op.weight(state[parameter])
    for module in architecture.transposed() & formats.modules.keys():
        state[f"{module}.weight"] = state[f"{module}.weight"].mT.contiguous()  # codes are (out, in)
    state = as_the_library_stores(architecture, {name: value.to(device, dtype) for name, value in state.items()})
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise LowbitError(f"{folder} lacks {len(missing)} tensors of its model, including '{missing[0]}'")
    ops = []
    for index, (layer, own_ops) in enumerate(zip(layers, layer_ops, strict=True)):
        offsets = architecture.layers[index].norm_offsets
        own, prefix = architecture.layers[index].experts, f"{architecture.blocks}.{index}."
        for name, op in own_ops.items():
            ops.append(op)
            if own is None or own.place(linear_behind(name) or name) is None:
                linear = linear_behind(name)
                hooked = linear is not None and formats.input(prefix + linear) is not None
                _attach(layer, name, op.to(device), offsets.get(name, 0.0), hooked)
        if own is not None:
            expert_inputs = _expert_inputs(own, prefix, formats, own_ops, device)
            if own.own_code:
                quantize_own_experts(layer, own, expert_inputs)
            else:
                run_experts_apart(layer.get_submodule(own.module), own, expert_inputs)
    front = () if manifest is None else manifest.prefix_ids
    refuse_saving(model, folder, ops, formats, text_config(model.config)._attn_implementation, len(front))
    qparams = read_input_qparams(checkpoint, formats.modules, device)
    behind = _quantize_behind_gathers(model, architecture, formats)
    for name in formats.modules:
        if (inputs := formats.input(name)) is not None and not architecture.is_experts(name):
            _quantize_inputs(model.get_submodule(name), inputs, qparams.get(name), name in behind)
    if formats.kv is not None:
        _quantize_attention(model, checkpoint, architecture, layers, formats.kv, len(front))
    if front:
        put_behind(model, stored_prefix(checkpoint, architecture.blocks, front, len(layers)))
    if (folder / "generation_config.json").exists():
        model.generation_config = _generation_config(folder)
    model = model.to(device).eval()
    with report_build_errors(folder), torch.no_grad():  # as ``check_computes``; every layer is in memory already
        model(torch.zeros(1, PROBE, dtype=torch.int64, device=device), use_cache=False)
    return model


def _quantize_attention(
    model: Any,
    checkpoint: Checkpoint,
    architecture: Architecture,
    layers: Sequence[nn.Module],
    kv: ActFormat,
    prefix: int,
) -> None:
    """Quantize Q, K and V from now on, but for those of a prefix, with each layer's ratios if the format has them.

    Those of the decoder layers only: the encoder of a model that also sees computes as it did.
    """
    kinds = enumerate(zip(layers, architecture.layers, strict=True))
    found = {i: layer.get_submodule(kind.attention) for i, (layer, kind) in kinds if kind.attention is not None}
    quantize_attention((text_config(model.config), *(module.config for module in found.values())), kv, prefix)
    if not isinstance(kv, RotatedTokens):
        return
    for index, module in found.items():
        ratios = read_ratios(checkpoint, f"{architecture.blocks}.{index}")
        module.register_buffer(ATTRIBUTE, ratios, persistent=False)


def _ops_of(
    checkpoint: Checkpoint, architecture: Architecture, layers: Sequence[nn.Module]
) -> list[dict[str, RuntimeOp]]:
    """The runtime ops of every layer, by module names within it."""
    kinds = zip(architecture.layers, layers, strict=True)
    shapes = [parameter_shapes(kind, layer) for kind, layer in kinds]
    return [read_ops(checkpoint, architecture, own, index) for index, own in enumerate(shapes)]


def _expert_inputs(
    experts: Experts, prefix: str, formats: ModelFormats, ops: Mapping[str, RuntimeOp], device: str
) -> dict[str, LinearInput]:
    """What happens to the inputs of experts' linears, by name within the layer; only those with something to do."""
    names = [name for group in experts.groups for name in group]
    moved = {name: op.to(device) for name, op in ops.items()}
    inputs = {
        name: LinearInput(formats.input(f"{prefix}{name}"), moved.get(name), mix=moved.get(at_input(name)))
        for name in names
    }
    return {name: own for name, own in inputs.items() if own}


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # it checks its fields with exceptions of many types
        raise LowbitError(f"cannot read {folder / 'generation_config.json'}: {one_line(error)}") from error


class _Runtime(nn.Module):
    """A runtime op whose tensors are buffers, so that they move with the model to another device."""

    def __init__(self, op: RuntimeOp) -> None:
        super().__init__()
        self.kind, self.names = type(op), op.fields()
        for name in self.names:
            self.register_buffer(name, getattr(op, name), persistent=False)

    @property
    def op(self) -> RuntimeOp:
        """The op with its tensors where the model is."""
        return self.kind(*(getattr(self, name) for name in self.names))

    def forward(self, x: Tensor, format: ActFormat | None = None) -> Tensor:
        """``(..., width) -> (..., width)``."""
        return self.op(x, format)


def _attach(layer: Any, name: str, op: RuntimeOp, norm_offset: float, hooked: bool) -> None:
    """Attach a runtime op after a norm, on a linear's input, or before a linear for use by ``_quantize_inputs``.

    ``hooked``: ``_quantize_inputs`` will also apply the op on this linear's input.
    """
    if (linear := linear_behind(name)) is not None:
        module = layer.get_submodule(linear)
        module.add_module(MIX, _Runtime(op))
        if not hooked:
            module.register_forward_pre_hook(_apply_on_input)
        return
    module = layer.get_submodule(name)
    if op.place == "behind a norm" and (fused := gathered_norm(module, norm_offset, op)):
        layer.set_submodule(name, fused)
        return
    module.add_module(PREFIX, _Runtime(op))
    if op.place == "behind a norm":
        module.register_forward_hook(_apply_behind)


def _apply_behind(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Any:
    """A forward hook: the module's runtime op on its output."""
    return module.get_submodule(PREFIX)(out)


def _apply_on_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """A forward pre-hook: the runtime op on the linear's input."""
    return (module.get_submodule(MIX)(args[0]), *args[1:])


def _quantize_behind_gathers(model: Any, architecture: Architecture, formats: ModelFormats) -> set[str]:
    """Let gathered norms quantize for their readers where these agree and a kernel does it; the readers' names."""
    out: set[str] = set()
    for place, norm in model.named_modules():
        if not isinstance(norm, GatheredRMSNorm) or norm.into is not None:
            continue
        readers = linears_at(architecture, place)
        given = {formats.input(name) for name in readers if name in formats.modules}
        format = given.pop() if len(given) == 1 else None
        own = [dict(model.get_submodule(name).named_children()) for name in readers if name in formats.modules]
        if isinstance(format, IntTokens) and not format.symmetric and len(own) == len(readers) and not any(own):
            norm.bits = format.bits
            out |= set(readers)
    return out


def _quantize_inputs(linear: nn.Module, format: ActFormat, qparams: QParams | None, behind: bool) -> None:
    """Quantize a linear's input, with the runtime ops on it and before it if there are any.

    ``behind``: a gathered norm does it where a kernel runs. Qparams of a static input are buffers, so that they move
    with the model to another device.
    """
    if qparams is not None:
        for name, value in zip(STATIC, qparams, strict=True):
            linear.register_buffer(name, value, persistent=False)
    linear.register_forward_pre_hook(_InputHook(format, behind))


@dataclass(frozen=True)
class _InputHook:
    """A forward pre-hook; an object and no closure, so that the model can be pickled."""

    format: ActFormat
    behind: bool = False

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, mix, op = args[0], module._modules.get(MIX), module._modules.get(PREFIX)
        if fused_kernels.on_kernels(x):
            if self.behind:
                return args
            ops = [None if own is None else cast(_Runtime, own).op for own in (mix, op)]
            if (both := HadamardQuantize.of(ops[0], self.format, ops[1])) is not None:
                return (both.fused(x), *args[1:])
        x = x if mix is None else mix(x)
        if op is not None:
            return (op(x, self.format), *args[1:])
        static = [module._buffers[name] for name in STATIC if name in module._buffers]
        qparams = QParams(*(value for value in static if value is not None)) if static else None
        return (quantize_input(x, self.format, qparams), *args[1:])
