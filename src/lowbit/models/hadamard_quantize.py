"""A Hadamard transform and the quantization of its result per token, as one operation: the plain form.

On a GPU a token's transform costs little arithmetic, but each of its steps reads and writes all activations. One
kernel (``hadamard_triton.py``) reads them once; this module says where it applies and what it must equal.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.hadamard import Hadamard
from lowbit.models.runtime_ops import Clip, RuntimeOp
from lowbit.quant.activations import ActFormat, IntTokens

WIDEST = 2**15  # channels; a program holds a whole token


@dataclass(frozen=True)
class HadamardQuantize:
    """``format.fake_quant(mix(x))`` with clipped ranges, see ``of``.

    Attributes:
        mix: the transform.
        format: of its result.
        ratios: ``(2,)``, clipping ratios of the ends of every token's range; ``None``: 1.
    """

    mix: Hadamard | FixedHadamard
    format: IntTokens
    ratios: Tensor | None = None

    @classmethod
    def of(cls, mix: RuntimeOp | None, format: ActFormat, op: RuntimeOp | None) -> HadamardQuantize | None:
        """What a linear with these does to its input, or ``None`` where it is something else.

        Args:
            mix: the op on the linear's input.
            format: of the input.
            op: the op before the linear.
        """
        if not isinstance(mix, Hadamard | FixedHadamard) or not isinstance(format, IntTokens) or mix.width > WIDEST:
            return None
        if op is None:
            return cls(mix, format)
        return cls(mix, format, op.ratios) if isinstance(op, Clip) and op.offset is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """``x`` ``(..., width)`` transformed, quantized and dequantized, in its dtype."""
        if self.ratios is None:
            return self.format.fake_quant(self.mix(x))
        low, high = self.ratios.to(x.dtype)
        return self.format.fake_quant(self.mix(x), low, high)

    def fused(self, x: Tensor) -> Tensor:
        """The same by the kernel; in 16 bits scales are float32 there, and 16 bits here."""
        from lowbit.models.hadamard_triton import hadamard_quantize

        return hadamard_quantize(self.mix, self.format, self.ratios, x)
