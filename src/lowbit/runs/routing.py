"""How many calibration tokens reach each expert of a mixture: counted in a pass that a run makes anyway."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.distributed.exchange import from_everyone
from lowbit.models.block import Block
from lowbit.models.forward import routing_of
from lowbit.models.linear_input import Tap


class Routing:
    """Tokens that reach each expert of a block's layers while ``taps`` are in use.

    Attributes:
        taps: for ``forward.run_all``; none for layers without experts.
    """

    def __init__(self, block: Block) -> None:
        self._counts: dict[int, Tensor] = {}
        self.taps: Mapping[str, Tap] = {
            routing_of(f"{index}.{own.module}"): self._counter(index, own.count)
            for index, kind in zip(block.indices, block.kinds, strict=True)
            if (own := kind.experts or kind.listed) is not None
        }

    def _counter(self, index: int, experts: int) -> Tap:
        self._counts[index] = torch.zeros(experts, dtype=torch.int64)

        def count(chosen: Tensor) -> None:
            self._counts[index] += torch.bincount(chosen.flatten(), minlength=experts).cpu()

        return count

    def gather(self) -> None:
        """Add up what the processes of a job have counted; called by all of them, once."""
        counted = {str(index): counts.tolist() for index, counts in self._counts.items()}
        for index in self._counts:
            self._counts[index] = torch.tensor([own[str(index)] for own in from_everyone(counted)]).sum(0)

    def tokens(self, index: int) -> list[int]:
        """Tokens that have reached each expert of layer ``index``; empty for a layer without experts."""
        return self._counts[index].tolist() if index in self._counts else []
