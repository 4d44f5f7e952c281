"""Quantization methods: one file and one entry of ``METHODS`` each; ``method.py`` defines the contract.

``AFTER`` holds the options of steps that train the whole model after the step that quantizes; the pipeline runs them.
"""

from __future__ import annotations

from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.awq import AWQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.hadamard import RandomHadamard
from lowbit.methods.lkd import LayerDistillation
from lowbit.methods.llm_int8 import LLMInt8
from lowbit.methods.lowrank import LowRank
from lowbit.methods.method import Method
from lowbit.methods.outlier_suppression import OutlierSuppression
from lowbit.methods.qronos import Qronos
from lowbit.methods.reassemble import Reassemble
from lowbit.methods.refit import Refit
from lowbit.methods.rounding import Rounding
from lowbit.methods.rptq import RPTQ
from lowbit.methods.rtn import RTN
from lowbit.methods.signs import Signs
from lowbit.methods.smoothquant import SmoothQuant
from lowbit.methods.sparsegpt import SparseGPT
from lowbit.methods.tune import Tune

METHODS: dict[str, type[Method]] = {
    "rtn": RTN,
    "smoothquant": SmoothQuant,
    "signs": Signs,
    "outlier-suppression+": OutlierSuppression,
    "rptq": RPTQ,
    "llm-int8": LLMInt8,
    "hadamard": RandomHadamard,
    "awq": AWQ,
    "gptq": GPTQ,
    "rounding": Rounding,
    "qronos": Qronos,
    "sparsegpt": SparseGPT,
    "affinequant": AffineQuant,
    "reassemble": Reassemble,
    "refit": Refit,
    "lowrank": LowRank,
    "lkd": LayerDistillation,
}
AFTER: dict[str, type[Tune]] = {"tune": Tune}
