"""A folder of another tool's quantized weights, read as the float model that they stand for.

Weights are dequantized one by one, as they are read, in float32: a code times its scale is exact there for scales of
16 bits and fewer. Names, shapes and dtypes are those of the float model, so nothing that reads a ``Checkpoint`` knows
the difference. The folder's identity stays the digest of its own bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.companions import CONFIG
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.stored import Header
from lowbit.errors import LowbitError, one_line, shown
from lowbit.finite import is_finite
from lowbit.progress import say
from lowbit.sources.layout import Decoded, Headers, SourceLayout, StoredWeight
from lowbit.sources.layouts import layout_of

FIELDS = ("quantization_config", "compression_config")  # the second is compressed-tensors' former name
OPERATION = ".runtime."  # in the names of a run folder's tensors that are no parameters of the model


class QuantizedCheckpoint(Checkpoint):
    """A ``Checkpoint`` whose quantized weights are decoded on the way in.

    Attributes:
        layout: how they are stored.
    """

    def __init__(self, folder: Path, layout: SourceLayout) -> None:
        """Read every header; no weight is read yet.

        Raises ``LowbitError`` for a folder without such weights, or with incomplete ones.
        """
        super().__init__(folder)
        self.layout, self._stored = layout, Checkpoint(folder)
        headers = self._stored.headers()
        try:
            weights = layout.weights(headers, self._stored.read)
        except ValueError as error:
            raise self._broken(error) from error
        if not weights:
            raise LowbitError(
                f"{folder / CONFIG} says that weights are quantized ({layout.summary}), and none are: fetch it "
                "again, or delete quantization_config if the weights are float"
            )
        self._weights: dict[str, StoredWeight] = {weight.name: weight for weight in weights}
        parts = {part for weight in weights for part in weight.parts.values()}
        if hidden := sorted(self._weights.keys() & headers.keys() - parts):
            raise LowbitError(f"{folder} has '{hidden[0]}' as codes and as floats: delete one of them")
        self._floats = self._rest({name: header for name, header in headers.items() if name not in parts})
        self._file_of = {name: self._stored.file_of(name) for name in self._floats}
        for weight in weights:
            self._file_of[weight.name] = self._stored.file_of(next(iter(weight.parts.values())))

    def _rest(self, headers: Headers) -> dict[str, Header]:
        """The tensors that are no parts of quantized weights, but for what the layout drops.

        Raises ``LowbitError`` for those that change what a module computes and that its layout does not have.
        """
        out, dropped = {}, self.layout.dropped_tensors if self.layout.dropped is not None else ()
        for name, header in headers.items():
            module, _, last = name.rpartition(".")
            if OPERATION in name:
                raise LowbitError(
                    f"{self.folder} has operations at run time ({shown(name)}) that only its lowbit.json describes, "
                    "and has none: copy the whole run folder again"
                )
            beside = f"{module}.weight" in self._weights
            if beside and last not in ("bias", *dropped):
                raise LowbitError(
                    f"{self.folder} has {shown(name)} beside quantized weights ({self.layout.summary}), which is not "
                    "read: give the float model"
                )
            if not (beside and last in dropped):
                out[name] = header
        return out

    def _broken(self, error: ValueError) -> LowbitError:
        return LowbitError(f"the weights of {self.folder} are broken ({one_line(error)}): fetch the folder again")

    def rename(self, rule: Callable[[str], str]) -> None:
        """See ``Checkpoint.rename``; layouts keep the names in files."""
        super().rename(rule)
        self._weights = {rule(name): weight for name, weight in self._weights.items()}
        self._floats = {rule(name): header for name, header in self._floats.items()}

    def names_in_files(self, name: str) -> list[str]:
        """What the tensors are called in their files that hold a tensor."""
        return [*self._weights[name].parts.values()] if name in self._weights else super().names_in_files(name)

    @property
    def stored_names(self) -> dict[str, str]:
        """Names of all tensors in files, and the shard of each."""
        return self._stored.stored_names

    @property
    def files(self) -> list[Path]:
        """The shards, those with scales alone included."""
        return self._stored.files

    @property
    def quantized(self) -> list[str]:
        """Names of the quantized weights, sorted."""
        return sorted(self._weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of the float tensor."""
        return self._weights[name].shape if name in self._weights else super().shape(name)

    def headers(self) -> dict[str, Header]:
        """Headers of the float tensors."""
        return self._floats | {name: Header(weight.shape, "F32") for name, weight in self._weights.items()}

    def read(self, names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """See ``Checkpoint.read``; quantized weights as float32 unless ``dtype`` is given."""
        names = list(names)
        coded = {name: stored for name in names if (stored := self.find(name)) in self._weights}
        out = super().read([name for name in names if name not in coded], dtype)
        for name, stored in coded.items():
            value = self.codes(stored).dequantize()
            if not is_finite(value):
                raise LowbitError(f"'{stored}' in {self.folder} holds NaN or infinity: the checkpoint is broken")
            out[name] = value.to(dtype or value.dtype)
        return {name: out[name] for name in names}

    def codes(self, name: str) -> Decoded:
        """A quantized weight by its stored name; raises ``LowbitError`` for broken tensors."""
        weight = self._weights[name]
        stored = self._stored.read(weight.parts.values())
        try:
            decoded = self.layout.unpack(weight, {role: stored[part] for role, part in weight.parts.items()})
        except ValueError as error:
            raise LowbitError(
                f"'{name}' in {self.folder} is broken ({one_line(error)}): fetch the folder again"
            ) from error
        return decoded


def open_checkpoint(folder: Path, config: Any, run: bool = False) -> Checkpoint:
    """The weights of a model's folder as floats, whether they are stored so or quantized.

    Args:
        folder: the folder.
        config: its config, which loses ``quantization_config``.
        run: it is a run folder, whose codes its manifest describes.

    Raises:
        LowbitError: the weights are quantized in a way that is not read, or are broken.
    """
    found = [config.__dict__.pop(field) for field in FIELDS if config.__dict__.get(field) is not None]
    if run or not found:
        return Checkpoint(folder)
    checkpoint = QuantizedCheckpoint(folder, layout_of(found[0], str(folder / CONFIG)))
    if (dropped := checkpoint.layout.dropped) is not None:
        say(f"{folder}: its weights are read; what it quantizes beside them is float here: {dropped}")
    return checkpoint
