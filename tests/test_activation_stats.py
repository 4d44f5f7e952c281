"""What a run sees for its report: activations as the models have them, learned matrices as they were learned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.data.text import calibration
from lowbit.methods.maps import PICTURE, LearnedMap
from lowbit.runs.activation_stats import OBSERVED, read_activation_stats
from lowbit.runs.manifest import manifest_of
from tiny import save_tiny

BFLOAT16 = 2**-8  # the file's precision: half a step of 8 significant bits
SETTINGS = ("affinequant.epochs=2", "affinequant.qkv=matrix")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model and a run of it with learned maps and quantized activations."""
    root = tmp_path_factory.mktemp("observed")
    save_tiny(root / "m", "llama")
    calib = str(root / "m/calib.txt")
    lowbit.quantize(
        str(root / "m"),
        root / "run",
        scheme="w4a8",
        recipe="affinequant",
        data=calib,
        samples=6,
        length=24,
        settings=SETTINGS,
    )
    return root


def peaks_of(model: torch.nn.Module, linears: list[str], folder: Path) -> dict[str, torch.Tensor]:
    """Largest absolute inputs of linears, by hooks on a whole model over the calibration tokens."""
    found: dict[str, torch.Tensor] = {}

    def watch(name):
        def hook(module, args):
            found[name] = args[0].detach().abs().flatten(0, -2).amax(0)

        # Before the hook that quantizes, which the model has already.
        return model.get_submodule(name).register_forward_pre_hook(hook, prepend=True)

    handles = [watch(name) for name in linears]
    ids = calibration(str(folder / "calib.txt"), load_tokenizer(folder), 6, 24, 0).ids
    with torch.no_grad():
        model(ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("kind", ["float", "quantized"])
def test_peaks_are_those_of_the_whole_model(kind, made):
    seen = {
        k.removeprefix(f"{kind}."): v
        for k, v in read_activation_stats(made / "run").items()
        if k.startswith(f"{kind}.")
    }
    assert len(seen) == 3 * 4
    linears = {name: f"model.layers.{name.partition('+')[0]}" for name in seen}
    if kind == "float":
        model = AutoModelForCausalLM.from_pretrained(made / "m", dtype=torch.float32)
    else:
        model = lowbit.load(made / "run")
    wanted = peaks_of(model, list(linears.values()), made / "m")
    for name, linear in linears.items():
        torch.testing.assert_close(seen[name], wanted[linear], rtol=BFLOAT16, atol=1e-4)


def test_before_and_after_differ_where_maps_moved(made):
    seen = read_activation_stats(made / "run")
    name = "1.mlp.gate_proj+mlp.up_proj"
    assert not torch.allclose(seen[f"float.{name}"], seen[f"quantized.{name}"], rtol=0.1)


def test_pictures_are_kept_of_matrices_only(made):
    pictures = {k: v for k, v in read_activation_stats(made / "run").items() if k.startswith("map.")}
    assert set(pictures) == {f"map.{i}.affinequant.{site}" for i in range(3) for site in ("qkv", "heads")}
    for picture in pictures.values():
        assert picture.ndim == 2
        assert max(picture.shape) <= PICTURE
        assert bool((picture.diagonal() > 0.5).all())


def test_a_picture_is_of_the_map_of_the_largest_condition():
    learned = LearnedMap("masked", 2, 8)
    with torch.no_grad():
        learned.leaves["full"][1, 0, 0] = 3.0
    assert torch.equal(learned.picture(), learned.value()[0][1].detach())


def test_a_run_of_before_has_seen_nothing(made, tmp_path):
    assert read_activation_stats(tmp_path) == {}
    assert OBSERVED in manifest_of(made / "run").files
