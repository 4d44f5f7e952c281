"""The most that torch holds while something runs, counted storage by storage."""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Held(TorchDispatchMode):
    """Counts what operations within it made and nothing has freed yet.

    Attributes:
        numbers: the most numbers that were alive at one time, storages with fewer than ``size`` left out.
    """

    def __init__(self, size: int = 0) -> None:
        super().__init__()
        self.size, self.numbers = size, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        self._alive = {key: kept for key, kept in self._alive.items() if not kept[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                # Views and results in place are of what was given.
                count = storage.nbytes() // tensor.element_size()
                if storage._cdata not in given and count >= self.size:
                    self._alive[storage._cdata] = (StorageWeakRef(storage), count)
        self.numbers = max(self.numbers, sum(count for _, count in self._alive.values()))
        return out
