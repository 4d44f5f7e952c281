"""Every cell of the table of what loads where: an export that is named is right, any other is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import loads
import lowbit
from loads import ROWS, TARGETS
from lowbit.checkpoints.gguf_types import Reader
from lowbit.exporters import EXPORTERS, exporter_of
from lowbit.pipeline.recipe import load_recipe
from lowbit.pipeline.target import subject_of
from lowbit.quant.scheme_names import NAMED, parse_scheme
from lowbit.runs.plan import make_plan
from runs import quantize_tiny
from tiny import save_tiny, skeleton_of, tiny_model

SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
NEEDS = {"executorch": "executorch", "onnx": "onnxruntime_genai"}
SLOW = {name: (pytest.mark.heavy, *([pytest.mark.runtimes] if name == "executorch" else [])) for name in NEEDS}
MADE = [
    pytest.param(row.scheme, target, marks=SLOW.get(target, ())) for row in ROWS.values() for target in row.exports
]


@pytest.fixture(scope="module")
def run_in(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A run in a scheme, made once."""
    root = tmp_path_factory.mktemp("loads")
    save_tiny(root / "m", "llama", **SIZES)

    def run(scheme: str) -> Path:
        out = root / scheme
        return out if out.exists() else quantize_tiny(root / "m", out, scheme).out

    return run


@pytest.mark.parametrize(("scheme", "target"), MADE)
def test_what_is_said_to_export_reads_back_bit_for_bit(
    scheme: str, target: str, run_in: Callable[[str], Path], tmp_path: Path
) -> None:
    if target in NEEDS:
        pytest.importorskip(NEEDS[target])
    more = {"pre": "gpt-2"} if target == "gguf" else {}
    out = tmp_path / ("x.gguf" if target == "gguf" else "x")
    lowbit.export(run_in(scheme), target, out=out, **more)
    (found,) = lowbit.verify(run_in(scheme), [out], logits=False)
    assert found.ok, (found.differs, found.other, found.unreadable)
    assert found.exact == found.tensors > 8
    if target == "gguf":
        kinds = {t.tensor_type.name for t in Reader(out).tensors if t.name.startswith("blk.0.ffn_")}
        said = {ROWS[scheme].exports[target]}
        assert kinds - ({"F32"} - said) == said


@pytest.mark.parametrize("scheme", ROWS)
def test_whatever_else_is_refused(scheme: str) -> None:
    parsed, skeleton = parse_scheme(scheme), skeleton_of(tiny_model("llama", **SIZES))
    plan = make_plan(skeleton, parsed)
    subject = subject_of(plan, parsed, load_recipe("rtn"), skeleton)
    misfits = {target: exporter_of(target).misfit(subject) for target in TARGETS}
    assert {target for target, misfit in misfits.items() if misfit is None} == set(ROWS[scheme].exports)
    assert {target for target, misfit in misfits.items() if misfit and misfit.field == "layout"} == ROWS[
        scheme
    ].folder
    assert (plan.stock is None) == (ROWS[scheme].transformers is not None)


def test_the_table_has_every_target_and_every_scheme_that_has_a_name() -> None:
    assert set(TARGETS) == set(EXPORTERS)
    assert set(NAMED) <= set(ROWS)


@pytest.mark.parametrize(("page", "schemes"), loads.PAGES.items())
def test_the_pages_have_the_table(page: str, schemes: tuple[str, ...] | None) -> None:
    text = (loads.ROOT / page).read_text()
    assert loads.with_table(text, loads.render(schemes)) == text, "run: python tests/loads.py"
