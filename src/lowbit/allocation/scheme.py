"""An assignment as a scheme file, which ``lowbit quantize --scheme`` takes."""

from __future__ import annotations

from collections import Counter
from typing import Any

from lowbit.allocation.losses import Formats
from lowbit.errors import LowbitError
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_names import NAMED, override_text


def scheme_of(formats: Formats, outside: tuple[str, ...]) -> dict[str, Any]:
    """The commonest format of the blocks' linears as the scheme, all others as overrides by full name.

    Args:
        formats: by module.
        outside: names of embedding and head, which a scheme leaves in float.

    >>> w4, w8 = IntFormat(4, 32), IntFormat(8, 32)
    >>> scheme_of({"a": w4, "b": w4, "c": w8, "lm_head": None}, ("lm_head",))
    {'scheme': 'w4a16g32-sym', 'overrides': [{'c': 'w8g32-sym'}]}
    """
    linears = {name: format for name, format in formats.items() if name not in outside}
    count = Counter(format for format in linears.values() if format is not None)
    if not count:
        raise LowbitError(
            "the best formats leave every linear in float: the model fits as it is, give a smaller size"
        )
    base = count.most_common(1)[0][0]
    differs = {name: format for name, format in linears.items() if format != base}
    differs |= {name: format for name in outside if (format := formats.get(name)) is not None}
    return {
        "scheme": scheme_name(base),
        "overrides": [{name: override_text(format)} for name, format in differs.items()],
    }


def scheme_name(format: Format) -> str:
    """The name of a scheme with these weights and inputs in float.

    >>> scheme_name(IntFormat(8, None)), scheme_name(IntFormat(4, 64, symmetric=False))
    ('w8a16-sym', 'w4a16g64-asym')
    """
    if isinstance(format, IntFormat):
        group = f"g{format.group}" if format.group else ""
        return f"w{format.bits}a16{group}-{'sym' if format.symmetric else 'asym'}"
    named = f"{format.name}a16" if f"{format.name}a16" in NAMED else format.name
    if named not in NAMED:
        raise LowbitError(f"{format.name} has no scheme's name")
    return named
