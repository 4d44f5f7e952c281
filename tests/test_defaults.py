"""A target alone: format and recipe by the model's size, with a sentence that says whether they were measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from lowbit.checkpoints.json_file import read_json
from lowbit.cli.main import call
from lowbit.pipeline.defaults import DEFAULTS_OF, SMALL, default_of, sentence, weights_of
from lowbit.pipeline.opened import open_model
from lowbit.pipeline.recipe import recipe_names
from lowbit.quant.runtimes import RUNTIMES
from tiny import save_tiny

DOCS = Path(__file__).parents[1] / "docs"


def test_every_target_has_a_recipe_for_every_size() -> None:
    assert set(DEFAULTS_OF) == set(RUNTIMES)
    for target, rows in DEFAULTS_OF.items():
        assert [row.below for row in rows] == sorted(row.below for row in rows)
        assert {row.recipe for row in rows} <= set(recipe_names())
        assert default_of(target, 10**13) == rows[-1]


def test_measured_is_said_of_what_a_table_shows_and_estimated_of_all_else() -> None:
    page = (DOCS / "results.md").read_text()
    for rows in DEFAULTS_OF.values():
        for row in rows:
            assert row.estimated.startswith("estimated")
            for scheme, said in row.measured.items():
                assert said.startswith("measured on SmolLM2-135M (docs/results.md)")
                (section,) = re.findall(rf"^## {scheme}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
                cells = {
                    line.split("|")[1].strip(): line.split("|")[4].strip()
                    for line in section.splitlines()
                    if line.startswith("| ")
                }
                assert f"{cells[row.recipe]}, {cells['rtn']} of rtn" in said
                assert float(cells[row.recipe]) == min(
                    float(kl) for name, kl in cells.items() if name not in ("float", "recipe")
                )
    assert "measured" in sentence("vllm", "w4a16g64-sym", SMALL)
    assert "measured" not in sentence("vllm", "w4a16g32-sym", SMALL)


@pytest.mark.parametrize(
    ("given", "recipe"),
    [
        ([], "awq+gptq"),
        (["--recipe", "rtn"], "rtn"),
        (["--scheme", "w8a16"], "gptq"),
        (["--set", "gptq.damping=0.02"], "gptq"),
    ],
)
def test_a_target_alone_says_what_it_takes(
    given: list[str], recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model", "llama")
    assert weights_of(open_model(str(tmp_path / "model"), None, False, False).skeleton) == 3 * (
        64 * 64 * 2 + 64 * 32 * 2 + 64 * 96 * 3
    )
    words = ["quantize", str(tmp_path / "model"), "--out", str(tmp_path / "run"), "--target", "vllm"]
    words += ["--data", str(tmp_path / "model/calib.txt"), "--samples", "2", "--length", "16"]
    assert call([*words, *given]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("vllm: ")]
    assert read_json(tmp_path / "run/lowbit.json")["request"]["recipe"] == recipe
    said = "vllm: w4a16g32-sym with awq+gptq; estimated from groups of 64, where it has the least divergence"
    assert [line.startswith(said) for line in lines] == ([] if given else [True])
