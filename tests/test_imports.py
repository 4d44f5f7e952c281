"""Imports go one way, and what is heavy or optional waits until it is needed."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowbit

ROOT = Path(lowbit.__file__).parent
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(ROOT.rglob("*.py"))}

# What a module, or every module of a package, may import of lowbit at most. The order is the design's, bottom up.
MAY = {
    "errors": set(),
    "progress": set(),
    "adam": set(),
    "quant": {"errors"},
    "compiled": {"errors", "quant"},
    "runtimes": {"errors", "compiled", "quant"},
    "scheme": {"errors", "quant", "runtimes"},
    "family": {"errors"},
    "families": {"errors", "family", "families"},
    "attention": {"errors", "compiled", "quant"},
    "checkpoint": {"errors"},
    "packing": {"errors", "quant", "scheme"},
    "feed": {"errors"},
    "block": {"errors", "attention", "compiled", "family", "feed", "quant", "runtimes", "scheme"},
    "fused": {"block"},
    "triton_norm": {"errors", "fused"},
    "move": {"errors", "family", "block"},
    "observed": {"errors", "block", "checkpoint"},
    "evaluations": {"errors", "checkpoint"},
    "repeating": {"errors", "data", "recipe"},
    "learn": {"errors", "adam", "progress", "checkpoint", "quant", "scheme", "family", "feed", "block", "move"},
    "methods": {"errors", "quant", "scheme", "family", "feed", "block", "move", "learn", "methods", "compiled"},
    "recipe": {"errors", "methods"},
    "skeleton": {"errors", "block", "families", "runtimes"},
    "evaluate": {"errors", "progress", "evaluate"},
    "damage": {"block", "evaluate", "quant", "scheme"},
    "budget": {"errors", "quant", "scheme"},
    "proposal": {"errors", "budget", "damage", "plan", "runfolder", "scheme", "skeleton"},
    "report": {"errors", "progress", "report"},
    "export": {
        *(
            "errors",
            "progress",
            "quant",
            "packing",
            "checkpoint",
            "scheme",
            "runfolder",
            "runtimes",
            "source",
            "family",
            "families",
        ),
        "export",
    },
    "data": {"errors", "progress", "wheels"},
    "task_data": {"errors", "progress", "wheels"},
    "wheels": {"errors", "progress"},
    "gguf_source": {"errors", "progress", "checkpoint"},
    "source": {"errors", "progress", "checkpoint", "gguf_source", "wheels"},
}
# The top of the tree: who alone may import it.
ONLY = {
    "runner": {"api", "tuning"},
    "tuning": {"api"},
    "api": {"__init__", "cli", "cli_measure", "comparing", "demo", "diagnosing", "tasking"},
    "comparing": {"__init__", "cli_measure", "measured"},
    "diagnosing": {"__init__", "cli_inspect"},
    "tasking": {"__init__", "cli_measure"},
    "measured": {"reporting"},
    "reporting": {"__init__", "cli_measure"},
    "exporting": {"__init__", "cli"},
    "demo": {"cli"},
    "inspecting": {"cli_inspect"},
    "making_for": {"api"},
    "cli_inspect": {"cli"},
    "cli_measure": {"cli"},
    "cli": {"__main__"},
}
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
def test_imports_go_one_way(module):
    part = module.split(".")[0]
    found = of_lowbit(tree_of(module)) & {name.split(".")[0] for name in MODULES}
    if part in MAY:
        assert found <= MAY[part], f"{module} imports {sorted(found - MAY[part])}"
    above = {name for name in found if name in ONLY and part not in ONLY[name]}
    assert not above, f"{module} imports {sorted(above)}"


def test_no_module_imports_itself_in_a_circle():
    graph = {}
    for module in MODULES:
        if module != "__init__":
            graph.setdefault(module.split(".")[0], set()).update(of_lowbit(tree_of(module)))
    while leaves := [name for name, uses in graph.items() if not (uses & graph.keys()) - {name}]:
        for name in leaves:
            del graph[name]
    assert not graph


@pytest.mark.parametrize("module", MODULES)
def test_optional_packages_are_imported_where_they_are_used(module):
    top = {name.split(".")[0] for name in imported(at_import(tree_of(module)))}
    assert not top & OPTIONAL


def test_the_reader_of_imports_sees_every_form():
    source = """
import lowbit.api
from lowbit.block import Block
from lowbit import wheels
if TYPE_CHECKING:
    import datasets
def later():
    from pyarrow import parquet
    import lowbit.runner as r
"""
    assert {"api", "block", "wheels", "runner"} <= of_lowbit(ast.parse(source))
    assert {"datasets", "pyarrow"} <= {name.split(".")[0] for name in imported(ast.parse(source))}
    assert not {"datasets", "pyarrow"} & {name.split(".")[0] for name in imported(at_import(ast.parse(source)))}
    assert "lowbit.api" in set(imported(at_import(ast.parse(source))))


def loaded_by(code: str) -> set[str]:
    """The top-level packages that are loaded after running code in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print('@', *sys.modules)"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return {name.split(".")[0] for name in done.stdout.rpartition("@")[2].split()}


@pytest.mark.parametrize(
    "code", ["import lowbit", "import lowbit.cli", "from lowbit.cli import call; call(['--help'])"]
)
def test_help_does_not_wait_for_torch(code):
    loaded = loaded_by(code)
    assert "lowbit" in loaded
    assert not loaded & {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"}


def test_a_subpackage_does_not_hide_the_function_of_its_name(monkeypatch):
    monkeypatch.delitem(sys.modules, "lowbit.evaluate", raising=False)
    package = importlib.import_module("lowbit.evaluate")  # sets it on lowbit, as every first import does
    assert inspect.ismodule(package)
    assert lowbit.evaluate is lowbit.api.evaluate
    assert inspect.ismodule(lowbit.data)


def test_every_public_name_is_there_and_others_are_not():
    for name in lowbit.__all__:
        assert getattr(lowbit, name).__module__.startswith("lowbit."), name
    assert set(lowbit.__all__) <= set(dir(lowbit))
    assert inspect.isfunction(lowbit.evaluate)
    with pytest.raises(AttributeError, match="quantise"):
        lowbit.quantise  # noqa: B018
    with pytest.raises(ImportError):
        exec("from lowbit import quantise")
