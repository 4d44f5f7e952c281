"""What an export target is: a value of a few functions, listed in ``EXPORTERS``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.exporters.fit import Limits, Misfit, weight_misfit
from lowbit.exporters.run import Run, Subject
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat


@dataclass(frozen=True)
class Options:
    """What a person may choose about an export.

    Attributes:
        embeddings: how float matrices (embedding, head) are stored in gguf: ``auto`` for the smallest type that
            loses nothing, ``f32``, ``f16``, or ``q8_0``, which rounds them.
        pre: llama.cpp's name for the tokenizer's splitting, where it cannot be found out.
        gptq_format: how gptq stores zeros: ``v1`` (minus one), ``v2`` (as they are), or ``auto``, v1 where all are
            symmetric.
        context: how many tokens an executorch program's cache holds; ``None``: 2048, or the model's positions.
        accuracy_level: how onnx multiplies: 0 in float32; 4 with inputs rounded to 8 bits, which is faster; by
            default as the run was evaluated.
    """

    embeddings: str = "auto"
    pre: str | None = None
    gptq_format: str = "auto"
    context: int | None = None
    accuracy_level: int | None = None


def value_of(run: Run, name: str) -> Tensor:
    """A parameter by the model's name, rounded or not, as the float32 values that the run computes with."""
    module = name.removesuffix(".weight")
    if name.endswith(".weight") and module in run.subject.weights:
        return run.qtensor(module).dequantize()
    return run.tensor(name).to(torch.float32)


@dataclass(frozen=True)
class Executed:
    """What a target's runtime computed from an export.

    Attributes:
        logits: ``(tokens, vocabulary)`` float32 from an empty cache, for as many of the tokens as fit in it.
        explained: the largest relative error that the runtime's documented arithmetic explains, see
            ``verify.relative_error``.
        runtime: whose inputs the simulation has to take, a runtime's name or ``float``; by default those of the
            runtime that the run was made for.
    """

    logits: Tensor
    explained: float
    runtime: str | None = None


@dataclass(frozen=True)
class Exporter:
    """One target.

    Attributes:
        suffix: of the file that is written; empty for a folder.
        limits: why the target cannot carry a subject, or ``None``.
        write: writes a run to a path that does not exist yet, under that very name (the caller renames); returns
            warnings.
        owns: a path is of this format.
        read: names and float32 values of all parameters, by the format's own reader, from the export alone.
        other: names of what else differs from what ``write`` would have written (metadata, config, tokenizer).
        expect: the value that a parameter must have there.
        execute: runs an export on token ids ``(tokens,)`` in its runtime; ``None`` where that is not installed.
        formats: the kinds of weight formats that it knows; any other is refused, never taken for a known one.
        ops: the kinds of runtime ops that its graph can hold; a run with any other is refused.
    """

    suffix: str
    limits: Limits
    write: Callable[[Run, Path, Options], list[str]]
    owns: Callable[[Path], bool]
    read: Callable[[Run, Path], Iterator[tuple[str, Tensor]]]
    other: Callable[[Run, Path], Iterator[str]]
    expect: Callable[[Run, str], Tensor] = value_of
    execute: Callable[[Path, Tensor], Executed | None] = lambda path, ids: None
    formats: tuple[type[Format], ...] = (IntFormat,)
    ops: frozenset[type[RuntimeOp]] = frozenset()

    def misfit(self, subject: Subject) -> Misfit | None:
        """Why the target cannot carry a subject: an op or a format that it does not know, or its own limits."""
        for op, who in subject.ops.items():
            if op not in self.ops:
                mend = "quantize with diagonal maps after norms (qkv and mlp), sites=down and without act_clip"
                return Misfit("recipe", f"{who} leaves {op.why} online; {mend}")
        for module, format in subject.weights.items():
            if not isinstance(format, self.formats):
                return weight_misfit(subject, module, f"{format.name} is no format that this target is written for")
        return self.limits(subject)
