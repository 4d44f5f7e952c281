"""A run as a Hugging Face folder in another layout: quantized modules are repacked, everything else is copied.

Shards keep their names and order; config, index and tokenizer accompany them. A target provides two things: the
``quantization_config``, and the tensors that it stores for one quantized module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.companions import CONFIG, companions, copy_companion
from lowbit.checkpoints.copy_tensors import copy_tensors
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.partial import final_name
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.writing import write_index, write_json, write_tensors
from lowbit.errors import LowbitError
from lowbit.exporters.run import Run
from lowbit.models.families import architecture_of
from lowbit.progress import track
from lowbit.quant.format import QTensor
from lowbit.runs.carried import CARRIED


def write_folder(
    run: Run,
    path: Path,
    quantization: Mapping[str, Any],
    store: Callable[[str, QTensor], Mapping[str, Tensor]],
    dtype: torch.dtype | None = None,
    carries: bool = False,
) -> None:
    """Write the folder, one shard in memory at a time.

    Args:
        run: the run.
        path: a folder that does not exist yet.
        quantization: the ``quantization_config``.
        store: maps a quantized module's name and weight to its tensors, by name relative to the module.
        dtype: of everything else; by default as stored.
        carries: what the run carries over comes along, byte for byte; else its file is left out.
    """
    path.mkdir()
    shards: dict[str, list[str]] = {}
    own = [file.name for file in run.checkpoint.files if file.name != CARRIED]
    for file in track(own, f"writing {final_name(path)}"):
        tensors = {name: run.tensor(name) for name in run.floats if run.file_of(name) == file}
        if dtype is not None:
            tensors = {name: value.to(dtype) for name, value in tensors.items()}
        for module in (module for module in run.quantized if run.file_of(module) == file):
            tensors |= {f"{module}.{key}": value for key, value in store(module, run.qtensor(module)).items()}
        write_tensors(path / file, tensors)
        shards[file] = sorted(tensors)
    if carries and run.carried:
        stored = run.checkpoint.stored_names
        names = [name for one in run.carried for name in run.checkpoint.names_in_files(one)]
        copy_tensors(run.folder, {name: stored[name] for name in names}, path / CARRIED)
        shards[CARRIED] = sorted(names)
    write_index(path, shards)
    for name in files_to_copy(run):
        copy_companion(run.folder, path, name)
    write_json(path / CONFIG, config_of(run, quantization))


def config_of(run: Run, quantization: Mapping[str, Any]) -> dict[str, Any]:
    """The content of ``config.json``.

    vLLM reads scales in its compute dtype, and bfloat16 would round them: the config requests float16, except for
    Gemma, which vLLM refuses to run in float16.
    """
    config = {**read_json(run.folder / CONFIG), "quantization_config": dict(quantization)}
    if not str(config["model_type"]).startswith("gemma"):
        config["torch_dtype" if "torch_dtype" in config else "dtype"] = "float16"
    return config


def requested_dtype(run: Run) -> torch.dtype:
    """The dtype that the folder's config requests, in which loaders read scales; float32 where it names none."""
    config = config_of(run, {})
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    found = getattr(torch, name.removeprefix("torch."), None)
    return found if isinstance(found, torch.dtype) else torch.float32


def files_to_copy(run: Run) -> list[str]:
    """Names of the files that come along from the run: those of its source that are still there."""
    return [name for name in companions(run.folder, code=True) if name in run.manifest.files]


def stored_config(path: Path) -> dict[str, Any]:
    """The ``quantization_config`` of a folder; empty for anything else."""
    if not (path / CONFIG).is_file():
        return {}
    config = read_json(path / CONFIG).get("quantization_config")
    return config if isinstance(config, dict) else {}


def owns(method: str) -> Callable[[Path], bool]:
    """Whether a path is a folder whose ``quant_method`` is ``method``."""
    return lambda path: path.is_dir() and stored_config(path).get("quant_method") == method


def read_folder(
    path: Path, key: str | tuple[str, ...], value: Callable[[str, Mapping[str, Tensor]], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """All parameters of a folder in float32; for what it carries over see ``other_carried``.

    Args:
        path: the folder.
        key: the tensor whose presence marks a quantized module, such as ``qweight``; or several of which one does.
        value: computes a quantized module's weight ``(out, in)`` from its name and its tensors, by relative name.
    """
    checkpoint = Checkpoint(path)
    parameters = [name for name in checkpoint.names if checkpoint.file_of(name) != CARRIED]
    keys = (key,) if isinstance(key, str) else key
    quantized = [name.removesuffix(f".{own}") for own in keys for name in parameters if name.endswith(f".{own}")]
    seen: set[str] = set()
    for module in quantized:
        own = [n for n in parameters if n.startswith(f"{module}.") and n != f"{module}.bias"]
        seen |= set(own)
        stored = {name.removeprefix(f"{module}."): tensor for name, tensor in checkpoint.read(own).items()}
        try:
            weight = value(module, stored)
        except Exception as error:  # readers fail on broken bytes in many ways; the message names the module
            raise LowbitError(f"'{module}' cannot be read: {error}") from error
        yield f"{module}.weight", weight
    for name in parameters:
        if name not in seen:
            yield name, checkpoint.read([name])[name].float()


def other_files(run: Run, path: Path, quantization: Mapping[str, Any]) -> Iterator[str]:
    """Names of the files, weights aside, that differ from what ``write_folder`` produces."""
    if read_json(path / CONFIG) != config_of(run, quantization):
        yield CONFIG
    for name in files_to_copy(run):
        if not (path / name).is_file() or (path / name).read_bytes() != (run.folder / name).read_bytes():
            yield name


def other_carried(run: Run, path: Path) -> Iterator[str]:
    """The name of the file of what the run carries over, where a folder's is another."""
    files = [folder / CARRIED for folder in (run.folder, path)]
    digests = []
    for file in files if run.carried else ():
        if not file.is_file():
            yield CARRIED
            return
        with file.open("rb") as content:
            digests.append(hashlib.file_digest(content, "sha256").digest())
    if len({*digests}) > 1:
        yield CARRIED


def embedding_of(run_config: Any) -> str:
    """The name of the embedding module."""
    return architecture_of(run_config).embed
