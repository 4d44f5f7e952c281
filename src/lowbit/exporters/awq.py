"""A run as a Hugging Face folder in the AWQ layout (GEMM), which vLLM, SGLang and onnxruntime-genai read.

For a linear ``(out, in)``; eight 4-bit values in an int32 word, low bits first, are those of eight adjacent
outputs in the order 0, 2, 4, 6, 1, 3, 5, 7:

=========== ==================================== ===========================================
``qweight`` int32 ``(in, out / 8)``              codes, packed along the output
``qzeros``  int32 ``(groups, out / 8)``          zero points, packed in the same way
``scales``  float16 ``(groups, out)``
=========== ==================================== ===========================================

All modules have 4 bits and one group size; a symmetric format has zero points of 8.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.exporters.fit import Misfit, no_activations, weight_misfit, wrong_scale
from lowbit.exporters.fused import fused
from lowbit.exporters.hf_folder import (
    embedding_of,
    other_files,
    owns,
    read_folder,
    requested_dtype,
    stored_config,
    write_folder,
)
from lowbit.exporters.rounded_scales import RoundedScales
from lowbit.exporters.run import Run, Subject
from lowbit.exporters.target import Exporter, Options
from lowbit.models.families import architecture_of
from lowbit.quant.format import QTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
WORD = len(ORDER)


def _group(subject: Subject) -> int | None:
    """The group size of most modules."""
    return Counter(format.group for format in subject.integers.values()).most_common(1)[0][0]


def limits(subject: Subject) -> Misfit | None:
    """4 bits, one group size, outputs in multiples of 8, activations in float, embeddings and head in float."""
    misfit = no_activations(subject, "runtimes of AWQ folders take them in float")
    if misfit is not None:
        return misfit
    size = _group(subject)
    for module, format in subject.integers.items():
        rows, columns = subject.shapes[module]
        if module in (embedding_of(subject.config), architecture_of(subject.config).head):
            why = "the layout does not support a quantized embedding or head"
        elif format.bits != 4:
            why = f"{format.bits} bits; the layout has 4"
        elif format.group != size:
            why = f"groups of {format.group}; the layout has one size for all modules, {size}"
        elif columns % (size or columns):
            why = f"groups of {size} do not divide a width of {columns}"
        elif rows % WORD:
            why = f"{rows} outputs do not fill words of {WORD}"
        else:
            why = wrong_scale(format) or ""
        if why:
            return weight_misfit(subject, module, why)
    return None


def pack_words(values: Tensor) -> Tensor:
    """``(n, out)`` values of 4 bits as int32 ``(n, out / 8)``.

    >>> hex(int(pack_words(torch.arange(8)[None])))
    '0x75316420'
    """
    words = values.long().unflatten(1, (-1, WORD))[:, :, list(ORDER)]
    return (words << 4 * torch.arange(WORD)).sum(-1).to(torch.int32)


def unpack_words(words: Tensor) -> Tensor:
    """The inverse of ``pack_words``: ``(n, out / 8)`` -> ``(n, out)``."""
    out = torch.empty(*words.shape, WORD, dtype=torch.long)
    for position, column in enumerate(ORDER):
        out[:, :, column] = words.long() >> 4 * position & 15
    return out.flatten(1)


def pack_module(q: QTensor) -> dict[str, Tensor]:
    """A quantized weight ``(out, in)`` as the tensors of the layout, by name relative to the module."""
    scales = q.qparams.scale.T.to(torch.float16)
    return {"qweight": pack_words(q.codes.T), "qzeros": pack_words(q.qparams.zero.T), "scales": scales}


def quantization_config(subject: Subject) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``."""
    config = {"quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True}
    size = _group(subject) or -1
    together = [name for name, format in fused(subject).agree.items() if format is None]  # as vLLM looks them up
    return {**config, "group_size": size, "modules_to_not_convert": [*subject.floats, *together, "lm_head"]}


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Write the folder; warns where the dtype that it requests changes scales, as Gemma's bfloat16 does."""
    scales = RoundedScales(requested_dtype(run))

    def store(module: str, q: QTensor) -> dict[str, Tensor]:
        scales.see(q)
        return pack_module(q)

    write_folder(run, path, quantization_config(run.subject), store)
    return [*scales.warnings(), *fused(run.subject).warnings()]


def read(run: Run, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, decoded as the folder's own config specifies."""
    size = int(stored_config(path)["group_size"])

    def value(module: str, stored: Mapping[str, Tensor]) -> Tensor:
        codes = unpack_words(stored["qweight"]).float()
        group = torch.arange(len(codes)) // (len(codes) if size == -1 else size)
        zeros, scales = unpack_words(stored["qzeros"]).float(), stored["scales"].float()
        return ((codes - zeros[group]) * scales[group]).T.contiguous()

    return read_folder(path, "qweight", value)


def other(run: Run, path: Path) -> Iterator[str]:
    """Files that differ."""
    return other_files(run, path, quantization_config(run.subject))


EXPORTER = Exporter("", limits, write, owns("awq"), read, other)
