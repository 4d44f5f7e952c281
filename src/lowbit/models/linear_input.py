"""What happens to a linear's input while a block runs: it is mixed, quantized, and shown to a tap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import QParams
from lowbit.quant.static_activations import quantize_input

Tap = Callable[[Tensor], None]
Cache = dict[tuple[ActFormat | None, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LinearInput:
    """A linear's input: its format, the runtime op before the linear, and who sees it.

    Attributes:
        format: the format; ``None``: float.
        op: the op before the linear, which is applied where the input is quantized.
        tap: receives the input as the linear sees it.
        qparams: of a static format, where they are known.
        mix: the op on the input, which is applied first, whether the input is quantized or not.
    """

    format: ActFormat | None = None
    op: RuntimeOp | None = None
    tap: Tap | None = None
    qparams: QParams | None = None
    mix: RuntimeOp | None = None

    def __bool__(self) -> bool:
        return self.format is not None or self.tap is not None or self.mix is not None

    def quantized(self, x: Tensor, cache: Cache) -> Tensor:
        """The input ``(..., in)`` as the linear sees it.

        ``cache`` is that of the linears which share ``x``: they share the op on it and its quantization, where both
        are one.
        """
        if not x.numel():  # an expert that no token reaches may be called all the same
            return x
        if self.mix is not None:
            x = _cached(cache, (None, id(self.mix)), x, self.mix)
        if self.format is None:
            return x
        if self.op is not None:
            return self.op(x, self.format)
        format = self.format
        return _cached(
            cache, (format, id(self.qparams)), x, lambda value: quantize_input(value, format, self.qparams)
        )

    def __call__(self, x: Tensor, cache: Cache) -> Tensor:
        """``quantized``, shown to the tap."""
        x = self.quantized(x, cache)
        if self.tap is not None:
            self.tap(x)
        return x


def _cached(cache: Cache, key: tuple[ActFormat | None, int], x: Tensor, by: Callable[[Tensor], Tensor]) -> Tensor:
    """``by(x)``, computed once for the linears that share ``x`` and the key."""
    if key not in cache or cache[key][0] is not x:
        cache[key] = (x, by(x))
    return cache[key][1]
