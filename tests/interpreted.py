"""When the tests of Triton kernels run: on a GPU, or on a CPU in Triton's interpreter.

The interpreter has to be chosen before Triton is imported. ``test_kernels.py`` therefore runs these tests in
processes of their own where there is no GPU; in the files themselves they are skipped unless ``TRITON_INTERPRET=1``
is set.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def needs_triton(test: Any) -> Any:
    """Mark a test that runs a kernel."""
    reason = "needs triton (pip install triton) and a GPU, or TRITON_INTERPRET=1 from the start"
    return pytest.mark.kernel(pytest.mark.skipif(not (INSTALLED and (CUDA or INTERPRETED)), reason=reason)(test))
