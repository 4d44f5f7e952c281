"""Can a target carry a scheme? If not: which field is wrong, and the nearest scheme that fits, in one line.

A target states its limits once, as a function ``limits(subject) -> Misfit | None``. The nearest scheme is found by
asking that same function about others, nearest first, so that what is suggested is never refused in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from lowbit.errors import LowbitError
from lowbit.exporters.run import Subject
from lowbit.models.families import family_of
from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import ModelFormats, ModuleFormats, Scheme, override_text

GROUPS = (128, 64, 32, None)


@dataclass(frozen=True)
class Misfit:
    """Why a target cannot carry a subject.

    Attributes:
        field: ``weight``, ``act``, ``kv``, ``override GLOB``, ``recipe``, ``architecture`` or another place.
        why: the reason and, where no other scheme helps, what to do.
        glob: the override at fault, if one is.
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
    """A misfit of one module's format: of the scheme, or of the override that gave it."""
    found = subject.scheme.override(module)
    if found is None:
        return Misfit("weight", f"{module}: {why}")
    return Misfit(f"override {found[0]}", f"{module}: {why}", found[0])


def wrong_scale(format: IntFormat) -> str | None:
    """For targets that store scales as float16."""
    if format.scale_dtype == torch.float16:
        return None
    return f"scales were rounded to {format.scale_dtype} for another runtime, this stores float16: give --target"


def no_activations(subject: Subject, who: str) -> Misfit | None:
    """For targets whose runtimes round activations in their own way or not at all."""
    if subject.act is not None:
        return Misfit("act", f"inputs are quantized to {subject.act.bits} bits per token, {who}")
    return no_kv(subject)


def no_kv(subject: Subject) -> Misfit | None:
    """For targets that cannot say that keys and values are rounded."""
    if subject.formats.kv is not None:
        return Misfit("kv", "keys and values quantized inside the attention have no place in it")
    return None


def check(target: str, limits: Limits, subject: Subject) -> None:
    """Raise ``LowbitError``, one line, if ``target`` cannot carry the subject."""
    found = limits(subject)
    if found is None:
        return
    near = nearest(limits, subject, found) if found.mendable else None
    hint = f"; nearest that fits: {near}" if near else ""
    raise LowbitError(f"{target} cannot carry scheme {subject.scheme.name}, {found.field}: {found.why}{hint}")


def nearest(limits: Limits, subject: Subject, found: Misfit) -> str | None:
    """The nearest scheme name, or override ``GLOB=FORMAT``, that fits; ``None`` if no change of that one does."""
    if found.glob is None:
        schemes = sorted(_schemes(subject.scheme), key=lambda s: _distance(subject.scheme, s))
        return next((s.name for s in schemes if limits(_with(subject, s)) is None), None)
    given = dict(subject.scheme.overrides)[found.glob] or subject.scheme.weight
    for spec in [*sorted(_specs(), key=lambda s: _spec_distance(given, s)), None]:
        pairs = tuple((glob, spec if glob == found.glob else old) for glob, old in subject.scheme.overrides)
        if limits(_with(subject, replace(subject.scheme, overrides=pairs))) is None:
            return f"--override '{found.glob}={override_text(spec)}'"
    return None


def _with(subject: Subject, scheme: Scheme) -> Subject:
    """The subject under another scheme; a size that does not divide a width is left for ``limits`` to refuse."""
    embed, kept = family_of(subject.config).embed, set(subject.floats)
    found = {name: formats for name in subject.shapes if (formats := scheme.module(name)) is not None}
    modules = {name: ModuleFormats(f.weight) if name == embed else f for name, f in found.items()}
    dropped = tuple(name for name in subject.weights if name not in modules and name != "lm_head")
    floats = (*sorted(kept - set(modules)), *dropped)
    return replace(subject, scheme=scheme, formats=ModelFormats(modules, scheme.kv), floats=floats)


def _specs() -> Iterator[IntFormat]:
    yield from (IntFormat(bits, size, sym) for bits in range(2, 9) for size in GROUPS for sym in (True, False))


def _schemes(given: Scheme) -> Iterator[Scheme]:
    """Schemes that a person could have meant instead, with the given overrides."""
    for weight in {
        *_specs(),
        *(IntFormat(b, given.weight.group, s) for b in range(2, 9) for s in (True, False)),
    }:
        for bits in (4, 6, 8, 16):
            act = None if bits == 16 else IntTokens(bits, weight.symmetric)
            for kv in {given.kv, None}:
                rest = weight.name.removeprefix(f"w{weight.bits}")
                name = f"w{weight.bits}a{bits}{f'kv{kv.bits}' if kv else ''}{rest}"
                stored = replace(weight, scale_dtype=given.weight.scale_dtype)
                yield Scheme(name, stored, act, kv, given.overrides, given.target)


def _distance(a: Scheme, b: Scheme) -> tuple[float, ...]:
    ours, theirs = (scheme.act.bits if scheme.act else 16 for scheme in (a, b))
    return (abs(ours - theirs), theirs < ours, a.kv != b.kv, *_spec_distance(a.weight, b.weight))


def _spec_distance(a: IntFormat, b: IntFormat) -> tuple[float, ...]:
    size = abs((a.group or 4096) - (b.group or 4096))
    return (abs(a.bits - b.bits), a.symmetric != b.symmetric, size, a.bits > b.bits)
