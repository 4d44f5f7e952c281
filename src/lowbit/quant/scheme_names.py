"""Names of schemes and of the formats in overrides.

A scheme of integers has a name of ``w{2..8}a{4,6,8,16,fp8}[kv{4,8}[h]][g{n}][-sym|-asym|-sym-asym][-static[n]]``:

========= ==========================================================================================
``w4``    weights of the blocks' linears at 4 bits, one scale per output channel unless ``g`` is given
``a8``    inputs of those linears at 8 bits, one dynamic range per token; ``a16``: float
``kv4``   queries, keys and values at 4 bits after the rotary embedding, per token and head, asymmetric
``kv4h``  the same behind a Hadamard rotation of each head, see ``rotated_kv.py``
``g64``   one scale for every 64 consecutive input channels of a weight row
``afp8``  inputs in FP8 (E4M3), one scale per token
``-sym``  zero points fixed at the middle of the range; ``-asym``: free. For weights and integer activations;
          ``-sym-asym``: symmetric weights, asymmetric activations
``-static`` one calibrated range per input tensor, stored with the weight; ``a16`` then is 16-bit integers.
          Weights are symmetric and inputs asymmetric unless ``-sym`` or ``-asym`` sets both
``-static32`` up to 32 calibrated ranges per input tensor, each of consecutive channels; 4, 6 or 8 bits
========= ==========================================================================================

Others are names of formats (``NAMED``): floating point with the same format for inputs (``mxfp4``, ``fp8``) or float
ones (``mxfp4a16``), and llama.cpp's (``q4_k``, ``iq4_nl``, ``q2_0``).

A dtype behind a colon is that of the weights' scales (``w4a16g128-sym:bf16``, see ``scale_dtype.py``).

Without a suffix, schemes with integer activations are asymmetric and others symmetric: the literature evaluates the
former, every runtime supports the latter exactly, and stock ``transformers`` loads both.
Embeddings and the output head stay float unless an override names them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat, IntTokens
from lowbit.quant.float_activations import FP8_GROUPS, FP8_TOKENS, MXFP4_ACTS, MXFP8_ACTS
from lowbit.quant.floating import FLOATS, FP8, FP8_BLOCK, FP8_TENSOR, MXFP4, MXFP6, MXFP8, NVFP4
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import K_QUANTS
from lowbit.quant.rotated_kv import RotatedTokens
from lowbit.quant.scale_dtype import suffix_of, with_suffix
from lowbit.quant.scheme import Scheme
from lowbit.quant.static_activations import NVFP4_ACTS, StaticInt
from lowbit.quant.static_clusters import MOST_CLUSTERS, StaticClusters
from lowbit.quant.tables import TABLES

_NAME = re.compile(r"w(\d+)a(\d+|fp8)(?:kv(\d+)(h)?)?(?:g(\d+))?(-sym-asym|-sym|-asym)?(?:-(static)(\d+)?)?")
_SPEC = re.compile(r"w(\d+)(?:g(\d+))?(-sym|-asym)?")
WEIGHT_BITS, ACT_BITS, KV_BITS = range(2, 9), (4, 6, 8, 16), (4, 8)
CLUSTERED_BITS = ("4", "6", "8")
GRAMMAR = "w{2..8}a{4,6,8,16,fp8}[kv{4,8}[h]][g{n}][-sym|-asym|-sym-asym][-static[n]]"
OVERRIDE_GRAMMAR = "w{2..8}[g{n}][-sym|-asym]"
# Weight formats that have names of their own.
WEIGHTS: dict[str, Format] = {**FLOATS, **K_QUANTS, **TABLES}
NAMED: dict[str, tuple[Format, ActFormat | None]] = {
    "nvfp4": (NVFP4, NVFP4_ACTS),
    "nvfp4a16": (NVFP4, None),
    "mxfp4": (MXFP4, MXFP4_ACTS),
    "mxfp4a16": (MXFP4, None),
    "mxfp4a8": (MXFP4, MXFP8_ACTS),
    "mxfp6a16": (MXFP6, None),
    "mxfp6a8": (MXFP6, MXFP8_ACTS),
    "mxfp8": (MXFP8, MXFP8_ACTS),
    "mxfp8a16": (MXFP8, None),
    "fp8": (FP8, FP8_TOKENS),
    "fp8a16": (FP8, None),
    "fp8-block": (FP8_BLOCK, FP8_GROUPS),
    "fp8-blocka16": (FP8_BLOCK, None),
    "fp8-tensora16": (FP8_TENSOR, None),
    **{name: (format, None) for name, format in K_QUANTS.items()},
    **{name: (format, None) for name, format in TABLES.items()},
}


def parse_scheme(name: str) -> Scheme:
    """The scheme of a name.

    >>> s = parse_scheme("w4a8kv4g64-asym")
    >>> s.weight.bits, s.weight.group, s.act.bits, s.kv.bits, s.weight.symmetric
    (4, 64, 8, 4, False)
    """
    if ":" in (name := name.lower()):
        base, _, suffix = name.partition(":")
        scheme = parse_scheme(base)
        return replace(scheme, name=name, weight=with_suffix(scheme.weight, suffix, name))
    if name in NAMED:
        return Scheme(name, *NAMED[name])
    match = _NAME.fullmatch(name)
    if match is None:
        raise LowbitError(
            f"unknown scheme '{name}': give {GRAMMAR}, for example w4a16g64-sym or w8a8, or one of {', '.join(NAMED)}"
        )
    weight, act, kv, rotated, group, suffix, static, clusters = match.groups()
    _check_allowed(name, "weight bits", int(weight), WEIGHT_BITS)
    if act != "fp8":
        _check_allowed(name, "activation bits", int(act), ACT_BITS)
    if kv:
        _check_allowed(name, "kv bits", int(kv), KV_BITS)
    symmetric, inputs = _inputs(name, act, suffix, static is not None, int(clusters) if clusters else None)
    return Scheme(
        name,
        IntFormat(int(weight), int(group) if group else None, symmetric),
        inputs,
        (RotatedTokens if rotated else IntTokens)(int(kv), symmetric=False) if kv else None,
    )


def _inputs(
    name: str, act: str, suffix: str | None, static: bool, clusters: int | None
) -> tuple[bool, ActFormat | None]:
    """Whether a scheme's weights are symmetric, and its inputs' format: what follows from the suffixes."""
    if clusters is not None:
        if act not in CLUSTERED_BITS:
            raise LowbitError(f"scheme '{name}': a{act} given; static inputs in clusters are a4, a6 or a8")
        if not 2 <= clusters <= MOST_CLUSTERS:
            raise LowbitError(f"scheme '{name}': {clusters} clusters given; 2 to {MOST_CLUSTERS} are allowed")
        return suffix != "-asym", StaticClusters(int(act), suffix == "-sym", clusters)
    if static:
        if act not in ("8", "16"):
            raise LowbitError(f"scheme '{name}': a{act} given; static inputs are a8 or a16")
        return suffix != "-asym", StaticInt(int(act), suffix == "-sym")
    floats = act in ("16", "fp8")
    if floats and suffix == "-sym-asym":
        raise LowbitError(f"scheme '{name}': a{act} inputs have no zero point; give -sym or -asym, for the weights")
    symmetric = suffix.startswith("-sym") if suffix else floats
    if act == "fp8":
        return symmetric, FP8_TOKENS
    return symmetric, None if floats else IntTokens(int(act), suffix == "-sym")


def _check_allowed(name: str, what: str, bits: int, allowed: range | tuple[int, ...]) -> None:
    if bits not in allowed:
        raise LowbitError(f"scheme '{name}': {bits} {what} given; allowed: {', '.join(map(str, allowed))}")


def parse_override(text: str) -> Format | None:
    """A weight format such as ``w8``, ``w4g64-asym``, ``q6_k`` or ``float``; integers are symmetric by default."""
    if text.lower() == "float":
        return None
    if ":" in text:
        base, _, suffix = text.lower().partition(":")
        spec = parse_override(base)
        return None if spec is None else with_suffix(spec, suffix, text)
    if text.lower() in WEIGHTS:
        return WEIGHTS[text.lower()]
    match = _SPEC.fullmatch(text.lower())
    if not match:
        raise LowbitError(
            f"override '{text}': give 'float', {OVERRIDE_GRAMMAR}, for example w8g64, or one of {', '.join(WEIGHTS)}"
        )
    bits, group, suffix = match.groups()
    return IntFormat(int(bits), int(group) if group else None, suffix != "-asym")


def override_text(spec: Format | None) -> str:
    """The inverse of ``parse_override``.

    >>> override_text(parse_override("w4g64-asym"))
    'w4g64-asym'
    >>> override_text(parse_override("fp8:f32"))
    'fp8:f32'
    """
    return "float" if spec is None else f"{spec.name}{suffix_of(spec)}"


def with_overrides(scheme: Scheme, overrides: Mapping[str, str]) -> Scheme:
    """``scheme`` with ``{glob: format}`` before its own overrides; an existing glob is replaced."""
    added = {str(glob): parse_override(str(text)) for glob, text in overrides.items()}
    kept = tuple((glob, spec) for glob, spec in scheme.overrides if glob not in added)
    return replace(scheme, overrides=(*added.items(), *kept))
