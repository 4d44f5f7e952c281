"""The run folder in stock transformers, by its logits: right folders pass, folders that are read wrongly do not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lowbit
from lowbit.cli.main import call
from tiny import save_tiny

pytestmark = pytest.mark.heavy  # a process for each check


def made(folder: Path, scheme: str, **more: str) -> Path:
    save_tiny(folder / "m", "llama", hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    how = {"recipe": "rtn", "data": str(folder / "m/calib.txt"), "samples": 1, "length": 8}
    lowbit.quantize(folder / "m", folder / "run", scheme=scheme, **how, **more)
    return folder / "run"


@pytest.mark.parametrize("scheme", ["w4a8-sym", "mxfp4"])
def test_a_right_folder_passes_in_its_dtype(scheme: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path, scheme)
    (found,) = lowbit.verify(run)
    assert found.ok
    assert found.logits is not None
    assert found.logits < 1e-6
    assert found.target.endswith("bfloat16" if scheme == "mxfp4" else "float32")
    if scheme == "mxfp4":
        assert call(["verify", str(run)]) == 0


def test_a_folder_that_is_read_wrongly_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Here the inputs' format is left out of the config, as a library's version that ignores it would have it."""
    run = made(tmp_path, "w4a4-sym")
    config = json.loads((run / "config.json").read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] = None
    (run / "config.json").write_text(json.dumps(config))
    assert call(["verify", str(run)]) == 1
    assert "logits by" in capsys.readouterr().err
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 77
    (run / "config.json").write_text(json.dumps(config))
    assert call(["verify", str(run)]) == 1
    assert "fails: " in capsys.readouterr().err


def test_a_folder_that_is_not_for_stock_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lowbit.LowbitError, match=r"iq4_nl is a format of llama\.cpp"):
        lowbit.verify(made(tmp_path, "iq4_nl"))
