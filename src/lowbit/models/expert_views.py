"""Products with parts of parameters that hold a layer's experts, seen from within a model's own code.

Models multiply with experts in many ways: ``torch.bmm(x, w)``, ``F.linear(x, w[3])``, ``x @ w[3].T``. What they
have in common is that the second factor is a view, and a view says by its offset and strides whose matrices it holds:
of a parameter ``(experts, rows, columns)``, the matrix that starts at number ``e * rows * columns`` is that of expert
``e``, and strides ``(1, columns)`` in place of ``(columns, 1)`` say that it is read the other way round. No number of
the parameter is needed for that, so it may be on the ``meta`` device.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.overrides import TorchFunctionMode

_MATMULS = (
    torch.matmul,
    Tensor.matmul,
    Tensor.__matmul__,
    torch.bmm,
    Tensor.bmm,
    torch.mm,
    Tensor.mm,
)


@dataclass(frozen=True)
class View:
    """Matrices of a parameter that holds experts.

    Attributes:
        parameter: its name.
        experts: whose matrices they are.
        turned: they are read as ``(columns, rows)``.
        batched: the view has three dimensions, also for one expert.
    """

    parameter: str
    experts: range
    turned: bool
    batched: bool


@dataclass(frozen=True)
class Product:
    """A product that a model's own code asks for.

    Attributes:
        view: the second factor.
        x: the first one, ``(..., in)``; of a view of three dimensions ``(experts, tokens, in)``.
        transposed: the parameter holds matrices as ``(in, out)``.
        multiply: the product of values in the place of ``x`` and of the view.
    """

    view: View
    x: Tensor
    transposed: bool
    multiply: Callable[[Tensor, Tensor], Tensor]


class Views:
    """Finds views of parameters ``(experts, rows, columns)``, given by name."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._known = {_storage(value): (name, value) for name, value in parameters.items()}

    def of(self, value: Any) -> View | None:
        """Whose matrices a tensor holds; ``None`` for any other tensor, and for parts of matrices.

        >>> stack = torch.zeros(4, 3, 5)
        >>> Views({"up": stack}).of(stack[2].T)
        View(parameter='up', experts=range(2, 3), turned=True, batched=False)
        >>> Views({"up": stack}).of(stack[2, :2]) is None
        True
        """
        if not isinstance(value, Tensor) or value.ndim not in (2, 3):
            return None
        known = self._known.get(_storage(value))
        if known is None:
            return None
        name, whole = known
        _, rows, columns = whole.shape
        forms = {(rows, columns, columns, 1): False, (columns, rows, 1, columns): True}
        turned = forms.get((*value.shape[-2:], *value.stride()[-2:]))
        first, rest = divmod(int(value.storage_offset()) - int(whole.storage_offset()), rows * columns)
        if turned is None or rest:
            return None
        count = len(value) if value.ndim == 3 else 1
        if count > 1 and value.stride(0) != rows * columns:
            return None
        return View(name, range(first, first + count), turned, value.ndim == 3)

    def product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Product | None:
        """The product with experts that a call of torch is; ``None`` for any other call."""
        if func is F.linear:
            x = args[0] if args else kwargs.get("input")
            weight = args[1] if len(args) > 1 else kwargs.get("weight")
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
        elif func in _MATMULS and len(args) == 2:
            (x, weight), bias = args, None
        else:
            return None
        view = self.of(weight)
        if view is None or not isinstance(x, Tensor):
            return None
        if func is F.linear:
            return Product(view, x, view.turned, lambda value, matrix: F.linear(value, matrix, bias))
        return Product(view, x, not view.turned, func)


def _storage(value: Tensor) -> int:
    return int(value.untyped_storage()._cdata)


class ExpertProducts(TorchFunctionMode):
    """Within the context, products with views of some parameters are what ``compute`` says."""

    def __init__(self, parameters: Mapping[str, Tensor], compute: Callable[[Product], Tensor]) -> None:
        super().__init__()
        self.views, self.compute = Views(parameters), compute

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        product = self.views.product(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if product is None else self.compute(product)
