"""Where a run lost what it lost: recorded and measured sensitivity against whole models with one weight replaced."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.analysis.linear_error import layer_sensitivity
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.checkpoints.writing import write_json
from lowbit.cli.main import call
from lowbit.data.text import calibration, evaluation
from lowbit.methods import METHODS
from lowbit.metrics import sensitivity
from lowbit.metrics.sensitivity import divergence
from lowbit.models.block import Calib
from lowbit.models.forward import run
from lowbit.quant.scheme_files import load_scheme
from lowbit.quant.scheme_names import parse_scheme
from tiny import NAMES, block_of, planned, save_tiny, tiny_ids, tiny_model

COARSE = "model.layers.1.mlp.up_proj"
BASE, LENGTH = "w4a16g16-sym", 16


def quantize(model, out, *more):
    given = ["quantize", str(model), "--out", str(out), "--data", f"{model}/calib.txt"]
    given += ["--samples", "2", "--length", str(LENGTH), "--scheme", BASE, "--recipe", "rtn", *map(str, more)]
    assert call(given) == 0
    return out


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny float model and a run of it in which one linear has 2 bits."""
    folder = tmp_path_factory.mktemp("diagnosis")
    save_tiny(folder / "model", "llama")
    (folder / "model/held.txt").write_text("".join(chr(30 + i) for i in tiny_ids(1, 700, seed=8)[0].tolist()))
    return folder / "model", quantize(folder / "model", folder / "run", "--override", f"{COARSE}=w2g16")


@pytest.fixture(scope="module")
def measured(places):
    model, out = places
    return lowbit.diagnose(out, exact=str(model), data=f"{model}/held.txt", samples=3, length=24, seed=5)


def plain_error(got, y):
    """Relative for each token, in the mean, and for all tokens together, as a sum."""
    lost, there = (got - y).square().sum(-1), y.square().sum(-1)
    return float((lost / there).mean() + lost.sum() / there.sum())


def by_name(found):
    return {row["linear"]: row for row in found.linears}


@pytest.mark.parametrize("exact", [False, True], ids=["recorded", "measured"])
def test_the_linear_with_two_bits_is_named_first(places, capsys, exact):
    model, out = places
    more = ["--float", model, "--data", f"{model}/held.txt", "--length", "24"] if exact else []
    capsys.readouterr()
    assert call(["inspect", str(out), "--json", *map(str, more)]) == 0
    told = json.loads(capsys.readouterr().out)["diagnosis"]
    assert told["linears"][0]["linear"] == COARSE
    assert told["linears"][0]["format"] == "w2g16-sym"
    assert told["linears"][0]["sensitivity"] > 3 * told["linears"][1]["sensitivity"]
    assert max(told["linears"], key=lambda row: row["gain"])["linear"] == COARSE


def test_recorded_errors_are_those_of_the_float_model_with_one_weight_replaced(places):
    model, out = places
    ids = calibration(f"{model}/calib.txt", load_tokenizer(model), 2, LENGTH, 0).ids[:1]
    ours = lowbit.load(out).state_dict()
    rows = by_name(lowbit.diagnose(out))
    for name in (COARSE, "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.o_proj"):
        other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        with torch.no_grad():
            at = rows[name]["block"] + 1
            y = other(ids, output_hidden_states=True).hidden_states[at].double()
            other.get_submodule(name).weight.copy_(ours[f"{name}.weight"])
            got = other(ids, output_hidden_states=True).hidden_states[at].double()
        assert rows[name]["sensitivity"] == pytest.approx(plain_error(got, y), rel=1e-3)


@torch.no_grad()
def test_measured_divergences_are_those_of_whole_models(places, measured):
    model, out = places
    windows = evaluation(f"{model}/held.txt", load_tokenizer(model), 24).ids
    ids = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(5))[:3]]
    ours = lowbit.load(out).state_dict()
    p = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits.double().log_softmax(-1)

    def alone(prefix):
        other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for name, weight in other.named_parameters():
            if name.startswith(prefix):
                weight.copy_(ours[name])
        q = other(ids).logits.double().log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1)[:, :-1].mean())

    rows = by_name(measured)
    for name in (COARSE, "model.layers.2.mlp.down_proj", "model.layers.0.self_attn.v_proj"):
        assert rows[name]["sensitivity"] == pytest.approx(alone(name), rel=1e-3)
        assert rows[name]["measured"]
    for row in measured.blocks:
        assert row["sensitivity"] == pytest.approx(alone(f"model.layers.{row['block']}."), rel=1e-3)


def test_streams_that_do_not_fit_together_give_the_same(places, measured, monkeypatch):
    model, out = places
    monkeypatch.setattr(sensitivity, "HELD_BYTES", 1)
    again = lowbit.diagnose(out, exact=str(model), data=f"{model}/held.txt", samples=3, length=24, seed=5)
    assert (again.linears, again.blocks) == (measured.linears, measured.blocks)


def test_what_wider_weights_gain_is_what_a_run_with_them_gains(places, tmp_path):
    model, out = places
    wide = by_name(lowbit.diagnose(quantize(model, tmp_path / "wide", "--override", f"{COARSE}=w8g16")))
    now = by_name(lowbit.diagnose(out))
    assert now[COARSE]["gain"] == pytest.approx(now[COARSE]["sensitivity"] - wide[COARSE]["sensitivity"], rel=0.02)
    assert wide[COARSE]["gain"] == 0


# By scheme the integers of 8 bits that its gain is against.
KINDS = {
    "nvfp4a16": "w8g16",
    "mxfp4": "w8g32",
    "fp8": "w8",
    "iq4_nl": "w8g32",
    "q2_k": "w8g16",
    "fp8-block": "w8g128",
}


@pytest.mark.parametrize("scheme", KINDS)
def test_runs_in_every_format_are_ranked_and_only_a_budget_is_refused(scheme, tmp_path, capsys):
    model = tmp_path / "model"
    save_tiny(model, "llama", hidden_size=256, intermediate_size=256, head_dim=64, num_hidden_layers=2)
    out, wide = (
        quantize(model, tmp_path / name, "--scheme", scheme, *more)
        for name, more in (("out", ()), ("wide", ("--override", f"{COARSE}={KINDS[scheme]}")))
    )
    found = lowbit.diagnose(out)
    rows, shown = by_name(found), json.loads((out / "lowbit.json").read_text())["blocks"]
    assert {name: row["error"] for name, row in rows.items()} == {
        f"model.layers.{i}.{name}": row["error"]
        for i in range(2)
        for name, row in shown[i]["sensitivity"]["linears"].items()
    }
    assert all(row["sensitivity"] > 0 and row["format"] == parse_scheme(scheme).weight.name for row in found.linears)
    gained = rows[COARSE]["sensitivity"] - by_name(lowbit.diagnose(wide))[COARSE]["sensitivity"]
    # The error of some of the rows stands for the linear's, and that of its output for the block's.
    assert rows[COARSE]["gain"] == pytest.approx(gained, abs=0.05 * rows[COARSE]["sensitivity"])
    capsys.readouterr()
    assert call(["inspect", str(out)]) == 0
    assert "up_proj" in capsys.readouterr().out
    assert call(["inspect", str(out), "--budget", "5"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert all(word in told for word in ("--budget", parse_scheme(scheme).weight.name, "w4a16g64-sym"))


def test_divergence_is_measured_in_formats_of_other_kinds(places, tmp_path):
    model, _ = places
    out = quantize(model, tmp_path / "out", "--scheme", "nvfp4a16", "--override", f"{COARSE}=w2g16")
    found = lowbit.diagnose(out, exact=str(model), data=f"{model}/held.txt", samples=2, length=24)
    assert found.linears[0]["linear"] == COARSE
    assert all(row["measured"] and 0 < row["gain"] < row["sensitivity"] for row in found.linears)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["w4a16g16-sym", "w4a8kv8"])
def test_after_maps_moved_it_is_still_the_damage_to_the_float_output(name, scheme):
    block, x = block_of(tiny_model(name), 1)
    scheme = parse_scheme(scheme)
    moved = METHODS["smoothquant"]()(planned(block, scheme), Calib(x, x, run(block, x)))
    done = METHODS["rtn"]()(moved, Calib(x, x, x))
    told = layer_sensitivity(done, x)[1]
    assert set(told["linears"]) == {n for kind in block.kinds for n in kind.linears}
    y = run(block, x).double()
    for linear, row in told["linears"].items():
        full = f"1.{linear}"
        got = run(done, x, {**done.params, f"{full}.weight": done.qweights[full].dequantize()}).double()
        assert row["error"] - row["input"] == pytest.approx(plain_error(got, y), rel=0.35 if scheme.act else 1e-2)
        assert (row["input"] > 0) == (scheme.act is not None)
        # From 2 to 8 bits a step is 85 times finer.
        assert row["rtn"]["8"] == pytest.approx(row["rtn"]["4"] / 17**2, rel=0.5)
    assert told["error"] > max(row["error"] for row in told["linears"].values()) / 2


def test_a_window_of_blocks_records_what_single_blocks_do(places, tmp_path):
    (tmp_path / "w2.yaml").write_text("steps: [rtn]\nwindow: 2\n")
    model, out = places
    two = quantize(model, tmp_path / "two", "--override", f"{COARSE}=w2g16", "--recipe", tmp_path / "w2.yaml")
    assert by_name(lowbit.diagnose(two)) == by_name(lowbit.diagnose(out))


def test_maps_that_moved_leave_a_share_of_the_blocks_divergence(places, tmp_path):
    model, _ = places
    out = quantize(model, tmp_path / "out", "--recipe", "awq+gptq")
    found = lowbit.diagnose(out, exact=str(model), data=f"{model}/held.txt", samples=3, length=24)
    error = {row["block"]: (row["sensitivity"], row["error"]) for row in found.blocks}
    for row in found.linears:
        kl, whole = error[row["block"]]
        assert not row["measured"]
        assert row["sensitivity"] == pytest.approx(kl * row["error"] / whole)


@pytest.mark.parametrize("budget", [4.5, 5.0, 6.2])
def test_a_proposal_fits_its_budget_and_quantize_takes_it(places, tmp_path, budget, capsys):
    model, out = places
    file = tmp_path / "mine.yaml"
    assert call(["inspect", str(out), "--budget", str(budget), "--out", str(file), "--json"]) == 0
    proposal = json.loads(capsys.readouterr().out)["diagnosis"]["proposal"]
    assert (proposal["sensitivity_proposed"] < proposal["sensitivity_now"]) == (budget >= 5)  # the run has 4.87
    made = lowbit.quantize(
        str(model),
        tmp_path / "made",
        scheme=str(file),
        recipe="rtn",
        data=f"{model}/calib.txt",
        samples=2,
        length=LENGTH,
    )
    assert made.bits_per_weight == pytest.approx(proposal["bits_per_weight"], abs=1e-12)
    assert made.bits_per_weight <= budget
    scheme = load_scheme(str(file))
    for i in range(3):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({scheme.module(f"model.layers.{i}.{name}").weight for name in group}) == 1
    assert scheme.module(COARSE).weight.bits > 2
    assert sum(row["sensitivity"] for row in lowbit.diagnose(made.out).linears) == pytest.approx(
        proposal["sensitivity_proposed"], rel=0.2
    )


def test_rounded_heads_are_counted_and_left_alone(places, tmp_path):
    model, _ = places
    out = quantize(model, tmp_path / "out", "--override", "lm_head=w8g16")
    found = lowbit.diagnose(out, budget=5.5)
    assert {"lm_head": "w8g16-sym"} in found.proposal.scheme["overrides"]
    assert 5.3 < found.proposal.bits_per_weight <= 5.5


def test_small_and_large_divergences():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(50, 400, generator=generator)
    for scale in (1e-3, 1e-1, 3.0, 100.0):
        other = logits + scale * torch.randn(50, 400, generator=generator) + 7
        p, q = logits.double().log_softmax(-1), other.double().log_softmax(-1)
        wanted = (p.exp() * (p - q)).sum(-1)
        # Logits near 10 are known to 5e-7 in float32, so a difference of 1e-3 to 1e-3 of it, its square to 2e-3.
        assert torch.allclose(divergence(logits, other), wanted, rtol=2e-3 if scale == 1e-3 else 1e-4, atol=0)
    assert float(divergence(logits, logits).abs().max()) == 0


def test_people_see_the_worst_ten_and_the_proposal(places, capsys, tmp_path):
    _, out = places
    capsys.readouterr()
    assert call(["inspect", str(out), "--budget", "5", "--bits", "4,8", "--out", str(tmp_path / "a.yml")]) == 0
    shown = capsys.readouterr().out
    assert "w2g16-sym" in shown
    assert "bits per weight; sum of sensitivities" in shown
    assert "quantize --scheme" in shown


def test_what_cannot_be_diagnosed_is_one_line(places, tmp_path, capsys):
    model, out = places
    save_tiny(tmp_path / "other", "llama", seed=1)
    (tmp_path / "there.yaml").touch()
    broken, old = tmp_path / "broken", tmp_path / "old"
    for copy, gone in ((broken, "input"), (old, "sensitivity")):
        shutil.copytree(out, copy)
        manifest = read_json(copy / "lowbit.json")
        row = manifest["blocks"][2]
        del (row if gone == "sensitivity" else row["sensitivity"]["linears"]["mlp.up_proj"])[gone]
        write_json(copy / "lowbit.json", manifest)
    capsys.readouterr()
    for given, words in (
        ([model, "--budget", "4"], "are for a finished run folder"),
        ([model, "--float", model], "are for a finished run folder"),
        ([model, "--data", f"{model}/held.txt"], "--data is for a finished run folder, which"),
        ([model, "--seed", "0"], "--seed is for a finished run folder, which"),
        ([model, "--bits", "4"], "--bits is for a finished run folder, which"),
        *(
            (
                [out, *option],
                f"{option[0]} is for a model, and {out} is a run folder: name the model, or leave it out",
            )
            for option in (
                ("--scheme", "w8a16"),
                ("--recipe", "rtn"),
                ("--effort", "normal"),
                ("--config-only",),
                ("--ranks", "1"),
                ("--device-memory", "80GB"),
                ("--host-memory", "80GB"),
                ("--flops", "400T"),
                ("--bandwidth", "3T"),
                ("--network", "1G"),
            )
        ),
        *(
            ([out, option, value], f"{option} is for a measurement: give --float too, or leave it out")
            for option, value in (("--data", "builtin"), ("--samples", "2"), ("--length", "128"), ("--seed", "0"))
        ),
        ([out, "--bits", "4,8"], "--bits is for a proposal: give --budget too, or leave it out"),
        ([out, "--budget", "2"], "at least 4.000 are needed"),
        ([out, "--budget", "-1"], "--budget -1"),
        ([out, "--budget", "nan"], "--budget nan"),
        ([out, "--budget", "4", "--bits", "4,7"], "--bits 7"),
        ([out, "--budget", "4", "--bits", "four"], "--bits 'four'"),
        ([out, "--out", tmp_path / "new.yaml"], "needs --budget"),
        ([out, "--budget", "4.5", "--out", tmp_path / "new.txt"], ".yaml file"),
        ([out, "--budget", "4.5", "--out", tmp_path / "there.yaml"], "exists"),
        ([out, "--budget", "4.5", "--out", tmp_path / "none/new.yaml"], "folder that does not exist"),
        ([broken, "--budget", "4.5"], "is broken (KeyError('input'))"),
        ([old], "has no recorded sensitivity"),
        ([out, "--float", tmp_path / "other"], "was not made from"),
        ([out, "--float", model, "--data", f"{model}/held.txt", "--samples", "9999"], "--samples 9999"),
        ([out, "--float", model, "--data", f"{model}/held.txt", "--samples", "0"], "--samples 0"),
        ([out, "--float", model, "--data", f"{model}/held.txt", "--length", "4096"], "positions end at"),
    ):
        assert call(["inspect", *map(str, given)]) == 2, given
        err = capsys.readouterr().err.strip()
        assert words in err
        assert len(err.splitlines()) == 1
