"""What runtime ops cost: counted by hand for a tiny run, and told by ``inspect`` and the report."""

from __future__ import annotations

import pytest

import lowbit
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError
from lowbit.pipeline.inspect import inspect_model
from lowbit.reports.build import report
from lowbit.runs.online_cost import OnlineCost
from runs import quantize_tiny
from tiny import save_tiny

# Of each layer: q and o, k and v, gate, up and down; three transforms of 64 channels in one step and one of 96 in a
# step of 32 and one of 3, each with its signs.
LINEARS = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96
MACS = 3 * 64 * (1 + 64) + 96 * (1 + 32 + 3)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_tiny(folder / "model", "llama")
    return quantize_tiny(folder / "model", folder / "out", "w4a4", "hadamard").out


def test_inspect_counts_ops_and_what_they_take(run):
    facts = inspect_model(str(run), "w4a16", "rtn")
    assert facts["runtime_ops"] == "12 hadamard"
    assert facts["runtime_op_share_of_linears"] == round(MACS / LINEARS, 4)
    assert facts["runtime_op_bits_per_weight"] == round(8 * (3 * 64 + 96) / LINEARS, 4)


def test_the_report_tells_them(run, tmp_path):
    report(run, out=tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert f"12 hadamard: {100 * MACS / LINEARS:.2f} % of the multiply-adds of the quantized linears" in page


def test_a_run_without_ops_tells_nothing(run, tmp_path):
    plain = quantize_tiny(run.parent / "model", tmp_path / "plain", "w4a4", "rtn").out
    assert not [key for key in inspect_model(str(plain), "w4a16", "rtn") if key.startswith("runtime")]


def test_the_text_of_a_cost():
    cost = OnlineCost({"hadamard": 3, "clip": 1}, 25, 1000, 7)
    assert cost.text == "3 hadamard, 1 clip: 2.50 % of the multiply-adds of the quantized linears"


@pytest.mark.parametrize("kind", ["kronecker", "rotation"])
def test_a_manifest_that_lists_what_is_not_there_is_one_line(kind, run, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in run.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    content = read_json(folder / "lowbit.json")
    first = next(iter(content["runtime_ops"]))
    write_json(folder / "lowbit.json", {**content, "runtime_ops": {**content["runtime_ops"], first: kind}})
    with pytest.raises(LowbitError, match=r"it is broken|unknown runtime op") as caught:
        inspect_model(str(folder), "w4a16", "rtn")
    assert "\n" not in str(caught.value)
    assert kind in str(caught.value)
    with pytest.raises(LowbitError, match=kind):
        report(folder, out=tmp_path / "page.html")


def test_they_run_as_they_are_counted(run):
    """The counted ops are those of the loaded model."""
    model = lowbit.load(run)
    names = [name for name, module in model.named_modules() if type(module).__name__ == "_Runtime"]
    assert len(names) == 12
