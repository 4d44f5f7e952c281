"""SmolLM2-135M-Instruct with its first layers only, for what its thirty would not prove better."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from lowbit.checkpoints.resolve import resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.shards import SINGLE
from lowbit.checkpoints.writing import write_json, write_tensors


def short_smollm2(folder: Path, layers: int = 4) -> Path:
    """A checkpoint of the first ``layers`` decoder layers, embeddings, final norm and tokenizer in ``folder``."""
    source = resolve("demo").folder
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.suffix in (".json", ".txt", ".jinja", ".model") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    write_json(folder / "config.json", config | {"num_hidden_layers": layers})
    checkpoint = Checkpoint(source)
    kept = [name for name in checkpoint.names if not _beyond(name, layers)]
    write_tensors(folder / SINGLE, checkpoint.read(kept))
    return folder


def _beyond(name: str, layers: int) -> bool:
    parts = name.split(".")
    return "layers" in parts and int(parts[parts.index("layers") + 1]) >= layers
