"""The state of torch that arithmetic depends on, as every public function of ``lowbit`` expects it.

A notebook may have switched gradients off, or work in inference mode, under autocast, in float64 by default, on a
default device, with deterministic algorithms. Results must not depend on that, and the caller's state, random
generators included, must be as before afterwards.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch

P = ParamSpec("P")
R = TypeVar("R")


def own_torch_state(function: Callable[P, R]) -> Callable[P, R]:
    """A public function that runs in ``expected_torch_state``."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with expected_torch_state():
            return function(*args, **kwargs)

    return run


@contextmanager
def expected_torch_state() -> Iterator[None]:
    """Gradients on, no inference mode, no autocast, float32 and the CPU as defaults; restored at the end.

    Random generators of torch, Python and NumPy continue afterwards as if nothing had been drawn or seeded.
    """
    with ExitStack() as stack:
        stack.enter_context(_generators())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_settings())
        for device in _autocasting():
            stack.enter_context(torch.autocast(device, enabled=False))
        if torch.empty(0).device.type != "cpu":
            # Only where it is needed: a device context costs time at every call of torch.
            stack.enter_context(torch.device("cpu"))
        yield


@contextmanager
def _settings() -> Iterator[None]:
    """Settings without a context of their own."""
    dtype, deterministic = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


@contextmanager
def _generators() -> Iterator[None]:
    """The global random generators, restored; those of GPUs only if they are in use already."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _autocasting() -> list[Any]:
    """Types of the devices for which autocast is on."""
    return [device for device in ("cpu", "cuda", "mps") if torch.is_autocast_enabled(device)]
