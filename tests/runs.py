"""Runs of a tiny model that is on disk already, and what is read from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.runs.streamed_model import StreamedModel


def quantize_tiny(model: Path, out: Path, scheme: str, recipe: Any = "rtn", **more: Any) -> lowbit.Quantized:
    """A run of a model that ``tiny.save_tiny`` wrote, calibrated on its own text."""
    text = str(model / "calib.txt")
    return lowbit.quantize(str(model), out, scheme=scheme, recipe=recipe, data=text, samples=4, length=24, **more)


def streamed_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``(sequences, length, vocabulary)`` of a run, or of a float model, block by block."""
    return torch.cat([logits for _, logits in StreamedModel(folder).logits(ids)])


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """All files of a run folder but the timing, which alone differs between equal runs."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lowbit-timing.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
