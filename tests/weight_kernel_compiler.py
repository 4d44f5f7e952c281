"""Compile the weight kernels for an NVIDIA GPU that need not be there, and print what of their code matters.

Run with Triton's compiler, not its interpreter. For each case a line of JSON: how many fused products and sums, which
would round differently from the plain form, and divisions that are not IEEE 754's.
"""

from __future__ import annotations

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lowbit.quant import weight_triton
from lowbit.quant.integer import IntFormat
from lowbit.quant.weight_kernel import _constants

NUMBERS = ("height", "width", "groups")


def compiled(kernel, columns, rows, format, width, out):
    """The PTX of a kernel for a weight of that width."""
    weight = torch.empty(8, width)
    factor = weight[0]
    constants = _constants(weight, factor if columns else None, factor if rows else None, format)
    fusion = constants.pop("enable_fp_fusion")
    if "TO_WEIGHT" in kernel.arg_names:
        constants["TO_WEIGHT"] = True
    kinds = {name: "i32" if name in NUMBERS else f"*{out if name in ('out', 'grad') else 'fp32'}"
             for name in kernel.arg_names if name not in constants}  # fmt: skip
    signature = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": fusion}).asm["ptx"]


CASES = [
    (True, True, IntFormat(4, 128), 4096, "bf16"),
    (False, False, IntFormat(3, None, False), 4096, "fp32"),
    (True, False, IntFormat(2, 64, False, torch.float32), 4096, "fp32"),
]

if __name__ == "__main__":
    for kernel in (weight_triton.forward_kernel, weight_triton.backward_kernel):
        for case in CASES:
            ptx = compiled(kernel, *case)
            found = {"fused": ptx.count("fma.rn.f32"), "approximate": ptx.count("div.full") + ptx.count("div.approx")}
            print(json.dumps(found | {"kernel": kernel.__name__, "exact": ptx.count("div.rn.f32")}))
