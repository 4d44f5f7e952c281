"""What the processes of a job must have in common, so that they compute the same bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from lowbit.distributed.job import agree
from lowbit.distributed.world import here
from lowbit.errors import LowbitError
from lowbit.runs.versions import versions


def check_alone_or_shared(device: str) -> None:
    """Refuse, before any work, a device on which processes do not share work."""
    if here().size > 1 and device != "cpu":
        raise LowbitError(
            f"--device {device} given and {here().size} processes started; they share work on CPUs only: leave the "
            "option out, or start the command without torchrun"
        )


def check_same_work(facts: Mapping[str, Any]) -> None:
    """Refuse processes whose versions, arithmetic or work differ.

    Args:
        facts: what the work is, plain data by name.
    """
    if here().size == 1:
        return
    arithmetic = {
        **{f"versions.{name}": version for name, version in versions().items()},
        "threads": torch.get_num_threads(),  # kernels may split their sums by them
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }
    agree({**arithmetic, **facts})
