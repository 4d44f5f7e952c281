"""Runs of a tiny model that is on disk already, and what is read from them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.pipeline.runner import Walk
from lowbit.runs.streamed_model import StreamedModel


def quantize_tiny(model: Path, out: Path, scheme: str, recipe: Any = "rtn", **more: Any) -> lowbit.Quantized:
    """A run of a model that ``tiny.save_tiny`` wrote, calibrated on its own text."""
    text = str(model / "calib.txt")
    return lowbit.quantize(str(model), out, scheme=scheme, recipe=recipe, data=text, samples=4, length=24, **more)


def streamed_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits ``(sequences, length, vocabulary)`` of a run, or of a float model, block by block."""
    return torch.cat([logits for _, logits in StreamedModel(folder).logits(ids)])


class Killed(BaseException):
    """Passes every handler of errors, as a kill does."""


def killed_and_resumed(make_run: Callable[[], Path], monkeypatch: Any) -> Path:
    """The folder of a run that is killed where it writes its second block, and started again."""
    real = Walk.write

    def write(self: Any, block: Any, *rest: Any) -> Any:
        if block.start == 1:
            raise Killed
        return real(self, block, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Walk, "write", write)
        with pytest.raises(Killed):
            make_run()
    return make_run()


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """All files of a run folder but the timing, which alone differs between equal runs."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lowbit-timing.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}
