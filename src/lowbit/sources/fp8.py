"""FP8 with a scale for each tile, as DeepSeek publishes it (``quant_method: fp8``), and MXFP8 (``mxfp8``).

``weight`` E4M3 ``(out, in)`` beside ``weight_scale_inv``, which despite its name multiplies: float32, or a power of
two in a byte (E8M0), ``(ceil(out / rows), ceil(in / columns))`` for tiles of ``weight_block_size``, 128 x 128 by
default and smaller at the right and lower edges; one number where the size is null. MXFP8 has tiles of 1 x 32 and
E8M0 bytes. Experts that are one tensor have a dimension before these and no ``.weight`` in their names.

AutoFP8 calls the scale ``weight_scale``, and has one number for the tensor without saying so in its config.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from lowbit.errors import LowbitError, shown
from lowbit.quant.floating import MXFP8
from lowbit.sources.floats import grouped, powers, tiled
from lowbit.sources.integers import SCALES
from lowbit.sources.layout import Decoded, Headers, Read, SourceLayout, StoredWeight, expect

SCALE, PLAIN = "_scale_inv", ".weight_scale"
DEFAULT = [128, 128]
MX_TILE = (1, 32)


@dataclass(frozen=True)
class Fp8(SourceLayout):
    """A folder with FP8 weights.

    Attributes:
        tile: rows and columns that share a scale; 0: all.
        inputs: how the source quantizes inputs, ``dynamic`` or ``static``; ``None``: it does not.
    """

    tile: tuple[int, int]
    inputs: str | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any], where: str) -> Self:
        """See ``SourceLayout``."""
        size = config.get("weight_block_size", list(MX_TILE) if config.get("quant_method") == "mxfp8" else DEFAULT)
        pair = [0, 0] if size is None else size
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(type(n) is int and n >= 0 for n in pair):
            raise LowbitError(
                f"{where} has weight_block_size = {shown(size)}; allowed are rows and columns, as in [128, 128], and "
                "null: correct it"
            )
        inputs = config.get("activation_scheme", "dynamic")
        return cls((pair[0], pair[1]), None if inputs is None else str(inputs))

    @property
    def summary(self) -> str:
        """The tile."""
        return f"FP8 (E4M3), {'tensor' if self.tile == (0, 0) else f'tiles of {self.tile[0]} x {self.tile[1]}'}"

    @property
    def dropped(self) -> str | None:
        """The inputs of linears."""
        return None if self.inputs is None else f"inputs of linears in FP8 ({shown(self.inputs)})"

    @property
    def dropped_tensors(self) -> tuple[str, ...]:
        """Scales of static inputs."""
        return ("activation_scale", "input_scale")

    def weights(self, headers: Headers, read: Read) -> list[StoredWeight]:
        """See ``SourceLayout``."""
        return [self._weight(headers, name) for name in headers if name.endswith((SCALE, PLAIN))]

    def _weight(self, headers: Headers, scale: str) -> StoredWeight:
        name = scale.removesuffix(SCALE).removesuffix("_scale")
        if name not in headers:
            raise ValueError(f"'{name}' is missing")
        shape = headers[name].shape
        if len(shape) not in (2, 3) or min(shape) < 1:
            raise ValueError(f"'{name}' has the shape {list(shape)}, allowed are two or three sizes of 1 or more")
        return StoredWeight(name, shape, {"weight": name, "scale": scale})

    def unpack(self, weight: StoredWeight, parts: Mapping[str, Tensor]) -> Decoded:
        """See ``SourceLayout``."""
        codes, scale = parts["weight"], parts["scale"]
        rows, columns = weight.shape[-2:]
        tensor_wide = self.tile == (0, 0) or weight.parts["scale"].endswith(PLAIN)
        tile = (rows, columns) if tensor_wide else (self.tile[0] or rows, self.tile[1] or columns)
        tiles = [*weight.shape[:-2], -(-rows // tile[0]), -(-columns // tile[1])]
        expect(weight.name, codes, [torch.float8_e4m3fn], weight.shape)
        if tensor_wide and scale.numel() == 1:
            scale = scale.reshape(tiles)
        expect(weight.parts["scale"], scale, [*SCALES, torch.uint8, torch.float8_e8m0fnu], tiles)
        if scale.dtype not in SCALES:
            scale = powers(scale.view(torch.uint8))
            if self.tile == MX_TILE and codes.ndim == 2 and columns % MX_TILE[1] == 0:
                return grouped(codes.view(torch.uint8), scale, MXFP8)
        return tiled(codes, scale, (0, 0) if tensor_wide else self.tile)
