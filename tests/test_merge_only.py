"""``--merge-only``: what stays at run time is left out of a recipe, so that targets take it."""

from __future__ import annotations

from pathlib import Path

import pytest

from lowbit.errors import LowbitError
from lowbit.exporters import EXPORTERS, exporter_of
from lowbit.methods import METHODS
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.options import with_options
from lowbit.methods.reassemble import Reassemble
from lowbit.pipeline.merge_only import INPUTS, merge_only
from lowbit.pipeline.recipe import Recipe, load_recipe, recipe_names, runtime_ops
from lowbit.pipeline.target import subject_of
from lowbit.quant.scheme_names import parse_scheme
from lowbit.runs.plan import make_plan
from runs import quantize_tiny
from tiny import save_tiny, skeleton_of, tiny_model

ALWAYS = {"llm-int8"}  # steps that have no form without an op


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_leaves_nothing_at_run_time_or_says_why(name: str) -> None:
    recipe = load_recipe(name)
    if ALWAYS & {step for step, _ in recipe.steps}:
        with pytest.raises(
            LowbitError, match=r"^--merge-only given: .* and has no form that folds; choose"
        ) as caught:
            merge_only(recipe)
        assert "\n" not in str(caught.value)
        return
    folded = merge_only(recipe)
    assert not any(runtime_ops(folded, inputs) for inputs in INPUTS)
    if not any(runtime_ops(recipe, inputs) for inputs in INPUTS):
        assert folded == recipe


def test_what_folds_is_kept() -> None:
    step = with_options(
        AffineQuant(), qkv="matrix", mlp="kronecker", heads="blocks", channels="hadamard", act_clip=True, epochs=3
    )
    wanted = with_options(
        AffineQuant(), qkv="diagonal", mlp="diagonal", heads="matrix", channels="diagonal", act_clip=False, epochs=3
    )
    assert step.folded() == wanted
    assert with_options(AffineQuant(), qkv="off", heads="off").folded() == with_options(
        AffineQuant(), qkv="off", heads="off"
    )
    assert Reassemble(sites="all", assembly="bipartite", offsets="both").folded() == Reassemble(offsets="weights")
    assert Reassemble(sites="norms").folded() is None


@pytest.mark.parametrize("name", METHODS)
def test_the_form_that_folds_leaves_no_op_or_the_step_is_known_to_leave_one(name: str) -> None:
    folded = METHODS[name]().folded()
    assert folded is None or (name in ALWAYS) == any(folded.runtime_ops(inputs) for inputs in INPUTS)


@pytest.mark.parametrize("target", EXPORTERS)
@pytest.mark.parametrize("name", ["hadamard", "hadamard+gptq", "flatquant"])
def test_every_target_takes_it(target: str, name: str) -> None:
    skeleton, scheme = skeleton_of(tiny_model("llama")), parse_scheme("w4a16-sym")
    plan, exporter = make_plan(skeleton, scheme), exporter_of(target)
    recipe: Recipe = load_recipe(name)
    assert exporter.misfit(subject_of(plan, scheme, merge_only(recipe), skeleton)) is None
    misfit = exporter.misfit(subject_of(plan, scheme, recipe, skeleton))
    assert (misfit is None) == (target == "onnx")
    assert misfit is None or "--merge-only" in misfit.why


@pytest.mark.heavy
def test_a_run_for_a_runtime_is_refused_before_work_and_made_with_the_switch(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "llama")
    model, out = tmp_path / "m", tmp_path / "out"
    with pytest.raises(LowbitError, match=r"recipe: hadamard leaves Hadamard transforms at run time; .*--merge-only"):
        quantize_tiny(model, out, "w4a16g32-sym", "hadamard", target="llama.cpp")
    assert not out.exists()
    made = quantize_tiny(model, out, "w4a16g32-sym", "hadamard", target="llama.cpp", merge_only=True)
    assert not made.manifest.runtime_ops
    assert made.manifest.request["merge_only"]
    plain = quantize_tiny(model, tmp_path / "rtn", "w4a16g32-sym", "rtn", target="llama.cpp")
    assert made.bits_per_weight == plain.bits_per_weight
