"""Files and folders that are given as a model and are something else: what each is, and what takes it."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoints.safetensors_folder import read_json
from lowbit.errors import LowbitError

_TAKES_EXPORT = "'lowbit verify RUN {path}' compares it with its run; give the run folder or the float model"
# By a file of the folder; the first that is there decides.
_FOLDERS = {
    "genai_config.json": ("an ONNX export", _TAKES_EXPORT),
    "model.pte": ("an ExecuTorch export", _TAKES_EXPORT),
    "model_index.json": ("a diffusers pipeline", "give a causal language model's folder"),
    "modules.json": (
        "a sentence-transformers folder without a language model at its top",
        "give the folder of its transformer, if that is a causal language model",
    ),
    "params.json": (
        "a checkpoint in its author's own format",
        "give the edition for transformers, which has a config.json",
    ),
}
_FILES = {".pte": "an ExecuTorch program", ".onnx": "an ONNX graph"}


def refuse_unfinished_run(folder: Path) -> None:
    """Refuse the folder of a run that did not end."""
    if (folder / ".run" / "identity.json").is_file() and not (folder / "lowbit.json").is_file():
        raise LowbitError(f"{folder} holds an unfinished run: repeat its 'lowbit quantize' command to resume it")


def refuse_adapter(folder: Path) -> None:
    """Refuse a PEFT adapter, with or without weights beside it: its base model alone computes something else."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    base = read_json(path).get("base_model_name_or_path") or "its base model"
    beside = "; if the weights beside it are the whole model, delete adapter_config.json"
    raise LowbitError(
        f"{folder} is a PEFT adapter of {str(base)[:100]}: load it with peft, save merge_and_unload() and the "
        f"tokenizer into a new folder, and give that{beside if (folder / 'config.json').is_file() else ''}"
    )


def no_config(folder: Path) -> LowbitError:
    """The error for a folder without ``config.json``."""
    for file, (what, advice) in _FOLDERS.items():
        if (folder / file).is_file():
            return LowbitError(
                f"{folder} is {what} and no model in transformers' format: {advice.format(path=folder)}"
            )
    hint = ": give the .gguf file itself" if next(folder.glob("*.gguf"), None) else ""
    inner = next((path.parent for path in sorted(folder.glob("*/config.json"))), None)
    if not hint and inner is not None:
        hint = f": did you mean {inner}?"
    return LowbitError(f"{folder} has no config.json, so it is not a model folder{hint}")


def no_model_file(path: Path, demo: str) -> LowbitError:
    """The error for a file that is no ``.gguf`` file."""
    if (what := _FILES.get(path.suffix.lower())) is not None:
        return LowbitError(f"{path} is {what}: {_TAKES_EXPORT.format(path=path)}")
    return LowbitError(f"{path} is a file; allowed are a .gguf file, a model's folder, a hub id, '{demo}'")
