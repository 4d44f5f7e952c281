"""What the runtimes do to the input of a rounded linear: their own arithmetic, operation for operation.

Weights at 4 bits and activations "in float" are run as int8 products on most devices: the runtime rounds each input
on the fly, in its own blocks and its own way. A run that is made for a runtime (``--target``) puts that rounding into
every quantized block, so that methods calibrate on, and evaluation measures, what will run. The weights and the
folder's layout stay those of the scheme.

============ ===================================================================================================
llama.cpp    int8 in blocks of 32, symmetric, scale ``absmax / 127`` stored as float16 (``quantize_row_q8_0``); beside
             K types in blocks of 256, scale in float32 (``quantize_row_q8_K``)
executorch   XNNPACK: int8 with a zero of its own, one range a token (``xnn_f32_qd8_asymmetric_quantization_params``)
onnxruntime  ``accuracy_level`` 4: int8 in the blocks of the weight, scale in float32 (``QuantizeARow_CompInt8``)
vllm         nothing where the scheme has ``a16``; otherwise the scheme's own format
============ ===================================================================================================

All multiply by a reciprocal and round ties to even, as the x86 kernels do; ARM kernels of llama.cpp and onnxruntime
take ``1 / (absmax / 127)`` for ``127 / absmax``, which moves a value only where it lies within a rounding error of a
tie. The products are summed in another order than in the simulation, which no format can fix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format, round_ste, round_trip
from lowbit.quant.integer import IntFormat

Q8_0, Q8_K = 32, 256
# Formats that a GGUF file holds in K types where groups are multiples of 256: see export/gguf_blocks.py.
K_TYPES = {(2, True), (2, False), (3, True), (4, False), (5, False), (6, True)}
MOST = 128  # a larger group is several blocks in ONNX


@dataclass(frozen=True)
class Runtime:
    """A runtime that a run can be made for.

    Attributes:
        target: what ``export --to`` writes for it.
        schemes: default schemes, best first; the first that fits the model is taken.
        rounds: what it does to the input of a rounded linear, in words; empty where it does nothing.
        round: the same as a function of the input ``(..., in)`` and the weight's format, or ``None``.
        scale_dtype: in which it keeps the scales of weights.
    """

    target: str
    schemes: tuple[str, ...]
    rounds: str = ""
    round: Callable[[Tensor, IntFormat], Tensor] | None = None
    scale_dtype: torch.dtype = torch.float16


def over(number: float, x: Tensor) -> Tensor:
    """``number / x``, rounded once; the operator multiplies by the reciprocal, which rounds twice."""
    return torch.div(torch.tensor(number, dtype=x.dtype, device=x.device), x)


def symmetric_blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes of a symmetric int8 block, ``round(x * (127 / absmax))``, and the blocks' ``absmax``.

    ``x`` ``(..., width)`` gives ``(..., blocks, size)`` and ``(..., blocks, 1)``; the last block may be short.
    """
    grouped = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    most = grouped.abs().amax(-1, keepdim=True)
    # Where all are 0 any factor will do, and this one has a gradient.
    return round_ste(grouped * over(127.0, most.where(most > 0, 1.0))), most


def q8_0(x: Tensor) -> Tensor:
    """llama.cpp's Q8_0: the scale is rounded to float16 after the codes are chosen.

    >>> x = torch.zeros(32)
    >>> x[:2] = torch.tensor([1.0, 0.3])
    >>> q8_0(x)[:2].tolist()
    [0.99993896484375, 0.2991943359375]
    """
    codes, most = symmetric_blocks(x, Q8_0)
    return (codes * round_trip(most / 127.0, torch.float16)).flatten(-2)[..., : x.shape[-1]]


def q8_k(x: Tensor) -> Tensor:
    """llama.cpp's Q8_K: the scale is the reciprocal of what the values were multiplied by."""
    codes, most = symmetric_blocks(x, Q8_K)
    scale = over(1.0, over(127.0, most.where(most > 0, 1.0)))
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]


def blocks_of(x: Tensor, size: int) -> Tensor:
    """onnxruntime's int8 blocks, with a float32 scale."""
    codes, most = symmetric_blocks(x, size)
    return (codes * (most / 127.0)).flatten(-2)[..., : x.shape[-1]]


def qd8(x: Tensor) -> Tensor:
    """XNNPACK's int8 rows: the zero comes from the end of the range where it is off by less.

    >>> qd8(torch.tensor([[-1.0, 0.0, 0.5, 2.0]])).tolist()
    [[-1.0, 0.0, 0.4941176474094391, 2.0]]
    """
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    factor = over(255.0, (high - low).where(low < high, 255.0))
    from_low, from_high = -128.0 - low * factor, 127.0 - high * factor
    nearer_low = (-128.0 + low * factor) + (127.0 + high * factor) > 0
    zero = round_ste(torch.where(nearer_low, from_low, from_high).clamp(-128, 127))
    codes = (round_ste(x * factor) + zero).clamp(-128, 127)
    return (codes - zero) * over(1.0, factor)


def _executorch(x: Tensor, weight: IntFormat) -> Tensor:
    return qd8(x)


def _llama_cpp(x: Tensor, weight: IntFormat) -> Tensor:
    wide = (weight.group or x.shape[-1]) % Q8_K == 0
    return q8_k(x) if wide and (weight.bits, weight.symmetric) in K_TYPES else q8_0(x)


def onnx_block(group: int) -> int:
    """The block of MatMulNBits for groups of that size: the largest power of two up to 128 that divides it.

    >>> onnx_block(128), onnx_block(576), onnx_block(48)
    (128, 64, 16)
    """
    return min(group & -group, MOST)


def _onnxruntime(x: Tensor, weight: IntFormat) -> Tensor:
    size = onnx_block(weight.group or x.shape[-1])
    # There is no int8 kernel for these; onnxruntime then computes in float.
    return x if weight.bits == 2 and size == 16 else blocks_of(x, size)


RUNTIMES = {
    "llama.cpp": Runtime("gguf", ("w4a16g32-sym",), "int8 blocks of 32 (256 beside K types)", _llama_cpp),
    "vllm": Runtime("vllm", ("w4a16g128-sym", "w4a16g64-sym", "w4a16g32-sym", "w4a16-sym")),
    "executorch": Runtime(
        "executorch",
        ("w4a16g32-sym",),
        "int8 per token with a zero of its own",
        _executorch,
        # XNNPACK keeps the scales of its blocks of 4-bit weights as bfloat16.
        torch.bfloat16,
    ),
    "onnxruntime": Runtime("onnx", ("w4a16g32-sym", "w4a16g16-sym"), "int8 in the weight's blocks", _onnxruntime),
}


@dataclass(frozen=True)
class RuntimeInput(ActFormat):
    """How a runtime quantizes the input of a linear by itself, where the scheme leaves inputs in float.

    Attributes:
        runtime: a name of ``RUNTIMES`` that quantizes inputs.
        weight: the format of the linear's weight, which some runtimes follow.

    Raises:
        LowbitError: no arithmetic is known for the runtime with weights of that format.
    """

    runtime: str
    weight: Format

    def __post_init__(self) -> None:
        if not isinstance(self.weight, IntFormat):
            raise LowbitError(f"{self.runtime} with {self.weight.name} weights: how it quantizes inputs is not known")

    @property
    def name(self) -> str:
        """The runtime's."""
        return self.runtime

    @property
    def independent_ends(self) -> bool:
        """Runtimes' ranges are their own: sign flips are chosen for the scheme's formats alone."""
        return False

    @property
    def clippable(self) -> bool:
        """No runtime lets its ranges be changed."""
        return False

    def fake_quant(self, x: Tensor) -> Tensor:
        """``x`` ``(..., in)`` as the linear sees it; a runtime computes in float32, whatever dtype ``x`` has."""
        round = RUNTIMES[self.runtime].round
        assert round is not None
        assert isinstance(self.weight, IntFormat)
        return round(x.float(), self.weight).to(x.dtype)
