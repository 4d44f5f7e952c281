"""What every exporter refuses before any work: runtime ops and number formats that it does not know."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

import lowbit
from formats import Ternary
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError
from lowbit.exporters import EXPORTERS, exporter_of
from lowbit.exporters.fit import check
from lowbit.exporters.run import Run, Subject, open_run
from lowbit.exporters.target import Options
from lowbit.models.ops import OPS
from lowbit.models.runtime_ops import Matrix, RuntimeOp
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import ModelFormats, ModuleFormats
from lowbit.quant.scheme_names import with_overrides

MODULE = "model.layers.1.mlp.down_proj"
targets = pytest.mark.parametrize("target", EXPORTERS)


@pytest.fixture
def run(run_of: Callable[..., Path]) -> Path:
    """A run that every target carries."""
    return run_of("w4a16-sym")


@pytest.fixture
def subject(run: Path) -> Subject:
    return open_run(run).subject


def with_format(subject: Subject, module: str, format: Any) -> Subject:
    """The subject with one module's weight in a format of its own."""
    modules = {**subject.formats.modules, module: ModuleFormats(format)}
    return replace(subject, formats=ModelFormats(modules))


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """No weight is read and nothing is written."""
    for name in ("qtensor", "tensor"):
        monkeypatch.setattr(Run, name, lambda *args: pytest.fail("a weight was read"))


@targets
def test_a_plain_run_fits(target: str, subject: Subject) -> None:
    check(target, exporter_of(target).misfit, subject)


@targets
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_a_runtime_op_that_the_graph_cannot_hold_is_refused(
    target: str, op: type[RuntimeOp], subject: Subject
) -> None:
    exporter = exporter_of(target)
    if op in exporter.ops:
        assert exporter.misfit(replace(subject, ops={op: "tune"})) is None
        exporter = replace(exporter, ops=exporter.ops - {op})
    with pytest.raises(
        LowbitError, match=f"{target} does not support .*, recipe: tune leaves {op.why} at run time; "
    ) as caught:
        check(target, exporter.misfit, replace(subject, ops={op: "tune"}))
    assert "\n" not in str(caught.value)
    assert "nearest that fits" not in str(caught.value)  # no other scheme would help
    able = replace(exporter, ops=exporter.ops | {op})
    assert able.misfit(replace(subject, ops={op: "tune"})) is None


REFUSED = [(target, kind) for target in EXPORTERS for kind, op in OPS.items() if op not in exporter_of(target).ops]


GIVEN: dict[str, Any] = {"embeddings": "F16", "pre": "gpt-2", "gptq_format": "v2", "context": 8, "accuracy_level": 0}


@targets
@pytest.mark.parametrize("option", GIVEN)
def test_an_option_of_another_target_is_refused_by_name(
    option: str, target: str, run: Path, tmp_path: Path, untouched: None
) -> None:
    readers = [name for name in EXPORTERS if option in exporter_of(name).options]
    assert len(readers) == 1
    assert {own.name for own in fields(Options)} == GIVEN.keys()
    if target in readers:
        assert exporter_of(target).unread(Options(**{option: GIVEN[option]})) == []
        return
    flag = option.replace("_", "-")
    said = f"^--{flag} \\w+(-\\d)? given: it is an option of {readers[0]}, and the target is {target}; leave it out$"
    with pytest.raises(LowbitError, match=said):
        lowbit.export(run, target, out=tmp_path / "out", **{option: GIVEN[option]})
    assert not (tmp_path / "out").exists()


def test_graphs_hold_no_more_ops_than_they_say() -> None:
    held = {target: {op.kind for op in exporter_of(target).ops} for target in EXPORTERS}
    assert {target: kinds for target, kinds in held.items() if kinds} == {
        "onnx": {"matrix", "reorder", "hadamard", "fixed-hadamard", "kronecker", "blocks"},
        "vllm": {"fixed-hadamard"},
    }


@pytest.mark.parametrize(("target", "kind"), REFUSED)
@pytest.mark.usefixtures("untouched")
def test_a_run_with_a_runtime_op_is_refused_before_any_work(
    target: str, kind: str, run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run, tmp_path / "run"))
    place = MODULE if OPS[kind].place == "before a linear" else "model.layers.1.input_layernorm"
    write_json(folder / "lowbit.json", {**read_json(folder / "lowbit.json"), "runtime_ops": {place: kind}})
    expected = f"recipe: the run, at {re.escape(place)} leaves {OPS[kind].why} at run time"
    with pytest.raises(LowbitError, match=expected):
        lowbit.export(folder, target)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.usefixtures("untouched")
def test_a_run_whose_recipe_left_matrices_is_refused(run_of: Callable[..., Path], tmp_path: Path) -> None:
    folder = run_of("w4a16-sym", recipe="affinequant", settings=("affinequant.qkv=matrix", "affinequant.epochs=1"))
    for target in (name for name in EXPORTERS if Matrix not in exporter_of(name).ops):
        with pytest.raises(LowbitError, match=r"recipe: .* leaves matrices after norms at run time") as caught:
            lowbit.export(folder, target, out=tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@targets
@pytest.mark.usefixtures("untouched")
def test_a_run_in_a_scheme_that_does_not_fit_is_refused_before_any_work(
    target: str, run_of: Callable[..., Path], tmp_path: Path
) -> None:
    folder = run_of("w4a16kv4")
    before = sorted(folder.parent.iterdir())
    for out in (None, tmp_path / "out"):
        with pytest.raises(LowbitError, match=f"^{target} does not support scheme w4a16kv4, kv: .*fits: w4a16-sym$"):
            lowbit.export(folder, target, out=out)
    assert sorted(folder.parent.iterdir()) == before
    assert not list(tmp_path.iterdir())


@targets
def test_a_format_that_is_not_known_is_refused_and_never_taken_for_a_known_one(target: str, subject: Subject) -> None:
    exporter = exporter_of(target)
    unknown = with_format(subject, MODULE, Ternary())
    with pytest.raises(
        LowbitError, match=f"weight: {re.escape(MODULE)}: this target does not support the format ternary"
    ) as caught:
        check(target, exporter.misfit, unknown)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("nearest that fits: w4a16-sym")
    assert Ternary not in exporter.formats
    with pytest.raises(AssertionError, match="for integer formats"):
        _ = unknown.integers
    found = replace(exporter, formats=(*exporter.formats, Ternary), limits=lambda subject: None).misfit(unknown)
    assert found is None


@targets
def test_an_override_to_a_format_that_is_not_known_is_named(target: str, subject: Subject) -> None:
    glob = "*.down_proj"
    scheme = with_overrides(subject.scheme, {glob: "w4"})
    unknown = replace(with_format(subject, MODULE, Ternary()), scheme=scheme)
    with pytest.raises(LowbitError, match=r"override \*\.down_proj: .*ternary; .*--override '\*\.down_proj=w4-sym'$"):
        check(target, exporter_of(target).misfit, unknown)


def test_formats_are_told_by_their_class_and_not_by_what_they_look_like(subject: Subject) -> None:
    """Int elements, plain scales and no zero point, as a symmetric integer format has."""
    ours, theirs = Ternary(), IntFormat(2)
    assert (ours.elements, ours.scales, ours.zero, ours.group) == (
        theirs.elements,
        theirs.scales,
        theirs.zero,
        theirs.group,
    )
    everywhere = subject
    for module in subject.weights:
        everywhere = with_format(everywhere, module, ours)
    for target in EXPORTERS:
        found = exporter_of(target).misfit(everywhere)
        assert found is not None
        assert "does not support the format ternary" in found.why
