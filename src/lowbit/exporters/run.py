"""A finished run folder as exporters read it: rounded weights one by one, everything else in its own dtype.

Nothing is held: a model larger than memory can be exported. Choices: an exporter sees ``QTensor`` and float tensors
by the model's names and never the layout that the folder stores them in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoints.resolve import load_config
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.quant.affine import QTensor, QuantSpec
from lowbit.quant.compressed_tensors import packed_names
from lowbit.quant.scheme import Scheme
from lowbit.runs.folder import IDENTITY, ONLINE, RUN, manifest_of, manifest_specs, read_qtensors


@dataclass(frozen=True)
class Subject:
    """What has to be known to say whether a target can carry a result; also before there is one.

    Attributes:
        config: the Hugging Face config.
        scheme: the run's scheme.
        specs: format by full name of each rounded module.
        shapes: ``(out, in)`` of those modules and of ``floats``.
        floats: linears of the blocks that stay float.
        online: what the recipe leaves beside the model's graph, in words; ``None`` for nothing.
    """

    config: Any
    scheme: Scheme
    specs: Mapping[str, QuantSpec]
    shapes: Mapping[str, tuple[int, int]]
    floats: tuple[str, ...] = ()
    online: str | None = None


@dataclass(frozen=True)
class Run:
    """A finished run, see ``open_run``."""

    folder: Path
    manifest: Mapping[str, Any]
    subject: Subject
    layout: str
    checkpoint: Checkpoint

    @property
    def rounded(self) -> list[str]:
        """Full names of the rounded modules."""
        return list(self.subject.specs)

    @property
    def floats(self) -> list[str]:
        """Names of all other tensors, sorted."""
        packed = {n for name, spec in self.subject.specs.items() for n in packed_names(name, spec, self.layout)}
        return [n for n in self.checkpoint.names if n not in packed and not n.endswith(ONLINE)]

    def qtensor(self, module: str) -> QTensor:
        """A rounded module's weight, ``(out, in)``."""
        return read_qtensors(self.checkpoint, {module: self.subject.specs[module]}, self.layout)[module]

    def tensor(self, name: str) -> Tensor:
        """A float tensor in the dtype that it is stored in."""
        return self.checkpoint.read([name])[name]

    def file_of(self, module: str) -> str:
        """The shard that a module's weight, or a tensor, is in."""
        spec = self.subject.specs.get(module)
        return self.checkpoint.file_of(packed_names(module, spec, self.layout)[0] if spec else module)


def open_run(folder: Path) -> Run:
    """The finished run in ``folder``; raises ``LowbitError`` for anything else."""
    manifest = manifest_of(folder)
    if manifest is None:
        if (folder / RUN / IDENTITY).exists():
            raise LowbitError(f"{folder} holds a run that is not finished: give its 'lowbit quantize' command again")
        raise LowbitError(f"{folder} is no run folder: give a folder that 'lowbit quantize' has finished")
    if gone := [name for name in manifest["files"] if not (folder / name).is_file()]:
        raise LowbitError(f"{folder} lacks {gone[0]} of its finished run: quantize again into another folder")
    scheme, specs, layout = manifest_specs(manifest)
    checkpoint = Checkpoint(folder)
    shapes = {name: _shape(checkpoint, name, spec, layout) for name, spec in specs.items()}
    floats = tuple(name for name in manifest.get("float", []) if name != "lm_head")
    shapes |= {name: _size(checkpoint, f"{name}.weight") for name in floats}
    online = [str(name) for name in manifest.get("online", [])]
    left = f"{len(online)} tensors stay online, {online[0]} first" if online else None
    config = load_config(folder)
    return Run(folder, manifest, Subject(config, scheme, specs, shapes, floats, left), layout, checkpoint)


def _shape(checkpoint: Checkpoint, module: str, spec: QuantSpec, layout: str) -> tuple[int, int]:
    name = packed_names(module, spec, layout)[1 if layout == "pack-quantized" else 0]
    if layout != "pack-quantized":
        return _size(checkpoint, name)
    rows, columns = checkpoint.read([name])[name].tolist()
    return int(rows), int(columns)


def _size(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    rows, columns = checkpoint.shape(name)
    return int(rows), int(columns)
