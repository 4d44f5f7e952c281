"""``lowbit compare`` against whole models in memory and plain loops over tokens."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.cli.main import call
from lowbit.data.text import evaluation
from lowbit.metrics.kl import percentile, ratio_interval
from tiny import save_tiny, tiny_ids

LENGTH = 32


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny float model and two runs of it, one much coarser."""
    folder = tmp_path_factory.mktemp("compare")
    model = folder / "model"
    save_tiny(model, "llama")
    (model / "held.txt").write_text("".join(chr(30 + i) for i in tiny_ids(1, 700, seed=8)[0].tolist()))
    for name, scheme in (("fine", "w8a8"), ("coarse", "w3a16g16-sym")):
        sizes = ["--samples", "2", "--length", "16", "--data", f"{model}/calib.txt", "--recipe", "rtn"]
        assert call(["quantize", str(model), "--out", str(folder / name), "--scheme", scheme, *sizes]) == 0
    return model, folder / "fine", folder / "coarse"


@pytest.fixture(scope="module")
def found(places):
    model, fine, coarse = map(str, places)
    return lowbit.compare(model, [fine, coarse], data=f"{model}/held.txt", length=LENGTH)


def text_of(found):
    (text,) = found.texts.values()
    return text


@torch.no_grad()
def plain(places, run):
    """Losses ``(windows, tokens)``, divergences and agreements of tokens, each block's error, by whole models."""
    model, folder = places[0], places[run]
    exact, other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval(), lowbit.load(folder)
    ids = evaluation(f"{model}/held.txt", load_tokenizer(model), LENGTH, None).ids
    losses, kls, same, errors = [[], []], [], [], []
    for window in ids:
        outs = [m(window[None], use_cache=False, output_hidden_states=True) for m in (exact, other)]
        p, q = (out.logits[0].double().softmax(-1) for out in outs)
        for i in range(LENGTH - 1):
            kls.append(
                sum(float(a) * (math.log(float(a)) - math.log(float(b))) for a, b in zip(p[i], q[i], strict=False))
            )
            same.append(int(p[i].argmax()) == int(q[i].argmax()))
            for loss, d in zip(losses, (p, q), strict=True):
                loss.append(-math.log(float(d[i, window[i + 1]])))
        # The last hidden state in the list is behind the final norm; that block is left out here.
        pairs = list(zip(outs[0].hidden_states[1:-1], outs[1].hidden_states[1:-1], strict=True))
        errors.append([float(((b - a).square().sum(-1) / a.square().sum(-1)).mean()) for a, b in pairs])
    return torch.tensor(losses).view(2, len(ids), -1), kls, same, torch.tensor(errors).mean(0)


@pytest.mark.parametrize("run", [1, 2])
def test_the_figures_are_those_of_whole_models(places, found, run):
    losses, kls, same, errors = plain(places, run)
    row = text_of(found)["runs"][run - 1]
    assert row["kl_mean"] == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert row["kl_p99"] == pytest.approx(sorted(kls)[math.ceil(len(kls) * 0.99) - 1], rel=1e-4)
    assert row["top1_agreement"] == pytest.approx(sum(same) / len(same), abs=1e-9)
    assert row["perplexity"] == pytest.approx(float(losses[1].mean().exp()), rel=1e-5)
    assert row["ratio"] == pytest.approx(float((losses[1] - losses[0]).mean().exp()), rel=1e-6)
    assert row["block_error"][:-1] == pytest.approx(errors.tolist(), rel=1e-3)
    assert text_of(found)["perplexity"] == pytest.approx(float(losses[0].mean().exp()), rel=1e-5)


def test_the_perplexities_are_those_of_evaluate(places, found):
    for folder, row in zip(places[1:], text_of(found)["runs"], strict=True):
        (value,) = lowbit.evaluate(str(folder), data=f"{places[0]}/held.txt", length=LENGTH).perplexity.values()
        assert row["perplexity"] == pytest.approx(value, rel=1e-6)


def test_a_coarser_run_is_further_away(found):
    fine, coarse = text_of(found)["runs"]
    assert 0 < fine["kl_mean"] < coarse["kl_mean"]
    assert fine["top1_agreement"] > coarse["top1_agreement"]
    assert all(a < b for a, b in zip(fine["block_error"], coarse["block_error"], strict=True))
    assert fine["ratio_low"] <= fine["ratio"] <= fine["ratio_high"]


def test_a_model_against_itself_differs_nowhere(places):
    made = lowbit.compare(str(places[0]), str(places[0]), data=f"{places[0]}/held.txt", length=LENGTH)
    row = text_of(made)["runs"][0]
    assert row["kl_mean"] == row["kl_p99"] == 0
    assert row["top1_agreement"] == 1
    assert row["ratio"] == row["ratio_low"] == row["ratio_high"] == 1
    assert set(row["block_error"]) == {0.0}


def test_the_interval_is_a_bootstrap_over_windows():
    generator = torch.Generator().manual_seed(5)
    exact = torch.rand(40, 20, generator=generator, dtype=torch.float64)
    other = exact + 0.1 + 0.05 * torch.randn(40, 1, generator=generator, dtype=torch.float64)
    low, high = ratio_interval(exact, other, 0)
    mean, spread = (other - exact).mean(), (other - exact).mean(1).std() / math.sqrt(40)
    assert math.log(low) == pytest.approx(float(mean - 1.96 * spread), abs=float(spread) / 3)
    assert math.log(high) == pytest.approx(float(mean + 1.96 * spread), abs=float(spread) / 3)
    assert ratio_interval(exact, other, 0) == (low, high) != ratio_interval(exact, other, 1)
    assert ratio_interval(exact[:1], other[:1], 0) == (None, None)


def test_a_percentile_is_one_of_the_values():
    values = torch.arange(1, 201.0)
    assert (percentile(values, 99), percentile(values, 100), percentile(values, 0)) == (198, 200, 1)


def test_the_command_says_it_for_people_and_for_programs(places, capsys):
    model, fine, coarse = map(str, places)
    given = ["compare", model, fine, coarse, "--data", f"{model}/held.txt", "--length", str(LENGTH)]
    assert call([*given, "--json", "--prompt", "abc", "--new-tokens", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [Path(run["run"]).name for run in told["runs"]] == ["fine", "coarse"]
    assert told["generations"]["float"].startswith("abc")
    assert len(told["generations"]["runs"]) == 2
    assert call([*given, "--blocks", "--prompt", "abc", "--new-tokens", "3"]) == 0
    shown = capsys.readouterr().out
    assert shown.count(" abc") == 3  # side by side
    assert all(f"{row['block_error'][1]:.4f}" in shown for row in told["texts"][f"{model}/held.txt"]["runs"])
    (text,) = told["texts"].values()
    assert all(f"{row['perplexity']:.4f}"[:5] in shown for row in text["runs"])


def test_what_does_not_compare_is_one_line(places, tmp_path, capsys):
    model, fine, _ = map(str, places)
    other = tmp_path / "other"
    save_tiny(other, "qwen2")
    capsys.readouterr()  # the library's bar when it saves
    for given, words in (
        ([fine, fine], "is a run folder"),
        ([model, str(other)], "architectures"),
        ([model, str(tmp_path / "none")], "no such file or folder"),
        ([model, fine, "--seed", "-1"], "seed"),
        ([model, fine, "--prompt", ""], "prompt"),
        ([model, fine, "--new-tokens", "3"], "--new-tokens 3 given without --prompt"),
    ):
        assert call(["compare", *given, "--data", f"{model}/held.txt", "--length", str(LENGTH)]) == 2
        err = capsys.readouterr().err.strip()
        assert words in err
        assert len(err.splitlines()) == 1


def test_a_texts_name_is_no_markup(places, tmp_path, capsys, monkeypatch):
    """Rich would swallow what stands in brackets."""
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("[bold]de.txt", "a[.txt", "[x] b.txt"):
        text = tmp_path / name
        text.write_text((places[0] / "held.txt").read_text())
        capsys.readouterr()
        given = ["--data", str(text), "--length", "32", "--tokens", "64"]
        assert call(["compare", str(places[0]), str(places[1]), *given]) == 0
        assert f"{text.name}: 64 tokens in windows of 32" in capsys.readouterr().out
