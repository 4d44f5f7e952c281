"""An opened ``.gguf`` file: its tensors, and the transformers model that they are of.

The config comes from ``gguf_config``, which refuses by name whatever changes the function and cannot be expressed.
Names come from transformers' map, which is built from a model without storage.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

from lowbit.checkpoints.gguf_config import architecture_of, config_of
from lowbit.checkpoints.gguf_content import Content
from lowbit.checkpoints.gguf_experts import STACK, apart, model_name, scales_apart, stored_shapes
from lowbit.checkpoints.gguf_layout import check_layout
from lowbit.checkpoints.gguf_rope import TABLES
from lowbit.checkpoints.gguf_sources import ARCHITECTURES
from lowbit.checkpoints.gguf_types import Reader, values_of
from lowbit.errors import LowbitError, one_line, shown

# Rotary frequencies that early converters copied from checkpoints; llama.cpp computes its own.
UNUSED = re.compile(r"blk\.\d+\.attn_rot_embd(\.weight)?")
# Exceptions of the readers on broken bytes: they validate little and fail at the first impossible number.
BROKEN = (ValueError, IndexError, KeyError, TypeError, OverflowError, OSError, MemoryError, struct.error)


@dataclass(frozen=True)
class GgufFile:
    """An opened file.

    Attributes:
        path: the file.
        architecture: llama.cpp's name.
        model: the transformers model, without storage.
        processor: transformers' tensor processor of the architecture.
        tensors: the tensors, as the ``gguf`` package describes them, that the model has a place for; of experts each
            matrix by itself, see ``gguf_experts``.
        names: the model's names by the file's.
        scales: a factor on all values of a tensor, by its name: NVFP4's scale of the tensor.
    """

    path: Path
    architecture: str
    model: Any
    processor: Any
    tensors: Sequence[Any]
    names: Mapping[str, str]
    scales: Mapping[str, np.float32]


def open_gguf(path: Path) -> GgufFile:
    """Open a file; no tensor's values are read yet.

    Raises:
        LowbitError: it is incomplete, or has metadata or tensors that the model has no place for.
    """
    reader = _open(path)
    content = _content(reader, path)
    architecture = architecture_of(content)
    model = _meta_model(_config(content), path)
    processor = ARCHITECTURES[architecture].processor(config=model.config.to_dict())
    try:
        names = get_gguf_hf_weights_map(WithoutParts(model), processor, architecture)
    except NotImplementedError as error:
        raise LowbitError(f"the installed gguf package does not know the tensors of {path}: {error}") from error
    scaled = _scaled(reader)
    beside = {*TABLES, *(_scale_of(name) for name in scaled)}
    used = [t for whole in reader.tensors if whole.name not in beside for t in apart(whole)]
    used = [tensor for tensor in used if not UNUSED.fullmatch(tensor.name)]
    if experts := ARCHITECTURES[architecture].experts:
        places = stored_shapes(model, experts)
        names |= {t.name: own for t in used if (own := model_name(t.name, experts)) in places}
    if unknown := sorted(tensor.name for tensor in used if tensor.name not in names):
        raise LowbitError(
            f"{path} has the tensor {shown(unknown[0])} ({len(unknown)} such in all), which transformers' "
            f"{type(model).__name__} has no place for: use the model's own folder"
        )
    scales = {name: value for stack, values in scaled.items() for name, value in scales_apart(stack, values).items()}
    return GgufFile(path, architecture, model, processor, used, names, scales)


def _scaled(reader: Any) -> dict[str, Any]:
    """Factors on NVFP4 tensors by these tensors' names: ``NAME.scale`` beside ``NAME.weight``, one a matrix."""
    weights = {tensor.name: tensor for tensor in reader.tensors if tensor.tensor_type == GGMLQuantizationType.NVFP4}
    out = {}
    for tensor in reader.tensors:
        weight = weights.get(f"{tensor.name.removesuffix('scale')}weight")
        if weight is None or not tensor.name.endswith(".scale") or tensor.tensor_type != GGMLQuantizationType.F32:
            continue
        if tensor.n_elements == (len(weight.data) if STACK.fullmatch(weight.name) else 1):
            out[weight.name] = tensor.data
    return out


def _scale_of(name: str) -> str:
    return f"{name.removesuffix('weight')}scale"


def check_magic(path: Path) -> None:
    """Raise ``LowbitError`` if the file cannot be read or does not begin with GGUF's magic number."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise LowbitError(f"cannot read {path}: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise LowbitError(f"{path} is not a GGUF file: it begins with {magic!r}, not with b'GGUF'")


def _open(path: Path) -> Any:
    """A reader of the file, after checks that it does not make itself."""
    check_magic(path)
    check_layout(path)
    try:
        return Reader(path)
    except BROKEN as error:
        raise LowbitError(f"{path} is not a complete GGUF file ({one_line(error)}): fetch it again") from error


def _content(reader: Any, path: Path) -> Content:
    """The file without tensors, but for the divisors of rotary frequencies; of token lists only the length."""
    lists = [key for key in reader.fields if key.startswith("tokenizer.") and len(reader.fields[key].data) > 1]
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    try:
        values = {key: field.contents() for key, field in reader.fields.items() if key not in lists}
        tables = {t.name: values_of(t.data, t.tensor_type) for t in reader.tensors if t.name in TABLES}
    except (*BROKEN, NotImplementedError) as error:
        raise LowbitError(f"{path} has unreadable metadata ({one_line(error)}): fetch it again") from error
    parts = values.get("split.count")
    if isinstance(parts, int) and parts > 1:
        raise LowbitError(f"{path} is one of {parts} parts: merge them first with llama-gguf-split --merge")
    return Content(
        path,
        values,
        {t.name: tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors},
        {name: [float(v) for v in np.ravel(table)] for name, table in tables.items()},
        len(tokens.data) if tokens is not None else None,
    )


def _config(content: Content) -> Any:
    try:
        return config_of(content)
    except LowbitError:
        raise
    except Exception as error:  # configs validate with exceptions of many types
        raise LowbitError(f"the metadata of {content.path} is not a valid model config: {one_line(error)}") from error


def _meta_model(config: Any, path: Path) -> Any:
    """The model without storage: its class, its parameters' names and shapes."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # impossible sizes fail anywhere in the model's code
        raise LowbitError(f"the metadata of {path} does not define a model: {one_line(error)}") from error


class WithoutParts:
    """A model as transformers' name map sees it, without submodules.

    The map is made of the model's own names. It is made again for every submodule, for the sake of checkpoints of
    base models, which no file that is read here holds: time would grow with the square of the number of layers.
    """

    def __init__(self, model: Any) -> None:
        self.config, self.state_dict = model.config, model.state_dict

    def named_children(self) -> tuple[()]:
        """There are none."""
        return ()
