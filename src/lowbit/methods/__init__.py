"""The methods: one file each, one line here."""

from __future__ import annotations

from typing import Any

from lowbit.methods.awq import AWQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.rtn import RTN
from lowbit.methods.smoothquant import SmoothQuant

METHODS: dict[str, type[Any]] = {
    "rtn": RTN,
    "smoothquant": SmoothQuant,
    "awq": AWQ,
    "gptq": GPTQ,
}
