"""Where a layer compares values with a constant: a map across such a place holds only while none reaches it.

Activations of a random model may all be smaller than the bound of a clamp, as OLMo's queries, keys and values are
smaller than 8. Then a false edge leaves the layer's output. What such functions read tells: a map that leaves the
layer's function leaves it too, whatever the activations are.

The bound 0 has no size, so a scale above 0 commutes with it (and a map of other signs is refuted by the output); a
bound that no number of float32 reaches is none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

NOWHERE = 1e38  # bounds beyond it are written for "none"; float32 ends at 3.4e38
CHANGED = 1e-9  # of the largest value; exact maps leave 1e-16 to 1e-13
# By name, without the underscore of those that write in place: the arguments that hold bounds, by place and by name.
_BOUNDED: Mapping[str, tuple[tuple[int, str], ...]] = {
    "clamp": ((1, "min"), (2, "max")),
    "clip": ((1, "min"), (2, "max")),
    "clamp_min": ((1, "min"),),
    "clamp_max": ((1, "max"),),
    "minimum": ((0, "input"), (1, "other")),
    "maximum": ((0, "input"), (1, "other")),
    "fmin": ((0, "input"), (1, "other")),
    "fmax": ((0, "input"), (1, "other")),
    "min": ((1, "other"),),  # its second argument may also be a dimension, which is no tensor
    "max": ((1, "other"),),
    "threshold": ((1, "threshold"),),
    **dict.fromkeys(("gt", "lt", "ge", "le", "__gt__", "__lt__", "__ge__", "__le__"), ((0, "input"), (1, "other"))),
    **dict.fromkeys(("greater", "less", "greater_equal", "less_equal"), ((0, "input"), (1, "other"))),
}
_TENSORS_ONLY = ("min", "max")
_BOUNDED_BY_ITSELF = ("hardtanh", "relu6", "hardswish", "hardsigmoid", "hardshrink", "softshrink")


class Thresholds(TorchFunctionMode):
    """Keeps what functions with a constant bound read.

    Attributes:
        read: name of the function, and its input, in the order of the calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: list[tuple[str, Tensor]] = []

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        plain = name.rstrip("_") if not name.startswith("__") else name
        if plain in _BOUNDED or plain in _BOUNDED_BY_ITSELF:
            self.read += [(plain.strip("_"), value.clone()) for value in bounded(plain, args, kwargs or {})]
        return func(*args, **(kwargs or {}))


def bounded(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The floating tensors that a function compares with a constant other than 0.

    >>> x = torch.tensor([1.0, 2.0])
    >>> [len(list(bounded("clamp", (x,), bounds))) for bounds in ({"min": 0}, {"min": 0, "max": 8.0}, {"max": 1e39})]
    [0, 1, 0]
    """
    given = [*args, *(kwargs[key] for key in ("input", "other") if key in kwargs)]
    values = [one for one in given if isinstance(one, Tensor) and one.is_floating_point() and not _is_constant(one)]
    if name in _BOUNDED_BY_ITSELF:
        yield from values
        return
    bounds = [args[at] if at < len(args) else kwargs.get(key) for at, key in _BOUNDED[name]]
    if any(_is_bound(one) for one in bounds if isinstance(one, Tensor) or name not in _TENSORS_ONLY):
        yield from values


def _is_constant(value: Tensor) -> bool:
    return value.numel() == 1 or bool((value == value.flatten()[:1]).all())


def _is_bound(value: Any) -> bool:
    """Whether it is one number that is neither 0 nor out of reach."""
    if isinstance(value, Tensor):
        value = float(value.flatten()[0]) if value.numel() and _is_constant(value) else 0.0
    return isinstance(value, int | float) and 0 < abs(value) < NOWHERE


def crossed(before: Thresholds, after: Thresholds) -> str:
    """The function whose input differs between two passes; empty if none does.

    Args:
        before: of the layer as it is.
        after: of the layer under a map.
    """
    if [(name, value.shape) for name, value in before.read] != [(name, value.shape) for name, value in after.read]:
        return "a function with a bound"  # it is called another number of times
    pairs = zip(before.read, after.read, strict=True)
    return next((name for (name, old), (_, new) in pairs if _differ(old, new)), "")


def _differ(old: Tensor, new: Tensor) -> bool:
    """Whether values differ by more than rounding, relative to the largest one; infinite ones are those of masks."""
    finite = old.isfinite()
    if not torch.equal(finite, new.isfinite()):
        return True
    if not bool(finite.any()):
        return False
    return float((new - old)[finite].abs().max()) > CHANGED * float(old[finite].abs().max())
