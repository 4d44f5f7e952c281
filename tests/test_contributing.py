"""The pages that tell people how to work here: commands exist, links lead somewhere, every example runs."""

from __future__ import annotations

import doctest
import re
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lowbit
from contracts import check_architecture, check_format, check_op
from tiny import COMMON, save_tiny, tiny_model

ROOT = Path(__file__).parent.parent
EXAMPLE = re.compile(r"```python\n# src/(lowbit/[\w/]+)\.py\n(.*?)```", re.S)
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture
def example(monkeypatch):
    """A module that CONTRIBUTING shows, by its name, imported as if it were in the package."""
    blocks = dict(EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text()))

    def load(name: str) -> types.ModuleType:
        full = name.replace("/", ".")
        module = types.ModuleType(full)
        monkeypatch.setitem(sys.modules, full, module)
        exec(compile(blocks[name], f"CONTRIBUTING.md: {name}", "exec"), module.__dict__)
        assert module.__doc__
        assert doctest.testmod(module).failed == 0
        return module

    return load


def test_every_example_is_one_that_the_tests_below_run():
    blocks = dict(EXAMPLE.findall((ROOT / "CONTRIBUTING.md").read_text()))
    kinds = ("methods/equalize", "models/families/starcoder", "quant/ternary", "models/scale_op", "exporters/npz")
    assert sorted(blocks) == sorted(f"lowbit/{kind}" for kind in kinds)
    for name in blocks:
        assert (ROOT / "src" / name).parent.is_dir()


def test_the_method_of_the_page_keeps_the_contract(example, monkeypatch):
    from lowbit.methods import METHODS
    from lowbit.models.block import Calib
    from lowbit.models.forward import relative_error, run_all, run_quantized
    from lowbit.pipeline.recipe import recipe_from_dict
    from tiny import block_of, planned

    equalize = example("lowbit/methods/equalize").Equalize
    monkeypatch.setitem(METHODS, "equalize", equalize)
    for name in ("llama-odd", "phi3", "opt"):
        block, x = block_of(tiny_model(name), 1, 2)
        # The case that it exists for: a channel of up whose weights are far larger than the others.
        src = next(edge for edge in block.edges() if edge.kind == "channels").src
        params = dict(block.params)
        params[src.parameter] = params[src.parameter].clone()
        params[src.parameter][src.index][3] *= 0.02
        block = planned(replace(block, params=params), "w4a16-sym")
        calib = Calib(x, x, run_all(block, x))
        moved = equalize()(block, calib)
        assert relative_error(run_all(moved, x), calib.y_fp) < 1e-10
        rounded = [run_quantized(METHODS["rtn"]()(one, calib), x) for one in (block, moved)]
        assert all(bool(y.isfinite().all()) for y in rounded)
    recipe = recipe_from_dict({"steps": [{"equalize": {"most": 10}}, "rtn"]}, "mine")
    assert recipe.steps[0][1] == equalize(10.0)


def test_the_architecture_of_the_page_is_proven(example, monkeypatch):
    from transformers import Starcoder2Config

    import lowbit.models.families as families
    import tiny
    from test_equivalence import random_maps

    family = example("lowbit/models/families/starcoder").STARCODER2
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, family))
    config = {key: value for key, value in COMMON.items() if key != "tie_word_embeddings"}
    monkeypatch.setitem(tiny.CONFIGS, "starcoder2", lambda: Starcoder2Config(**config))
    check_architecture(tiny_model("starcoder2"), random_maps)


def test_the_format_of_the_page_keeps_the_contract(example):
    for format in example("lowbit/quant/ternary").Ternary.examples():
        check_format(format)


def test_the_runtime_op_of_the_page_keeps_the_contract(example):
    check_op(example("lowbit/models/scale_op").Scale(torch.rand(8) + 0.5), 8)


def test_the_exporter_of_the_page_is_exact_and_refuses_what_it_does_not_know(example, monkeypatch, tmp_path):
    from lowbit.exporters import EXPORTERS

    example("lowbit/exporters/npz")
    monkeypatch.setitem(EXPORTERS, "npz", "lowbit.exporters.npz")
    save_tiny(tmp_path / "model", "llama")
    text = str(tmp_path / "model" / "calib.txt")
    for scheme in ("w4a16g32-asym", "w4a8"):
        given = {"scheme": scheme, "recipe": "rtn", "data": text, "samples": 2, "length": 16}
        lowbit.quantize(str(tmp_path / "model"), tmp_path / scheme, **given)
    made = lowbit.export(tmp_path / "w4a16g32-asym", "npz")
    (found,) = lowbit.verify(tmp_path / "w4a16g32-asym", [made.out], logits=False)
    assert found.ok
    assert found.exact == found.tensors > 20
    with pytest.raises(lowbit.LowbitError, match="npz does not support scheme w4a8, act"):
        lowbit.export(tmp_path / "w4a8", "npz")


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_every_make_command_on_the_page_is_a_target(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", (ROOT / page).read_text(), re.M))
    assert "test" in named
    assert named <= targets, named - targets


def test_the_map_in_the_readme_names_every_package():
    text = (ROOT / "README.md").read_text()
    package = ROOT / "src" / "lowbit"
    folders = {path.name for path in package.iterdir() if path.is_dir() and path.name != "__pycache__"}
    missing = sorted(name for name in folders if f"`{name}/`" not in text)
    assert not missing


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), (page.name, target)
