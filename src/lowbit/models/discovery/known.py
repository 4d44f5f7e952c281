"""Discovered architectures by config: found once, and kept in the user's cache folder.

A file there is plain JSON under a digest of what determines it: the config, and the versions of transformers, torch
and of discovery itself. One that cannot be read is found again.
"""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from lowbit.checkpoints.pypi import cache_dir
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError
from lowbit.models.discovery.discover import discover
from lowbit.models.discovery.result import Discovery
from lowbit.progress import say

VERSION = 4  # of discovery: raise it when the same config gives another result
NOT_STRUCTURE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "quantization_config")
_FOUND: dict[str, Discovery] = {}  # by what determines them


def discovered(config: Any) -> Discovery:
    """The structure of a model that no family declares, from its config; the first time takes seconds.

    The model's own code runs only if ``config`` is of such code, which loading it has permitted.

    Raises:
        LowbitError: as ``discover``.
    """
    text = _text(config)
    if text not in _FOUND:
        path = _file(text)
        found = None if path is None else _read(path)
        _FOUND[text] = found or _find(config, path)
    return _FOUND[text]


def _file(text: str) -> Path | None:
    """Where the result for a config is kept; ``None`` without a home folder."""
    with suppress(LowbitError):
        return cache_dir() / "architectures" / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    return None


def _find(config: Any, path: Path | None) -> Discovery:
    own = not type(config).__module__.startswith("transformers.")
    say(f"{config.architectures[0]} is not declared: finding its structure on a small model of its class")
    found = discover(config, trust_remote_code=own)
    for note in found.record.notes:
        say(note)
    if path is not None:
        with suppress(OSError, LowbitError):  # a folder that cannot be written costs the time again, nothing else
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, found.to_json())
    return found


def _text(config: Any) -> str:
    """What determines the structure, as text."""
    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_STRUCTURE}
    versions = {"discovery": VERSION, "transformers": transformers.__version__, "torch": torch.__version__}
    return json.dumps([type(config).__name__, fields, versions], sort_keys=True, default=str)


def _read(path: Path) -> Discovery | None:
    try:
        return Discovery.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
