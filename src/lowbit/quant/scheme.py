"""Which numbers are rounded to what: weights, activations, keys and values, and exceptions by name.

A scheme has a name, ``w{2..8}a{4,6,8,16}[kv{4,8}][g{n}][-sym|-asym]``:

========= ==========================================================================================
``w4``    weights of the blocks' linears at 4 bits, one scale per output channel unless ``g`` is given
``a8``    inputs of those linears at 8 bits, one range per token, found on the fly; ``a16``: left in float
``kv4``   queries, keys and values at 4 bits after the rotary embedding, per token and head, asymmetric
``g64``   one scale for every 64 consecutive input channels of a weight row
``-sym``  zeros fixed at the middle of the range; ``-asym``: free. This covers weights and activations.
========= ==========================================================================================

Without a suffix, weight-only schemes are symmetric and schemes with activations asymmetric: the first is what
every runtime holds exactly, the second what the literature measures, and stock ``transformers`` loads both.
Embeddings and the output head stay float unless an override names them.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lowbit.errors import LowbitError, unknown
from lowbit.quant.affine import QuantSpec
from lowbit.quant.runtimes import RUNTIMES, Inputs

_NAME = re.compile(r"w(\d+)a(\d+)(?:kv(\d+))?(?:g(\d+))?(-sym|-asym)?")
_SPEC = re.compile(r"w(\d+)(?:g(\d+))?(-sym|-asym)?")
_FORM = "w{2..8}a{4,6,8,16}[kv{4,8}][g{n}][-sym|-asym], for example w4a16g64-sym or w8a8"


@dataclass(frozen=True)
class Scheme:
    """The formats of a run.

    Attributes:
        name: the name it was parsed from.
        weight: format of the blocks' linear weights.
        act: format of those linears' inputs, dynamic per token; ``None``: float.
        kv: format of Q, K and V inside the attention, dynamic per token and head; ``None``: float.
        overrides: ``(glob, format)`` pairs over module names such as ``model.layers.3.mlp.down_proj`` or
            ``lm_head``; the first match wins; ``None`` leaves the module in float.
        target: the runtime whose arithmetic is simulated, a name of ``RUNTIMES``; ``None``: the scheme's own. Set it
            with ``for_runtime``.
    """

    name: str
    weight: QuantSpec
    act: QuantSpec | None = None
    kv: QuantSpec | None = None
    overrides: tuple[tuple[str, QuantSpec | None], ...] = ()
    target: str | None = None

    def override(self, module: str) -> tuple[str, QuantSpec | None] | None:
        """The first override that matches a module's full name, or ``None``."""
        return next((pair for pair in self.overrides if fnmatch.fnmatchcase(module, pair[0])), None)

    def weight_spec(self, module: str) -> QuantSpec | None:
        """The weight format of a linear inside a block; ``None``: it stays float."""
        found = self.override(module)
        return found[1] if found else self.weight

    def act_spec(self, module: str) -> QuantSpec | None:
        """The format of a linear's input: float where its weight is."""
        return self.act if self.weight_spec(module) is not None else None

    def inputs(self, module: str) -> Inputs | None:
        """What happens to the input of a rounded linear: the scheme's rounding, or else the runtime's."""
        weight = self.weight_spec(module)
        if weight is None:
            return None
        if self.act is not None:
            return Inputs(self.act)
        return Inputs(weight, self.target) if self.target and RUNTIMES[self.target].round else None


def parse_scheme(name: str) -> Scheme:
    """The scheme that a name stands for.

    >>> s = parse_scheme("w4a8kv4g64-asym")
    >>> s.weight.bits, s.weight.group_size, s.act.bits, s.kv.bits, s.weight.symmetric
    (4, 64, 8, 4, False)
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise LowbitError(f"unknown scheme '{name}': give {_FORM}")
    weight, act, kv, group, suffix = match.groups()
    _allowed(name, "weight bits", int(weight), range(2, 9))
    _allowed(name, "activation bits", int(act), (4, 6, 8, 16))
    if kv:
        _allowed(name, "kv bits", int(kv), (4, 8))
    symmetric = suffix == "-sym" if suffix else int(act) == 16
    return Scheme(
        name,
        QuantSpec(int(weight), int(group) if group else None, symmetric),
        None if int(act) == 16 else QuantSpec(int(act), None, symmetric),
        QuantSpec(int(kv), None, symmetric=False) if kv else None,
    )


def _allowed(name: str, what: str, given: int, allowed: range | tuple[int, ...]) -> None:
    if given not in allowed:
        raise LowbitError(f"scheme '{name}': {given} {what} given; allowed: {', '.join(map(str, allowed))}")


def parse_override(text: str) -> QuantSpec | None:
    """A weight format such as ``w8``, ``w4g64-asym`` or ``float``; symmetric unless it says otherwise."""
    if text == "float":
        return None
    match = _SPEC.fullmatch(text)
    if not match:
        raise LowbitError(f"override '{text}': give 'float' or w{{2..8}}[g{{n}}][-sym|-asym], for example w8g64")
    bits, group, suffix = match.groups()
    return QuantSpec(int(bits), int(group) if group else None, suffix != "-asym")


def override_text(spec: QuantSpec | None) -> str:
    """The inverse of ``parse_override``.

    >>> override_text(parse_override("w4g64-asym"))
    'w4g64-asym'
    """
    if spec is None:
        return "float"
    group = f"g{spec.group_size}" if spec.group_size else ""
    return f"w{spec.bits}{group}-{'sym' if spec.symmetric else 'asym'}"


def with_overrides(scheme: Scheme, overrides: Mapping[str, str]) -> Scheme:
    """``scheme`` with ``{glob: format}`` put before its own overrides; a glob that it had already is replaced."""
    added = {str(glob): parse_override(str(text)) for glob, text in overrides.items()}
    kept = tuple((glob, spec) for glob, spec in scheme.overrides if glob not in added)
    return replace(scheme, overrides=(*added.items(), *kept))


def for_runtime(scheme: Scheme, name: str | None) -> Scheme:
    """``scheme`` as a runtime runs it: its rounding of inputs, its dtype of scales; ``None`` leaves it as it is."""
    if name is None:
        return scheme
    if name not in RUNTIMES:
        raise unknown("runtime", name, RUNTIMES)
    dtype = RUNTIMES[name].scale_dtype
    pairs = tuple((glob, spec and replace(spec, scale_dtype=dtype)) for glob, spec in scheme.overrides)
    return replace(scheme, weight=replace(scheme.weight, scale_dtype=dtype), overrides=pairs, target=name)


def simulated_on(scheme: Scheme | None, name: str | None) -> Scheme | None:
    """A finished run's scheme with the inputs of another runtime, or ``float`` ones; ``None``: those it was made for.

    Raises ``LowbitError`` where that makes no sense: for a float model, or a scheme with its own format of inputs.
    """
    if name is None:
        return scheme
    if scheme is None or scheme.act is not None:
        what = "a float model" if scheme is None else f"scheme {scheme.name}, which has a format of its own"
        raise LowbitError(f"--target {name} given: it rounds the inputs of a weight-only run, and this is {what}")
    if name not in (known := [*RUNTIMES, "float"]):
        raise unknown("runtime", name, known)
    return replace(scheme, target=None if name == "float" else name)


def load_scheme(given: str) -> Scheme:
    """A scheme from its name, or from a YAML file with ``scheme: NAME`` and ``overrides: {glob: format}``."""
    if not given.endswith((".yaml", ".yml")):
        return parse_scheme(given)
    try:
        content = yaml.safe_load(Path(given).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise LowbitError(f"cannot read the scheme file {given}: {' '.join(str(error).split())}") from error
    return scheme_from_dict(content, given)


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
    """Plain data for a manifest or a YAML file; overrides as a list, since their order counts."""
    target = {} if scheme.target is None else {"target": scheme.target}
    overrides = [{glob: override_text(spec)} for glob, spec in scheme.overrides]
    return {"scheme": scheme.name, "overrides": overrides, **target}
