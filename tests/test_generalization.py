"""Where a run loses on other text: tokens and their kinds, what calibration has shown, and the tables."""

from __future__ import annotations

import doctest
import json
import math
import sys
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.data.text import evaluation
from lowbit.runs.streamed_model import StreamedModel
from tiny import save_tiny

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import generalization
import generalization_measure
import generalization_page
import token_kinds
from generalization_measure import Observed, measure


@pytest.mark.parametrize("module", [token_kinds, generalization_measure, generalization_page])
def test_examples(module):
    assert doctest.testmod(module).failed == 0


def test_parts_of_characters_have_the_script_of_what_they_end_up_as():
    def decode(ids):
        return bytes(ids).decode("utf-8", "replace")

    text = "é 漢1я"
    kinds = token_kinds.kinds_of_tokens(list(text.encode()), decode)
    assert kinds == [*["Latin, bytes"] * 2, "signs", *["CJK, bytes"] * 3, "digits", *["Cyrillic, bytes"] * 2]
    broken = [0xFF] * 9 + [0x61, 0xE6]
    assert token_kinds.kinds_of_tokens(broken, decode) == ["bytes"] * 8 + ["bytes"] * 3
    assert token_kinds.kinds_of_tokens([0xE6, 0xBC, 0xA2, 0xE6], decode) == [*["CJK, bytes"] * 3, "bytes"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tiny model, a run of it, and a text of letters that it was not calibrated on."""
    folder = tmp_path_factory.mktemp("g")
    save_tiny(folder / "m", "llama")
    text = folder / "m/calib.txt"
    shape = {"scheme": "w4a8", "recipe": "gptq", "samples": 4, "length": 16}
    lowbit.quantize(str(folder / "m"), folder / "run", data=str(text), seed=5, **shape)
    (folder / "other.txt").write_text(text.read_text()[::-1])
    return folder


def test_the_figures_of_a_run_are_those_of_compare(made):
    """Perplexities and errors of blocks have an independent witness; shares add up; every token is in each table."""
    other = str(made / "other.txt")
    found = measure(str(made / "m"), made / "run", str(made / "m/calib.txt"), other, 32, 256)
    told = lowbit.compare(str(made / "m"), [str(made / "run")], data=other, length=32, tokens=256).texts[other]
    assert found["perplexity"] == pytest.approx(told["runs"][0]["perplexity"], rel=1e-12)
    assert found["float_perplexity"] == pytest.approx(told["perplexity"], rel=1e-12)
    assert found["blocks"][1] == pytest.approx(told["runs"][0]["block_error"], rel=1e-12)
    assert found["blocks"][0] != pytest.approx(found["blocks"][1], rel=1e-6)
    for name in ("kinds", "positions", "beyond"):
        assert sum(row["tokens"] for row in found[name].values()) == 8 * 31
        assert sum(row["share"] for row in found[name].values()) == pytest.approx(1)
    means = [(row["tokens"], row["mean"]) for row in found["positions"].values()]
    excess = sum(count * mean for count, mean in means) / (8 * 31)
    assert excess == pytest.approx(math.log(found["perplexity"] / found["float_perplexity"]))
    assert list(found["positions"]) == ["1 to 15", "16 to 63"]
    assert {name.partition(".")[0] for name in found["inputs"]} == {"0", "1", "2"}


def test_the_calibration_tokens_are_the_runs_own(made):
    with pytest.raises(SystemExit, match=r"was calibrated on .*: --calibration .*other\.txt has other tokens"):
        measure(str(made / "m"), made / "run", str(made / "other.txt"), str(made / "other.txt"), 32, 64)
    with pytest.raises(SystemExit, match="no finished run folder"):
        measure(str(made / "m"), made / "m", str(made / "m/calib.txt"), str(made / "other.txt"), 32, 64)


def test_what_calibration_has_shown_is_not_beyond_it(made):
    """A text that was calibrated on has ratios of 1 at most; with one token's hidden state doubled, 2 there."""
    ids = evaluation(str(made / "m/calib.txt"), load_tokenizer(made / "m"), 32, 64).ids
    model = StreamedModel(made / "m")
    observed = Observed(model, [True, False])
    with torch.no_grad():
        states = [observed.enter(ids), observed.enter(ids)]
        for index in range(observed.blocks):
            states = observed.through(index, states)
    (beyond,) = observed.beyond
    assert beyond.shape == ids.shape
    assert float(beyond.max()) == pytest.approx(1)
    assert all(torch.equal(*pair) for pair in observed.inputs.values())
    observed.beyond = []
    doubled = states[0].clone()
    doubled[1, 7] *= 2
    peak = states[0].abs().amax((0, 1))
    observed._note([states[0], doubled])
    assert float(observed.beyond[0][1, 7]) == pytest.approx(float((doubled[1, 7].abs() / peak).max()))
    assert int((observed.beyond[0] > 1).sum()) <= 1


def _row(**more):
    one = {"tokens": 31, "float": 2.0, "mean": 0.5, "median": 0.25, "p99": 3.0, "share": 0.75}
    table = {"Latin": one}
    return {
        "recipe": "gptq",
        "scheme": "w3a16",
        "bits_per_weight": 3.25,
        "corpora": ["a.txt", "b.txt"],
        "sizes": [[4, 16], [8, 32]],
        "notes": [],
        "perplexity": 30.0,
        "float_perplexity": 20.0,
        "kinds": table,
        "positions": table,
        "beyond": table,
        "blocks": [[0.125, 0.25], [0.5, 1.0]],
        "inputs": {
            "0.mlp.down_proj": {"tensor": 1.5, "channel": 4.0, "share": 0.5},
            "1.mlp.down_proj": {"tensor": 3.0, "channel": 2.0, "share": 0.0},
        },
        **more,
    }


def test_the_page_has_a_section_for_each_run_and_one_table_of_blocks():
    text = generalization_page.measured(
        [_row(), _row(recipe="qllm", notes=[f"block {i}: damping raised" for i in range(9)])]
    )
    assert "### gptq, w3a16, on b.txt" in text
    assert "1.500 times the float model's 20.00" in " ".join(text.split())
    assert "| Latin | 31 | 2.00 | 0.50 | 0.25 | 3.00 | 75 % |" in text
    assert "| down | 2.25 | 3.00 (block 1) | 4.00 (block 0) | 25.00 % |" in text
    assert "Notes of the run, 5 of 9:" in text
    assert text.count("damping raised") == 5
    assert "| block | gptq, w3a16, on b.txt | qllm, w3a16, on b.txt |" in text
    assert "| 1 | 0.2500 -> 1.0000 | 0.2500 -> 1.0000 |" in text


def test_rows_are_kept_and_written_between_the_markers(made, tmp_path, monkeypatch):
    """The second command measures nothing; what else is on the page stays."""
    page, asked = tmp_path / "page.md", []
    page.write_text(f"before\n{generalization.BEGIN}old\n{generalization.END}\nafter\n")

    def counted(*given):
        asked.append(given)
        return _row()

    monkeypatch.setattr(generalization, "BUILD", tmp_path / "kept")
    monkeypatch.setattr(generalization, "measure", counted)
    texts = ["--calibration", str(made / "m/calib.txt"), "--data", str(made / "other.txt")]
    command = ["generalization.py", str(made / "m"), str(made / "run"), *texts, "--page", str(page)]
    monkeypatch.setattr(sys, "argv", command)
    generalization.main()
    generalization.main()
    assert len(asked) == 1
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "### gptq, w3a16, on b.txt" in text
    monkeypatch.setattr(sys, "argv", [*command[:2], str(tmp_path), *command[3:]])
    with pytest.raises(SystemExit, match="no finished run folder"):
        generalization.main()
    assert generalization.BEGIN in generalization.PAGE.read_text()


def test_a_users_mistake_is_one_line(made, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    page.write_text(generalization.BEGIN + generalization.END)
    monkeypatch.setattr(generalization, "BUILD", tmp_path / "kept")
    texts = ["--calibration", str(made / "m/calib.txt"), "--data", "wikitext3"]
    monkeypatch.setattr(sys, "argv", ["g.py", str(made / "m"), str(made / "run"), *texts, "--page", str(page)])
    with pytest.raises(SystemExit, match=r"^[^\n]*wikitext3[^\n]*$"):
        generalization.main()
    assert json.dumps(page.read_text()).count("###") == 0
