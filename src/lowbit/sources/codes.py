"""The codes of a source's quantized weights by the model's names, whatever kind of source it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from lowbit.checkpoints.gguf_file import open_gguf
from lowbit.checkpoints.resolve import Source
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.sources.checkpoint import QuantizedCheckpoint
from lowbit.sources.gguf_codes import decoded, quantized, types_text
from lowbit.sources.layout import Decoded


@dataclass(frozen=True)
class Codes:
    """Quantized weights of a source.

    Attributes:
        summary: what they are quantized in, for messages.
        dropped: what the source quantizes beside weights; ``None``: nothing.
        names: of the parameters.
        read: the weight of a parameter.
    """

    summary: str
    dropped: str | None
    names: frozenset[str]
    read: Callable[[str], Decoded]


def codes_of(source: Source, checkpoint: Checkpoint, parameters: Iterable[str]) -> Codes | None:
    """The codes of a source; ``None`` for a float one.

    Args:
        source: the source.
        checkpoint: its weights as floats.
        parameters: names of all parameters of the model; those of codes that are none keep their stored names.
    """
    if isinstance(checkpoint, QuantizedCheckpoint):
        layout, stored = checkpoint.layout, {*checkpoint.quantized}
        named = {name: found for name in parameters if (found := checkpoint.find(name)) in stored}
        named |= {name: name for name in stored - {*named.values()}}
        read = checkpoint.codes
        return Codes(layout.summary, layout.dropped, frozenset(named), lambda name: read(named[name]))
    if source.file is None:
        return None
    file = open_gguf(source.file.resolve())
    names = quantized(file)
    if not names:
        return None
    return Codes(f"GGUF, {types_text(file)}", None, frozenset(names), lambda name: decoded(file, names[name]))
