"""The run folder in stock transformers, by its logits: right folders pass, folders that are read wrongly do not."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.cli.main import call
from lowbit.exporters import known_faults
from lowbit.exporters.known_faults import FAULTS, installed_faults
from lowbit.exporters.run import open_run
from lowbit.quant.floating import NVFP4
from lowbit.quant.scheme import ModelFormats, ModuleFormats
from tiny import save_tiny, tiny_ids

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
    told = capsys.readouterr().err
    assert "logits by" in told
    assert re.search(r"transformers \S+ and compressed-tensors \S+ compute something else .*: copy the folder ", told)
    manifest = json.loads((run / "lowbit.json").read_text())
    manifest["versions"]["transformers"] = "5.1"
    (run / "lowbit.json").write_text(json.dumps(manifest))
    assert call(["verify", str(run)]) == 1
    assert "install transformers 5.1 and compressed-tensors" in capsys.readouterr().err
    config["quantization_config"]["config_groups"]["group_0"]["weights"]["num_bits"] = 77
    (run / "config.json").write_text(json.dumps(config))
    assert call(["verify", str(run)]) == 1
    assert "fails: " in capsys.readouterr().err


def test_a_folder_that_is_not_for_stock_transformers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(lowbit.LowbitError, match=r"iq4_nl is a format of llama\.cpp"):
        lowbit.verify(made(tmp_path, "iq4_nl"))


def with_library(monkeypatch: pytest.MonkeyPatch, name: str, of: str | None) -> None:
    """The library is installed in a version, or not at all."""

    def found(package: str) -> str:
        if package != name:
            return version(package)
        if of is None:
            raise PackageNotFoundError(name)
        return of

    monkeypatch.setattr(known_faults, "version", found)


def test_keys_and_values_in_float_are_named_and_are_what_stock_transformers_computes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path, "w8a16kv4-sym")
    assert call(["verify", str(run)]) == 1
    told = capsys.readouterr().err
    assert f"transformers {version('transformers')} runs a checkpoint with quantized keys and values" in told
    assert "load it with lowbit.load, or quantize with a scheme without kv" in told
    with torch.no_grad():
        stock = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)(tiny_ids()).logits
        ours = lowbit.load(run)(tiny_ids()).logits
    assert float((stock - ours).norm() / ours.norm()) > 1e-3


@pytest.mark.parametrize("of", ["0.28.1", None])
def test_another_installed_library_that_misreads_a_folder_is_named(
    of: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path, "fp8a16")
    with_library(monkeypatch, "mlx-lm", of)
    (found,) = lowbit.verify(run)
    assert found.logits is not None
    assert found.logits < 1e-6  # transformers is right
    assert found.ok == (of is None)
    assert call(["verify", str(run)]) == (of is not None)
    told = capsys.readouterr().err
    assert ("mlx-lm 0.28.1 takes weights in FP8 for integers of 4 bits" in told) == (of is not None)
    assert "differs" not in told


def test_each_known_fault_is_of_some_schemes_and_not_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_run(made(tmp_path, "nvfp4a16")).subject
    with_library(monkeypatch, "mlx-lm", "1.0")
    assert installed_faults(subject) == []
    expert = "model.layers.0.mlp.experts.0.up_proj"
    mixture = ModelFormats({**subject.formats.modules, expert: ModuleFormats(NVFP4)})
    (line,) = installed_faults(replace(subject, formats=mixture))
    assert re.fullmatch(
        r"transformers \S+ drops the scale of the tensor of experts .*: .*'\*\.experts\.\*=mxfp4'", line
    )
    assert not any(fault.applies(subject) for fault in FAULTS)
