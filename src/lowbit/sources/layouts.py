"""The registry of layouts of other tools: one file and one entry each.

===================== ===========================================================
``gptq``              ``gptq.py``
``awq``               ``awq.py``
``fp8``, ``mxfp8``    ``fp8.py``
``mxfp4``             ``mxfp4.py``
``compressed-tensors`` ``compressed.py``, with its config in ``compressed_config.py``
===================== ===========================================================

``.gguf`` files are converted to folders of floats (``lowbit.checkpoints.gguf_reader``); ``gguf_codes.py`` reads their
codes.
"""

from __future__ import annotations

from typing import Any

from lowbit.errors import LowbitError, shown
from lowbit.sources.awq import Awq
from lowbit.sources.compressed import CompressedTensors
from lowbit.sources.fp8 import Fp8
from lowbit.sources.gptq import Gptq
from lowbit.sources.layout import SourceLayout
from lowbit.sources.mxfp4 import Mxfp4

LAYOUTS: dict[str, type[SourceLayout]] = {
    "awq": Awq,
    "compressed-tensors": CompressedTensors,
    "fp8": Fp8,
    "gptq": Gptq,
    "mxfp4": Mxfp4,
    "mxfp8": Fp8,
}


def layout_of(config: Any, where: str) -> SourceLayout:
    """The layout that a ``quantization_config`` names; ``where`` is its file.

    Raises:
        LowbitError: it names none that is read.
    """
    if not isinstance(config, dict):
        raise LowbitError(f"{where} has quantization_config = {shown(config)}, an object is allowed: correct it")
    method = config.get("quant_method")
    if method not in LAYOUTS:
        raise LowbitError(
            f"{where}: the model is already quantized ({shown(method)}); read are {', '.join(LAYOUTS)}: give the "
            "float model"
        )
    return LAYOUTS[method].from_config(config, where)
