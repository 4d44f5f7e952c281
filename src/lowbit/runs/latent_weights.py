"""The latent weights of a quantized layer, as offsets within its quantization steps: the start of end-to-end tuning.

One file per layer holds, for each linear, the position of every latent weight in units of 1/128 of a quantization
step, clamped to the cell of its code so that rounding to nearest reproduces the stored codes, whichever method chose
them; the qparams; and the layer's other parameters. A weight takes two bytes.

Rejected: float weights (four bytes, and GPTQ's codes are not the nearest to them), and the codes alone (a weight in
the middle of its cell must move half a step before its code changes).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoints.writing import write_tensors
from lowbit.models.block import Block
from lowbit.models.ops import OPS
from lowbit.models.runtime_ops import RuntimeOp, linear_behind, parse_tensor_name, tensor_name
from lowbit.quant.format import Format, QParams, QTensor

INPUT = "input"  # in the names of a static input's qparams
PARTS = 128  # positions per step; 8 bits of code and 7 of offset fill 16 bits


def latent_file(index: int) -> str:
    """The file of decoder layer ``index``."""
    return f"latent-{index:05d}.safetensors"


def places(weight: Tensor, q: QTensor) -> Tensor:
    """Positions of ``weight`` ``(rows, columns)`` within the cells of its codes, as ``int16``.

    >>> from lowbit.quant.integer import IntFormat
    >>> qparams = QParams(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    >>> q = QTensor(torch.tensor([[1, 3]], dtype=torch.uint8), qparams, IntFormat(2))
    >>> places(torch.tensor([[0.5, 9.0]]), q).tolist()  # a quarter step above code 1; beyond the last code
    [[160, 447]]
    """
    qparams = q.format.per_column(q.qparams, weight.shape[1])
    codes = q.codes.to(qparams.scale.dtype)
    offsets = ((q.format.position(weight, qparams) - codes) * PARTS).round().clamp(1 - PARTS // 2, PARTS // 2 - 1)
    return (codes * PARTS + offsets).to(torch.int16)


def latent(places: Tensor, qparams: QParams, format: Format) -> Tensor:
    """The latent weights ``(rows, columns)`` at positions ``places``.

    >>> from lowbit.quant.integer import IntFormat
    >>> qparams = QParams(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    >>> latent(torch.tensor([[160, 447]]), qparams, IntFormat(2)).tolist()
    [[0.5, 4.984375]]
    """
    return format.dequantize(places.to(qparams.scale.dtype) / PARTS, qparams)


def write_latents(folder: Path, block: Block) -> None:
    """Write the latent-weight files of a quantized block's layers."""
    for index in block.indices:
        prefix = f"{index}."
        content: dict[str, Tensor] = {}
        for name, q in block.qweights.items():
            if name.startswith(prefix):
                content |= {f"{name}.places": places(block.weight(name), q)}
                content |= {f"{name}.{key}": value for key, value in zip(QParams._fields, q.qparams, strict=True)}
        for name, value in block.as_stored(block.params).items():
            if name.startswith(prefix) and name.removesuffix(".weight") not in block.qweights:
                content[name] = value
        for name, own in block.input_qparams.items():
            if name.startswith(prefix):
                pairs = zip(QParams._fields, own, strict=True)
                content |= {f"{name}.{INPUT}.{key}": value.clone() for key, value in pairs}
        for name, op in block.ops.items():
            if name.startswith(prefix):
                # Ops may share tensors, which a file does not hold twice.
                content |= {tensor_name(name, op, key): value.clone() for key, value in op.to_tensors().items()}
        write_tensors(folder / latent_file(index), {name: value.detach().cpu() for name, value in content.items()})


class Latents:
    """The content of one layer's file.

    Attributes:
        params: parameters that are not quantized, as the library stores them.
        ops: runtime ops by module name.
        places, qparams: positions and qparams by the name of the quantized linear.
        input_qparams: qparams of static inputs by the name of the linear.
    """

    def __init__(self, content: Mapping[str, Tensor]) -> None:
        """Sort the tensors of a file by their names."""
        self.places = {n.removesuffix(".places"): v for n, v in content.items() if n.endswith(".places")}
        self.qparams = {n: QParams(content[f"{n}.scale"], content[f"{n}.zero"]) for n in self.places}
        op_tensors: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, value in content.items():
            if (parsed := parse_tensor_name(name)) is not None:
                op_tensors.setdefault(parsed[:2], {})[parsed[2]] = value
        inputs = {n.removesuffix(f".{INPUT}.scale") for n in content if n.endswith(f".{INPUT}.scale")}
        self.input_qparams = {
            n: QParams(*(content[f"{n}.{INPUT}.{key}"] for key in QParams._fields)) for n in sorted(inputs)
        }
        known = {f"{name}.{key}" for name in self.places for key in ("places", "scale", "zero")}
        known |= {f"{name}.{INPUT}.{key}" for name in inputs for key in QParams._fields}
        self.params = {n: v for n, v in content.items() if n not in known and parse_tensor_name(n) is None}
        self.ops: dict[str, RuntimeOp] = {
            module: OPS[kind].from_tensors(tensors, self._width(module))
            for (module, kind), tensors in op_tensors.items()
        }

    def _width(self, module: str) -> int:
        """Channels of an op: inputs of the linear that it stands before, or entries of the norm's gain."""
        linear = linear_behind(module) or module
        return self.places[linear].shape[1] if linear in self.places else len(self.params[f"{module}.weight"])
