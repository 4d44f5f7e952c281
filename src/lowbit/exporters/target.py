"""An export target as a value: a few functions and what it supports; see ``EXPORTERS``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from lowbit.exporters.fit import Limits, Misfit, weight_misfit
from lowbit.exporters.run import Run, Subject
from lowbit.models.families import architecture_of
from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.hadamard import Hadamard
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat

SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Options:
    """User options of an export.

    Attributes:
        embeddings: gguf: type of float matrices (embedding, head): ``auto`` for the smallest lossless type, ``f32``,
            ``f16``, or ``q8_0``, which rounds them.
        pre: gguf: llama.cpp's name of the pre-tokenizer, where it cannot be detected.
        gptq_format: gptq: convention for zero points: ``v1`` (minus one), ``v2`` (as they are), or ``auto``, v1 where
            all formats are symmetric.
        context: executorch: capacity of the cache in tokens; ``None``: 2048, or the model's positions.
        accuracy_level: onnx: 0 multiplies in float32; 4 with inputs quantized to 8 bits, which is faster; by default
            as the run was evaluated.
    """

    embeddings: str = "auto"
    pre: str | None = None
    gptq_format: str = "auto"
    context: int | None = None
    accuracy_level: int | None = None


def value_of(run: Run, name: str) -> Tensor:
    """A parameter by the model's name, quantized or not, as the float32 values that the run computes with."""
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
        runtime: the runtime whose quantization of inputs the simulation uses, or ``float``; by default the run's
            target.
    """

    logits: Tensor
    explained: float
    runtime: str | None = None


@dataclass(frozen=True)
class Exporter:
    """One target.

    Attributes:
        suffix: of the file that is written; empty for a folder.
        limits: why the target does not support a subject, or ``None``.
        write: writes a run to a path that does not exist yet, under exactly that name (the caller renames); returns
            warnings.
        owns: whether a path is of this format.
        read: names and float32 values of all parameters, by the format's own reader, from the export alone.
        other: names of anything else that differs from what ``write`` produces (metadata, config, tokenizer).
        expect: the value that the export must hold for a parameter.
        execute: runs an export on token ids ``(tokens,)`` in its runtime; ``None`` where that is not installed.
        formats: the classes of weight formats that it supports; any other is refused.
        ops: the classes of runtime ops that its graph can hold; a run with any other is refused.
        experts: it holds mixtures of experts.
        text_models: of a model with other parts it holds the text model alone; else such models are refused.
        options: the fields of ``Options`` that ``write`` reads; another one that was given is refused.
        carries: it holds tensors that the run carries over and the model's class does not have, see ``left_out``.
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
    experts: bool = False
    text_models: bool = False
    options: frozenset[str] = frozenset()
    carries: bool = False

    def unread(self, options: Options) -> list[str]:
        """Names of the options that were given, or are not their defaults, and that ``write`` does not read."""
        given = (own.name for own in fields(options) if getattr(options, own.name) != own.default)
        return [name for name in given if name not in self.options]

    def left_out(self, run: Run) -> str | None:
        """What of a run the export lacks that the model's class does not have, such as heads for several tokens.

        Loaders that take every name of a folder for a parameter fail on them. Other parts of a model are not among
        them: ``write`` says that they stay behind, where it does not refuse them.
        """
        outside = architecture_of(run.subject.config).is_outside
        names = [] if self.carries else [name for name in run.carried if not outside(name)]
        if not names:
            return None
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return (
            f"{len(names)} tensors that the run carries over and the model's class does not have stay behind: "
            f"{', '.join(names[:SHOWN])}{more}"
        )

    def misfit(self, subject: Subject) -> Misfit | None:
        """Why the target does not support a subject: a prefix, experts, an op, a format, its own limits."""
        if subject.prefix:
            why = (
                f"texts come behind the keys and values of {subject.prefix} tokens, which no runtime starts from; "
                "use lowbit.load, or quantize with --prefix none"
            )
            return Misfit("prefix", why)
        kinds = architecture_of(subject.config).layers
        if any(kind.kept or kind.experts_of_own_code for kind in kinds):
            return Misfit(
                "architecture", "experts outside transformers' registry are not exported; use the run folder itself"
            )
        if not self.experts and any(kind.experts for kind in kinds):
            why = "mixtures of experts are exported to gguf alone; else use the run folder itself"
            return Misfit("architecture", why)
        for op, origin in subject.ops.items():
            if op not in self.ops:
                near = FixedHadamard in self.ops and op is Hadamard
                signs = " or give --set hadamard.signs=false, which this target runs," if near else ""
                advice = f"quantize with --merge-only, which keeps what folds,{signs} or load it with lowbit.load"
                return Misfit("recipe", f"{origin} leaves {op.why} at run time; {advice}")
        if turned := architecture_of(subject.config).transposed() & subject.weights.keys():
            why = f"{min(turned)} is stored as (in, out) by its library; targets take linears stored as (out, in)"
            return Misfit("architecture", why)
        for module, format in subject.weights.items():
            if not isinstance(format, self.formats):
                return weight_misfit(subject, module, f"this target does not support the format {format.name}")
        return self.limits(subject)
