"""``lowbit.load``: a run folder as an ordinary ``transformers`` model, for every scheme.

Stock ``transformers`` loads most run folders by itself. This loads all of them: codes are replaced by the values
that they stand for, inputs of quantized linears are rounded by a hook, and Q, K, V by a registered attention.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from lowbit.checkpoints.resolve import load_config
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models.attention import attention_name
from lowbit.models.block import apply_online, rounded_input
from lowbit.models.families import family_of
from lowbit.models.gathered_norm import gathered_norm
from lowbit.models.validate import building, check_tensors, refuse_foreign_quantization
from lowbit.quant.runtimes import Inputs
from lowbit.quant.scheme import simulated_on
from lowbit.runs.folder import dequantized, manifest_of, manifest_specs, read_online


def load(
    folder: str | Path,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    target: str | None = None,
) -> Any:
    """A ``transformers`` causal language model from a run folder (or a float checkpoint), ready to generate.

    It computes what was evaluated, activations and KV included. ``lowbit.load(DIR).generate(...)`` works as usual.
    ``target`` names a runtime whose inputs are simulated, or ``float``; by default the one the run was made for.

    Raises:
        LowbitError: the folder is no model, is broken, or was quantized by another tool.
    """
    folder = Path(folder)
    manifest = manifest_of(folder)
    config: Any = load_config(folder, trust_remote_code)
    refuse_foreign_quantization(config, manifest, folder)
    config.__dict__.pop("quantization_config", None)
    with building(folder), init_empty_weights(include_buffers=False):
        family = family_of(config)
        model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    scheme, specs, layout = manifest_specs(manifest) if manifest else (None, {}, "")
    scheme = simulated_on(scheme, target)
    tied = f"{family.head}.weight" if config.tie_word_embeddings else ""
    shapes = {name: value.shape for name, value in model.state_dict().items() if name != tied}
    checkpoint = Checkpoint(folder)
    check_tensors(checkpoint, shapes, family.blocks, specs)
    state = dequantized(checkpoint, shapes, specs, layout)
    model.load_state_dict({n: v.to(device, dtype) for n, v in state.items()}, strict=False, assign=True)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise LowbitError(f"{folder} lacks {len(missing)} tensors of its model, '{missing[0]}' among them")
    for index, layer in enumerate(model.get_submodule(family.blocks)):
        for name, value in read_online(checkpoint, family, layer, index).items():
            norm = layer.get_submodule(name)
            if value.ndim == 2 and (fused := gathered_norm(norm, family.norm_offset, value.to(device))):
                layer.set_submodule(name, fused)
                continue
            # A buffer follows the model to another device; it is no part of what the library would save.
            layer.get_submodule(name).register_buffer("online", value.to(device), persistent=False)
            if value.ndim == 2:
                layer.get_submodule(name).register_forward_hook(
                    lambda module, args, out: apply_online(out, module.online)
                )
    for name in specs:
        if name != family.embed and scheme is not None and (inputs := scheme.inputs(name)) is not None:
            _round_inputs(model.get_submodule(name), inputs)
    if scheme is not None and scheme.kv is not None:
        model.config._attn_implementation = attention_name(scheme.kv, model.config._attn_implementation)
    if (folder / "generation_config.json").exists():
        model.generation_config = _generation_config(folder)
    return model.to(device).eval()


def _generation_config(folder: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, TypeError, ValueError) as error:
        raise LowbitError(f"cannot read {folder / 'generation_config.json'}: {error}") from error


def _round_inputs(linear: nn.Module, inputs: Inputs) -> None:
    """Round what a linear reads; a run may have left factors on the ends of ranges, or offsets, before it."""

    def hook(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if hasattr(module, "online"):
            return (rounded_input(args[0], inputs.spec, module.online), *args[1:])
        return (inputs.round(args[0]), *args[1:])

    linear.register_forward_pre_hook(hook)
