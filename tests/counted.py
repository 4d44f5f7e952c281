"""Counts what torch computes: operations of matrix products, of factorisations, bytes of everything else, calls."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

FACTORS = ("linalg_cholesky_ex", "linalg_solve_triangular")


class Counted(TorchDispatchMode):
    """Within the context, operations are counted by kind.

    Attributes:
        products: of matrix products and attention, as torch's own counter counts them.
        factors: of Cholesky factorisations (a third of the cube) and triangular solves (the square by the columns).
        bytes: read and written by operations that are neither and no views.
        calls: number of operations that are no views.
        by_name: bytes by operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = self.factors = 0.0
        self.bytes = self.calls = 0
        self.by_name: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func._overloadpacket
        tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
        name = str(packet).removeprefix("aten.")
        if func.is_view or name in ("detach", "alias", "_unsafe_view", "empty", "empty_like", "empty_strided"):
            return out
        self.calls += 1
        if name == "addmm_":  # in place, which torch's counter leaves out
            self.products += 2.0 * out.shape[0] * out.shape[1] * args[1].shape[1]
        elif packet in flop_registry:
            self.products += flop_registry[packet](*args, **kwargs, out_val=out)
        elif name in FACTORS:
            size = len(args[0])
            self.factors += size**3 / 3 if name == FACTORS[0] else float(size**2 * args[1].shape[1])
        else:
            moved = sum(leaf.numel() * leaf.element_size() for leaf in tensors)
            self.bytes += moved
            self.by_name[name] += moved
        return out
