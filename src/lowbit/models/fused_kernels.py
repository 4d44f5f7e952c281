"""Where fused kernels run in place of the plain operations that they equal."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

TRITON = importlib.util.find_spec("triton") is not None


def on_kernels(x: Tensor) -> bool:
    """Whether kernels run for a tensor: on CUDA, with Triton installed, where no gradient is asked for."""
    return TRITON and x.is_cuda and not torch.is_grad_enabled()
