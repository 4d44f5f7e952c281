"""What a path that somebody gave is, when it is not what a command takes; and what takes it."""

from __future__ import annotations

from pathlib import Path

from lowbit.checkpoints.json_file import read_json
from lowbit.errors import LowbitError

_EXPORT = "'lowbit verify RUN {path}' compares it with its run; give the run folder or the float model"
_NO_LANGUAGE_MODEL = "give the folder of a causal language model"
# By a file of a folder without config.json: what it is and the advice.
_FOLDERS = {
    "genai_config.json": ("an ONNX export", _EXPORT),
    "model.pte": ("an ExecuTorch export", _EXPORT),
    "model_index.json": ("a diffusers pipeline", _NO_LANGUAGE_MODEL),
    "modules.json": ("a sentence-transformers folder", f"{_NO_LANGUAGE_MODEL}, which may be one of its subfolders"),
    "params.json": (
        "a checkpoint in its author's own format",
        "give its edition for transformers, with a config.json",
    ),
}
_FILES = {
    ".pte": ("an ExecuTorch program", _EXPORT),
    ".onnx": ("an ONNX graph", _EXPORT),
    ".safetensors": ("a file of weights", "give its folder, with config.json and tokenizer"),
    ".bin": ("a file of weights", "give its folder, with config.json and tokenizer"),
    ".gguf": ("a .gguf file", "give it as a model"),
}
ADAPTER = "adapter_config.json"
_CONFIG, _MANIFEST = "config.json", "lowbit.json"
_RESUME = "repeat its 'lowbit quantize' command to resume it"


def what_is(path: Path) -> str | None:
    """What a file or folder is, with an article; ``None`` if it is nothing known."""
    if not path.is_dir():
        return _FILES.get(path.suffix.lower(), (None, ""))[0] if path.is_file() else None
    if (path / _MANIFEST).is_file():
        return "a run folder"
    if (path / ".run" / "identity.json").is_file():
        return "the folder of an unfinished run"
    if (path / ADAPTER).is_file():
        return "a PEFT adapter"
    if (path / _CONFIG).is_file():
        quantization = read_json(path / _CONFIG).get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        return f"an export or another tool's quantized model ({method})" if quantization else "a float model"
    return next((what for file, (what, _) in _FOLDERS.items() if (path / file).is_file()), None)


def no_run(folder: Path) -> LowbitError:
    """The error for anything but a finished run folder where one is needed."""
    what = what_is(folder)
    if what == "the folder of an unfinished run":
        return LowbitError(f"{folder} holds an unfinished run: {_RESUME}")
    but = f" but {what}" if what else ""
    return LowbitError(f"{folder} is not a run folder{but}: give the folder of a finished 'lowbit quantize'")


def refuse_unfinished_run(folder: Path) -> None:
    """Refuse the folder of a run that did not end."""
    if (folder / ".run" / "identity.json").is_file() and not (folder / _MANIFEST).is_file():
        raise LowbitError(f"{folder} holds an unfinished run: {_RESUME}")


def refuse_adapter(folder: Path) -> None:
    """Refuse a PEFT adapter, with or without weights beside it: its base model alone computes something else."""
    path = folder / ADAPTER
    if not path.is_file():
        return
    base = read_json(path).get("base_model_name_or_path") or "its base model"
    beside = "; if the weights beside it are the whole model, delete adapter_config.json"
    raise LowbitError(
        f"{folder} is a PEFT adapter of {str(base)[:100]}: 'lowbit merge {folder} --base MODEL --out DIR' makes a "
        f"model of both (LoRA; others with peft's merge_and_unload()){beside if (folder / _CONFIG).is_file() else ''}"
    )


def no_config(folder: Path) -> LowbitError:
    """The error for a folder without ``config.json``."""
    for file, (what, advice) in _FOLDERS.items():
        if (folder / file).is_file():
            return LowbitError(f"{folder} is {what}: {advice.format(path=folder)}")
    hint = ": give the .gguf file itself" if next(folder.glob("*.gguf"), None) else ""
    inner = next((path.parent for path in sorted(folder.glob("*/config.json"))), None)
    if not hint and inner is not None:
        hint = f": did you mean {inner}?"
    return LowbitError(f"{folder} has no config.json, so it is not a model folder{hint}")


def no_model_file(path: Path, demo: str) -> LowbitError:
    """The error for a file that is no ``.gguf`` file."""
    if (known := _FILES.get(path.suffix.lower())) is not None:
        return LowbitError(f"{path} is {known[0]}: {known[1].format(path=path)}")
    return LowbitError(f"{path} is a file; allowed are a .gguf file, a model's folder, a hub id, '{demo}'")
