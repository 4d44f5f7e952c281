"""The weight formats: one file each, one line here. The contract tests are parametrized over this dict."""

from __future__ import annotations

from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat

FORMATS: dict[str, type[Format]] = {
    "integer": IntFormat,
}
