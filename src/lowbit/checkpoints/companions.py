"""The files that come along with a model: everything that its own loaders may read, except its weights.

A list of names would go stale with each new tokenizer. The rule is the reverse: what is not weights, not another
framework's copy of them, not left over from training and not the repository's own papers comes along, if it is of a
tokenizer's size at most. Texts and tables may be somebody's data: they come along if they are named like a
vocabulary, or if ``tokenizer_config.json`` or the model's code mentions them. In subfolders only chat templates, code
and what ``tokenizer_config.json`` names are read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.writing import write_bytes
from lowbit.errors import LowbitError

CONFIG, GENERATION, TOKENIZER_CONFIG = "config.json", "generation_config.json", "tokenizer_config.json"
LARGEST = 128 << 20  # bytes; the largest tokenizer files have about 35 MB
TEMPLATES = "additional_chat_templates"
# Weights of any framework, archives, and pictures.
_OTHER = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".onnx", ".onnx_data"),
    *(".pte", ".ptd", ".tflite", ".mlmodel", ".npz", ".npy", ".pkl", ".pickle", ".ot", ".nemo", ".index.json"),
    *(".parquet", ".arrow", ".feather", ".sqlite", ".db", ".xml"),
    *(".zip", ".tar", ".gz", ".xz", ".zst", ".7z", ".whl", ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".pdf"),
    *(".md", ".rst", ".html", ".log", ".ipynb", ".sh", ".lock", ".partial"),
)
_TEXTS = (".txt", ".jsonl", ".csv", ".tsv", ".yaml", ".yml")
_VOCABULARY = ("vocab", "merges", "tokens", "bpe", "spm", "dict", "license", "notice", "policy")
# Papers of the repository, what trainers leave, and lowbit's own (which describe another folder).
_STEMS = ("readme", "lowbit", "trainer_state", "training_args", "adapter_", "optimizer", "scheduler", "rng_state")
_RESULTS = ("_results.json",)
# Configs of other loaders, and of quantizations that the weights do not have.
_CONFIGS = ("params.json", "model_index.json", "genai_config.json", "quantize_config.json", "quant_config.json")


def companions(folder: Path, code: bool) -> list[str]:
    """Names relative to ``folder``, with forward slashes, sorted; ``config.json`` is not among them.

    Args:
        folder: a model's folder.
        code: include Python files, in subfolders too.
    """
    mentions = _mentions(folder, code)
    found = {path.name for path in folder.iterdir() if _comes_along(path, mentions)}
    found |= {f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja") if path.is_file()}
    found |= set(_named_by_tokenizer(folder))
    if code:
        found |= set(code_files(folder))
    return sorted(found)


def code_files(folder: Path) -> list[str]:
    """Every Python file in a folder or below, relative to it and sorted; without hidden folders and environments."""
    found: list[str] = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _foreign_folder(Path(root, name))]
        found += [Path(root, name).relative_to(folder).as_posix() for name in files if name.endswith(".py")]
    return sorted(found)


def _foreign_folder(path: Path) -> bool:
    return path.name.startswith((".", "__pycache__")) or (path / "pyvenv.cfg").exists()


def without_code(content: Mapping[str, Any]) -> dict[str, Any]:
    """A config of a model or tokenizer without the map to classes in the folder's own code."""
    return {key: value for key, value in content.items() if key != "auto_map"}


def _mentions(folder: Path, code: bool) -> str:
    """The text of the files that may name others."""
    names = [TOKENIZER_CONFIG, *(code_files(folder) if code else ())]
    paths = [folder / name for name in names if (folder / name).is_file()]
    return "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in paths)


def _comes_along(path: Path, mentions: str) -> bool:
    name = path.name.lower()
    if name in (CONFIG, *_CONFIGS) or name.startswith((".", *_STEMS)) or name.endswith((".py", *_OTHER, *_RESULTS)):
        return False
    if name.endswith(_TEXTS) and not any(word in name for word in _VOCABULARY) and path.name not in mentions:
        return False
    return path.is_file() and path.stat().st_size <= LARGEST


def _named_by_tokenizer(folder: Path) -> Iterator[str]:
    """Files in subfolders that ``tokenizer_config.json`` names (``{"vocab_file": "vocab/en.txt"}``)."""
    path = folder / TOKENIZER_CONFIG
    for value in read_json(path).values() if path.is_file() else ():
        if not isinstance(value, str) or not is_inside(value) or value.lower().endswith(_OTHER):
            continue
        if len(PurePosixPath(value).parts) < 2:
            continue  # beside ``config.json``, which it must not replace: ``_comes_along`` decides
        if (named := folder / value).is_file() and named.stat().st_size <= LARGEST:
            yield PurePosixPath(value).as_posix()


def is_inside(name: str) -> bool:
    """Whether a name from a file's content is a plain relative path: nothing else is followed.

    >>> [is_inside(name) for name in ("vocab/en.txt", "../secret", "/etc/passwd", "C:\\\\x", "a/.git/b", "")]
    [True, False, False, False, False, False]
    """
    parts = PurePosixPath(name).parts
    plain = not PurePosixPath(name).is_absolute() and not PureWindowsPath(name).drive and "\\" not in name
    return plain and 0 < len(name) < 200 and not any(part.startswith(".") for part in parts)


def copy_companion(source: Path, target: Path, name: str) -> None:
    """Copy one file between folders, by its name relative to both."""
    try:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        content = (source / name).read_bytes()
    except OSError as error:
        raise LowbitError(f"cannot copy {source / name} to {target}: {error.strerror or error}") from error
    write_bytes(target / name, content)
