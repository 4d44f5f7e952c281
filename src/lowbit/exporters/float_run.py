"""A float model in the form that exporters read: a run in which nothing is quantized."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.exporters.run import Run, Subject
from lowbit.quant.scheme import ModelFormats
from lowbit.quant.scheme_names import parse_scheme
from lowbit.runs.manifest import Calibration, Identity, Manifest, StockLoading


def float_run(folder: Path, config: Any, checkpoint: Checkpoint, name: str) -> Run:
    """A run whose tensors are a float model's own.

    Args:
        folder: with config and tokenizer.
        config: its transformers config.
        checkpoint: its weights, by the names of the model's parameters.
        name: what files call the model.
    """
    subject = Subject(config, parse_scheme("w8a16-sym"), ModelFormats(), {})  # the scheme is of messages alone
    identity = Identity(
        model=name,
        fingerprint="",
        recipe={"steps": []},
        recipe_name="float",
        scheme={},
        data=Calibration("", 0, 0, "auto", "", ""),
        seed=0,
        device="cpu",
        dtype="float32",
        versions={},
    )
    manifest = Manifest(identity, {}, [], [], [], 32.0, 32.0, {}, StockLoading(loads=True), {}, [], {})
    return Run(folder, manifest, subject, checkpoint)
