"""Quantized weights in the layouts of ``compressed-tensors``, and the config that describes them to loaders.

Two layouts are used, according to what stock ``transformers`` loads:

* weight-only schemes: ``pack-quantized``, codes as a dense bit stream in int32 words;
* schemes with activations: ``int-quantized``, one int8 per code, because the packed layout does not load with
  activations there. On disk a code takes 8 bits at any width; ``bits_per_weight`` counts the format's width.

Weight-only asymmetric checkpoints load in ``transformers`` 5.23 only if dequantized at load time (otherwise the
packed zero points mismatch a placeholder of another shape), so their config requests that. Dequantization multiplies
in the dtype of the scale; the scale is therefore stored as float32 with the same 16-bit value, and the product is
exact.
"""

from __future__ import annotations

import importlib.metadata
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat, IntTokens
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.integer import IntFormat, integer
from lowbit.quant.runtimes import RuntimeInput
from lowbit.quant.scales import PowerOfTwo, TwoLevel
from lowbit.quant.scheme import ModelFormats


def layout_of(formats: ModelFormats) -> str:
    """``pack-quantized`` or ``int-quantized``."""
    return "int-quantized" if _input_formats(formats) else "pack-quantized"


def _input_formats(formats: ModelFormats) -> set[IntTokens]:
    """The input formats that the checkpoint states."""
    return {inputs for module in formats.modules.values() if (inputs := _input_format(module.input)) is not None}


def _input_format(format: ActFormat | None) -> IntTokens | None:
    """An input format as a checkpoint states it; a runtime's own quantization of float inputs is not stated."""
    if format is None or isinstance(format, RuntimeInput):
        return None
    if not isinstance(format, IntTokens):
        raise LowbitError(f"a compressed-tensors layout holds integer input formats; {format.name} given")
    return format


def _integer(format: Format) -> IntFormat:
    return integer(format, "a compressed-tensors layout")


def pack(q: QTensor, layout: str) -> dict[str, Tensor]:
    """A quantized weight as the tensors stored under the linear's name.

    ``pack-quantized``: ``weight_packed`` int32 ``(out, ceil(in * bits / 32))``, ``weight_shape`` int64 ``(2,)``;
    ``int-quantized``: ``weight`` int8 ``(out, in)``. Both: ``weight_scale`` ``(out, groups)`` and, if asymmetric,
    ``weight_zero_point``. Stored values are ``code - 2**(bits - 1)``.
    """
    # Imported here, because the package loads parts of transformers that plans and messages do without.
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    format = _integer(q.format)
    signed = (q.codes.to(torch.int16) - format.middle).to(torch.int8)
    zero = (q.qparams.zero.to(torch.int16) - format.middle).to(torch.int8)
    if layout == "int-quantized":
        out = {"weight": signed, "weight_scale": q.qparams.scale.to(format.scale_dtype)}
        return out if format.symmetric else {**out, "weight_zero_point": zero}
    out = {
        "weight_packed": pack_to_int32(signed, format.bits),
        "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
    }
    if format.symmetric:
        return {**out, "weight_scale": q.qparams.scale.to(format.scale_dtype)}
    packed_zero = pack_to_int32(zero, format.bits, packed_dim=0)
    return {**out, "weight_scale": q.qparams.scale.to(torch.float32), "weight_zero_point": packed_zero}


@dataclass(frozen=True)
class Stored:
    """How one tensor of a quantized weight is stored."""

    dtype: torch.dtype
    shape: tuple[int, ...]


def stored_tensors(format: Format, layout: str, rows: int, columns: int) -> dict[str, Stored]:
    """Dtypes and shapes of the tensors of ``pack`` for a weight ``(rows, columns)``.

    >>> stored_tensors(IntFormat(4, group=16, symmetric=True), "pack-quantized", 8, 64)["weight_packed"]
    Stored(dtype=torch.int32, shape=(8, 8))
    """
    format = _integer(format)
    groups = format.groups(columns)
    scale = Stored(format.scale_dtype, (rows, groups))
    if layout == "int-quantized":
        out = {"weight": Stored(torch.int8, (rows, columns)), "weight_scale": scale}
        return out if format.symmetric else {**out, "weight_zero_point": Stored(torch.int8, (rows, groups))}
    out = {
        "weight_packed": Stored(torch.int32, (rows, math.ceil(columns * format.bits / 32))),
        "weight_shape": Stored(torch.int64, (2,)),
    }
    if format.symmetric:
        return {**out, "weight_scale": scale}
    zero = Stored(torch.int32, (math.ceil(rows * format.bits / 32), groups))
    return {**out, "weight_scale": Stored(torch.float32, (rows, groups)), "weight_zero_point": zero}


def _check_stored(stored: Mapping[str, Tensor], format: Format) -> None:
    """Refuse tensors that are not what ``pack`` writes for the shape that they state."""
    layout = "pack-quantized" if "weight_packed" in stored else "int-quantized"
    shape = stored["weight"].shape if layout == "int-quantized" else stored["weight_shape"].flatten()[:3].tolist()
    if len(shape) != 2 or min(shape) < 1:
        raise ValueError(f"the weight's shape is {list(shape)}; two sizes of 1 or more are allowed")
    for name, expected in stored_tensors(format, layout, int(shape[0]), int(shape[1])).items():
        found = Stored(stored[name].dtype, tuple(stored[name].shape))
        if found != expected:
            raise ValueError(
                f"{name} is {found.dtype} {found.shape}; for a weight of {list(shape)} only {expected.dtype} "
                f"{expected.shape} is allowed"
            )


def unpack(stored: Mapping[str, Tensor], format: Format) -> QTensor:
    """The inverse of ``pack``, from the tensors under a linear's name; the qparams are in float32.

    Raises:
        ValueError: a tensor has another dtype or shape than ``pack`` gives it; they may come from a broken file.
    """
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    format = _integer(format)
    _check_stored(stored, format)
    scale = stored["weight_scale"].to(torch.float32)
    if packed := "weight_packed" in stored:
        shape = torch.Size(stored["weight_shape"].tolist())
        signed = unpack_from_int32(stored["weight_packed"], format.bits, shape)
    else:
        signed = stored["weight"]
    if format.symmetric:
        zero = torch.full_like(scale, format.middle)
    else:
        zero_points = stored["weight_zero_point"]
        if packed:
            zero_points = unpack_from_int32(zero_points, format.bits, scale.shape, packed_dim=0)
        zero = zero_points.to(torch.float32) + format.middle
    codes = (signed.to(torch.int16) + format.middle).to(torch.uint8)
    return QTensor(codes, QParams(scale, zero), format)


def packed_names(linear: str, format: Format, layout: str) -> list[str]:
    """Names of the tensors of ``pack`` for a linear."""
    names = ["weight_packed", "weight_shape"] if layout == "pack-quantized" else ["weight"]
    names += ["weight_scale"] if _integer(format).symmetric else ["weight_scale", "weight_zero_point"]
    return [f"{linear}.{name}" for name in names]


def stock_loads(formats: ModelFormats, embed: str, two_d_inputs: bool) -> str | None:
    """Why stock ``transformers`` cannot run the formats as simulated, or ``None`` if it can.

    ``embed``: name of the embedding; ``two_d_inputs``: some linears receive ``(tokens, width)``.
    """
    weights = {_integer(format) for format in formats.weights.values()}
    activations = _input_formats(formats)
    if formats.kv is not None:
        return "Q, K and V quantized in the attention are not part of the compressed-tensors format"
    if embed in formats.modules:
        return "transformers 5.23 cannot build a model around quantized embeddings"
    if activations and two_d_inputs:
        return "compressed-tensors uses one range for all tokens where a layer flattens its input to (tokens, width)"
    if not activations and len(weights) > 1 and not all(format.symmetric for format in weights):
        return "weight-only checkpoints with asymmetric and other formats side by side do not load"
    return None


def quantization_config(formats: ModelFormats, floats: Sequence[str], embed: str) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``.

    Args:
        formats: of every quantized module.
        floats: linears that stay float.
        embed: name of the embedding; its input is token ids, so it never has an input format.
    """
    groups: dict[tuple[IntFormat, IntTokens | None], list[str]] = {}
    for name, module in formats.modules.items():
        if name != embed:
            groups.setdefault((_integer(module.weight), _input_format(module.input)), []).append(name)
    # The most common format is the default for class Linear; the others name their modules and take precedence.
    ordered = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    entries = [(["Linear"] if i == 0 else [_exact_pattern(n) for n in names]) for i, (_, names) in enumerate(ordered)]
    config_groups: dict[str, Any] = {
        f"group_{i}": {"targets": targets, "weights": weights_args(weight), "input_activations": _activations(inputs)}
        for i, (targets, ((weight, inputs), _)) in enumerate(zip(entries, ordered, strict=True))
    }
    weights = [_integer(format) for format in formats.weights.values()]
    if embed in formats.modules:
        embedding = _integer(formats.modules[embed].weight)
        config_groups["embeddings"] = {"targets": [_exact_pattern(embed)], "weights": weights_args(embedding)}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layout_of(formats),
        "quantization_status": "compressed",
        "version": importlib.metadata.version("compressed-tensors"),
        "config_groups": config_groups,
        "ignore": list(floats),
    }
    asymmetric = not all(format.symmetric for format in weights)
    if asymmetric and not _input_formats(formats) and len(set(weights)) == 1:
        config["dequantize"] = True
    return config


def _exact_pattern(name: str) -> str:
    return f"re:^{re.escape(name)}$"


def weights_args(format: Format) -> dict[str, Any]:
    """A weight format as compressed-tensors' arguments; raises ``LowbitError`` for one that it lacks."""
    if isinstance(format, FloatFormat):
        return _float_args(format)
    integers = _integer(format)
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


def _activations(format: IntTokens | None) -> dict[str, Any] | None:
    if format is None:
        return None
    kind = {"strategy": "token", "dynamic": True}
    return {"num_bits": format.bits, "type": "int", "symmetric": format.symmetric, **kind}
