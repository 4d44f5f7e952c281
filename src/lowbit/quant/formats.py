"""The registry of weight formats: one file and one entry each. The contract tests are parametrized over it."""

from __future__ import annotations

from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import KQuant
from lowbit.quant.tables import TableFormat

FORMATS: dict[str, type[Format]] = {
    "integer": IntFormat,
    "float": FloatFormat,
    "k-quant": KQuant,
    "table": TableFormat,
}
