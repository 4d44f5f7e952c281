"""Triton kernels equal their plain forms in Triton's interpreter, which needs no GPU but a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from interpreted import CUDA, INSTALLED, INTERPRETED

HERE = Path(__file__).parent
# The files with tests of kernels, and how many there are at least.
FILES = {"test_weight_kernel.py": 60, "test_gathered_norm.py": 7, "test_hadamard_quantize.py": 27}


@pytest.mark.heavy
@pytest.mark.skipif(not INSTALLED, reason="needs triton (pip install triton)")
@pytest.mark.skipif(CUDA or INTERPRETED, reason="kernels run in the files themselves")
@pytest.mark.parametrize("name", FILES)
def test_kernels_equal_their_plain_forms_in_the_interpreter(name):
    command = [sys.executable, "-m", "pytest", "-q", "-m", "kernel", "-p", "no:cacheprovider", str(HERE / name)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=HERE.parent, env={**environment, "TRITON_INTERPRET": "1"}
    )
    last = done.stdout.rstrip().rpartition("\n")[2]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.match(r"(\d+) passed", last)
    assert passed is not None, last
    assert int(passed[1]) >= FILES[name]
    assert "skipped" not in last


def test_every_file_with_kernels_is_named():
    using = {file.name for file in HERE.rglob("test_*.py") if "\n@needs_triton\n" in file.read_text()}
    assert using == set(FILES)
