"""What a run's ``.gguf`` file has: its tensors, their types where they are quantized, and its metadata."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Kind

from lowbit.checkpoints.gguf_types import OwnKind
from lowbit.exporters.gguf_data import (
    divisors,
)
from lowbit.exporters.gguf_floats import exact_type
from lowbit.exporters.gguf_limits import of_text, type_of
from lowbit.exporters.gguf_model import architecture, model_metadata
from lowbit.exporters.gguf_tensors import (
    FileTensor,
    file_tensors,
    stack_of,
)
from lowbit.exporters.gguf_tokenizer import tokenizer_metadata
from lowbit.exporters.run import Run
from lowbit.models.families import architecture_of

FILE_TYPES = {  # llama.h, LLAMA_FTYPE_MOSTLY_*; for a K type the one without larger types for some tensors
    Kind.F32: 0, Kind.F16: 1, Kind.BF16: 32,
    Kind.Q4_0: 2, Kind.Q8_0: 7, Kind.Q5_0: 8, Kind.Q2_K: 10, Kind.Q3_K: 11, Kind.Q4_K: 14,
    Kind.Q5_K: 16, Kind.Q6_K: 18, Kind.IQ4_NL: 25, Kind.MXFP4: 38, Kind.NVFP4: 39,
    OwnKind.Q2_0: 41,
}  # fmt: skip


def text_run(run: Run) -> Run:
    """The same run with the config of the text model alone."""
    return replace(run, subject=of_text(run.subject))


def weight_types(run: Run) -> dict[str, Any]:
    """The types of all quantized modules; reads those that are stored as floats."""
    out, stacks = {}, dict[str, list[str]]()
    for module, format in run.subject.weights.items():
        kind = type_of(format, run.subject.shapes[module][1])
        out[module] = exact_type(run.qtensor(module).dequantize()) if kind is None else kind
        if kind is None and (place := stack_of(f"{module}.weight")) is not None:
            stacks.setdefault(place[0], []).append(module)
    for modules in stacks.values():
        if len({out[module] for module in modules}) > 1:  # one type for all: the one that holds everything
            out |= dict.fromkeys(modules, Kind.F32)
    return out


def metadata_of(run: Run, pre: str | None, types: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """All keys and values but ``general.architecture``, and warnings; ``types`` are those of ``weight_types``."""
    config = run.subject.config
    kinds = Counter(types.values())
    name = Path(run.manifest.identity.model).name
    tokens, warnings = tokenizer_metadata(run.folder, config.vocab_size, pre)
    commonest = kinds.most_common(1)[0][0] if kinds else Kind.F32
    return model_metadata(config, name) | {"general.file_type": FILE_TYPES[commonest]} | tokens, warnings


def tensors_of(run: Run) -> list[FileTensor]:
    """The file's tensors but for the scales beside NVFP4 weights."""
    alone = [module for module in run.quantized if module != shared_head(run)]
    names = [*run.floats, *(f"{module}.weight" for module in alone)]
    return [*(FileTensor(name, (name,)) for name in divisors(run)), *file_tensors(run.subject.config, names)]


def shared_head(run: Run) -> str | None:
    """The head where it has the embedding's codes, scales and all: llama.cpp multiplies with the embedding instead.

    A run has two tensors of a tied one that it quantizes; a file has one.
    """
    model = architecture_of(run.subject.config)
    embed, head = model.embed, model.head
    if architecture(run.subject.config).head == "own" or head not in run.subject.weights:
        return None
    if run.subject.weights[head] != run.subject.weights.get(embed):
        return None
    one, other = run.qtensor(embed), run.qtensor(head)
    equal = torch.equal(one.codes, other.codes) and all(map(torch.equal, one.qparams, other.qparams))
    return head if equal else None
