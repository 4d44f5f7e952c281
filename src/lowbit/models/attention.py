"""Quantization of Q, K and V after the rotary embedding, through transformers' registry of attention functions.

``transformers`` looks the attention function up by a name in the config. A function registered by lowbit quantizes
its three inputs, per token and head, and passes them to the function that the model would have used. The cache holds
K and V in float, and they are quantized at each use: since every token and head has its own range, the result equals
that of a quantized cache. The softmax output stays in float, as in the literature.

A format with rotated heads rotates Q and K here; V comes rotated out of its linear (``rotated_values.py``).

The keys and values of a prefix (``prefix.py``) come first and stay float.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit.models.kv_ratios import ATTRIBUTE, KINDS
from lowbit.quant.activations import ActFormat, IntTokens
from lowbit.quant.rotated_kv import RotatedTokens
from lowbit.quant.walsh_hadamard import walsh_hadamard


def attention_name(format: ActFormat, base: str, prefix: int = 0) -> str:
    """Register (once) attention ``base`` with Q, K, V quantized in ``format``; returns its name for the config.

    Args:
        format: of queries, keys and values.
        base: a name such as ``sdpa`` or ``eager``.
        prefix: how many of the first keys and values stay as they are.
    """
    # Imported where it is needed: the library's batched serving comes with it.
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    name = f"lowbit_{base}_{format.name}" + (f"_behind_{prefix}" if prefix else "")
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(format, RotatedTokens):
            query, key = walsh_hadamard(query), walsh_hadamard(key)
        ratios = _ratios(module)
        quantized = (
            _quantized(format, query, ratios[0]),
            *(_behind(prefix, format, x, ratio) for x, ratio in zip((key, value), ratios[1:], strict=True)),
        )
        # Each modelling file defines its own eager function (Gemma2's caps the logits).
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)(module, *quantized, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _ratios(module: nn.Module) -> tuple[Tensor | None, ...]:
    """The clipping ratios of an attention module's queries, keys and values, see ``kv_ratios.py``."""
    ratios: Tensor | None = getattr(module, ATTRIBUTE, None)
    return (None,) * len(KINDS) if ratios is None else ratios.unbind()


def _quantized(format: ActFormat, x: Tensor, ratio: Tensor | None) -> Tensor:
    """``x`` quantized, its ranges cut to ``ratio`` at both ends."""
    if ratio is None or not isinstance(format, IntTokens):
        return format.fake_quant(x)
    ratio = ratio.to(x)
    return format.fake_quant(x, ratio, ratio)


def _behind(prefix: int, format: ActFormat, x: Tensor, ratio: Tensor | None) -> Tensor:
    """Keys or values ``(sequences, heads, length, width)``, quantized from position ``prefix`` on."""
    if not prefix:
        return _quantized(format, x, ratio)
    return torch.cat([x[..., :prefix, :], _quantized(format, x[..., prefix:, :], ratio)], -2)


@contextmanager
def quantized_attention(config: Any, format: ActFormat | None, prefix: int = 0) -> Iterator[None]:
    """Within the context, layers that share ``config`` quantize Q, K and V in ``format`` (``None``: no effect)."""
    before = config._attn_implementation
    if format is not None:
        quantize_attention([config], format, prefix)
    try:
        yield
    finally:
        _name_alone(config, before)


def quantize_attention(configs: Iterable[Any], format: ActFormat, prefix: int = 0) -> None:
    """From now on, modules that look their attention up in one of ``configs`` quantize Q, K and V in ``format``.

    Args:
        configs: those of the modules and of what builds their masks, once or several times. Configs within them, as
            of a vision encoder, stay.
        format: of queries, keys and values.
        prefix: how many of the first keys and values stay as they are.
    """
    for config in {id(config): config for config in configs}.values():
        _name_alone(config, attention_name(format, config._attn_implementation, prefix))


def _name_alone(config: Any, name: str) -> None:
    """Set a config's attention, not that of configs within it: a plain name would be passed on to all of them."""
    config._attn_implementation = {"": name}
