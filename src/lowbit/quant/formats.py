"""The registry of weight formats: one file and one entry each. The contract tests are parametrized over it."""

from __future__ import annotations

from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat

FORMATS: dict[str, type[Format]] = {
    "integer": IntFormat,
}
