"""Versions of what computes and of what is written with."""

from __future__ import annotations

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Versions of what computes and of what is written with."""
    packages = ("lowbit", "torch", "transformers", "compressed-tensors", "safetensors")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
