"""Where the float weights behind a rounded layer lie on its grid: what end-to-end correction starts from.

A file for each layer holds all of it: for a linear the place of every float weight, in steps of 1/128 of its grid's
and held within the cell of its code, so that rounding to nearest gives the very codes that ship, whatever method
chose them; the grid; and the layer's other parameters. Two bytes a weight.

Rejected: float weights (four bytes, and GPTQ's codes are not the nearest to them), and the codes alone: a weight in
the middle of its cell has far to go until it rounds otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoints.safetensors_folder import write_tensors
from lowbit.models.block import Block
from lowbit.quant.affine import Grid, QTensor, QuantSpec

PARTS = 128  # of a step; 8 bits of code and 7 of place fill 16 bits


def latent_file(index: int) -> str:
    """The file of decoder layer ``index``."""
    return f"latent-{index:05d}.safetensors"


def places(weight: Tensor, q: QTensor) -> Tensor:
    """Places of ``weight`` ``(rows, columns)`` on the grid that it was rounded to, as ``int16``.

    >>> grid = Grid(torch.tensor([[2.0]]), torch.tensor([[1.0]]))
    >>> q = QTensor(torch.tensor([[1, 3]], dtype=torch.uint8), grid, QuantSpec(2))
    >>> places(torch.tensor([[0.5, 9.0]]), q).tolist()  # a quarter step above code 1; beyond the last code
    [[160, 447]]
    """
    columns = weight.shape[1] // q.grid.scale.shape[1]
    scale, zero = (value.repeat_interleave(columns, 1) for value in q.grid)
    codes = q.codes.to(scale.dtype)
    within = ((weight / scale + zero - codes) * PARTS).round().clamp(1 - PARTS // 2, PARTS // 2 - 1)
    return (codes * PARTS + within).to(torch.int16)


def latent(places: Tensor, grid: Grid) -> Tensor:
    """The float weights ``(rows, columns)`` at ``places`` of a grid.

    >>> latent(torch.tensor([[160, 447]]), Grid(torch.tensor([[2.0]]), torch.tensor([[1.0]]))).tolist()
    [[0.5, 4.984375]]
    """
    steps = (places.to(grid.scale.dtype) / PARTS).unflatten(1, (grid.scale.shape[1], -1))
    return ((steps - grid.zero[..., None]) * grid.scale[..., None]).flatten(1)


def write_latents(folder: Path, block: Block) -> None:
    """The files of a rounded block's layers."""
    for index in block.indices:
        prefix = f"{index}."
        content: dict[str, Tensor] = {}
        for name, q in block.qweights.items():
            if name.startswith(prefix):
                content |= {f"{name}.places": places(block.weight(name), q)}
                content |= {f"{name}.{key}": value for key, value in zip(Grid._fields, q.grid, strict=True)}
        for name, value in block.params.items():
            if name.startswith(prefix) and name.removesuffix(".weight") not in block.qweights:
                content[name] = value
        content |= {
            f"{name}.online": value.float() for name, value in block.online.items() if name.startswith(prefix)
        }
        write_tensors(folder / latent_file(index), {name: value.detach().cpu() for name, value in content.items()})


class Latents:
    """One layer's file, taken apart.

    Attributes:
        params: parameters that are not rounded.
        online: what stays online; see ``Block``.
        places, grids: of each rounded linear.
    """

    def __init__(self, content: Mapping[str, Tensor]) -> None:
        """Sort the tensors of a file by their names."""
        self.places = {n.removesuffix(".places"): v for n, v in content.items() if n.endswith(".places")}
        self.grids = {name: Grid(content[f"{name}.scale"], content[f"{name}.zero"]) for name in self.places}
        self.online = {n.removesuffix(".online"): v for n, v in content.items() if n.endswith(".online")}
        known = {f"{name}.{key}" for name in self.places for key in ("places", "scale", "zero")}
        known |= {f"{name}.online" for name in self.online}
        self.params = {name: value for name, value in content.items() if name not in known}


def started(grid: Grid, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The ends of a grid's range, ``(rows, groups)`` each: what ``quant.range_grid`` makes this grid from again.

    >>> bottom, top = started(Grid(torch.tensor([[1.0]]), torch.tensor([[1.0]])), QuantSpec(2, symmetric=False))
    >>> bottom.tolist(), top.tolist()
    ([[-1.0]], [[2.0]])
    """
    if spec.symmetric:
        half = grid.scale * (spec.levels / 2)
        return -half, half
    return -grid.zero * grid.scale, (spec.levels - grid.zero) * grid.scale
