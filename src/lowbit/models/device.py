"""The compute device and dtype, checked before any work."""

from __future__ import annotations

import re

import torch

from lowbit.errors import LowbitError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DEVICE = re.compile(r"cpu|mps|cuda(:\d+)?")


def check_device(device: str, dtype: str) -> torch.dtype:
    """The compute dtype; an unavailable device or a slow combination is refused."""
    if dtype not in DTYPES:
        raise LowbitError(f"--dtype {dtype} given; allowed: {', '.join(DTYPES)}")
    if not _DEVICE.fullmatch(device):
        raise LowbitError(f"--device '{device}' given; allowed: cpu, cuda, cuda:N (such as cuda:0), mps")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise LowbitError(f"--device {device} cannot be used here ({reason}); use --device cpu") from error
    if device == "cpu" and dtype != "float32":
        raise LowbitError(f"--dtype {dtype} on a CPU: 16-bit arithmetic may be a hundred times slower; use float32")
    return DTYPES[dtype]
