"""What ``lowbit --version`` prints: the versions that a report of a problem needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

# Packages that compute or write something, if they are installed: what runs used, then devices, then exports.
OTHERS = (
    "accelerate",
    "tokenizers",
    "gguf",
    "numpy",
    "triton",
    "nvidia-cuda-runtime",
    "nvidia-cuda-runtime-cu12",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "pytorch-triton-rocm",
    "lm_eval",
    "datasets",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-genai",
    "executorch",
    "torchao",
    "llama-cpp-python",
)


def version_lines() -> list[str]:
    """A line for each package, ``lowbit`` first, then the platform; packages are not imported."""
    from lowbit.runs.versions import versions

    found = versions() | {name: number for name in OTHERS if (number := _version(name)) is not None}
    lowbit = found.pop("lowbit")
    return [f"lowbit {lowbit}", *(f"{name} {number}" for name, number in found.items()), f"on {platform.platform()}"]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
