"""Make large language models small enough for phones, laptops and single GPUs, and keep them good.

>>> import lowbit
>>> lowbit.parse_scheme("w4a16g64-sym").weight.bits
4
"""

from lowbit.api import Evaluated, Quantized, evaluate, quantize
from lowbit.errors import LowbitError
from lowbit.loading import load
from lowbit.quant import Grid, QTensor, QuantSpec
from lowbit.recipe import Recipe, load_recipe
from lowbit.scheme import Scheme, parse_scheme

__all__ = [
    "Evaluated",
    "Grid",
    "LowbitError",
    "QTensor",
    "QuantSpec",
    "Quantized",
    "Recipe",
    "Scheme",
    "evaluate",
    "load",
    "load_recipe",
    "parse_scheme",
    "quantize",
]
