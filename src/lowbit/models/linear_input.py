"""What happens to a linear's input while a block runs: it is quantized, and shown to a tap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import QParams
from lowbit.quant.static_activations import quantize_input

Tap = Callable[[Tensor], None]
Cache = dict[tuple[ActFormat, int], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LinearInput:
    """A linear's input: its format, the runtime op before the linear, and who sees it.

    Attributes:
        format: the format; ``None``: float.
        op: the op before the linear, which is applied where the input is quantized.
        tap: receives the input as the linear sees it.
        qparams: of a static format, where they are known.
    """

    format: ActFormat | None = None
    op: RuntimeOp | None = None
    tap: Tap | None = None
    qparams: QParams | None = None

    def __bool__(self) -> bool:
        return self.format is not None or self.tap is not None

    def quantized(self, x: Tensor, cache: Cache) -> Tensor:
        """The input ``(..., in)`` as the linear sees it.

        ``cache`` is that of the linears which share ``x``: they share its quantization, where both are one.
        """
        if self.format is None or not x.numel():  # an expert that no token reaches may be called all the same
            return x
        if self.op is not None:
            return self.op(x, self.format)
        key = self.format, id(self.qparams)
        if key not in cache or cache[key][0] is not x:
            cache[key] = (x, quantize_input(x, self.format, self.qparams))
        return cache[key][1]

    def __call__(self, x: Tensor, cache: Cache) -> Tensor:
        """``quantized``, shown to the tap."""
        x = self.quantized(x, cache)
        if self.tap is not None:
            self.tap(x)
        return x
