"""The ``quantization_config`` of a run folder, in the words of ``compressed-tensors``, and what loaders make of it.

Every config group names the layout of its modules (``format``): without it the loader infers one, and takes packed
integers with quantized inputs for plain ones. Weight-only asymmetric checkpoints load in ``transformers`` 5.23 and
5.24 only if dequantized at load time (otherwise the packed zero points mismatch a placeholder of another shape), so
their config requests that.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat, IntegerActs, IntTokens
from lowbit.quant.float_activations import FloatActs
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat, integer
from lowbit.quant.layouts import FP8, OWN, PACKED, PLAIN
from lowbit.quant.scales import PowerOfTwo, TwoLevel
from lowbit.quant.scheme import ModelFormats, ModuleFormats
from lowbit.quant.static_activations import Nvfp4Acts, StaticInt
from lowbit.quant.static_clusters import StaticClusters

MIXED = "mixed-precision"


def stock_loads(formats: ModelFormats, embed: str, two_d_inputs: bool) -> str | None:
    """Why stock ``transformers`` cannot run the formats as simulated, or ``None`` if it can.

    ``embed``: name of the embedding; ``two_d_inputs``: some linears receive ``(tokens, width)``.
    """
    modules = formats.modules
    for module in modules.values():
        inputs_args(module.stated_input)  # refuses what the library does not have
    if formats.kv is not None:
        return "Q, K and V quantized in the attention are not part of the compressed-tensors format"
    if (own := next((m.weight.name for m in modules.values() if m.layout is OWN), None)) is not None:
        return f"{own} is a format of llama.cpp, not part of the compressed-tensors format"
    if (act := next((a for a in _input_formats(formats) if isinstance(a, StaticClusters)), None)) is not None:
        return f"{act.name} inputs have a range for each cluster of channels, which compressed-tensors lacks"
    if embed in modules and modules[embed].layout not in (PLAIN, FP8):
        return f"embeddings in {modules[embed].weight.name} do not load"
    activations = _input_formats(formats)
    if any(isinstance(act, IntTokens | FloatActs) for act in activations) and two_d_inputs:
        return "compressed-tensors uses one range for all tokens where a layer flattens its input to (tokens, width)"
    weights = {m.weight for m in modules.values()}
    if formats.dense:
        if activations:
            return "weights that are made dense at load time have float inputs"
        if len(weights) > 1:
            return "weights that are made dense at load time are read in one format"
    free = [m for m in modules.values() if _asymmetric(m) and m.layout.name == PACKED.name]
    if free and len(weights) > 1:
        return "weight-only checkpoints with asymmetric and other formats side by side do not load"
    return None


def stock_loads_experts(formats: ModelFormats, experts: Sequence[str], embed: str) -> str | None:
    """Why stock ``transformers`` cannot run a mixture's experts as simulated, or ``None`` if it can.

    It dequantizes all experts into one tensor when it loads them, by the first group of ``quantization_config`` that
    names experts, or else by the first that names a class.

    Args:
        formats: of every quantized module.
        experts: full names of all linears of experts.
        embed: name of the embedding.
    """
    own = [formats.modules[name] for name in experts if name in formats.modules]
    if not own and not formats.modules:
        return None
    if len(own) < len(experts):
        return "float experts beside quantized linears do not load"
    weights = {module.weight for module in own}
    if len(weights) > 1:
        return "experts in several formats do not load: all are read in one"
    if any(module.stated_input is not None for module in own):
        return "transformers computes experts with float inputs"
    if any(_asymmetric(module) for module in own):
        return "zero points of experts are not read"
    if any(isinstance(weight.scales, TwoLevel) for weight in weights):
        return "the tensors' scales of experts are not read"
    ordered = _groups(formats, embed)
    read = next((module for module, names in ordered[1:] if any("experts" in n for n in names)), ordered[0][0])
    if read.weight not in weights:
        return f"experts are read as {read.weight.name}, the format of other linears with such names"
    return None


def stock_dtype(formats: ModelFormats) -> str:
    """The dtype in which stock ``transformers`` runs the formats as simulated.

    Its decoders of MX and NVFP4 weights give bfloat16, whatever the model's dtype.
    """
    blocks = any(isinstance(m.weight, FloatFormat) and m.weight.in_blocks for m in formats.modules.values())
    return "bfloat16" if blocks else "float32"


def _asymmetric(module: ModuleFormats) -> bool:
    return isinstance(module.weight, IntFormat) and not module.weight.symmetric


def _input_formats(formats: ModelFormats) -> set[ActFormat]:
    """The input formats that the checkpoint states."""
    return {inputs for module in formats.modules.values() if (inputs := module.stated_input) is not None}


def quantization_config(formats: ModelFormats, floats: Sequence[str], embed: str) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``.

    Args:
        formats: of every quantized module.
        floats: linears that stay float.
        embed: name of the embedding; its input is token ids, so it never has an input format.
    """
    config_groups: dict[str, Any] = {}
    for index, (module, names) in enumerate(_groups(formats, embed)):
        targets = ["Linear"] if index == 0 else [_exact_pattern(name) for name in names]
        config_groups[f"group_{index}"] = _group(module, targets)
    if embed in formats.modules:
        config_groups["embeddings"] = _group(formats.modules[embed], [_exact_pattern(embed)])
    layouts = formats.layouts
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layouts[0] if len(layouts) == 1 else MIXED,
        "quantization_status": "compressed",
        "version": _library_version(),
        "config_groups": config_groups,
        "ignore": list(floats),
    }
    modules = formats.modules.values()
    asymmetric = any(_asymmetric(module) and module.layout.name == PACKED.name for module in modules)
    if asymmetric or formats.dense:
        config["dequantize"] = True
    return config


def _groups(formats: ModelFormats, embed: str) -> list[tuple[ModuleFormats, list[str]]]:
    """Formats with the modules that have them, but for the embedding, the most common first.

    That one is the default for class ``Linear``; the others name their modules and take precedence.
    """
    groups: dict[ModuleFormats, list[str]] = {}
    for name, module in formats.modules.items():
        if name != embed:
            own = ModuleFormats(module.weight, module.stated_input, module.outside)
            if own.layout.name != module.layout.name:
                own = replace(own, expert=module.expert)
            groups.setdefault(own, []).append(name)
    return sorted(groups.items(), key=lambda pair: -len(pair[1]))


def _library_version() -> str:
    # Imported late: the library's models import more than a scheme's name needs.
    import compressed_tensors

    return str(compressed_tensors.__version__)


def _exact_pattern(name: str) -> str:
    return f"re:^{re.escape(name)}$"


def _group(module: ModuleFormats, targets: list[str]) -> dict[str, Any]:
    if module.layout is OWN:
        # No loader knows these; an unreadable group makes one fail with the group's name.
        name = module.weight.name
        return {"targets": targets, "format": OWN.name, "weights": {"num_bits": name}, "input_activations": None}
    return {
        "targets": targets,
        "format": module.layout.name,
        "weights": weights_args(module.weight),
        "input_activations": inputs_args(module.stated_input),
    }


def weights_args(format: Format) -> dict[str, Any]:
    """A weight format as compressed-tensors' arguments; raises ``LowbitError`` for one that it lacks."""
    if isinstance(format, FloatFormat):
        return _float_args(format)
    integers = integer(format, "a compressed-tensors layout")
    shape = {"strategy": "group" if format.group else "channel", "group_size": format.group}
    return {"num_bits": integers.bits, "type": "int", "symmetric": integers.symmetric, **shape}


def _float_args(format: FloatFormat) -> dict[str, Any]:
    common = {"num_bits": format.elements.bits, "type": "float", "symmetric": True, "group_size": format.group}
    if isinstance(format.scales, TwoLevel):
        return {**common, "strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    if isinstance(format.scales, PowerOfTwo):
        return {**common, "strategy": "group", "scale_dtype": "torch.uint8"}
    if format.rows > 1:
        return {**common, "group_size": None, "strategy": "block", "block_structure": [format.rows, format.group]}
    return {**common, "strategy": "channel" if format.rows else "tensor"}


def inputs_args(format: ActFormat | None) -> dict[str, Any] | None:
    """An input format as compressed-tensors' arguments; raises ``LowbitError`` for one that it lacks."""
    if format is None:
        return None
    if isinstance(format, FloatActs):
        scales = {"scale_dtype": "torch.uint8"} if format.powers else {}
        kind = {"strategy": "group", "group_size": format.group} if format.group else {"strategy": "token"}
        return {
            "num_bits": format.element.bits,
            "type": "float",
            "symmetric": True,
            "dynamic": True,
            **kind,
            **scales,
        }
    if isinstance(format, Nvfp4Acts):
        shape = {"strategy": "tensor_group", "group_size": format.group, "scale_dtype": "torch.float8_e4m3fn"}
        return {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": "local", **shape}
    if isinstance(format, StaticClusters):
        # No loader knows these; a number of bits that is none makes one fail with the format's name.
        return {"num_bits": format.name, "type": "int", "symmetric": format.symmetric, "dynamic": False}
    if not isinstance(format, IntegerActs):
        raise LowbitError(f"a compressed-tensors layout holds integer and float input formats; {format.name} given")
    static = isinstance(format, StaticInt)
    ranges = {"strategy": "tensor" if static else "token", "dynamic": not static}
    return {"num_bits": format.bits, "type": "int", "symmetric": format.symmetric, **ranges}
