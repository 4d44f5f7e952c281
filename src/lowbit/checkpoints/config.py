"""Reads ``config.json``: refuses what is no model, and code that nobody permitted, and builds the config."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig

from lowbit.checkpoints.companions import CONFIG
from lowbit.checkpoints.config_fields import neutralize, taken_names, without_neutral
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.kinds import no_config, refuse_adapter, refuse_unfinished_run
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError, one_line, shown


def needs_remote_code(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` needs Python code of its own: an ``auto_map`` and no class in transformers."""
    return bool(config.get("auto_map")) and not _knows(config.get("model_type"))


def _knows(kind: Any) -> bool:
    """Whether transformers has a config class for a ``model_type``."""
    return isinstance(kind, str) and kind in CONFIG_MAPPING


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's transformers config, without network access. Raises ``LowbitError`` with one line."""
    content = check_config(folder, trust_remote_code)
    kind = content.get("model_type")
    if not content.get("auto_map") and not _knows(kind):
        raise LowbitError(
            f"{folder / CONFIG} has the model_type {shown(kind)}, which the installed transformers does not know: "
            "update transformers or use another model"
        )
    try:
        config = _built(folder, content, trust_remote_code)
    except LowbitError:
        raise
    except Exception as error:  # configs validate with exceptions of many types, and may be remote code
        raise LowbitError(f"{folder / CONFIG} is not a valid config: {one_line(error)}") from error
    config.name_or_path = str(folder)  # where code of its own is looked up, whatever the file says
    return config


def _built(folder: Path, content: dict[str, Any], trust_remote_code: bool) -> Any:
    """The config without the fields that do not matter; code of the model's own reads the file as it is."""
    if content.get("auto_map") and trust_remote_code:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        neutralize(config)
        return config
    kept = without_neutral(content)
    if not content.get("auto_map") and (taken := taken_names(CONFIG_MAPPING[content["model_type"]]) & kept.keys()):
        raise LowbitError(
            f"{folder / CONFIG} has a field {shown(min(taken))}, a name that transformers' config classes need for "
            "themselves: delete the field"
        )
    with tempfile.TemporaryDirectory() as temporary:
        write_json(Path(temporary, CONFIG), kept)
        return AutoConfig.from_pretrained(temporary, trust_remote_code=False, local_files_only=True)


def check_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The content of ``config.json``; refuses a checkpoint with its own code unless it is trusted."""
    path = folder / CONFIG
    refuse_unfinished_run(folder)
    refuse_adapter(folder)
    if not path.is_file():
        raise no_config(folder)
    content = read_json(path)
    if content.get("configuration_files"):
        raise LowbitError(f"{path} refers to other configs (configuration_files): rename the one that you mean to it")
    if needs_remote_code(content) and not trust_remote_code:
        raise LowbitError(f"{path} requires Python code from the model's repository: pass --trust-remote-code")
    return content
