"""What a step records stays, whatever steps follow: the same one again, layer by layer or over a window."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from method_contract import brief

import lowbit
from lowbit.methods import METHODS, RTN
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.options import with_options
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.pipeline.recipe import Recipe, load_recipe, with_settings
from lowbit.runs.manifest import manifest_of
from runs import quantize_tiny
from tiny import block_of, planned, save_tiny, tiny_model

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

RECORDING = ["affinequant", "reassemble", "lowrank", "refit", "outlier-suppression+", "signs"]


@cache
def window():
    block, x = block_of(tiny_model("opt"), 1, 2)
    block = planned(block, "w4a4")
    return block, Calib(x, x, run_all(block, x))


def merged(records):
    """The figures of all layers in one dict."""
    return {(index, name): figures for index, steps in records.items() for name, figures in steps.items()}


PAIRS = {(before, behind) for before in RECORDING for behind in (before, "affinequant", "reassemble")}


@pytest.mark.parametrize(("before", "behind"), sorted(PAIRS))
def test_figures_of_the_step_before_stay_and_those_of_the_step_behind_come(before, behind):
    block, calib = window()
    first = brief(METHODS[before]())(block, calib)
    second = brief(METHODS[behind]())(first, calib)
    kept, all_of_them = merged(first.record), merged(second.record)
    assert kept
    assert {key: all_of_them[key] for key in kept} == kept
    expected = f"{behind}-2" if behind == before else behind
    assert {name for _, name in all_of_them.keys() - kept.keys()} == {expected}
    assert all(second.pictures[name] is picture for name, picture in first.pictures.items())


def test_steps_of_one_name_are_numbered_over_the_whole_window():
    block, calib = window()
    alone, together = (with_options(AffineQuant(), epochs=0, window=n) for n in (1, 2))
    done = together(alone(together(block, calib), calib), calib)
    assert {index: list(steps) for index, steps in done.record.items()} == {
        1: ["affinequant", "affinequant-2", "affinequant-3"],
        2: ["affinequant-2"],
    }
    names = {name.split(".", 1)[1].rpartition(".")[0] for name in done.pictures}
    assert names == {"affinequant", "affinequant-2", "affinequant-3"}


def test_a_record_is_of_its_step_alone():
    """A step over both layers after one layer by layer: the layers' own figures are not the window's."""
    block, calib = window()
    signs = METHODS["signs"]()(block, calib)
    done = with_options(AffineQuant(), epochs=1)(signs, calib)
    assert {index: list(steps) for index, steps in done.record.items()} == {
        1: ["signs", "affinequant"],
        2: ["affinequant"],
    }
    assert done.record[1]["signs"] is signs.record[1]["signs"]
    part = done.part(1, 2)
    assert replace(done, record={}).with_part(part).record == {2: done.record[2]}
    assert torch.equal(part.params["2.fc1.weight"], done.params["2.fc1.weight"])


def test_manifest_and_report_show_every_step(tmp_path):
    save_tiny(tmp_path / "m", "llama")
    epochs = [f"{step}.epochs=1" for step in ("affinequant", "lowrank", "tune")]
    recipe = with_settings(load_recipe("affinequant+qllm"), [*epochs, "reassemble.tries=2"])
    again = Recipe("twice", (recipe.steps[0], *recipe.steps), window=recipe.window)
    quantize_tiny(tmp_path / "m", tmp_path / "out", "w4a4", again)
    rows = manifest_of(tmp_path / "out").blocks
    everywhere = {"affinequant", "affinequant-2", "reassemble"}
    assert [set(row.steps) for row in rows] == [everywhere | {"lowrank", "tune"}, everywhere, everywhere]
    learned = [row.steps[name] for row in rows for name in ("affinequant", "affinequant-2")]
    assert all(figures["held_out"] and figures["sites"] for figures in learned)
    lowbit.report([tmp_path / "out"], out=tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for step in ("affinequant", "affinequant-2", "lowrank", "tune"):
        assert f"{step}: loss" in page, step


def test_a_step_without_figures_leaves_none():
    block, calib = window()
    assert RTN()(METHODS["signs"]()(block, calib), calib).record.keys() == {1}
