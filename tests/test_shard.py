"""Hidden states that processes divide: any of them, wherever they are, and the same as undivided ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from forked_job import free_port, server
from lowbit.distributed.tree import leaves, own_part, sequences_of
from lowbit.distributed.world import World, within
from lowbit.models.shard import Shard, owned_sequences
from shard_worker import check_all, run


@pytest.mark.parametrize("size", [1, 2, 3, 8, 11])
@pytest.mark.parametrize("count", [1, 4, 7, 30, 100])
def test_a_process_owns_the_sequences_whose_statistics_it_takes(count, size):
    with within(World(0, size)):
        owned = owned_sequences(count, 4)
    assert [sequence for own in owned for sequence in own] == list(range(count))
    parts = leaves(-(-count // 4))
    for rank, mine in enumerate(owned):
        for leaf in own_part(len(parts), rank, size):
            assert set(range(count)[sequences_of(parts[leaf], 4)]) <= set(mine)


def test_a_shard_gives_its_own_sequences_by_their_numbers():
    whole = torch.arange(22.0)[:, None, None].expand(-1, 2, 3)
    with within(World(1, 2)):
        mine = owned_sequences(22, 4)[1]
        shard = Shard.of(whole[mine.start : mine.stop], 22, 4)
    assert mine == range(12, 22)
    assert torch.equal(shard[16:20], whole[16:20])
    assert torch.equal(shard[20:24], whole[20:22])
    assert not len(shard[3:3])
    with pytest.raises(RuntimeError, match=r"sequences range\(8, 12\) wanted of a process that has range\(12, 22\)"):
        shard[8:12]


@pytest.mark.heavy  # starts processes
@pytest.mark.parametrize("size", [2, 3])
def test_sequences_reach_whoever_wants_them(size: int, tmp_path: Path) -> None:
    port, context = free_port(), server()
    said = [tmp_path / f"{rank}.txt" for rank in range(size)]
    processes = [
        context.Process(target=run, args=(rank, size, port, check_all, said[rank]), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0] * size, [path.read_text() for path in said]
