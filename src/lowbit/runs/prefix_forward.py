"""A prefix in a loaded model: every text that the model is called with comes behind it.

The caller sees the text alone: ids, masks, positions and logits are those of the text. Before the model's own
``forward``, a hook puts the prefix's keys and values into the cache, if that is empty, ones in front of the mask, and
moves positions by the prefix's length. ``generate`` works through the same hook.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lowbit.data.sampling import cache_name
from lowbit.errors import LowbitError
from lowbit.models.prefix import Prefix

MODULE = "lowbit_prefix"
_OLD_NAME = "past_key_values"  # of the cache, which callers may still use


class _Stored(nn.Module):
    """A prefix as buffers, so that it moves with the model to another device or dtype; no part of its state dict."""

    def __init__(self, prefix: Prefix) -> None:
        super().__init__()
        self.ids = prefix.ids
        for index, (key, value) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
            self.register_buffer(f"keys_{index}", key, persistent=False)
            self.register_buffer(f"values_{index}", value, persistent=False)
        self.layers = len(prefix.keys)

    def prefix(self) -> Prefix:
        """Where the model is now, in its dtype."""
        keys, values = ([getattr(self, f"{name}_{i}") for i in range(self.layers)] for name in ("keys", "values"))
        return Prefix(self.ids, tuple(keys), tuple(values))


def put_behind(model: Any, prefix: Prefix) -> None:
    """From now on, texts that the model is called with come behind a prefix."""
    model.add_module(MODULE, _Stored(prefix))
    model.register_forward_pre_hook(_before_forward, with_kwargs=True)


def tokens_before(model: Any) -> int:
    """Tokens of a loaded model's prefix."""
    stored = getattr(model, MODULE, None)
    return len(stored.ids) if isinstance(stored, _Stored) else 0


def _before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
    """The arguments of a call behind the prefix."""
    names = list(inspect.signature(model.forward).parameters)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    prefix: Prefix = model.get_submodule(MODULE).prefix()
    text = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    if text is None:
        raise LowbitError("a model behind a prefix was called without input_ids and without inputs_embeds")
    _shift(given, len(prefix.ids))
    name = cache_name(model)
    caches = [given.pop(own, None) for own in (name, _OLD_NAME)]
    cache = next((own for own in caches if own is not None), None)  # an empty one counts as false
    given[name] = _filled(cache, prefix, text, model.dtype)
    _check_positions(given, given[name], text.shape[1])
    return (), given


def _shift(given: dict[str, Any], tokens: int) -> None:
    """Mask and positions of the text behind the prefix, in place."""
    mask = given.get("attention_mask")
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.ndim != 2:
            raise LowbitError(
                "a model behind a prefix takes an attention_mask (sequences, length): give none of another form, and "
                "no cache_implementation"
            )
        given["attention_mask"] = torch.cat([mask.new_ones(len(mask), tokens), mask], 1)
    for name in ("position_ids", "cache_position"):
        if given.get(name) is not None:
            given[name] = given[name] + tokens


def _filled(cache: Cache | None, prefix: Prefix, text: Tensor, dtype: torch.dtype) -> Cache:
    """The caller's cache with the prefix in front; one of an earlier call has it already."""
    if cache is None:
        return prefix.filled(len(text), dtype)
    if cache.is_compileable:
        raise LowbitError(
            f"a {type(cache).__name__} given: a model behind a prefix takes caches that grow; give no "
            "cache_implementation"
        )
    if cache.get_seq_length() == 0:
        prefix.fill(cache, len(text), dtype)
    return cache


def _check_positions(given: dict[str, Any], cache: Cache, length: int) -> None:
    """Refuse a text longer than a token whose positions are not right behind the cache: tokens were left out."""
    positions = given.get("position_ids")
    if length > 1 and positions is not None and int(positions.max()) >= cache.get_seq_length() + length:
        raise LowbitError(
            "generate was given the cache of an earlier call, which holds a prefix too, and leaves out as many "
            "tokens of the text: call it without a cache"
        )
