"""What ``make`` prints while it installs: one line, and pip's own only where pip fails."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(shutil.which("make") is None, reason="needs make"),
]


def installed(venv: Path, code: int) -> subprocess.CompletedProcess:
    """``make`` with a Python in the environment that says much and ends with ``code``."""
    (venv / "bin").mkdir(parents=True, exist_ok=True)
    python = venv / "bin/python"
    python.write_text(f"#!/bin/sh\necho 'Collecting torch'\necho 'no space left' >&2\nexit {code}\n")
    python.chmod(0o755)
    return subprocess.run(
        ["make", "--no-print-directory", f"VENV={venv}", f"{venv}/.installed"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_pip_is_quiet_and_its_log_is_kept(tmp_path):
    done = installed(tmp_path / "v", 0)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"installing lowbit and what it needs into .*/v: .*minutes.*pip\.log\n", done.stdout)
    assert (tmp_path / "v/pip.log").read_text() == "Collecting torch\nno space left\n"
    assert (tmp_path / "v/.installed").exists()


def test_pip_that_fails_is_shown(tmp_path):
    done = installed(tmp_path / "v", 1)
    assert done.returncode == 2
    assert "Collecting torch\nno space left\n" in done.stdout
    assert not (tmp_path / "v/.installed").exists()


def test_the_three_gates_differ_in_their_tests_only():
    text = (ROOT / "Makefile").read_text()
    assert '-m "not slow"' in text.partition("\ncheck:")[2].partition("\n\n")[0]
    assert '-m "not slow and not heavy"' in text.partition("\nfast:")[2].partition("\n\n")[0]
    for target in ("check", "fast"):
        assert re.search(rf"^{target}: static ", text, re.M)
    assert re.search(r"^test: check slow ", text, re.M)
