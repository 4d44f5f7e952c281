"""llama.cpp's importance matrix: sums of squares of each linear's input, which weight columns in a search of scales.

A ``.gguf`` file with ``general.type`` ``imatrix`` and, by the name of a weight's tensor, sorted:

=================== ============== =================================================================================
``NAME.in_sum2``    F32 (n, in)    ``sum x^2`` over tokens; ``n`` experts of a stack, else 1
``NAME.counts``     F32 (n, 1)     tokens in those sums
=================== ============== =================================================================================

``imatrix.datasets`` (strings), ``imatrix.chunk_count`` and ``imatrix.chunk_size`` (uint32) say what text they are of.
Columns are in the file's order, see ``gguf_tensors``. llama-quantize divides sums by counts; so does ``read``.
https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from lowbit.checkpoints.gguf_file import BROKEN, check_magic
from lowbit.checkpoints.gguf_layout import check_layout
from lowbit.checkpoints.gguf_types import Reader
from lowbit.checkpoints.partial import commit, partial_of, remove
from lowbit.errors import LowbitError, one_line, shown
from lowbit.exporters.gguf_architectures.text_models import text_model
from lowbit.exporters.gguf_model import unlike_llamacpp
from lowbit.exporters.gguf_tensors import FileTensor, column_order, file_tensors
from lowbit.finite import is_finite

SUMS, COUNTS = ".in_sum2", ".counts"
KIND, DATASETS, CHUNKS, CHUNK = "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"


@dataclass(frozen=True)
class Squares:
    """Of one linear's input: ``total`` the sum of squares ``(in,)`` float32 over ``count`` tokens."""

    total: Tensor
    count: int


def check_imatrix(config: Any) -> None:
    """Refuse a model of an architecture that llama.cpp does not have; its text model's, where it has others."""
    if (why := unlike_llamacpp(text_model(config))) is not None:
        raise LowbitError(f"llama.cpp does not support this model, so its tensors have no names there: {why}")


def check_replaceable(path: Path) -> None:
    """Refuse to write over anything but an importance matrix, such as the model itself.

    Raises:
        LowbitError: something else is there.
    """
    if not path.exists():
        return
    try:
        _stored(path)
    except LowbitError as error:
        raise LowbitError(
            f"--out {path} exists and is no importance matrix, which alone is replaced: name another, or delete it"
        ) from error


def write_imatrix(
    path: Path, config: Any, squares: Mapping[str, Squares], text: str, windows: int, length: int
) -> None:
    """Write the file.

    Args:
        path: the file, replaced if it is there.
        config: the model's config.
        squares: by full name of every linear.
        text, windows, length: the calibration text's name, and the number and length of its windows.
    """
    config, partial = text_model(config), partial_of(path)
    try:
        writer = gguf.GGUFWriter(partial, "")
        writer.kv_data[0].clear()  # the package begins with the architecture, which such a file does not have
        writer.add_string(KIND, "imatrix")
        writer.add_array(DATASETS, [text])
        writer.add_uint32(CHUNKS, windows)
        writer.add_uint32(CHUNK, length)
        for tensor in sorted(_tensors(config, squares), key=lambda one: one.name):
            parts = [squares[name.removesuffix(".weight")] for name in tensor.parts]
            order = column_order(config, tensor.parts[0])
            totals = torch.stack([part.total if order is None else part.total[order] for part in parts])
            counts = np.array([[part.count] for part in parts], dtype=np.float32)
            writer.add_tensor(f"{tensor.name}{SUMS}", totals.float().contiguous().numpy())
            writer.add_tensor(f"{tensor.name}{COUNTS}", counts)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        commit(partial, path)
    except OSError as error:
        raise LowbitError(f"cannot write {path}: {error.strerror or error}; choose another --out") from error
    finally:
        remove(partial)


def read_imatrix(path: Path, config: Any, widths: Mapping[str, int]) -> dict[str, Tensor]:
    """Mean squares of the columns of each linear's input ``(in,)``, by full name.

    Args:
        path: a file that ``write_imatrix`` or llama-imatrix wrote.
        config: the model's config.
        widths: inputs of every linear, by full name.

    A linear that the file lacks, and an expert that no token reached, has none.

    Raises:
        LowbitError: no such file, or of another model.
    """
    check_imatrix(config)
    config, stored = text_model(config), _stored(path)
    out: dict[str, Tensor] = {}
    for tensor in _tensors(config, widths):
        sums, counts = stored.get(f"{tensor.name}{SUMS}"), stored.get(f"{tensor.name}{COUNTS}")
        if sums is None or counts is None:
            continue
        width = widths[tensor.parts[0].removesuffix(".weight")]
        if sums.numel() != width * len(tensor.parts) or counts.numel() not in (1, len(tensor.parts)):
            raise LowbitError(
                f"{path}: {tensor.name} has {sums.numel()} sums and {counts.numel()} counts, the model's linear "
                f"{width} inputs in {len(tensor.parts)} parts: give the file of this model"
            )
        order = column_order(config, tensor.parts[0])
        rows, tokens = sums.reshape(len(tensor.parts), width), counts.flatten().expand(len(tensor.parts))
        for name, row, count in zip(tensor.parts, rows, tokens, strict=True):
            if float(count) > 0:
                mean = row / count
                out[name.removesuffix(".weight")] = mean if order is None else mean[order.argsort()]
    if not out:
        raise LowbitError(f"{path} has no sums for any linear of this model: give the file of this model")
    return out


def tensor_means(path: Path) -> dict[str, Tensor]:
    """Mean squares by the name of a weight's tensor, those of a stack's experts one after another.

    This is what llama.cpp's quantizer takes; an expert that no token reached has ones, as there.
    """
    stored, out = _stored(path), dict[str, Tensor]()
    for name, sums in stored.items():
        if name.endswith(SUMS) and (counts := stored.get(f"{name.removesuffix(SUMS)}{COUNTS}")) is not None:
            counts = counts.reshape(-1, 1)
            means = torch.where(counts > 0, sums.reshape(len(counts), -1) / counts, 1.0)
            out[name.removesuffix(SUMS)] = means.flatten()
    return out


def _stored(path: Path) -> dict[str, Tensor]:
    """Every tensor of an importance matrix, by name."""
    if not path.is_file():
        raise LowbitError(f"{path} does not exist: give a .gguf file that 'lowbit imatrix' or llama-imatrix wrote")
    check_magic(path)
    check_layout(path)
    try:
        reader = Reader(path)
        kind = reader.fields[KIND].contents() if KIND in reader.fields else "a model"
        if kind != "imatrix":
            raise LowbitError(f"{path} is {shown(kind)}, not an importance matrix: give one that llama-imatrix wrote")
        found = {tensor.name: torch.from_numpy(np.array(tensor.data, dtype=np.float32)) for tensor in reader.tensors}
    except BROKEN as error:
        raise LowbitError(f"cannot read {path}: {one_line(error)}; write it again") from error
    if broken := [n for n, x in found.items() if not is_finite(x) or bool((x < 0).any())]:
        raise LowbitError(f"{path}: {shown(broken[0])} has negative sums, NaN or infinity: write the file again")
    return found


def _tensors(config: Any, modules: Iterable[str]) -> list[FileTensor]:
    """The tensors of linears; of a fused one that several tensors share, all have its input."""
    return file_tensors(config, [f"{module}.weight" for module in modules])
