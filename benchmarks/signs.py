"""What turning channels over does to the noise of quantized inputs, on SmolLM2-135M-Instruct and unseen tokens.

    python benchmarks/signs.py [--blocks 30]

Each block gets its float input and SmoothQuant's scales. Signs are found on 14 sequences of 256 tokens of the
built-in text; the noise is that of two others: the squared rounding error of a token's 4-bit input with a zero point,
relative to the token's power, in the mean.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import Tensor

from lowbit.methods.signs import with_signs
from lowbit.methods.smoothquant import SmoothQuant
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block
from lowbit.models.forward import observe
from lowbit.quant.activations import ActFormat
from widths import SCHEME, first_blocks

HELD_OUT, BATCH = 2, 4
SITES = ("q, k, v", "o", "gate, up", "down")


def noise(block: Block, params: Mapping[str, Tensor], x: Tensor, format: ActFormat) -> list[float]:
    """Of the input of each group of linears, for hidden states ``x``."""
    seen: dict[str, list[Tensor]] = {group[0]: [] for group in block.linear_groups()}
    observe(block, x, {name: rows.append for name, rows in seen.items()}, params, batch=BATCH)
    out = []
    for rows in seen.values():
        value = torch.cat(rows)
        out.append(float(relative_loss(format.fake_quant(value), value, loss_unit(value, "token"))))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--blocks", type=int, default=30)
    options = parser.parse_args()
    assert SCHEME.act is not None
    sums = torch.zeros(2, len(SITES), dtype=torch.float64)
    for block, calib in first_blocks(options.blocks, 16, 256):
        smooth = SmoothQuant()(block, calib)
        signed, _ = with_signs(smooth, calib.x_fp[HELD_OUT:], BATCH)
        for row, params in enumerate((smooth.params, signed)):
            sums[row] += torch.tensor(noise(smooth, params, calib.x_fp[:HELD_OUT], SCHEME.act))
    before, after = sums / options.blocks
    print("| input of | noise | with signs | ratio |\n|---|---:|---:|---:|")
    for site, a, b in zip(SITES, before.tolist(), after.tolist(), strict=True):
        print(f"| {site} | {a:.4f} | {b:.4f} | {b / a:.2f} |")


if __name__ == "__main__":
    main()
