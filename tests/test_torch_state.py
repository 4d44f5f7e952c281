"""Whatever state of torch a caller is in, results are the same bytes, and the state is as before afterwards."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import lowbit
from runs import folder_bytes
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models


@contextmanager
def switched(set_: Callable[[object], object], now: object, value: object) -> Iterator[None]:
    set_(value)
    try:
        yield
    finally:
        set_(now)


STATES: dict[str, Callable[[], AbstractContextManager]] = {
    "gradients off": torch.no_grad,
    "inference mode": torch.inference_mode,
    "float64": lambda: switched(torch.set_default_dtype, torch.float32, torch.float64),
    "bfloat16": lambda: switched(torch.set_default_dtype, torch.float32, torch.bfloat16),
    "meta device": lambda: torch.device("meta"),
    "default meta device": lambda: switched(torch.set_default_device, None, "meta"),
    "deterministic": lambda: switched(torch.use_deterministic_algorithms, False, True),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


def state() -> tuple[object, ...]:
    """Everything that a caller could find changed."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.empty(0).device,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_rng_state().tolist(),
        random.getstate(),
        str(np.random.get_state()),
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("state") / "m"
    save_tiny(folder, "llama", num_hidden_layers=2)
    (folder / "learned.yaml").write_text("steps: [affinequant: {epochs: 1}, gptq, tune: {epochs: 1, rank: 2}]")
    return folder


def quantize(model: Path, out: Path) -> lowbit.Quantized:
    sizes = {"data": str(model / "calib.txt"), "samples": 3, "length": 8, "effort": "paper"}
    return lowbit.quantize(str(model), out, scheme="w8a8-sym", recipe=str(model / "learned.yaml"), **sizes)


@pytest.fixture(scope="module")
def plain(model) -> Path:
    """The run and its export in torch's initial state."""
    quantize(model, model.parent / "plain")
    lowbit.export(model.parent / "plain", "vllm", out=model.parent / "exported")
    return model.parent / "plain"


@pytest.mark.parametrize("name", STATES)
def test_a_learned_recipe_gives_the_same_bytes(name, model, plain, tmp_path):
    with STATES[name]():
        before = state()
        quantize(model, tmp_path / "run")
        assert state() == before
    assert folder_bytes(tmp_path / "run") == folder_bytes(plain)


@pytest.mark.parametrize("name", STATES)
def test_everything_else_measures_and_writes_the_same(name, model, plain, tmp_path):
    text = {"data": str(model / "calib.txt"), "length": 8, "tokens": 64}

    def results(out: Path) -> list[object]:
        evaluated, compared = lowbit.evaluate(str(plain), **text), lowbit.compare(str(model), [str(plain)], **text)
        lowbit.export(plain, "vllm", out=out / "exported")
        verified = lowbit.verify(plain, [out / "exported"])
        page = lowbit.report(plain, out=out / "page.html").out.read_bytes()
        ranked = lowbit.diagnose(str(plain)).linears
        return [evaluated.perplexity, compared.texts, [one.exact for one in verified], page, ranked]

    (tmp_path / "usual").mkdir()
    expected = results(tmp_path / "usual")
    (tmp_path / "here").mkdir()
    with STATES[name]():
        before = state()
        got = results(tmp_path / "here")
        assert state() == before
    assert got == expected
    assert folder_bytes(tmp_path / "here" / "exported") == folder_bytes(tmp_path / "usual" / "exported")


@pytest.mark.parametrize("name", STATES)
def test_a_model_is_loaded_as_usual(name, plain):
    def logits(model) -> torch.Tensor:
        with torch.no_grad():
            return model(tiny_ids(1, 8), use_cache=False).logits

    expected = logits(lowbit.load(plain))
    with STATES[name]():
        before = state()
        model = lowbit.load(plain)
        assert state() == before
    assert not any(parameter.is_inference() for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("name", STATES)
def test_the_state_is_restored_after_an_error(name, tmp_path):
    with STATES[name]():
        before = state()
        with pytest.raises(lowbit.LowbitError):
            lowbit.quantize(str(tmp_path / "nowhere"), tmp_path / "run")
        assert state() == before


def test_every_public_function_that_computes_is_guarded():
    free = {"load_recipe", "parse_scheme"}  # read names and files
    functions = {name for name in lowbit.__all__ if inspect.isfunction(getattr(lowbit, name))}
    assert {name for name in functions if not hasattr(getattr(lowbit, name), "__wrapped__")} == free
