"""How a quantized weight is stored in a run folder: the tensors under its module's name.

Layouts are those of ``compressed-tensors``, which stock ``transformers`` and vLLM read, and one of our own for
formats that those lack. A module's layout follows from its formats:

======================== ===========================================================================================
``pack-quantized``       integers, dense: ``weight_packed`` int32 ``(out, ceil(in * bits / 32))``, ``weight_shape``
``int-quantized``        integers, one a byte: ``weight`` int8 ``(out, in)``: embeddings and heads, and asymmetric
                         weights behind quantized inputs, whose packed zero points stock loaders misread
``nvfp4-pack-quantized`` two codes a byte, ``weight_scale`` E4M3, ``weight_global_scale`` float32 ``(1,)``, a divisor
``mxfp4-pack-quantized`` two codes a byte, ``weight_scale`` E8M0 bytes
``mxfp6-pack-quantized`` four codes in three bytes, ``weight_scale`` E8M0 bytes
``mxfp8-quantized``      ``weight`` E4M3, ``weight_scale`` E8M0 bytes
``float-quantized``      ``weight`` E4M3, ``weight_scale`` ``(out, groups)``, ``(tiles, tiles)`` or ``(1,)``
``lowbit-packed``        K-quants and tables: dense codes, scales on both of their levels
======================== ===========================================================================================

Integers have ``weight_scale`` ``(out, groups)`` and, if asymmetric, ``weight_zero_point``; stored integers are
``code - 2**(bits - 1)``. Packed asymmetric weights load in stock ``transformers`` only if dequantized at load time,
which multiplies in the dtype of the scale: it is stored as float32 with the same 16-bit value. So are those of other
weights that it makes dense, the experts of a mixture among them; these are packed whatever their inputs.
"""

from __future__ import annotations

from lowbit.quant.activations import ActFormat
from lowbit.quant.float_layouts import Floats
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import integer
from lowbit.quant.integer_layouts import PackedIntegers, PlainIntegers
from lowbit.quant.kquants import KQuant
from lowbit.quant.layout import Layout
from lowbit.quant.own_layout import Own
from lowbit.quant.scales import Plain
from lowbit.quant.tables import TableFormat

PACKED, PLAIN, OWN = PackedIntegers(), PlainIntegers(), Own()
DENSE = PackedIntegers(wide=True)
NVFP4, MXFP4, MXFP6 = (Floats(f"{name}-pack-quantized") for name in ("nvfp4", "mxfp4", "mxfp6"))
MXFP8, FP8 = Floats("mxfp8-quantized"), Floats("float-quantized")
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (PACKED, PLAIN, NVFP4, MXFP4, MXFP6, MXFP8, FP8, OWN)}


def layout_of(
    format: Format, inputs: ActFormat | None = None, *, outside: bool = False, dense: bool = False
) -> Layout:
    """The layout of a module's weight.

    Args:
        format: the weight's.
        inputs: the input's as the checkpoint states it; ``None``: float.
        outside: the module is an embedding or the head.
        dense: stock ``transformers`` dequantizes it when it loads it.
    """
    if isinstance(format, FloatFormat):
        if isinstance(format.scales, Plain):
            return FP8
        return {"nvfp4": NVFP4, "mxfp4": MXFP4, "mxfp6": MXFP6, "mxfp8": MXFP8}[format.label]
    if isinstance(format, KQuant | TableFormat):
        return OWN
    integers = integer(format, "a layout of a run folder")
    if dense:
        return DENSE
    return PLAIN if outside or (inputs is not None and not integers.symmetric) else PACKED
