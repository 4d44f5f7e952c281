"""A prefix: fixed tokens in front of every text, of which the model keeps the keys and values alone.

A few tokens have hidden states hundreds of times as large as all others (*massive* tokens): the first one of a text,
and often its first full stop or line break. If such tokens come in front of every text, the text has none, and ranges
of activations fit what is left (PrefixQuant, Chen et al. 2024, arXiv 2410.05265). A decoder reads of earlier tokens
their keys and values only, and these depend on nothing behind them: the float model computes them once, and the
layers get them as the content of a cache. So the library's own code counts positions and makes masks, and no hidden
state of the prefix is ever quantized.

In a block the keys and values of each layer are two parameters, ``(heads, tokens, width of a head)`` as the layer
caches them: behind the rotary embedding. Whatever moves a map over the rows of k or v moves it over them
(``change_cached``), so that a transformed block reads them in its own coordinates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lowbit.errors import LowbitError
from lowbit.models.edges import Edge

KEYS, VALUES = "lowbit_prefix.keys", "lowbit_prefix.values"  # parameters of a layer


@dataclass(frozen=True)
class Prefix:
    """Fixed tokens in front of every text.

    Attributes:
        ids: the tokens, in order.
        keys, values: by layer, ``(heads, tokens, width)``.
    """

    ids: tuple[int, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def params(self, index: int) -> dict[str, Tensor]:
        """Those of layer ``index``, by their names in a block."""
        return {f"{index}.{KEYS}": self.keys[index], f"{index}.{VALUES}": self.values[index]}

    def filled(self, batch: int, dtype: torch.dtype) -> DynamicCache:
        """A cache for ``batch`` sequences that starts with the prefix and grows.

        >>> prefix = Prefix((7,), (torch.ones(2, 1, 4),), (torch.zeros(2, 1, 4),))
        >>> keys, values = prefix.filled(3, torch.float32).update(torch.ones(3, 2, 5, 4), torch.ones(3, 2, 5, 4), 0)
        >>> keys.shape, values[0, 0, :2, 0].tolist()
        (torch.Size([3, 2, 6, 4]), [0.0, 1.0])
        """
        cache = DynamicCache()
        self.fill(cache, batch, dtype)
        return cache

    def fill(self, cache: Cache, batch: int, dtype: torch.dtype) -> None:
        """Put the prefix into an empty cache for ``batch`` sequences.

        Layers that keep a sliding window become such that keep everything: masks hide what is out of the window, and
        the prefix stays in front, where it is known not to be quantized.
        """
        cache.layers = [DynamicLayer() if type(own) is DynamicSlidingWindowLayer else own for own in cache.layers]
        for index, pair in enumerate(zip(self.keys, self.values, strict=True)):
            key, value = (own[None].expand(batch, *own.shape).to(dtype) for own in pair)
            cache.update(key, value, index)


class _Counted(DynamicLayer):  # type: ignore[misc]
    """As many tokens as a prefix has, for positions and masks; nothing can be added."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.keys = self.values = torch.zeros(1, 1, tokens, 1)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refused: a layer runs with its own keys and values of the prefix."""
        raise RuntimeError("a layer ran behind a prefix without the prefix's keys and values")


class _Fixed(DynamicLayer):  # type: ignore[misc]
    """The prefix in one layer: what is added is returned behind it and forgotten, so that passes do not meet."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.is_initialized = key[None], value[None], True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values ``(sequences, heads, prefix + length, width)``; differentiable."""
        return _behind(self.keys, key_states), _behind(self.values, value_states)


def _behind(prefix: Tensor, states: Tensor) -> Tensor:
    return torch.cat([prefix.to(states).expand(len(states), *prefix.shape[1:]), states], -2)


def counted(tokens: int, layers: int) -> Cache:
    """What a model is called with behind a prefix of ``tokens``, to find its layers' arguments."""
    return Cache(layers=[_Counted(tokens) for _ in range(layers)])


def with_prefix(arguments: Mapping[str, Any], index: int, params: Mapping[str, Tensor]) -> dict[str, Any]:
    """A layer's arguments with its keys and values of the prefix in the place of ``counted`` ones.

    Args:
        arguments: as recorded behind ``counted``.
        index: the layer's.
        params: parameters of its block.
    """
    out = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, Cache):
            layers = list(value.layers)
            layers[index] = _Fixed(params[f"{index}.{KEYS}"], params[f"{index}.{VALUES}"])
            out[name] = Cache(layers=layers)
    return out


def cached_of(cache: Cache, index: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Keys and values ``(heads, tokens, width)`` that a pass over a prefix alone left in a cache, in float32.

    Raises:
        LowbitError: the layer left none there, or not those of each token.
    """
    layer = cache.layers[index] if index < len(cache.layers) else None
    pair = [getattr(layer, name, None) for name in ("keys", "values")]
    if any(own is None or own.ndim != 4 or own.shape[-2] != tokens for own in pair):
        raise LowbitError(
            f"layer {index} of this model does not keep keys and values of every token, and of a prefix nothing else "
            "is kept: give --prefix none"
        )
    key, value = (own[0].detach().float().contiguous() for own in pair if own is not None)
    return key, value


def change_cached(
    params: MutableMapping[str, Tensor], which: str, edge: Edge, by: Callable[[Tensor], Tensor]
) -> None:
    """Change the prefix's keys or values of a layer as the rows of its k or v change; nothing without a prefix.

    Args:
        params: of the block.
        which: ``KEYS`` or ``VALUES``.
        edge: over which a map moves: of kind ``qk`` or ``heads``.
        by: what happens to the rows, head by head: takes and returns ``(kv * dim, tokens)``.
    """
    name = f"{edge.src.module.partition('.')[0]}.{which}"
    if (cached := params.get(name)) is None:
        return
    heads = edge.layout
    if (len(cached), cached.shape[-1]) != (heads.kv, heads.dim):
        raise LowbitError(
            f"{edge.src.module}: the layer caches {len(cached)} heads of {cached.shape[-1]} channels, not the "
            f"{heads.kv} of {heads.dim} that transforms know: give --prefix none"
        )
    rows = by(cached.mT.flatten(0, 1).to(params[edge.src.parameter].dtype))
    params[name] = rows.unflatten(0, (heads.kv, heads.dim)).mT.to(cached.dtype)
