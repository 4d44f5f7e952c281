"""The formats, and the scheme, under which a source's codes are a run's: nothing is rounded.

A format that several modules share should be one format in the run, so that exports and the manifest have one: all
integers share the dtype of their scales, the first of float16, bfloat16 and float32 that holds every one exactly;
integers of a width and group are symmetric if all of them are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format, QTensor, split_groups
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import SUPERBLOCK, KQuant
from lowbit.quant.scale_dtype import DTYPES, holding, scale_dtype_of, suffix_of, with_scale_dtype
from lowbit.quant.scales import PowerOfTwo, TwoLevel
from lowbit.quant.scheme import Scheme
from lowbit.quant.scheme_files import scheme_from_dict
from lowbit.quant.scheme_names import NAMED, override_text

# The dtype that formats of a kind have by default comes first.
PREFERRED: Mapping[type[Format], tuple[str, ...]] = {
    IntFormat: ("f16", "bf16", "f32"),
    FloatFormat: ("bf16", "f16", "f32"),
}


@dataclass
class Settled:
    """Formats of a source's modules, gathered one by one."""

    formats: dict[str, Format] = field(default_factory=dict)
    _held: dict[type[Format], set[str]] = field(default_factory=dict)
    _free: set[tuple[int, int | None]] = field(default_factory=set)

    def add(self, module: str, q: QTensor) -> None:
        """Take a module's weight into account."""
        format = self.formats[module] = q.format
        if scale_dtype_of(format) is not None:
            self._held.setdefault(type(format), {*DTYPES}).intersection_update(holding(q.qparams.scale))
        if isinstance(format, IntFormat) and not format.symmetric:
            self._free.add((format.bits, format.group))

    def result(self) -> dict[str, Format]:
        """The formats by module."""
        return {module: self._settle(format) for module, format in self.formats.items()}

    def _settle(self, format: Format) -> Format:
        if isinstance(format, IntFormat):
            format = replace(format, symmetric=(format.bits, format.group) not in self._free)
        if scale_dtype_of(format) is None:
            return format
        held = self._held[type(format)]
        return with_scale_dtype(format, DTYPES[next(name for name in PREFERRED[type(format)] if name in held)])


def why_not_stored(q: QTensor) -> str | None:
    """Why a weight's scales do not fit how its format stores them; ``None`` if they do."""
    format, scale = q.format, q.qparams.scale
    if isinstance(format, KQuant):
        parts = [scale, q.qparams.zero] if format.has_minimum else [scale]
        blocks = q.codes.shape[1] // SUPERBLOCK
        fits = all(format.scales.holds(split_groups(part, blocks)) for part in parts)
    elif isinstance(format, FloatFormat) and isinstance(format.scales, PowerOfTwo | TwoLevel):
        fits = format.scales.holds(scale)
    else:
        fits = True
    return None if fits else f"its scales are none that {format.name} stores"


def scheme_of(formats: Mapping[str, Format], linears: Iterable[str], outside: Sequence[str]) -> Scheme:
    """The scheme that gives each module its format, and the rest none; inputs are float.

    Args:
        formats: by module; at least one linear has one.
        linears: names of the linears of all blocks.
        outside: names of head and embedding.

    >>> from lowbit.quant.floating import MXFP4
    >>> scheme = scheme_of({"a": IntFormat(4, 32), "b": MXFP4, "c": IntFormat(4, 32)}, ["a", "b", "c", "d"], ["head"])
    >>> scheme.name, [(glob, override_text(format)) for glob, format in scheme.overrides]
    ('w4a16g32-sym', [('b', 'mxfp4'), ('d', 'float')])
    """
    names = list(linears)
    commonest, _ = Counter(formats[name] for name in names if name in formats).most_common(1)[0]
    own = {name: formats.get(name) for name in names if formats.get(name) != commonest}
    own |= {name: formats[name] for name in outside if name in formats}
    overrides = {name: override_text(format) for name, format in own.items()}
    return scheme_from_dict({"scheme": weight_only(commonest), "overrides": overrides})


def weight_only(format: Format) -> str:
    """The name of the scheme with this format and float inputs.

    >>> from lowbit.quant.floating import FP8_BLOCK
    >>> weight_only(IntFormat(4, 128, symmetric=False)), weight_only(FP8_BLOCK)
    ('w4a16g128-asym', 'fp8-blocka16')
    """
    if isinstance(format, IntFormat):
        width = f"w{format.bits}"
        return f"{width}a16{format.name.removeprefix(width)}{suffix_of(format)}"
    named = (name for name, (own, inputs) in NAMED.items() if inputs is None and own.name == format.name)
    return f"{next(named)}{suffix_of(format)}"
