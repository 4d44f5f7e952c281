"""Windows longer than a model's positions are refused by their length, whatever the config calls the limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lowbit
from decoders import SIZES, saved
from lowbit.errors import LowbitError

MPT = {"d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 128, "max_seq_len": 40}
# 40 rows, two of which are of no position.
ROBERTA = {**SIZES, "is_decoder": True, "max_position_embeddings": 40, "pad_token_id": 1}
FEW = [
    ("mpt", MPT, 40, "positions end at 40: give 40 or less"),
    ("roberta", ROBERTA, 38, "RobertaForCausalLM computes no texts of 39 tokens"),
]


@pytest.mark.parametrize(("type", "given", "most", "said"), FEW)
def test_a_window_beyond_the_last_position_is_one_line(
    type: str, given: dict[str, Any], most: int, said: str, tmp_path: Path
) -> None:
    config = CONFIG_MAPPING[type](**given)
    config.architectures = [AutoModelForCausalLM._model_mapping[CONFIG_MAPPING[type]].__name__]
    saved(tmp_path / "m", config)
    text = str(tmp_path / "m" / "calib.txt")
    with pytest.raises(LowbitError, match=said):
        lowbit.quantize(tmp_path / "m", tmp_path / "run", scheme="w4a16", recipe="rtn", data=text, length=most + 1)
    with pytest.raises(LowbitError, match=said):
        lowbit.evaluate(str(tmp_path / "m"), data=text, length=most + 1, tokens=2 * most + 2)
    found = lowbit.evaluate(str(tmp_path / "m"), data=text, length=most, tokens=2 * most).perplexity
    assert all(value > 1 for value in found.values())
