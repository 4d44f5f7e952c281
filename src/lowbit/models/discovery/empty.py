"""A model's class without memory for its parameters, and without other parts than its text model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import init_empty_weights
from torch.overrides import TorchFunctionMode

from lowbit.errors import LowbitError, one_line
from lowbit.models.build import from_config, is_composite
from lowbit.models.text_part import remove_outside, text_part

_FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
_LARGE = 2**22  # entries


def empty_model(config: Any, trust_remote_code: bool = False) -> Any:
    """The model's class without memory for its parameters, and without other parts than its text model.

    Raises:
        LowbitError: the class cannot be built.
    """
    try:
        with init_empty_weights(include_buffers=False), _WithoutMemory():
            model = from_config(config, trust_remote_code, attn_implementation="eager").eval()
    except Exception as error:  # a model's own code
        raise LowbitError(f"no model of {type(config).__name__}: {one_line(error)}") from error
    if is_composite(config) and (kept := text_part(model)) is not None:
        remove_outside(model, kept)
    return model


class _WithoutMemory(TorchFunctionMode):
    """Large tensors have no memory from the start: a stack of experts may be larger than the machine."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _FACTORIES and "device" not in kwargs and _entries(args) > _LARGE:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _entries(shape: Sequence[Any]) -> int:
    sizes = shape[0] if shape and isinstance(shape[0], tuple | list) else shape
    return math.prod(size for size in sizes if isinstance(size, int))
