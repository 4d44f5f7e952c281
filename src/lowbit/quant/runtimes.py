"""Runtimes' own quantization of a linear's input, simulated operation for operation.

Most devices run 4-bit weights with "float" activations as int8 products: the runtime quantizes each input
dynamically, with its own blocks and arithmetic. A run with a target runtime (``--target``) simulates this in every
quantized block, so that methods calibrate on, and evaluation measures, what the runtime computes. Weights and the
layout of the folder stay those of the scheme.

============ ===================================================================================================
llama.cpp    int8 in blocks of 32, symmetric, scale ``absmax / 127`` stored as float16 (``quantize_row_q8_0``); for
             K-quant weights in blocks of 256, scale in float32 (``quantize_row_q8_K``)
executorch   XNNPACK: int8 with a zero point, one range per token (``xnn_f32_qd8_asymmetric_quantization_params``)
onnxruntime  ``accuracy_level`` 4: int8 in the weight's blocks, scale in float32 (``QuantizeARow_CompInt8``)
vllm         none where the scheme has ``a16``; otherwise the scheme's own format
============ ===================================================================================================

All multiply by a reciprocal and round ties to even, as the x86 kernels do; ARM kernels of llama.cpp and onnxruntime
use ``1 / (absmax / 127)`` for ``127 / absmax``, which changes a code only within a rounding error of a tie. Runtimes
sum products in another order than the simulation, which no format can reproduce.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.activations import ActFormat
from lowbit.quant.floating import MXFP4
from lowbit.quant.format import Format, round_ste
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import K_QUANTS, KQuant
from lowbit.quant.scales import round_trip
from lowbit.quant.tables import TABLES

Q8_0, Q8_K = 32, 256
# (bits, symmetric) that a GGUF file stores as K-quants where groups are multiples of 256: exporters/gguf_blocks.py.
K_TYPES = {(2, True), (2, False), (3, True), (4, False), (5, False), (6, True)}
# Formats of llama.cpp's own. Its CPU kernels quantize inputs to Q8_K beside K-quants and to Q8_0 beside the others.
LLAMA_CPP = (*K_QUANTS, *TABLES, MXFP4.name)
MOST = 128  # largest ONNX block; a larger group is split into several


@dataclass(frozen=True)
class Runtime:
    """A target runtime.

    Attributes:
        target: the export target (``export --to``) for the runtime.
        schemes: default schemes in order of preference; the first that fits the model is used.
        rounds: description of its quantization of a linear's input; empty for none.
        round: that quantization as a function of the input ``(..., in)`` and the weight's format, or ``None``.
        scale_dtype: dtype of its weight scales.
    """

    target: str
    schemes: tuple[str, ...]
    rounds: str = ""
    round: Callable[[Tensor, Format], Tensor] | None = None
    scale_dtype: torch.dtype = torch.float16


def over(number: float, x: Tensor) -> Tensor:
    """``number / x``, rounded once; the operator multiplies by the reciprocal, which rounds twice."""
    return torch.div(torch.tensor(number, dtype=x.dtype, device=x.device), x)


def symmetric_blocks(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Codes of symmetric int8 blocks, ``round(x * (127 / absmax))``, and the blocks' ``absmax``.

    ``x`` ``(..., width)`` gives ``(..., blocks, size)`` and ``(..., blocks, 1)``; the last block may be short.
    """
    grouped = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    absmax = grouped.abs().amax(-1, keepdim=True)
    # For an all-zero block any factor is correct; this one has a gradient.
    return round_ste(grouped * over(127.0, absmax.where(absmax > 0, 1.0))), absmax


def q8_0(x: Tensor) -> Tensor:
    """llama.cpp's Q8_0: the scale is rounded to float16 after the codes are chosen.

    >>> x = torch.zeros(32)
    >>> x[:2] = torch.tensor([1.0, 0.3])
    >>> q8_0(x)[:2].tolist()
    [0.99993896484375, 0.2991943359375]
    """
    codes, absmax = symmetric_blocks(x, Q8_0)
    return (codes * round_trip(absmax / 127.0, torch.float16)).flatten(-2)[..., : x.shape[-1]]


def q8_k(x: Tensor) -> Tensor:
    """llama.cpp's Q8_K: the scale is the reciprocal of the factor on the values."""
    codes, absmax = symmetric_blocks(x, Q8_K)
    scale = over(1.0, over(127.0, absmax.where(absmax > 0, 1.0)))
    return (codes * scale).flatten(-2)[..., : x.shape[-1]]


def blocks_of(x: Tensor, size: int) -> Tensor:
    """onnxruntime's int8 blocks, with a float32 scale."""
    codes, absmax = symmetric_blocks(x, size)
    return (codes * (absmax / 127.0)).flatten(-2)[..., : x.shape[-1]]


def qd8(x: Tensor) -> Tensor:
    """XNNPACK's int8 rows: the zero point is computed from the end of the range with the smaller rounding error.

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


def _executorch(x: Tensor, weight: Format) -> Tensor:
    return qd8(x)


def _llama_cpp(x: Tensor, weight: Format) -> Tensor:
    if not isinstance(weight, IntFormat):
        return q8_k(x) if isinstance(weight, KQuant) else q8_0(x)
    superblocks = (weight.group or x.shape[-1]) % Q8_K == 0
    return q8_k(x) if superblocks and (weight.bits, weight.symmetric) in K_TYPES else q8_0(x)


def onnx_block(group: int) -> int:
    """The block size of MatMulNBits for a group size: the largest power of two up to 128 that divides it.

    >>> onnx_block(128), onnx_block(576), onnx_block(48)
    (128, 64, 16)
    """
    return min(group & -group, MOST)


def _onnxruntime(x: Tensor, weight: Format) -> Tensor:
    size = onnx_block(weight.group or x.shape[-1])
    # onnxruntime has no int8 kernel for these and computes in float.
    return x if weight.elements.bits == 2 and size == 16 else blocks_of(x, size)


RUNTIMES = {
    "llama.cpp": Runtime("gguf", ("w4a16g32-sym",), "int8 blocks of 32 (256 for K-quant weights)", _llama_cpp),
    "vllm": Runtime("vllm", ("w4a16g128-sym", "w4a16g64-sym", "w4a16g32-sym", "w4a16-sym")),
    "executorch": Runtime(
        "executorch",
        ("w4a16g32-sym",),
        "int8 per token with a zero point",
        _executorch,
        # XNNPACK stores the scales of its 4-bit weight blocks as bfloat16.
        torch.bfloat16,
    ),
    "onnxruntime": Runtime("onnx", ("w4a16g32-sym", "w4a16g16-sym"), "int8 in the weight's blocks", _onnxruntime),
}


def simulates(runtime: str, weight: Format) -> bool:
    """Whether a runtime's quantization of inputs is known for weights of a format."""
    return isinstance(weight, IntFormat) or (runtime == "llama.cpp" and weight.name in LLAMA_CPP)


@dataclass(frozen=True)
class RuntimeInput(ActFormat):
    """A runtime's own quantization of a linear's input, where the scheme leaves inputs in float.

    Attributes:
        runtime: a name of ``RUNTIMES`` that quantizes inputs.
        weight: the format of the linear's weight, which determines the block size in some runtimes.

    Raises:
        LowbitError: the runtime's arithmetic is not known for weights of that format.
    """

    runtime: str
    weight: Format

    def __post_init__(self) -> None:
        if not simulates(self.runtime, self.weight):
            raise LowbitError(f"{self.runtime} with {self.weight.name} weights: its input quantization is not known")

    @property
    def name(self) -> str:
        """The runtime's name."""
        return self.runtime

    @property
    def independent_ends(self) -> bool:
        """False: sign flips are chosen for the scheme's formats only."""
        return False

    @property
    def clippable(self) -> bool:
        """False: no runtime supports clipped ranges."""
        return False

    def fake_quant(self, x: Tensor) -> Tensor:
        """``x`` ``(..., in)`` as the linear sees it; computed in float32 for any dtype of ``x``."""
        round = RUNTIMES[self.runtime].round
        assert round is not None
        return round(x.float(), self.weight).to(x.dtype)
