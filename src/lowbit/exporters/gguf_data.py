"""The values of a ``.gguf`` file's tensors, from a run's codes and float tensors."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
from torch import Tensor

from lowbit.exporters.gguf_blocks import pack_blocks
from lowbit.exporters.gguf_floats import DTYPES
from lowbit.exporters.gguf_native import pack_native
from lowbit.exporters.gguf_rope import rope_tensors
from lowbit.exporters.gguf_tensors import FileTensor, column_order, row_order, stored_value, with_columns
from lowbit.exporters.run import Run
from lowbit.exporters.target import value_of
from lowbit.quant.integer import IntFormat
from lowbit.quant.scales import TwoLevel, shared_exponent


def expect(run: Run, name: str) -> Tensor:
    """The value that the file must hold for a parameter, up to the order of rows and columns."""
    if (found := divisors(run).get(name)) is not None:
        return found
    return stored_value(run.subject.config, name, value_of(run, name))


def divisors(run: Run) -> dict[str, Tensor]:
    """What rotary frequencies are divided by, by the tensor's name; see ``gguf_rope``."""
    return rope_tensors(run.subject.config)


def module_of(run: Run, name: str) -> str | None:
    """The quantized module whose weight a parameter is."""
    module = name.removesuffix(".weight")
    return module if name.endswith(".weight") and module in run.subject.weights else None


def shape_of(run: Run, tensor: FileTensor) -> tuple[int, ...]:
    """A tensor's shape in values: ``(out, in)``, of a stack ``(parts, out, in)``."""
    name = tensor.parts[0]
    module = module_of(run, name)
    rows, *rest = expect(run, name).shape if module is None else run.subject.shapes[module]
    own = (rows if tensor.share is None else tensor.share.stop - tensor.share.start, *rest)
    return (len(tensor.parts), *own) if tensor.stacked else own


def data_of(run: Run, tensor: FileTensor, kind: Any) -> Any:
    """The blocks ``uint8 (..., bytes per row)``, or float values, of a tensor in the type ``kind``."""
    parts = [_part(run, name, kind) for name in tensor.parts]
    if tensor.share is not None:
        return parts[0][tensor.share.start : tensor.share.stop]
    return np.stack(parts) if tensor.stacked else parts[0]


def _part(run: Run, name: str, kind: Any) -> Any:
    rows, columns = row_order(run.subject.config, name), column_order(run.subject.config, name)
    if (module := module_of(run, name)) is None:
        value = expect(run, name)
        value = value if rows is None else value[rows]
        value = value if columns is None else value[:, columns]
        return gguf.quants.quantize(value.contiguous().numpy(), kind)
    q = run.qtensor(module)
    q = q if rows is None else q.select_rows(rows)
    q = q if columns is None else with_columns(q, columns)
    if kind in DTYPES:
        return gguf.quants.quantize(q.dequantize().contiguous().numpy(), kind)
    if isinstance(q.format, IntFormat):
        return pack_blocks(q, kind)
    return pack_native(q, _exponent(run, module))


def scale_name(tensor: FileTensor) -> str:
    """The name of the multipliers of NVFP4 weights."""
    return f"{tensor.name.removesuffix('.weight')}.scale"


def scales_of(run: Run, tensor: FileTensor) -> Any:
    """One multiplier for each part."""
    modules = [name.removesuffix(".weight") for name in tensor.parts]
    return np.array([2.0 ** -_exponent(run, module) for module in modules], dtype=np.float32)


def _exponent(run: Run, module: str) -> int:
    """Of the power of two that divides a weight's scales, and that the file holds beside the blocks; 0 without."""
    if not isinstance(run.subject.weights[module].scales, TwoLevel):
        return 0
    return shared_exponent([run.qtensor(module).qparams.scale]) or 0
