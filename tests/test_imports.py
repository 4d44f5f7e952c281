"""Imports go one way, and what is heavy or optional waits until it is needed."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowbit

ROOT = Path(lowbit.__file__).parent
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}

# The floors of the house, bottom up: a module imports from its own package and from floors below. Packages that
# share a floor stand side by side and do not know each other, but for the pairs in BESIDE.
FLOORS = (
    {"errors", "finite", "torch_state"},
    {"progress", "yaml_text"},
    {"distributed", "paths"},
    {"checkpoints", "data", "metrics"},
    {"quant"},
    {"sources"},
    {"models"},
    {"methods"},
    {"runs"},
    {"analysis", "evaluation", "exporters"},
    {"pipeline"},
    {"allocation"},
    {"reports"},
    {"cli"},
    {"__init__", "__main__"},
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}
BESIDE = {("data", "checkpoints")}  # published packages hold texts too
OPTIONAL = {"datasets", "pyarrow", "lm_eval", "onnx", "onnxruntime", "executorch", "torchao"}


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of all modules that a tree imports; of ``from package import name`` both readings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_lowbit(tree: ast.AST) -> set[str]:
    """The parts of ``lowbit`` that a tree imports: the first name below it."""
    names = (name.split(".") for name in imported(tree))
    return {parts[1] for parts in names if parts[0] == "lowbit" and len(parts) > 1}


def at_import(tree: ast.Module) -> ast.Module:
    """The tree without what runs later (functions) or never (``if TYPE_CHECKING``)."""

    class Later(ast.NodeTransformer):
        def visit_FunctionDef(self, node):
            return ast.Pass()

        def visit_If(self, node):
            return ast.Pass() if ast.unparse(node.test) == "TYPE_CHECKING" else self.generic_visit(node)

    return Later().visit(tree)


def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_down(module):
    part = module.split(".")[0]
    found = of_lowbit(tree_of(module)) & {name.split(".")[0] for name in MODULES}
    wrong = {n for n in found - {part} if FLOOR[n] >= FLOOR[part] and (part, n) not in BESIDE}
    assert not wrong, f"{module} imports {sorted(wrong)}, which stand on its own floor or above"


def test_no_module_imports_itself_in_a_circle():
    graph = {}
    for module in MODULES:
        if not module.endswith("__init__"):
            names = {name.removeprefix("lowbit.") for name in imported(tree_of(module)) if name.startswith("lowbit.")}
            graph[module] = {f"{name}.__init__" if f"{name}.__init__" in MODULES else name for name in names}
    packages = {module for module in MODULES if module.endswith("__init__")}
    for package in packages:
        names = {name.removeprefix("lowbit.") for name in imported(tree_of(package)) if name.startswith("lowbit.")}
        graph[package] = names
    while leaves := [name for name, uses in graph.items() if not (uses & graph.keys()) - {name}]:
        for name in leaves:
            del graph[name]
    assert not graph, f"circle among {sorted(graph)}"


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module):
    top = {name.split(".")[0] for name in imported(at_import(tree_of(module)))}
    assert not top & OPTIONAL


def test_the_reader_of_imports_sees_every_form():
    source = """
import lowbit.pipeline.quantize
from lowbit.models.block import Block
from lowbit.checkpoints import pypi as wheels
if TYPE_CHECKING:
    import datasets
def later():
    from pyarrow import parquet
    import lowbit.pipeline.runner as r
"""
    assert {"pipeline", "models", "checkpoints"} <= of_lowbit(ast.parse(source))
    assert {"datasets", "pyarrow"} <= {name.split(".")[0] for name in imported(ast.parse(source))}
    assert not {"datasets", "pyarrow"} & {name.split(".")[0] for name in imported(at_import(ast.parse(source)))}
    assert "lowbit.pipeline.quantize" in set(imported(at_import(ast.parse(source))))


def loaded_by(code: str) -> set[str]:
    """The top-level packages that are loaded after running code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('@', *sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name.split(".")[0] for name in done.stdout.rpartition("@")[2].split()}


@pytest.mark.heavy
@pytest.mark.parametrize(
    "code",
    [
        "import lowbit",
        "import lowbit.cli.main",
        "from lowbit.cli.main import call; call(['--help'])",
        "from lowbit.cli.main import call; call(['--version'])",
    ],
)
def test_help_does_not_wait_for_torch(code):
    loaded = loaded_by(code)
    assert "lowbit" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}


def test_every_public_name_is_there_and_others_are_not():
    for name in lowbit.__all__:
        assert getattr(lowbit, name).__module__.startswith("lowbit."), name
    assert set(lowbit.__all__) <= set(dir(lowbit))
    assert inspect.isfunction(lowbit.evaluate)
    with pytest.raises(AttributeError, match="quantise"):
        lowbit.quantise  # noqa: B018
    with pytest.raises(ImportError):
        exec("from lowbit import quantise")
