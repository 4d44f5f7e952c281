"""Number formats and the schemes named after them, as rows of ``lowbit schemes``.

Every fact is asked of the formats, of a plan for a model with the widths of Llama 7B, and of the exporters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lowbit.cli.targets import planned
from lowbit.exporters.target import Exporter
from lowbit.quant.activations import ActFormat, IntegerActs
from lowbit.quant.compressed_tensors import stock_dtype
from lowbit.quant.elements import E2M1, Float, Table
from lowbit.quant.float_activations import FloatActs
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import SUPERBLOCK
from lowbit.quant.rotated_kv import RotatedTokens
from lowbit.quant.scales import Integers, Plain, PowerOfTwo
from lowbit.quant.scheme_names import NAMED, WEIGHTS, parse_scheme
from lowbit.quant.static_activations import Nvfp4Acts, StaticInt
from lowbit.quant.static_clusters import StaticClusters

COLUMNS = 4096  # width of the weight for which bits per weight are shown


@dataclass(frozen=True)
class FormatRow:
    """A weight format that has a name.

    Attributes:
        name: as in schemes and overrides.
        codes: what a code means.
        scales: how scales are stored, and what shares one.
        widths: the input width of a linear is a multiple of this.
        bits_per_weight: codes and scales.
    """

    name: str
    codes: str
    scales: str
    widths: int
    bits_per_weight: str


@dataclass(frozen=True)
class SchemeRow:
    """A scheme that is the name of a format.

    Attributes:
        scheme: its name.
        weights, inputs: formats.
        bits_per_weight: codes and scales.
        layout: of the run folder.
        transformers: the dtype in which stock ``transformers`` gives the simulated logits, or ``None``.
        why_not: why it does not.
        exports: targets of ``lowbit export``.
    """

    scheme: str
    weights: str
    inputs: str
    bits_per_weight: str
    layout: str
    transformers: str | None
    why_not: str | None
    exports: tuple[str, ...]


def format_rows() -> list[FormatRow]:
    """The weight formats that have names of their own."""
    return [
        FormatRow(name, codes_text(own), f"{scales_text(own)}, {shared_by(own)}", own.width_unit, bits_text(own))
        for name, own in WEIGHTS.items()
    ]


def scheme_rows(exporters: Mapping[str, Exporter]) -> list[SchemeRow]:
    """The schemes that are names of formats.

    Args:
        exporters: export targets by name, where the packages that they need are installed.
    """
    return [_scheme_row(name, exporters) for name in NAMED]


def _scheme_row(name: str, exporters: Mapping[str, Exporter]) -> SchemeRow:
    scheme = parse_scheme(name)
    plan, subject = planned(scheme)
    return SchemeRow(
        scheme=name,
        weights=scheme.weight.name,
        inputs=inputs_text(scheme.act),
        bits_per_weight=bits_text(scheme.weight),
        layout=plan.formats.layouts[0],
        transformers=stock_dtype(plan.formats) if plan.stock is None else None,
        why_not=plan.stock,
        exports=tuple(target for target, exporter in exporters.items() if exporter.misfit(subject) is None),
    )


def weights_text(format: Format) -> str:
    """A weight format in a few words.

    >>> weights_text(IntFormat(4, 64)), weights_text(WEIGHTS["mxfp4"])
    ('4 bits sym', 'mxfp4')
    """
    if isinstance(format, IntFormat):
        return f"{format.bits} bits {'sym' if format.symmetric else 'asym'}"
    return format.name


def inputs_text(format: ActFormat | None) -> str:
    """A format of inputs in a few words; ``None`` is float.

    >>> inputs_text(parse_scheme("w4a8").act), inputs_text(parse_scheme("mxfp4").act), inputs_text(None)
    ('8 bits asym', 'E2M1, groups of 32', 'float')
    >>> inputs_text(parse_scheme("w4a8kv4h").kv)
    '4 bits asym, heads rotated'
    """
    if isinstance(format, IntegerActs):
        static = ", static" if isinstance(format, StaticInt) else ""
        if isinstance(format, StaticClusters):
            static = f", static, {format.clusters} ranges"
        rotated = ", heads rotated" if isinstance(format, RotatedTokens) else ""
        return f"{format.bits} bits {'sym' if format.symmetric else 'asym'}{static}{rotated}"
    if isinstance(format, Nvfp4Acts):
        return f"{E2M1.name}, groups of {format.group}"
    if isinstance(format, FloatActs):
        return f"{format.element.name}, {f'groups of {format.group}' if format.group else 'per token'}"
    return "float" if format is None else format.name


def codes_text(format: Format) -> str:
    """What a code means.

    >>> [codes_text(WEIGHTS[name]) for name in ("nvfp4", "q4_k", "q6_k", "iq4_nl")]
    ['E2M1', '4 bits from a minimum', '6 bits', 'table of 16']
    """
    elements = format.elements
    if isinstance(elements, Float):
        return elements.name
    if isinstance(elements, Table):
        return f"table of {len(elements.values)}"
    return f"{elements.bits} bits" + {"none": "", "code": " asym", "offset": " from a minimum"}[format.zero]


def scales_text(format: Format) -> str:
    """How scales are stored.

    >>> [scales_text(WEIGHTS[name]) for name in ("fp8", "mxfp4", "q4_k")]
    ['bfloat16', 'E8M0', '6 bits x float16 of 256']
    """
    scales = format.scales
    if isinstance(scales, Plain):
        return dtype_text(scales.dtype)
    if isinstance(scales, PowerOfTwo):
        return "E8M0"
    if isinstance(scales, Integers):
        return f"{scales.bits} bits x float16 of {SUPERBLOCK}"
    return "E4M3 x power of two of the tensor"


def dtype_text(dtype: torch.dtype) -> str:
    """``float16``."""
    return str(dtype).removeprefix("torch.")


def shared_by(format: Format) -> str:
    """The values that share a scale.

    >>> [shared_by(WEIGHTS[name]) for name in ("mxfp4", "fp8", "fp8-tensor", "fp8-block")]
    ['groups of 32', 'rows', 'the tensor', 'tiles of 128 x 128']
    """
    rows = format.rows if isinstance(format, FloatFormat) else 1
    if rows == 0:
        return "the tensor"
    if rows > 1:
        return f"tiles of {rows} x {format.group}"
    return f"groups of {format.group}" if format.group else "rows"


def bits_text(format: Format) -> str:
    """Bits per weight at a width of ``COLUMNS``.

    >>> bits_text(WEIGHTS["q4_k"])
    '4.500'
    """
    return f"{format.bits_per_value(COLUMNS):.3f}"
