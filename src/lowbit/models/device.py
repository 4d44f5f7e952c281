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
    check_usable(device, "--device ")
    if device == "cpu" and dtype != "float32":
        raise LowbitError(f"--dtype {dtype} on a CPU: 16-bit arithmetic may be a hundred times slower; use float32")
    return DTYPES[dtype]


def check_usable(device: str, option: str = "device ") -> None:
    """Refuse a device that torch does not know or cannot use here; ``option`` is what the user calls it."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:100]
        raise LowbitError(f"{option}{device} cannot be used here ({reason}); use {option}cpu") from error


def float_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """A type of 16 or more bits to compute in, given as torch's or by its name.

    >>> float_dtype("bfloat16"), float_dtype(torch.float64)
    (torch.bfloat16, torch.float64)
    """
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        names = ", ".join(f"'{name}'" for name in DTYPES)
        raise LowbitError(f"dtype {dtype!r} given; allowed: {names}, or one of torch's floating-point types")
    return found
