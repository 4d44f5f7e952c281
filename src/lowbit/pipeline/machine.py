"""What a machine computes in a second and holds: measured on this one, or stated for another.

A block runs at a share of the rate of a large matrix product, since its products are smaller and others come between
them: ``BLOCK_SHARE``, measured on a GPU (docs/gpu.md). A rate that is measured here is one of products of the sizes
that blocks have, and needs no such share.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lowbit.errors import LowbitError

BLOCK_SHARE = 0.55  # of a stated rate, in products of a block
FACTOR_SHARE = 0.05  # of a stated rate, in factorisations in float64
CALL = 8e-6  # seconds between two small operations on a GPU
NETWORK = 1e9  # bytes a second between processes, unless stated
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgtp]?)\s*", re.IGNORECASE)
_PREFIXES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}


@dataclass(frozen=True)
class Rates:
    """What a process computes in a second.

    Attributes:
        products: floating-point operations of matrix products in the dtype of the blocks.
        factors: of factorisations in float64.
        bandwidth: bytes that elementwise operations read and write.
        call: seconds that one small operation takes, whatever its size.
        network: bytes between processes.
    """

    products: float
    factors: float
    bandwidth: float
    call: float
    network: float = NETWORK


@dataclass(frozen=True)
class Machine:
    """Where a rank runs.

    Attributes:
        rates: what it computes in a second; ``None``: not known, so that no time is predicted.
        host_memory: bytes of the host that a rank may take; ``None``: any number.
        device_memory: bytes of its device; ``None``: blocks run on the host.
        value_bytes: of a hidden state: 4 in float32, 2 in 16 bits.
        ranks: number of processes.
        network: bytes a second between them.
    """

    rates: Rates | None
    host_memory: int | None = None
    device_memory: int | None = None
    value_bytes: int = 4
    ranks: int = 1
    network: float = NETWORK

    @property
    def has_device(self) -> bool:
        """Whether blocks run on a device with memory of its own."""
        return self.device_memory is not None


def stated_rates(products: float, bandwidth: float, network: float = NETWORK) -> Rates:
    """Rates of a device of which two figures are known.

    Args:
        products: operations a second of a large matrix product in the dtype of the blocks.
        bandwidth: bytes a second of its memory.
        network: bytes a second between processes.

    >>> round(stated_rates(800e12, 4e12).products / 1e12)
    440
    """
    return Rates(BLOCK_SHARE * products, FACTOR_SHARE * products, bandwidth, CALL, network)


def rate_in(text: str, option: str) -> float:
    """A rate as users write it: ``989T``, ``1.2P``, ``4e12``.

    >>> rate_in("989T", "--flops"), rate_in("3.35 T", "--bandwidth")
    (989000000000000.0, 3350000000000.0)

    Raises:
        LowbitError: the text is no such number, or 0.
    """
    match = _RATE.fullmatch(text)
    value = float(match[1]) * _PREFIXES[match[2].lower()] if match else 0.0
    if not 0 < value < float("inf"):
        raise LowbitError(f"{option} {text} given; give a number a second, with k, M, G, T or P, such as 400T")
    return value


def measured_rates(rows: int = 256, width: int = 1024) -> Rates:
    """The rates of this machine's CPU, each the best of runs of milliseconds; half a second in all.

    Longer runs would be interrupted by other processes, and measure those.

    Args:
        rows: tokens that go through a block together.
        width: channels of a linear, on both sides.
    """
    rows, width = min(rows, 256), min(max(width, 64), 1536)
    a, b = torch.rand(rows, width), torch.rand(width, width)
    products = 2.0 * rows * width * width / best_of(lambda: a @ b)
    size = 256
    square = torch.rand(size, size, dtype=torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    square = square @ square.T + size * eye

    def factor() -> None:
        torch.linalg.solve_triangular(torch.linalg.cholesky_ex(square)[0], eye, upper=False)

    large, small = torch.rand(1 << 21), torch.rand(16)

    def calls() -> None:
        for _ in range(200):
            small.mul(small)

    return Rates(
        products,
        size**3 * 4 / 3 / best_of(factor),
        12 * large.numel() / best_of(lambda: large * large),
        best_of(calls) / 200,
    )


def best_of(work: Callable[[], object], times: int = 15) -> float:
    """Seconds of the fastest of some calls, which other processes disturb least."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)
