"""The ``config.json`` of a folder whose weights are written anew: what the source's says and still holds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowbit.checkpoints.companions import without_code
from lowbit.checkpoints.config_fields import is_kernel_choice

WEIGHTS = "transformers_weights"  # the file with the weights; files written anew have the library's own names


def shipped_config(source: Mapping[str, Any], trusted: bool) -> dict[str, Any]:
    """A source's config without what does not hold for the result.

    That is the name of its weight file and the attention kernel of the machine that it was made on; and, where no
    code was permitted, the map to code, which is not copied either: ``transformers`` has the class.

    >>> shipped_config({"hidden_size": 64, "transformers_weights": "a.safetensors", "auto_map": {}}, trusted=False)
    {'hidden_size': 64}
    """
    kept = source if trusted else without_code(source)
    return {key: value for key, value in kept.items() if key != WEIGHTS and not is_kernel_choice(key)}


def untie(config: dict[str, Any]) -> None:
    """Say that head and embedding are two tensors; some classes read that from the text model's own config.

    >>> config = {"text_config": {"tie_word_embeddings": True, "hidden_size": 64}}
    >>> untie(config)
    >>> config
    {'text_config': {'tie_word_embeddings': False, 'hidden_size': 64}, 'tie_word_embeddings': False}
    """
    config["tie_word_embeddings"] = False
    for part in config.values():
        if isinstance(part, dict) and "tie_word_embeddings" in part:
            part["tie_word_embeddings"] = False
