"""Rounded weights in the layouts of ``compressed-tensors``, and the config that tells loaders about them.

Two layouts are used, chosen by what stock ``transformers`` loads:

* weight-only schemes: ``pack-quantized``, codes as a dense bit stream in int32 words;
* schemes with activations: ``int-quantized``, one int8 a code, because the packed layout does not load with
  activations there. On disk this takes 8 bits a code whatever the width; ``bits_per_weight`` counts the width.

Weight-only asymmetric checkpoints load in ``transformers`` 5.23 only through its dequantizing route (on the usual
one the packed zeros mismatch a placeholder of another shape), so their config asks for it. That route multiplies
in the dtype of the scale; the scale is therefore stored as float32 there, holding the same 16-bit value, and the
product is exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import compressed_tensors
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor

from lowbit.quant.affine import Grid, QTensor, QuantSpec
from lowbit.quant.scheme import Scheme


def layout_of(scheme: Scheme) -> str:
    """``pack-quantized`` or ``int-quantized``."""
    return "pack-quantized" if scheme.act is None else "int-quantized"


def pack(q: QTensor, layout: str) -> dict[str, Tensor]:
    """A rounded weight as the tensors that a checkpoint stores under the linear's name.

    ``pack-quantized``: ``weight_packed`` int32 ``(out, ceil(in * bits / 32))``, ``weight_shape`` int64 ``(2,)``;
    ``int-quantized``: ``weight`` int8 ``(out, in)``. Both: ``weight_scale`` ``(out, groups)`` and, if asymmetric,
    ``weight_zero_point``. Stored numbers are ``code - 2**(bits - 1)``.
    """
    middle = 2 ** (q.spec.bits - 1)
    signed = (q.codes.to(torch.int16) - middle).to(torch.int8)
    zero = (q.grid.zero.to(torch.int16) - middle).to(torch.int8)
    if layout == "int-quantized":
        out = {"weight": signed, "weight_scale": q.grid.scale.to(q.spec.scale_dtype)}
        return out if q.spec.symmetric else {**out, "weight_zero_point": zero}
    out = {
        "weight_packed": pack_to_int32(signed, q.spec.bits),
        "weight_shape": torch.tensor(q.codes.shape, dtype=torch.int64),
    }
    if q.spec.symmetric:
        return {**out, "weight_scale": q.grid.scale.to(q.spec.scale_dtype)}
    packed_zero = pack_to_int32(zero, q.spec.bits, packed_dim=0)
    return {**out, "weight_scale": q.grid.scale.to(torch.float32), "weight_zero_point": packed_zero}


def unpack(stored: Mapping[str, Tensor], spec: QuantSpec) -> QTensor:
    """The inverse of ``pack``, from the tensors under a linear's name; the grid comes back in float32."""
    middle = 2 ** (spec.bits - 1)
    scale = stored["weight_scale"].to(torch.float32)
    if packed := "weight_packed" in stored:
        shape = torch.Size(stored["weight_shape"].tolist())
        signed = unpack_from_int32(stored["weight_packed"], spec.bits, shape)
    else:
        signed = stored["weight"]
    if spec.symmetric:
        zero = torch.full_like(scale, middle)
    else:
        zeros = stored["weight_zero_point"]
        if packed:
            zeros = unpack_from_int32(zeros, spec.bits, scale.shape, packed_dim=0)
        zero = zeros.to(torch.float32) + middle
    codes = (signed.to(torch.int16) + middle).to(torch.uint8)
    return QTensor(codes, Grid(scale, zero), spec)


def packed_names(linear: str, spec: QuantSpec, layout: str) -> list[str]:
    """Names of the tensors that ``pack`` gives for a linear."""
    names = ["weight_packed", "weight_shape"] if layout == "pack-quantized" else ["weight"]
    names += ["weight_scale"] if spec.symmetric else ["weight_scale", "weight_zero_point"]
    return [f"{linear}.{name}" for name in names]


def stock_loads(scheme: Scheme, specs: Mapping[str, QuantSpec], embed: str, two_d_inputs: bool) -> str | None:
    """Why stock ``transformers`` cannot run the scheme as simulated, or ``None`` if it can.

    ``specs``: format by name of every rounded module; ``embed``: the embedding's name; ``two_d_inputs``: some linears
    get ``(tokens, width)``.
    """
    if scheme.kv is not None:
        return "Q, K and V rounded in the attention are not part of the compressed-tensors format"
    if embed in specs:
        return "transformers 5.23 cannot build a model around rounded embeddings"
    if scheme.act is not None and two_d_inputs:
        return "compressed-tensors takes one range for all tokens where a layer flattens its input to (tokens, width)"
    if scheme.act is None and len(set(specs.values())) > 1 and not all(s.symmetric for s in specs.values()):
        return "weight-only checkpoints with asymmetric and other formats side by side do not load"
    return None


def quantization_config(
    scheme: Scheme, specs: Mapping[str, QuantSpec], floats: Sequence[str], embed: str
) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``.

    Args:
        scheme: the run's scheme.
        specs: the format by full name of every rounded module.
        floats: linears that stay float.
        embed: the embedding's name; its input is token ids, so it never has an activation format.
    """
    groups: dict[QuantSpec, list[str]] = {}
    for name, spec in specs.items():
        if name != embed:
            groups.setdefault(spec, []).append(name)
    # The commonest format is the default for class Linear; the others name their modules and take precedence.
    ordered = sorted(groups.items(), key=lambda pair: -len(pair[1]))
    entries = [(["Linear"] if i == 0 else [_exactly(n) for n in names]) for i, (_, names) in enumerate(ordered)]
    config_groups = {
        f"group_{i}": {"targets": targets, "weights": _weights(spec), "input_activations": _activations(scheme)}
        for i, (targets, (spec, _)) in enumerate(zip(entries, ordered, strict=True))
    }
    if embed in specs:
        config_groups["embeddings"] = {"targets": [_exactly(embed)], "weights": _weights(specs[embed])}
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": layout_of(scheme),
        "quantization_status": "compressed",
        "version": compressed_tensors.__version__,
        "config_groups": config_groups,
        "ignore": list(floats),
    }
    if scheme.act is None and not all(spec.symmetric for spec in specs.values()) and len(set(specs.values())) == 1:
        config["dequantize"] = True
    return config


def _exactly(name: str) -> str:
    return f"re:^{re.escape(name)}$"


def _weights(spec: QuantSpec) -> dict[str, Any]:
    strategy = "group" if spec.group_size else "channel"
    shape = {"strategy": strategy, "group_size": spec.group_size}
    return {"num_bits": spec.bits, "type": "int", "symmetric": spec.symmetric, **shape}


def _activations(scheme: Scheme) -> dict[str, Any] | None:
    if scheme.act is None:
        return None
    kind = {"strategy": "token", "dynamic": True}
    return {"num_bits": scheme.act.bits, "type": "int", "symmetric": scheme.act.symmetric, **kind}
