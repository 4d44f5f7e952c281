"""A whole run from pickled weights: only when permitted, and then as from safetensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import lowbit
from runs import quantize_tiny, streamed_logits
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs


def pickled(folder: Path) -> None:
    """Turn a folder's shards into pickles with their index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    names = {
        file: file.replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        for file in index["weight_map"].values()
    }
    for file, name in names.items():
        torch.save(load_file(folder / file), folder / name)
        (folder / file).unlink()
    index["weight_map"] = {key: names[file] for key, file in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_a_run_from_pickled_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    for name in ("safe", "pickled"):
        save_tiny(tmp_path / name, "llama", shards=True)
    pickled(tmp_path / "pickled")
    assert len(list((tmp_path / "pickled").glob("*.bin"))) > 1
    with pytest.raises(lowbit.LowbitError, match=r"only pickled weights .*pass --allow-pickle to convert them"):
        quantize_tiny(tmp_path / "pickled", tmp_path / "run", "w8a16g32-sym")
    assert not (tmp_path / "run").exists()
    run = quantize_tiny(tmp_path / "pickled", tmp_path / "run", "w8a16g32-sym", allow_pickle=True).out
    other = quantize_tiny(tmp_path / "safe", tmp_path / "other", "w8a16g32-sym").out
    assert json.loads((run / "lowbit.json").read_text())["request"]["allow_pickle"] is True
    assert json.loads((other / "lowbit.json").read_text())["request"]["allow_pickle"] is False
    assert torch.equal(streamed_logits(run, tiny_ids()), streamed_logits(other, tiny_ids()))
