"""A finished run folder as exporters read it: quantized weights one by one, everything else in its own dtype.

Tensors are read on demand, so a model larger than memory can be exported. An exporter receives ``QTensor`` values and
float tensors by the model's names, never the layout in which the folder stores them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.checkpoints.kinds import no_run
from lowbit.checkpoints.resolve import load_config
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError, shown, unknown
from lowbit.models.families import architecture_of
from lowbit.models.ops import OPS
from lowbit.models.runtime_ops import RuntimeOp, parse_tensor_name
from lowbit.models.validate import check_model, open_weights
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format, QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import ModelFormats, ModuleFormats, Scheme
from lowbit.runs.carried import CARRIED
from lowbit.runs.folder import first_missing
from lowbit.runs.manifest import MANIFEST, Manifest, manifest_of
from lowbit.runs.online_cost import stored_ops
from lowbit.runs.reading import read_qtensors, run_formats, run_scheme, tensor_names
from lowbit.runs.static_inputs import input_names


@dataclass(frozen=True)
class Subject:
    """What decides whether a target supports a result; also known before the result exists.

    Attributes:
        config: the Hugging Face config.
        scheme: the run's scheme, for messages; the formats in effect are in ``formats``.
        formats: of each quantized module, by full name.
        shapes: ``(out, in)`` of those modules and of ``floats``.
        floats: linears of the blocks that stay float.
        ops: kinds of runtime ops that the result has, or may have, each with the step or module it comes from.
        prefix: tokens whose keys and values the result has in front of every text.
    """

    config: Any
    scheme: Scheme
    formats: ModelFormats
    shapes: Mapping[str, tuple[int, int]]
    floats: tuple[str, ...] = ()
    ops: Mapping[type[RuntimeOp], str] = field(default_factory=dict)
    prefix: int = 0

    @property
    def weights(self) -> dict[str, Format]:
        """Weight formats by full name of each quantized module."""
        return self.formats.weights

    @property
    def integers(self) -> dict[str, IntFormat]:
        """The same where all are integer formats, which ``Exporter.misfit`` checks for targets that need it."""
        out = {name: format for name, format in self.weights.items() if isinstance(format, IntFormat)}
        assert len(out) == len(self.weights), "a target for integer formats was given another format"
        return out

    @property
    def act(self) -> ActFormat | None:
        """The scheme's format of the linears' inputs; a runtime's own quantization of them is not included."""
        return next((act for f in self.formats.modules.values() if (act := f.stated_input) is not None), None)


@dataclass(frozen=True)
class Run:
    """A finished run, see ``open_run``."""

    folder: Path
    manifest: Manifest
    subject: Subject
    checkpoint: Checkpoint

    @property
    def quantized(self) -> list[str]:
        """Full names of the quantized modules."""
        return list(self.subject.formats.modules)

    @property
    def floats(self) -> list[str]:
        """Names of all other tensors of the model, sorted; what the run carries over is not among them."""
        modules = self.subject.formats.modules.items()
        packed = {n for name, own in modules for n in tensor_names(name, own)} | set(self.inputs)
        own = (n for n in self.checkpoint.names if self.checkpoint.file_of(n) != CARRIED)
        return [n for n in own if n not in packed and parse_tensor_name(n) is None]

    @property
    def carried(self) -> list[str]:
        """Names of the tensors that the run carries over from its source as they are, sorted."""
        return [n for n in self.checkpoint.names if self.checkpoint.file_of(n) == CARRIED]

    @property
    def inputs(self) -> list[str]:
        """Names of the tensors of static inputs."""
        return [n for name, own in self.subject.formats.modules.items() for n in input_names(name, own)]

    @property
    def op_tensors(self) -> list[str]:
        """Names of the tensors of runtime ops."""
        return [n for n in self.checkpoint.names if parse_tensor_name(n) is not None]

    def ops(self) -> dict[str, RuntimeOp]:
        """The runtime ops by their places: a norm, a linear, or its input (``at_input``), by full names."""
        return stored_ops(self.checkpoint, self.manifest, self.subject.shapes)

    def qtensor(self, module: str) -> QTensor:
        """A quantized module's weight, ``(out, in)``."""
        return read_qtensors(self.checkpoint, {module: self.subject.formats.modules[module]})[module]

    def tensor(self, name: str) -> Tensor:
        """A float tensor in the dtype that it is stored in."""
        return self.checkpoint.read([name])[name]

    def file_of(self, module: str) -> str:
        """The shard that holds a module's weight, or a tensor."""
        formats = self.subject.formats.modules.get(module)
        return self.checkpoint.file_of(tensor_names(module, formats)[0] if formats else module)


def open_run(folder: Path, trust_remote_code: bool = False) -> Run:
    """The finished run in ``folder``; raises ``LowbitError`` for anything else.

    Code of the model's own is needed only where ``transformers`` has no config class of its type.
    """
    manifest = manifest_of(folder)
    if manifest is None:
        raise no_run(folder)
    if (lost := first_missing(folder, manifest)) is not None:
        raise LowbitError(f"{folder} lacks {lost} of its finished run: copy it from where the run was made")
    config = load_config(folder, trust_remote_code)
    scheme = run_scheme(manifest)
    formats = run_formats(manifest, scheme, architecture_of(config))
    if getattr(config, "auto_map", None) and not trust_remote_code:  # only that code knows names and shapes
        checkpoint = Checkpoint(folder)
    else:
        checkpoint, _ = open_weights(folder, config, True, trust_remote_code)
        check_model(checkpoint, config, formats.modules, trust_remote_code)
    shapes = {name: _shape(checkpoint, name, own) for name, own in formats.modules.items()}
    floats = tuple(name for name in manifest.floats if name != architecture_of(config).head)
    shapes |= {name: _size(checkpoint, f"{name}.weight") for name in floats}
    ops: dict[type[RuntimeOp], str] = {}
    for module, kind in manifest.runtime_ops.items():
        if kind not in OPS:
            raise unknown(f"runtime op in {folder / MANIFEST}", kind, OPS)
        ops.setdefault(OPS[kind], f"the run, at {module}")
    subject = Subject(config, scheme, formats, shapes, floats, ops, len(manifest.prefix_ids))
    return Run(folder, manifest, subject, checkpoint)


def _shape(checkpoint: Checkpoint, module: str, formats: ModuleFormats) -> tuple[int, int]:
    """``(out, in)`` of a quantized module, from the header of its shard where that says it."""
    if (shape := f"{module}.weight_shape") in tensor_names(module, formats):
        stored = checkpoint.read([shape])[shape].flatten().tolist()
        return _two(stored, f"'{shape}' in {checkpoint.folder} says the shape")
    rows, columns = _size(checkpoint, tensor_names(module, formats)[0])
    packed = formats.weight.elements.bits if f"{module}.weight_packed" in tensor_names(module, formats) else 8
    return rows, columns * 8 // packed


def _size(checkpoint: Checkpoint, name: str) -> tuple[int, int]:
    return _two(checkpoint.shape(name), f"'{name}' in {checkpoint.folder} has the shape")


def _two(shape: Sequence[int], where: str) -> tuple[int, int]:
    """The two sizes of a matrix; refuses any other shape, which only a broken file has."""
    if len(shape) != 2 or min(shape) < 1:
        raise LowbitError(f"{where} {shown(list(shape))}; two sizes of 1 or more are allowed: copy the folder again")
    return int(shape[0]), int(shape[1])
