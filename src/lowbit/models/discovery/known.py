"""Discovered architectures by config: found once, and kept in the user's cache folder.

A file there is plain JSON under a digest of what determines it: the config, the model's own code if it has some, and
the versions of transformers, torch and of discovery itself. One that cannot be read is found again. Where the code
that runs is not in the model's folder, the result is kept for this process only.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit.checkpoints.companions import code_files
from lowbit.checkpoints.pypi import cache_dir
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError
from lowbit.models.discovery.discover import discover
from lowbit.models.discovery.result import Discovery
from lowbit.progress import say

VERSION = 4  # of discovery: raise it when the same config gives another result
NOT_STRUCTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config")
# By what determines them; the class stands for code that cannot be read.
_FOUND: dict[tuple[str, type], Discovery] = {}


def discovered(config: Any) -> Discovery:
    """The structure of a model that no family declares, from its config; the first time takes seconds.

    The model's own code runs only if ``config`` is of such code, which loading it has permitted.

    Raises:
        LowbitError: as ``discover``.
    """
    code = code_of(config)
    key = _text(config, code or ""), type(config)
    if key not in _FOUND:
        path = None if code is None else _file(key[0])
        found = None if path is None else _read(path)
        _FOUND[key] = found or _find(config, path)
    return _FOUND[key]


def code_of(config: Any) -> str | None:
    """What a model's own code is: a digest of it, ``""`` for a class of transformers, ``None`` if it cannot be read.

    The code is every Python file in the folder that the config was read from. Code of another repository, to which
    ``auto_map`` may point, and classes that a program has registered are elsewhere.
    """
    if not _is_own(config):
        return ""
    folder = Path(config.name_or_path)
    mapped = getattr(config, "auto_map", None) or {}
    if not mapped or any("--" in str(place) for place in mapped.values()):
        return None
    try:
        names = code_files(folder)
        parts = [(name, hashlib.sha256((folder / name).read_bytes()).hexdigest()) for name in names]
    except OSError:
        return None
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest() if parts else None


def _is_own(config: Any) -> bool:
    """Whether the config is of code of the model's own."""
    return not type(config).__module__.startswith("transformers.")


def _file(text: str) -> Path | None:
    """Where the result for a config is kept; ``None`` without a home folder."""
    with suppress(LowbitError):
        return cache_dir() / "architectures" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    return None


def _find(config: Any, path: Path | None) -> Discovery:
    say(f"{config.architectures[0]} is not declared: finding its structure on a small model of its class")
    found = discover(config, trust_remote_code=_is_own(config))
    for note in found.record.notes:
        say(note)
    if path is not None:
        with suppress(OSError, LowbitError):  # a folder that cannot be written costs the time again, nothing else
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found.to_json())
    return found


def _text(config: Any, code: str) -> str:
    """What determines the structure, as text; ``code`` is the digest of the model's own."""
    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_STRUCTURE}
    versions = {"discovery": VERSION, "transformers": transformers.__version__, "torch": torch.__version__}
    own = {"code": code} if code else {}
    return json.dumps([type(config).__name__, fields, versions | own], sort_keys=True, default=str)


def _read(path: Path) -> Discovery | None:
    try:
        return Discovery.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
