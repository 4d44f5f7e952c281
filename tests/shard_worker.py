"""A process of a job that checks its share of some hidden states against all of them; exits with 0 if all is well."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch


def states(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``(count, 3, 5)``, the same in all processes."""
    return torch.randn(count, 3, 5, generator=torch.Generator().manual_seed(count)).to(dtype)


def check_all() -> None:
    """All that a shard can do, for numbers of sequences that leave some processes without any, too."""
    from lowbit.distributed.world import here
    from lowbit.models.offload import Rows, select_sequences
    from lowbit.models.shard import Shard, owned_sequences, states_of

    size, rank = here().size, here().rank
    for count, dtype in ((1, torch.float32), (5, torch.bfloat16), (22, torch.float32), (41, torch.float64)):
        whole = states(count, dtype)
        mine = owned_sequences(count, 4)[rank]
        shard = Shard.of(whole[mine.start : mine.stop].clone(), count, 4)
        assert len(shard) == count
        assert shard.shape == whole.shape
        assert torch.equal(shard.whole(), whole)
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(1))[: count // 2 + 1]
        assert torch.equal(states_of(shard, chosen), whole[chosen])
        selected = select_sequences(shard, chosen)
        assert isinstance(selected, Shard)
        assert torch.equal(selected.whole(), whole[chosen])
        wanted = [chosen[process::size] for process in range(size)]
        assert torch.equal(shard.delivered(wanted), whole[wanted[rank]])
        rows = Rows(torch.device("cpu"), shard, whole[..., :1], shard)
        rows.share(wanted)
        asked = wanted[rank].flip(0)
        expected = [whole[asked], whole[asked][..., :1], whole[asked]]
        assert all(torch.equal(*pair) for pair in zip(rows(asked), expected, strict=True))
        others = [sequence for sequence in range(count) if sequence not in mine]
        if others:
            with pytest.raises(RuntimeError, match="wanted of a process that has"):
                shard[others[0] : others[0] + 1]


def run(rank: int, size: int, port: int, check: Callable[[], None], said: Path) -> None:
    """``check`` in one process of a job."""
    from lowbit.distributed.job import joined

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOWBIT_TIMEOUT": "120"}
    with said.open("w") as file:
        os.dup2(file.fileno(), 2)
    with joined():
        check()
    sys.exit(0)
