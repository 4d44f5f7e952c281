"""Hidden states that the processes of a job divide: each holds those of its own sequences, and no others.

Which sequences a process owns follows from the leaves of ``distributed.tree``, as does what it computes: statistics
and passes over a block need nothing of another process. What needs other sequences asks for them, in all processes at
once: a step of a fit its few, a choice of some sequences its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lowbit.distributed.exchange import delivered, fill
from lowbit.distributed.tree import leaves, own_part, sequences_of
from lowbit.distributed.world import here


def owned_sequences(count: int, micro_batch: int) -> list[range]:
    """The sequences of each process, of ``count`` that go through a block ``micro_batch`` at a time.

    >>> owned_sequences(10, 4)
    [range(0, 10)]
    """
    parts, size = leaves(-(-count // micro_batch)), here().size
    out = []
    for rank in range(size):
        own = own_part(len(parts), rank, size)
        slices = [sequences_of(parts[leaf], micro_batch) for leaf in own]
        out.append(range(slices[0].start, min(slices[-1].stop, count)) if slices else range(0))
    return out


@dataclass(frozen=True)
class Shard:
    """A process's share of hidden states ``(sequences, length, width)``.

    Attributes:
        own: those of its own sequences, on the CPU.
        owned: the sequences of each process, consecutive ones; some may have none.
        rank: this process's number.
        micro_batch: sequences that go through a block at a time.
    """

    own: Tensor
    owned: tuple[range, ...]
    rank: int
    micro_batch: int

    @classmethod
    def of(cls, own: Tensor, count: int, micro_batch: int) -> Shard:
        """The share of the calling process, of ``count`` sequences."""
        return cls(own, tuple(owned_sequences(count, micro_batch)), here().rank, micro_batch)

    def __len__(self) -> int:
        """The sequences of all processes."""
        return sum(map(len, self.owned))

    @property
    def shape(self) -> torch.Size:
        """Of the hidden states of all processes."""
        return torch.Size((len(self), *self.own.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states."""
        return self.own.dtype

    @property
    def device(self) -> torch.device:
        """The device that holds them."""
        return self.own.device

    def __getitem__(self, part: slice) -> Tensor:
        """Consecutive sequences by their numbers among all; a ``RuntimeError`` unless this process owns them."""
        mine, wanted = self.owned[self.rank], range(len(self))[part]
        if wanted and (wanted.step != 1 or wanted[0] not in mine or wanted[-1] not in mine):
            raise RuntimeError(f"sequences {wanted} wanted of a process that has {mine}")
        return self.own[wanted.start - mine.start : wanted.stop - mine.start] if wanted else self.own[:0]

    def with_own(self, own: Tensor) -> Shard:
        """The share of other hidden states of the same sequences."""
        return replace(self, own=own)

    def delivered(self, wanted: Sequence[Tensor]) -> Tensor:
        """The sequences that this process wants; called by all processes.

        Args:
            wanted: numbers of sequences, for each process.
        """
        return delivered(self.own, self.owned, [part.tolist() for part in wanted])

    def everywhere(self, chosen: Tensor) -> Tensor:
        """The sequences ``chosen``, in every process; called by all of them."""
        return self.delivered([chosen] * len(self.owned))

    def select(self, chosen: Tensor) -> Shard:
        """The share of the sequences ``chosen``, which are numbered anew; called by all processes."""
        owned = owned_sequences(len(chosen), self.micro_batch)
        own = self.delivered([chosen[part.start : part.stop] for part in owned])
        return replace(self, own=own, owned=tuple(owned))

    def whole(self) -> Tensor:
        """All hidden states, for narrow ones; called by all processes."""
        out = torch.empty(self.shape, dtype=self.dtype)
        mine = self.owned[self.rank]
        out[mine.start : mine.stop] = self.own
        fill(out, self.owned)
        return out


States = Tensor | Shard


def own_states(x: States) -> Tensor:
    """The hidden states that this process has: its own, or all."""
    return x.own if isinstance(x, Shard) else x


def states_of(x: States, chosen: Tensor) -> Tensor:
    """A few sequences ``chosen``; of a shard in every process, all of which call it."""
    return x.everywhere(chosen) if isinstance(x, Shard) else x[chosen.to(x.device)]
