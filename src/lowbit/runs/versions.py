"""Versions of Python and of the packages that compute and write a run."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that compute and write a run, by name."""
    packages = ("lowbit", "torch", "transformers", "compressed-tensors", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
