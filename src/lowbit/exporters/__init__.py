"""Export targets: the codes of a run in the format of each runtime, one module per target.

A target states what it supports (``limits``), writes it and reads it back; see ``target.Exporter``. Modules are
imported on first use, so a package that one format needs stays optional for the others.
"""

from __future__ import annotations

import importlib
from pathlib import Path

from lowbit.checkpoints.kinds import what_is
from lowbit.errors import LowbitError, MissingExtra, canonical
from lowbit.exporters.target import Exporter

# target: the module that has its EXPORTER
EXPORTERS = {
    "executorch": "lowbit.exporters.executorch",
    "gguf": "lowbit.exporters.gguf",
    "gptq": "lowbit.exporters.gptq",
    "awq": "lowbit.exporters.awq",
    "vllm": "lowbit.exporters.vllm",
    "onnx": "lowbit.exporters.onnx",
    "gemma": "lowbit.exporters.gemma",
}
ALIASES = {"llama.cpp": "gguf", "onnxruntime": "onnx"}


def target_name(given: str) -> str:
    """The target of that name or alias, in any case; an unknown name raises an error that lists the known ones."""
    name = canonical("target", given, [*EXPORTERS, *ALIASES])
    return ALIASES.get(name, name)


def exporter_of(target: str) -> Exporter:
    """The exporter of a target; an unknown name raises an error that lists the known ones."""
    name = target_name(target)
    try:
        module = importlib.import_module(EXPORTERS[name])
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lowbit"):
            raise
        raise MissingExtra(error.name or name, name, f"--to {name}") from error
    exporter: Exporter = module.EXPORTER
    return exporter


def target_of(path: Path) -> str:
    """The target whose format a file or folder is in."""
    if not path.exists():
        raise LowbitError(f"{path} does not exist: give files or folders that 'lowbit export' wrote")
    for name in EXPORTERS:
        if exporter_of(name).owns(path):
            return name
    what = what_is(path)
    raise LowbitError(
        f"{path} is {f'{what}, ' if what else ''}not an export in a known format: {', '.join(EXPORTERS)}"
    )
