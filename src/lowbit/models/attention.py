"""Q, K and V rounded after the rotary embedding, through the library's registry of attention functions.

``transformers`` looks the attention up by a name in the config. A function under a name of ours rounds its three
inputs, per token and head, and hands them to the function that the model would have used. K and V come out of the
cache in float and are rounded at each use: since every token and head has a range of its own, that gives the same
numbers as storing them rounded. The softmax output stays in float, as in the literature.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit.quant.activations import ActFormat


def attention_name(format: ActFormat, base: str) -> str:
    """Register (once) attention ``base`` with Q, K, V quantized in ``format``; returns its name for the config.

    ``base`` is a name such as ``sdpa`` or ``eager``.
    """
    name = f"lowbit_{base}_{format.name}"
    if name in ALL_ATTENTION_FUNCTIONS.valid_keys():
        return name

    def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        quantized = (format.fake_quant(x) for x in (query, key, value))
        # Each modelling file has an eager function of its own (Gemma2's caps the logits).
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        return ALL_ATTENTION_FUNCTIONS.get_interface(base, eager)(module, *quantized, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


@contextmanager
def quantized_attention(config: Any, format: ActFormat | None) -> Iterator[None]:
    """Inside, layers that share ``config`` quantize Q, K and V in ``format`` (``None``: nothing changes)."""
    before = config._attn_implementation
    if format is not None:
        config._attn_implementation = attention_name(format, before)
    try:
        yield
    finally:
        config._attn_implementation = before
