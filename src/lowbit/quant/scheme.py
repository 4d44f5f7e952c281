"""Schemes: the formats of weights, activations, and keys and values, with overrides by module name.

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

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import yaml

from lowbit.errors import LowbitError, canonical, unknown
from lowbit.paths import user_path
from lowbit.quant.activations import ActFormat, IntTokens
from lowbit.quant.float_activations import FP8_GROUPS, FP8_TOKENS, MXFP4_ACTS, MXFP8_ACTS
from lowbit.quant.floating import FLOATS, FP8, FP8_BLOCK, FP8_TENSOR, MXFP4, MXFP6, MXFP8, NVFP4, FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import K_QUANTS
from lowbit.quant.layout import Layout, Stored
from lowbit.quant.layouts import layout_of
from lowbit.quant.rotated_kv import RotatedTokens
from lowbit.quant.runtimes import RUNTIMES, RuntimeInput
from lowbit.quant.scale_dtype import suffix_of, with_suffix
from lowbit.quant.static_activations import NVFP4_ACTS, StaticActs, StaticInt
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


@dataclass(frozen=True)
class Scheme:
    """The formats of a run.

    Attributes:
        name: the name from which it is parsed.
        weight: format of the blocks' linear weights.
        act: format of those linears' inputs: dynamic, its ranges depend on one token, or static; ``None``: float.
        kv: format of Q, K and V inside the attention, dynamic per token and head; ``None``: float.
        overrides: ``(glob, format)`` pairs over module names such as ``model.layers.3.mlp.down_proj`` or
            ``lm_head``; the first match wins; ``None`` leaves the module in float.
        target: the runtime whose arithmetic is simulated, a name of ``RUNTIMES``; ``None``: the scheme's own. Set
            by ``for_runtime``.
    """

    name: str
    weight: Format
    act: ActFormat | None = None
    kv: IntTokens | None = None
    overrides: tuple[tuple[str, Format | None], ...] = ()
    target: str | None = None

    def override(self, module: str) -> tuple[str, Format | None] | None:
        """The first override that matches a module's full name, or ``None``."""
        return next((pair for pair in self.overrides if fnmatch.fnmatchcase(module, pair[0])), None)

    def module(self, name: str) -> ModuleFormats | None:
        """The formats of a linear inside a block, by its full name; ``None``: it stays float.

        Its input has the scheme's format or, if the scheme has none, that of the target runtime.
        """
        override = self.override(name)
        weight = override[1] if override else self.weight
        if weight is None:
            return None
        if self._has_block_floats:
            weight = _stored_as(weight, torch.bfloat16)
        return ModuleFormats(weight, self._input(weight))

    def outside(self, name: str) -> ModuleFormats | None:
        """The formats of a module outside the blocks (embedding, head): float unless an override matches it.

        The head's input is never static: its range would be known only behind the last block, and the head is
        written before the first.
        """
        formats = self.module(name) if self.override(name) else None
        if formats is None:
            return None
        inputs = None if isinstance(formats.input, StaticActs) else formats.input
        return replace(formats, input=inputs, outside=True)

    @property
    def _has_block_floats(self) -> bool:
        """MX or NVFP4 weights: stock decoders of these need a bfloat16 model, which rounds float16 scales."""
        given = (self.weight, *(spec for _, spec in self.overrides))
        return any(isinstance(spec, FloatFormat) and spec.in_blocks for spec in given)

    def _input(self, weight: Format) -> ActFormat | None:
        if self.act is not None:
            return self.act
        quantizes = self.target is not None and RUNTIMES[self.target].round is not None
        return RuntimeInput(str(self.target), weight) if quantizes else None


@dataclass(frozen=True)
class ModuleFormats:
    """The formats of one module.

    Attributes:
        weight: the weight's.
        input: the input's; ``None``: float.
        outside: the module is an embedding or the head.
        expert: it belongs to an expert of a mixture.
        dense: stock ``transformers`` makes the weight dense when it loads it, see ``runs/stock.py``.
    """

    weight: Format
    input: ActFormat | None = None
    outside: bool = False
    expert: bool = False
    dense: bool = False

    @property
    def stated_input(self) -> ActFormat | None:
        """The input's format as a checkpoint states it; a runtime's own quantization of inputs is not stated."""
        return None if isinstance(self.input, RuntimeInput) else self.input

    @property
    def layout(self) -> Layout:
        """How the weight is stored in a run folder."""
        dense = self.dense or self.expert
        return layout_of(self.weight, self.stated_input, outside=self.outside, dense=dense)

    @property
    def input_tensors(self) -> Mapping[str, Stored]:
        """The stored tensors of a static input by their names within the module; none for others."""
        return self.input.tensors if isinstance(self.input, StaticActs) else {}


@dataclass(frozen=True)
class ModelFormats:
    """The formats of a model's modules, resolved from a scheme once, by the plan.

    Attributes:
        modules: formats of the quantized modules by full name.
        kv: format of queries, keys and values inside the attention; ``None``: float.
    """

    modules: Mapping[str, ModuleFormats] = field(default_factory=dict)
    kv: ActFormat | None = None

    def weight(self, module: str) -> Format | None:
        """A module's weight format; ``None``: float."""
        formats = self.modules.get(module)
        return formats.weight if formats else None

    def input(self, module: str) -> ActFormat | None:
        """The format of a module's input; ``None``: float."""
        formats = self.modules.get(module)
        return formats.input if formats else None

    @property
    def layouts(self) -> list[str]:
        """Names of the layouts in which weights are stored, the most common one first."""
        count = Counter(formats.layout.name for formats in self.modules.values())
        return [name for name, _ in count.most_common()]

    @property
    def dense(self) -> bool:
        """Whether stock ``transformers`` makes the weights dense when it loads them."""
        return any(formats.dense for formats in self.modules.values())

    @property
    def weights(self) -> dict[str, Format]:
        """Weight formats by full name."""
        return {name: formats.weight for name, formats in self.modules.items()}


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


def for_runtime(scheme: Scheme, name: str | None) -> Scheme:
    """``scheme`` for a target runtime: its input quantization and scale dtype; ``None``: unchanged."""
    if name is None:
        return scheme
    name = canonical("runtime", name, RUNTIMES)
    dtype = RUNTIMES[name].scale_dtype
    pairs = tuple((glob, spec and _stored_as(spec, dtype)) for glob, spec in scheme.overrides)
    return replace(scheme, weight=_stored_as(scheme.weight, dtype), overrides=pairs, target=name)


def _stored_as(format: Format, dtype: torch.dtype) -> Format:
    """Integers with scales in a runtime's dtype; other formats say themselves how scales are stored."""
    return replace(format, scale_dtype=dtype) if isinstance(format, IntFormat) else format


def simulated_on(scheme: Scheme | None, name: str | None) -> Scheme | None:
    """A finished run's scheme with the inputs of another runtime, or ``float`` ones; ``None``: unchanged.

    Raises:
        LowbitError: the model is float, or the scheme has its own input format.
    """
    if name is None:
        return scheme
    if scheme is None or scheme.act is not None:
        what = "a float model" if scheme is None else f"scheme {scheme.name}, which has its own input format"
        raise LowbitError(f"--target {name} given: it sets the inputs of a weight-only run, and this is {what}")
    name = canonical("runtime", name, [*RUNTIMES, "float"])
    return replace(scheme, target=None if name == "float" else name)


def load_scheme(name: str) -> Scheme:
    """A scheme from its name, or from a YAML file with ``scheme: NAME`` and ``overrides: {glob: format}``."""
    if not name.lower().endswith((".yaml", ".yml")):
        return parse_scheme(name)
    try:
        content = yaml.safe_load(user_path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LowbitError(f"cannot read the scheme file {name}: {' '.join(str(error).split())}") from error
    return scheme_from_dict(content, name)


def scheme_from_dict(content: Any, where: str = "scheme") -> Scheme:
    """The inverse of ``scheme_to_dict``; unknown keys are refused."""
    if not isinstance(content, dict) or "scheme" not in content:
        raise LowbitError(f"{where}: expected the keys 'scheme' (a name) and 'overrides' (glob: format)")
    for key in content:
        if key not in (known := ("scheme", "overrides", "target")):
            raise unknown(f"key in {where}", str(key), known)
    overrides = content.get("overrides") or {}
    if isinstance(overrides, list) and all(isinstance(entry, dict) for entry in overrides):
        overrides = {glob: text for entry in overrides for glob, text in entry.items()}
    if not isinstance(overrides, dict):
        raise LowbitError(f"{where}: 'overrides' must map a glob to a format such as w8g64 or float")
    return for_runtime(with_overrides(parse_scheme(str(content["scheme"])), overrides), content.get("target"))


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """Plain data for a manifest or a YAML file; overrides as a list, since their order matters."""
    target = {} if scheme.target is None else {"target": scheme.target}
    specs = (
        (glob, spec and _stored_as(spec, torch.float16)) if target else (glob, spec)
        for glob, spec in scheme.overrides
    )
    overrides = [{glob: override_text(spec)} for glob, spec in specs]
    return {"scheme": scheme.name, "overrides": overrides, **target}
