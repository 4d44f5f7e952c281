"""Attention heads of a config, all of whose layers have the same, or some of whose layers have others."""

from __future__ import annotations

from typing import Any


def head_dim(config: Any) -> int:
    """Width of an attention head; where layers differ, of the first with full attention, or else of the first."""
    kinds = list(config.layer_types) if _differ(config) else []
    full = kinds.index("full_attention") if "full_attention" in kinds else 0
    own = config.per_layer_config[full] if _differ(config) else config
    return int(getattr(own, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def head_dims(config: Any) -> list[int]:
    """The same of each layer."""
    if not _differ(config):
        return [head_dim(config)] * config.num_hidden_layers
    return [config.per_layer_config[i].head_dim for i in range(config.num_hidden_layers)]


def kv_heads(config: Any) -> int | list[int] | None:
    """Heads of keys and values, a list where layers differ; ``None`` where a config has no such field.

    >>> from transformers import Gemma4TextConfig
    >>> kinds = ["sliding_attention", "full_attention"]
    >>> one_head = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 512}
    >>> config = Gemma4TextConfig(num_hidden_layers=2, layer_types=kinds, num_key_value_heads=4, **one_head)
    >>> head_dim(config), head_dims(config), kv_heads(config)
    (512, [256, 512], [4, 1])
    """
    if not _differ(config):
        return getattr(config, "num_key_value_heads", None)
    each = [config.per_layer_config[i].num_key_value_heads for i in range(config.num_hidden_layers)]
    return each if len(set(each)) > 1 else int(each[0])


def _differ(config: Any) -> bool:
    return bool(getattr(config, "is_heterogeneous", False))
