"""The methods: one file each, one line here.

A method is a frozen dataclass of its options, with ``__call__(block, calib, scheme) -> Block`` and some facts:
``rounds`` (it chooses codes, so it ends a recipe), ``passes`` (how often it runs the block over the calibration
tokens, for estimates of time) and, where they are true, ``corrects`` (it changes the float function on purpose) and
``solves`` (it fits weights or codes to the data at once, with no sequences held out of its own).

``AFTER`` has what works on the whole model, behind the step that rounds: options only, run by a module of its own.
"""

from __future__ import annotations

from typing import Any

from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.awq import AWQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.lowrank import LowRank
from lowbit.methods.reassemble import Reassemble
from lowbit.methods.refit import Refit
from lowbit.methods.rtn import RTN
from lowbit.methods.signs import Signs
from lowbit.methods.smoothquant import SmoothQuant
from lowbit.methods.tune import Tune

METHODS: dict[str, type[Any]] = {
    "rtn": RTN,
    "smoothquant": SmoothQuant,
    "signs": Signs,
    "awq": AWQ,
    "gptq": GPTQ,
    "affinequant": AffineQuant,
    "reassemble": Reassemble,
    "refit": Refit,
    "lowrank": LowRank,
}
AFTER: dict[str, type[Any]] = {"tune": Tune}
