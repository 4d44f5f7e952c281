"""One grid, written in the format of each runtime: one file a target, one line here.

A target states what it can carry (``limits``), writes it and reads it back; see ``target.Exporter``. Its module is
loaded when it is asked for, so that a package that one format needs is no condition for the others.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from lowbit.errors import LowbitError, MissingExtra, unknown
from lowbit.exporters.target import Exporter

# target: the module that has its EXPORTER
EXPORTERS = {
    "executorch": "lowbit.exporters.executorch",
    "gguf": "lowbit.exporters.gguf",
    "gptq": "lowbit.exporters.gptq",
    "awq": "lowbit.exporters.awq",
    "vllm": "lowbit.exporters.vllm",
    "onnx": "lowbit.exporters.onnx",
}
ALIASES = {"llama.cpp": "gguf", "onnxruntime": "onnx"}


def exporter_of(target: str) -> Exporter:
    """The exporter of a target's name; an unknown one is an error that lists the known."""
    name = ALIASES.get(target, target)
    if name not in EXPORTERS:
        raise unknown("target", target, [*EXPORTERS, *ALIASES])
    try:
        module = importlib.import_module(EXPORTERS[name])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lowbit"):
            raise
        raise MissingExtra(error.name or name, name, f"--to {name}") from error
    exporter: Exporter = module.EXPORTER
    return exporter


def target_of(path: Path) -> str:
    """The target whose format a file or folder has."""
    if not path.exists():
        raise LowbitError(f"{path} does not exist: give files or folders that 'lowbit export' wrote")
    for name in EXPORTERS:
        if exporter_of(name).owns(path):
            return name
    raise LowbitError(f"{path} is no export of a known format: {', '.join(EXPORTERS)}")
