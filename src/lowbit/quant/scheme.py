"""Schemes: the formats of weights, activations, and keys and values, with overrides by module name.

A scheme has a name, ``w{2..8}a{4,6,8,16}[kv{4,8}][g{n}][-sym|-asym]``:

========= ==========================================================================================
``w4``    weights of the blocks' linears at 4 bits, one scale per output channel unless ``g`` is given
``a8``    inputs of those linears at 8 bits, one dynamic range per token; ``a16``: float
``kv4``   queries, keys and values at 4 bits after the rotary embedding, per token and head, asymmetric
``g64``   one scale for every 64 consecutive input channels of a weight row
``-sym``  zero points fixed at the middle of the range; ``-asym``: free. For weights and activations.
========= ==========================================================================================

Without a suffix, weight-only schemes are symmetric and schemes with activations asymmetric: every runtime supports
the former exactly, the literature evaluates the latter, and stock ``transformers`` loads both.
Embeddings and the output head stay float unless an override names them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from lowbit.errors import LowbitError, canonical, unknown
from lowbit.paths import user_path
from lowbit.quant.activations import ActFormat, IntTokens
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.runtimes import RUNTIMES, RuntimeInput

_NAME = re.compile(r"w(\d+)a(\d+)(?:kv(\d+))?(?:g(\d+))?(-sym|-asym)?")
_SPEC = re.compile(r"w(\d+)(?:g(\d+))?(-sym|-asym)?")
WEIGHT_BITS, ACT_BITS, KV_BITS = range(2, 9), (4, 6, 8, 16), (4, 8)
GRAMMAR = "w{2..8}a{4,6,8,16}[kv{4,8}][g{n}][-sym|-asym]"
OVERRIDE_GRAMMAR = "w{2..8}[g{n}][-sym|-asym]"


@dataclass(frozen=True)
class Scheme:
    """The formats of a run.

    Attributes:
        name: the name from which it is parsed.
        weight: format of the blocks' linear weights.
        act: format of those linears' inputs, dynamic per token; ``None``: float.
        kv: format of Q, K and V inside the attention, dynamic per token and head; ``None``: float.
        overrides: ``(glob, format)`` pairs over module names such as ``model.layers.3.mlp.down_proj`` or
            ``lm_head``; the first match wins; ``None`` leaves the module in float.
        target: the runtime whose arithmetic is simulated, a name of ``RUNTIMES``; ``None``: the scheme's own. Set
            by ``for_runtime``.
    """

    name: str
    weight: IntFormat
    act: IntTokens | None = None
    kv: IntTokens | None = None
    overrides: tuple[tuple[str, IntFormat | None], ...] = ()
    target: str | None = None

    def override(self, module: str) -> tuple[str, IntFormat | None] | None:
        """The first override that matches a module's full name, or ``None``."""
        return next((pair for pair in self.overrides if fnmatch.fnmatchcase(module, pair[0])), None)

    def module(self, name: str) -> ModuleFormats | None:
        """The formats of a linear inside a block, by its full name; ``None``: it stays float.

        Its input has the scheme's format or, if the scheme has none, that of the target runtime.
        """
        override = self.override(name)
        weight = override[1] if override else self.weight
        return None if weight is None else ModuleFormats(weight, self._input(weight))

    def outside(self, name: str) -> ModuleFormats | None:
        """The formats of a module outside the blocks (embedding, head): float unless an override matches it."""
        return self.module(name) if self.override(name) else None

    def _input(self, weight: IntFormat) -> ActFormat | None:
        if self.act is not None:
            return self.act
        quantizes = self.target is not None and RUNTIMES[self.target].round is not None
        return RuntimeInput(str(self.target), weight) if quantizes else None


@dataclass(frozen=True)
class ModuleFormats:
    """The formats of one linear's weight and input (``None``: float)."""

    weight: Format
    input: ActFormat | None = None


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
    def weights(self) -> dict[str, Format]:
        """Weight formats by full name."""
        return {name: formats.weight for name, formats in self.modules.items()}


def parse_scheme(name: str) -> Scheme:
    """The scheme of a name.

    >>> s = parse_scheme("w4a8kv4g64-asym")
    >>> s.weight.bits, s.weight.group, s.act.bits, s.kv.bits, s.weight.symmetric
    (4, 64, 8, 4, False)
    """
    match = _NAME.fullmatch(name := name.lower())
    if not match:
        raise LowbitError(f"unknown scheme '{name}': give {GRAMMAR}, for example w4a16g64-sym or w8a8")
    weight, act, kv, group, suffix = match.groups()
    _check_allowed(name, "weight bits", int(weight), WEIGHT_BITS)
    _check_allowed(name, "activation bits", int(act), ACT_BITS)
    if kv:
        _check_allowed(name, "kv bits", int(kv), KV_BITS)
    symmetric = suffix == "-sym" if suffix else int(act) == 16
    return Scheme(
        name,
        IntFormat(int(weight), int(group) if group else None, symmetric),
        None if int(act) == 16 else IntTokens(int(act), symmetric),
        IntTokens(int(kv), symmetric=False) if kv else None,
    )


def _check_allowed(name: str, what: str, bits: int, allowed: range | tuple[int, ...]) -> None:
    if bits not in allowed:
        raise LowbitError(f"scheme '{name}': {bits} {what} given; allowed: {', '.join(map(str, allowed))}")


def parse_override(text: str) -> IntFormat | None:
    """A weight format such as ``w8``, ``w4g64-asym`` or ``float``; symmetric by default."""
    if text.lower() == "float":
        return None
    match = _SPEC.fullmatch(text.lower())
    if not match:
        raise LowbitError(f"override '{text}': give 'float' or {OVERRIDE_GRAMMAR}, for example w8g64")
    bits, group, suffix = match.groups()
    return IntFormat(int(bits), int(group) if group else None, suffix != "-asym")


def override_text(spec: Format | None) -> str:
    """The inverse of ``parse_override``.

    >>> override_text(parse_override("w4g64-asym"))
    'w4g64-asym'
    """
    return "float" if spec is None else spec.name


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
    pairs = tuple((glob, spec and replace(spec, scale_dtype=dtype)) for glob, spec in scheme.overrides)
    return replace(scheme, weight=replace(scheme.weight, scale_dtype=dtype), overrides=pairs, target=name)


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
    overrides = [{glob: override_text(spec)} for glob, spec in scheme.overrides]
    return {"scheme": scheme.name, "overrides": overrides, **target}
