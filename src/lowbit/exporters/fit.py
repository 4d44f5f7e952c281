"""Checks whether an export target supports a scheme; if not, names the field and the nearest scheme that fits.

A target states its limits once, as a function ``limits(subject) -> Misfit | None``. The nearest scheme is found by
calling that function on other schemes, nearest first, so a suggestion is never refused in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

import torch

from lowbit.errors import LowbitError
from lowbit.exporters.run import Subject
from lowbit.models.families import architecture_of
from lowbit.quant.activations import ActFormat, IntegerActs, IntTokens
from lowbit.quant.float_activations import FloatActs
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.rotated_kv import kv_text
from lowbit.quant.scheme import ModelFormats, ModuleFormats, Scheme
from lowbit.quant.scheme_names import override_text
from lowbit.quant.static_activations import Nvfp4Acts, StaticInt

GROUPS = (128, 64, 32, None)


@dataclass(frozen=True)
class Misfit:
    """Why a target does not support a subject.

    Attributes:
        field: what does not fit: ``weight``, ``act``, ``kv``, ``override GLOB``, ``recipe``, ``prefix``,
            ``architecture``; ``layout``: nothing, the target reads the run folder itself.
        why: the reason and, where no other scheme helps, what to do.
        glob: the override that causes it, if one does.
    """

    field: str
    why: str
    glob: str | None = None

    @property
    def mendable(self) -> bool:
        """Another scheme could fit."""
        return self.field in ("weight", "act", "kv") or self.glob is not None


Limits = Callable[[Subject], Misfit | None]


def weight_misfit(subject: Subject, module: str, why: str) -> Misfit:
    """A misfit of one module's format: of the scheme, or of the override that sets it."""
    override = subject.scheme.override(module)
    if override is None:
        return Misfit("weight", f"{module}: {why}")
    return Misfit(f"override {override[0]}", f"{module}: {why}", override[0])


def wrong_scale(format: IntFormat) -> str | None:
    """For targets that store scales as float16."""
    if format.scale_dtype == torch.float16:
        return None
    return f"scales are {format.scale_dtype}, chosen for another runtime; this target stores float16: give --target"


def no_activations(subject: Subject, who: str) -> Misfit | None:
    """For targets whose runtimes quantize activations in their own way or not at all."""
    if subject.act is not None:
        return Misfit("act", f"inputs are quantized to {subject.act.name}, {who}")
    return no_kv(subject)


def no_kv(subject: Subject) -> Misfit | None:
    """For targets that cannot express quantized keys and values."""
    if subject.formats.kv is not None:
        return Misfit("kv", "keys and values quantized inside the attention are not supported")
    return None


def check(target: str, limits: Limits, subject: Subject) -> None:
    """Raise ``LowbitError``, one line, if ``target`` does not support the subject."""
    misfit = limits(subject)
    if misfit is None:
        return
    near = nearest(limits, subject, misfit) if misfit.mendable else None
    hint = f"; nearest that fits: {near}" if near else ""
    raise LowbitError(f"{target} does not support scheme {subject.scheme.name}, {misfit.field}: {misfit.why}{hint}")


def nearest(limits: Limits, subject: Subject, misfit: Misfit) -> str | None:
    """The nearest scheme name, or override ``GLOB=FORMAT``, that fits; ``None`` if there is none."""
    if misfit.glob is None:
        schemes = sorted(_schemes(subject.scheme), key=lambda s: _distance(subject.scheme, s))
        return next((s.name for s in schemes if limits(_with(subject, s)) is None), None)
    current = dict(subject.scheme.overrides)[misfit.glob] or subject.scheme.weight
    for spec in [*sorted(_specs(), key=lambda s: _format_distance(current, s)), None]:
        pairs = tuple((glob, spec if glob == misfit.glob else old) for glob, old in subject.scheme.overrides)
        if limits(_with(subject, replace(subject.scheme, overrides=pairs))) is None:
            return f"--override '{misfit.glob}={override_text(spec)}'"
    return None


def _with(subject: Subject, scheme: Scheme) -> Subject:
    """The subject under another scheme; ``limits`` refuses group sizes that do not divide a width."""
    architecture, kept = architecture_of(subject.config), set(subject.floats)
    outside = (architecture.embed, architecture.head)
    found = {name: scheme.outside(name) if name in outside else scheme.module(name) for name in subject.shapes}
    quantized = {name: formats for name, formats in found.items() if formats is not None}
    modules = {name: ModuleFormats(f.weight) if name == architecture.embed else f for name, f in quantized.items()}
    dropped = tuple(name for name in subject.weights if name not in modules and name != architecture.head)
    floats = (*sorted(kept - set(modules)), *dropped)
    return replace(subject, scheme=scheme, formats=ModelFormats(modules, scheme.kv), floats=floats)


def _specs() -> Iterator[IntFormat]:
    yield from (IntFormat(bits, size, sym) for bits in range(2, 9) for size in GROUPS for sym in (True, False))


def _schemes(current: Scheme) -> Iterator[Scheme]:
    """Candidate schemes in place of ``current``, with its overrides."""
    for weight in {
        *_specs(),
        *(IntFormat(b, current.weight.group, s) for b in range(2, 9) for s in (True, False)),
    }:
        for bits, act in _acts(current, weight):
            for kv in {current.kv, None}:
                suffix = weight.name.removeprefix(f"w{weight.bits}")
                if isinstance(act, StaticInt):
                    # By default weights are symmetric and static inputs asymmetric.
                    own = suffix.removesuffix("-sym") if act.symmetric != weight.symmetric else suffix
                    suffix = f"{own}-static"
                elif isinstance(act, IntTokens) and act.symmetric != weight.symmetric:
                    suffix += "-asym"
                name = f"w{weight.bits}a{bits}{kv_text(kv)}{suffix}"
                stored = weight
                if isinstance(current.weight, IntFormat):
                    stored = replace(weight, scale_dtype=current.weight.scale_dtype)
                yield Scheme(name, stored, act, kv, current.overrides, current.target)


def _acts(current: Scheme, weight: IntFormat) -> Iterator[tuple[int, ActFormat | None]]:
    """Formats of inputs that a scheme's name can state beside a weight's, with their bits; static ones if it has."""
    yield 16, None
    yield from ((bits, IntTokens(bits, sym)) for bits in (4, 6, 8) for sym in sorted({weight.symmetric, False}))
    if isinstance(current.act, StaticInt):
        for bits, sym in product((8, 16), sorted({weight.symmetric, False})):
            yield bits, replace(current.act, bits=bits, symmetric=sym)


def _distance(a: Scheme, b: Scheme) -> tuple[float, ...]:
    ours, theirs = (_act_bits(scheme.act) for scheme in (a, b))
    static = [isinstance(scheme.act, StaticInt) for scheme in (a, b)]
    inputs = (abs(ours - theirs), theirs < ours, a.kv != b.kv, static[0] != static[1])
    return (*inputs, *_format_distance(a.weight, b.weight), _has_zero(a.act) != _has_zero(b.act))


def _has_zero(act: ActFormat | None) -> bool:
    return isinstance(act, IntegerActs) and not act.symmetric


def _act_bits(act: ActFormat | None) -> int:
    if isinstance(act, IntegerActs):
        return act.bits
    if isinstance(act, Nvfp4Acts):
        return 4
    return act.element.bits if isinstance(act, FloatActs) else 16


def _format_distance(a: Format, b: Format) -> tuple[float, ...]:
    size, symmetric = abs((a.group or 4096) - (b.group or 4096)), [format.zero == "none" for format in (a, b)]
    bits = [format.elements.bits for format in (a, b)]
    return (abs(bits[0] - bits[1]), symmetric[0] != symmetric[1], size, bits[0] > bits[1])
