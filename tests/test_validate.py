"""What a checkpoint must hold to be taken for the model that its config describes."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import check_tied
from tiny import save_tiny


@pytest.mark.parametrize("change", [0.0, 1e-3])
def test_a_head_of_its_own_under_a_tied_config_is_refused(change, tmp_path: Path):
    model = save_tiny(tmp_path, "llama-odd")
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    assert "lm_head.weight" not in tensors
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + change
    save_file(tensors, file, metadata={"format": "pt"})
    checkpoint, skeleton = Checkpoint(tmp_path), Skeleton(model.config)
    if change:
        with pytest.raises(LowbitError, match="tie_word_embeddings"):
            check_tied(checkpoint, skeleton)
    else:
        check_tied(checkpoint, skeleton)
