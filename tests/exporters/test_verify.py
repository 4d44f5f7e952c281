"""What verify makes of a runtime's logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import BioGptConfig, BioGptForCausalLM

import lowbit
from lowbit.cli.main import call
from lowbit.exporters import api as exporting
from lowbit.exporters import exporter_of
from lowbit.exporters.target import Executed
from tiny import tiny_tokenizer


@pytest.fixture(scope="module")
def made(run_of: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    run = run_of("w4a16g32-sym")
    return run, lowbit.export(run, "gguf", out=tmp_path_factory.mktemp("verify") / "run.gguf").out


def runtime(run: Path, factor: float) -> Any:
    def execute(path: Path, ids: Tensor) -> Executed:
        model = lowbit.load(run, target="llama.cpp")
        return Executed(model(ids[None]).logits[0].detach() * factor, 0.01, "llama.cpp")

    return lambda target: replace(exporter_of(target), execute=execute)


@pytest.mark.parametrize(("factor", "code"), [(1.0, 0), (1.005, 0), (1.05, 1)])
def test_logits_beyond_what_is_explained_fail(
    made: tuple[Path, Path], factor: float, code: int, monkeypatch: Any, capsys: Any
) -> None:
    run, file = made
    monkeypatch.setattr(exporting, "exporter_of", runtime(run, factor))
    assert call(["verify", str(run), str(file)]) == code
    assert ("0.01 is explained" in capsys.readouterr().err) is (code == 1)
    (found,) = lowbit.verify(run, [file])
    assert found.logits == pytest.approx(factor - 1, abs=1e-6)
    assert lowbit.verify(run, [file], logits=False)[0].logits is None


@pytest.mark.parametrize(("wrong", "code"), [(1, 0), (2, 1)])
def test_a_runtime_that_is_wrong_once_has_a_second_pass(
    made: tuple[Path, Path], wrong: int, code: int, monkeypatch: Any, capsys: Any
) -> None:
    run, file = made
    factors = iter([1.05] * wrong + [1.0])

    def execute(path: Path, ids: Tensor) -> Executed:
        return Executed(lowbit.load(run)(ids[None]).logits[0].detach() * next(factors), 0.01, None)

    monkeypatch.setattr(exporting, "exporter_of", lambda target: replace(exporter_of(target), execute=execute))
    assert call(["verify", str(run), str(file)]) == code
    said = capsys.readouterr().err
    assert ("in pass 2 only" in said, "0.01 is explained" in said) == (code == 0, code == 1)


def test_a_runtime_that_gives_up_has_failed(made: tuple[Path, Path], monkeypatch: Any) -> None:
    def execute(path: Path, ids: Tensor) -> Executed:
        raise RuntimeError("no kernel")

    run, file = made
    monkeypatch.setattr(exporting, "exporter_of", lambda target: replace(exporter_of(target), execute=execute))
    (found,) = lowbit.verify(run, [file])
    assert found.unreadable == "error in its runtime: RuntimeError: no kernel"
    assert not found.ok


def test_a_tied_head_of_another_name_is_no_tensor_of_its_own(tmp_path: Path) -> None:
    """BioGPT's head is ``output_projection``, which is the embedding."""
    tokenizer = tiny_tokenizer(merge=True)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    model = BioGptForCausalLM(BioGptConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "calib.txt").write_text("a cab of the day. " * 200)
    text = str(tmp_path / "calib.txt")
    lowbit.quantize(tmp_path / "model", tmp_path / "run", scheme="w4a16g32-sym", data=text, samples=2, length=16)
    (checked,) = lowbit.verify(tmp_path / "run")
    assert checked.ok
