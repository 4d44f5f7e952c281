"""A ``.gguf`` file's tensors and metadata back as those of the run, for ``lowbit verify``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowbit.checkpoints.gguf_types import Reader, values_of
from lowbit.errors import LowbitError
from lowbit.exporters.gguf_contents import metadata_of, shared_head, tensors_of, text_run, weight_types
from lowbit.exporters.gguf_data import expect, scale_name
from lowbit.exporters.gguf_model import architecture
from lowbit.exporters.gguf_tensors import FileTensor, Share, column_order, row_order
from lowbit.exporters.run import Run
from lowbit.models.families import architecture_of


def read(run: Run, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the file through the package's reader, as the model's parameters in the model's order."""
    run = text_run(run)
    known = {tensor.name: tensor for tensor in tensors_of(run)}
    stored = Reader(path).tensors
    scales = {t.name: t.data for t in stored if t.name.endswith(".scale") and t.name not in known}
    shares: dict[str, dict[int, Any]] = {}
    head = shared_head(run)
    for tensor in stored:
        if tensor.name in scales:  # part of the weight beside it
            continue
        value = values_of(tensor.data, tensor.tensor_type)
        own = known.get(tensor.name, FileTensor(tensor.name, (tensor.name,)))
        factors = scales.get(scale_name(own))
        if own.share is not None:
            value = _joined(value, own, own.share, shares)
            if value is None:
                continue
        for index, name in enumerate(own.parts):
            # Of a stack with fewer parts than the model has, those that are missing are not yielded.
            if own.stacked and index >= len(value):
                break
            part = value[index] if own.stacked else value
            part = part if factors is None else part * factors[index if own.stacked else 0]
            found = _in_order(run, name, torch.from_numpy(np.ascontiguousarray(part)))
            yield name, found
            if head is not None and name == f"{architecture_of(run.subject.config).embed}.weight":
                yield f"{head}.weight", found


def _joined(value: Any, tensor: FileTensor, share: Share, shares: dict[str, dict[int, Any]]) -> Any:
    """A parameter of whose shares this is the last one; ``None`` for the ones before, which ``shares`` keeps."""
    held = shares.setdefault(tensor.parts[0], {})
    held[share.start] = value
    complete = sum(map(len, held.values())) == share.total
    return np.concatenate([held[start] for start in sorted(held)]) if complete else None


def _in_order(run: Run, name: str, value: Tensor) -> Tensor:
    """Rows and columns back in the model's order; left alone where their number is another, which shows by itself."""
    rows, columns = row_order(run.subject.config, name), column_order(run.subject.config, name)
    if rows is not None and len(rows) == len(value):
        value = value[rows.argsort()]
    if columns is not None and value.ndim == 2 and len(columns) == value.shape[1]:
        value = value[:, columns.argsort()]
    return value.contiguous()


def other(run: Run, path: Path) -> Iterator[str]:
    """Metadata keys whose values differ from the run's."""
    run = text_run(run)
    fields = Reader(path).fields
    stored = {key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")}
    types = weight_types(run)
    try:
        expected, _ = metadata_of(run, None, types)
    except LowbitError:
        expected, _ = metadata_of(run, str(stored.get("tokenizer.ggml.pre")), types)
    expected["general.architecture"] = architecture(run.subject.config).name
    for key in sorted({**expected, **stored}):
        ours, theirs = expected.get(key), stored.get(key)
        if isinstance(ours, float):
            ours = float(np.float32(ours))
        if ours != theirs and not (ours == [] and theirs is None):
            yield key


def expected_value(run: Run, name: str) -> Tensor:
    """The value that a file must hold for a parameter, in the order of the model's rows and columns."""
    return expect(text_run(run), name)
