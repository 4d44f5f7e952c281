"""Measured divergence of whole assignments of formats, weights rounded to nearest on searched scales.

All assignments pass through the model together, block by block; one that is still the float model shares its hidden
states. Each weight is quantized once for every format that an assignment has for it. Inputs stay float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.allocation.losses import Formats
from lowbit.metrics.kl import LOGIT_BYTES
from lowbit.metrics.sensitivity import divergence
from lowbit.models.block import Block
from lowbit.models.forward import run_all
from lowbit.progress import track
from lowbit.quant.format import Format
from lowbit.quant.scale_search import search_scales
from lowbit.runs.streamed_model import StreamedModel


@dataclass
class _Rounded:
    """Quantized weights of a block by module and format, each made when it is first asked for."""

    columns: Mapping[str, Tensor]
    made: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def value(self, module: str, weight: Tensor, format: Format) -> Tensor:
        key = (module, format.name)
        if key not in self.made:
            weight = weight.float()
            qparams = search_scales(weight, format, format.qparams(weight), self.columns.get(module))
            self.made[key] = format.fake_quant(weight, qparams)
        return self.made[key]


@torch.no_grad()
def divergences(
    model: StreamedModel, assignments: Sequence[Formats], columns: Mapping[str, Tensor], ids: Tensor
) -> list[float]:
    """Mean over tokens of ``KL(float || assignment)`` in nats; a window's last position is left out.

    Args:
        model: the float model.
        assignments: formats by module; modules that one lacks are float.
        columns: weights of columns in searches of scales, by module; see ``measure_losses``.
        ids: ``(windows, length)``.
    """
    architecture = model.skeleton.architecture
    base = model.enter(ids)
    states: list[Tensor | None] = [None] * len(assignments)
    for at, formats in enumerate(assignments):
        if (own := _outside(model, formats, architecture.embed)) is not None:
            with _weight(model, architecture.embed, own):
                states[at] = model.enter(ids)
    for index in track(range(model.blocks), "blocks of assignments"):
        block, rounded = model.block(index), _Rounded(columns)
        for at, formats in enumerate(assignments):
            weights = _weights(block, formats, rounded)
            before = states[at]
            if weights or before is not None:
                params = {**block.params, **weights}
                states[at] = run_all(block, base if before is None else before, params, batch=len(ids))
        base = run_all(block, base, block.params, batch=len(ids))
    pairs = zip(states, assignments, strict=True)
    return [_divergence(model, ids, base, base if state is None else state, formats) for state, formats in pairs]


def _weights(block: Block, formats: Formats, rounded: _Rounded) -> dict[str, Tensor]:
    """The quantized weights of a block's linears that have a format."""
    out = {}
    for linear in block.linears():
        full = block.full_name(linear)
        if (format := formats.get(full)) is not None:
            out[f"{linear}.weight"] = rounded.value(full, block.weight(linear), format)
    return out


def _divergence(model: StreamedModel, ids: Tensor, exact: Tensor, other: Tensor, formats: Formats) -> float:
    head = model.skeleton.architecture.head
    own = _outside(model, formats, head)
    total, last = 0.0, ids.shape[1] - 1
    step = max(1, LOGIT_BYTES // (8 * model.scores(ids[:1], exact[:1], 0, 1).shape[-1]))
    for window in range(len(ids)):
        row = slice(window, window + 1)
        for start in range(0, last, step):
            stop = min(start + step, last)
            p = model.scores(ids[row], exact[row], start, stop).float()
            with _weight(model, head, own):
                q = model.scores(ids[row], other[row], start, stop).float()
            total += float(divergence(p, q).sum())
    return total / (len(ids) * last)


def _outside(model: StreamedModel, formats: Formats, name: str) -> Tensor | None:
    """The embedding or the head in its format, rounded to nearest on searched scales; ``None``: float."""
    if (format := formats.get(name)) is None:
        return None
    weight = model.skeleton.model.get_submodule(name).weight.data
    qparams = search_scales(weight.float(), format, format.qparams(weight.float()))
    return format.fake_quant(weight.float(), qparams).to(weight.dtype)


@contextmanager
def _weight(model: StreamedModel, name: str, value: Tensor | None) -> Iterator[None]:
    """The model with another embedding or head; ``None``: with its own."""
    parameter = model.skeleton.model.get_submodule(name).weight
    before = parameter.data
    parameter.data = before if value is None else value
    try:
        yield
    finally:
        parameter.data = before
