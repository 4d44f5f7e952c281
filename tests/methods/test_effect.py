"""Which parameters act is decided from the formats; here each is moved, and the loss tells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.methods import effect
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.effect import rows_scale_freely
from lowbit.methods.options import with_options
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_names import parse_scheme, with_overrides
from tiny import block_of, planned, tiny_model

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

OVERRIDES = {
    "none": {},
    "down": {"*.down_proj": "float", "*.fc2": "float"},
    "o": {"*.o_proj": "float", "*.out_proj": "float"},
    "attention": {"*self_attn.*": "float"},
    "mlp": {"*mlp*": "float", "*fc?": "float"},
    "all but v": {
        "*.[qk]_proj": "float",
        "*.o_proj": "float",
        "*.out_proj": "float",
        "*mlp*": "float",
        "*fc?": "float",
    },
}


def exact(scheme):
    """The scheme with scales stored as they are computed: rounding them is no effect of a map."""
    overrides = tuple((g, f and replace(f, scale_dtype=torch.float32)) for g, f in scheme.overrides)
    return replace(scheme, weight=replace(scheme.weight, scale_dtype=torch.float32), overrides=overrides)


def fit_of(block, calib, **options):
    options = {"signs": False, "loss": "mse", "init_power": 0.5, **options}
    step = with_options(AffineQuant(), **options)
    return AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)


def effects(trainer):
    """By ``site.leaf``, the change of the loss, relative to it, when the leaf is moved far."""
    chosen, found = torch.arange(2), {}
    with torch.no_grad():
        trainer.begin(20)
        before = float(trainer.loss(chosen))
        for site in trainer.sites:
            leaves = {**site.map.leaves, **({} if site.shift is None else {"shift": site.shift})}
            for name, leaf in leaves.items():
                start = leaf.clone()
                noise = torch.randn(leaf.shape, generator=torch.Generator().manual_seed(0)).to(leaf)
                leaf += (0.2 if name == "full" else 0.5) * noise
                found[f"{site.name}.{name}"] = abs(float(trainer.loss(chosen)) - before) / before
                leaf.copy_(start)
    return found


@pytest.mark.parametrize("options", [{}, {"heads": "diagonal", "qk": "diagonal"}, {"qkv": "matrix", "mlp": "matrix"}])
@pytest.mark.parametrize("left_float", OVERRIDES)
@pytest.mark.parametrize("scheme", ["w4a4", "w4a16kv4", "w3a16g16-asym"])
@pytest.mark.parametrize("name", ["llama-odd", "opt", "qwen3", "phi3"])
def test_what_is_left_out_is_what_no_quantizer_sees(name, scheme, left_float, options, monkeypatch):
    block, x = block_of(tiny_model(name), 1)
    formats = exact(with_overrides(parse_scheme(scheme), OVERRIDES[left_float]))
    block = planned(block, formats)
    calib = Calib(x, x, run_all(block, x))
    trainer = fit_of(block, calib, **options)
    learned = {f"{site.name}.{name}" for site in trainer.sites for name in site.map.leaves}
    learned |= {f"{site.name}.shift" for site in trainer.sites if site.shift is not None}
    learned -= {f"{site.name}.{name}" for site in trainer.sites for name in site.without_effect}
    with monkeypatch.context() as patch:
        patch.setattr(effect, "_map_acts", lambda *args, **kwargs: True)
        patch.setattr("lowbit.methods.sites.shift_has_effect", lambda *args: True)
        found = effects(fit_of(block, calib, **options))
    assert learned <= set(found)
    # Between the two lie the ties that float32 rounds the other way, and real effects at eight bits and more.
    assert {leaf for leaf, change in found.items() if change > 1e-4} == learned, found


def test_the_record_names_what_is_left_out_and_it_stays_at_its_start():
    block, x = block_of(tiny_model("llama"), 1)
    block = planned(block, with_overrides(parse_scheme("w4a4"), {"*.down_proj": "float"}))
    step = with_options(AffineQuant(), epochs=2, held_out=0.0)
    calib = Calib(x, x, run_all(block, x))
    record = step(block, calib).record[1]["affinequant"]
    assert record["without_effect"] == ["1.channels", "1.qk.log"]
    assert set(record["sites"]) == {"1.qkv", "1.heads", "1.qk", "1.mlp"}
    diagonal = with_options(step, qk="diagonal")(block, calib).record[1]["affinequant"]
    assert diagonal["without_effect"] == ["1.channels", "1.qk"]


@pytest.mark.parametrize("start", ["smooth", "given"])
def test_ratios_that_no_gradient_moves_are_searched_and_not_trained(start):
    block, x = block_of(tiny_model("llama"), 1)
    block = planned(block, with_overrides(parse_scheme("mxfp4a16"), {"*.down_proj": "w4g16"}))
    rows = len(block.weight("1.mlp.up_proj"))
    kept = torch.full((rows, 2), 0.9), torch.full((rows, 2), 0.8)
    block, calib = replace(block, clips={"1.mlp.up_proj": kept}), Calib(x, x, run_all(block, x))
    step = with_options(AffineQuant(), epochs=2, held_out=0.0, start=start)
    fit = AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)
    assert set(fit.clips) == {"1.mlp.down_proj"}  # with leaves that are trained
    done = step(block, calib)
    assert not [name for name in done.record[1]["affinequant"]["without_effect"] if name.endswith(".clip")]
    assert "1.mlp.down_proj" in done.clips
    # What an earlier step chose for a range goes with the range.
    found = done.clips.get("1.mlp.up_proj")
    assert start == "given" or found is None or not torch.equal(found[0], kept[0])


def test_a_matrix_behind_a_norm_stays_away_where_its_readers_are_float():
    block, x = block_of(tiny_model("llama"), 1)
    block = planned(block, with_overrides(parse_scheme("w4a16"), {"*mlp*": "float"}))
    step = with_options(AffineQuant(), epochs=1, qkv="matrix", mlp="matrix")
    done = step(block, Calib(x, x, run_all(block, x)))
    assert list(done.ops) == ["1.input_layernorm"]


@pytest.mark.parametrize("format", [IntFormat(4), IntFormat(3, 16, symmetric=False)])
def test_integers_with_a_scale_of_their_own_commute_with_factors_of_rows(format):
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    format = replace(format, scale_dtype=torch.float64)
    factors = torch.logspace(-2, 2, 6, dtype=torch.float64)[:, None]
    both = [format.fake_quant(weight, format.qparams(weight)) * factors]
    both.append(format.fake_quant(weight * factors, format.qparams(weight * factors)))
    assert rows_scale_freely(format)
    assert torch.allclose(*both, rtol=1e-12)
