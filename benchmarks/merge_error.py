"""What folding a random map between two random linears costs in accuracy, by precision: the paper's experiment.

    python benchmarks/merge_error.py [--size 512] [--seeds 3]

``x W1 W2`` against ``x (W1 A^-1) (A W2)``, as Table 4 of AffineQuant (arXiv 2403.12544) has it for two linears of
4096 x 4096, run with ``--size 4096``. The paper names neither the distribution of its numbers nor its unit: here all
are normal, weights and map with variance ``1 / size``, so that all outputs have variance 1, and the error is the mean
square of the difference. A random map of this kind has a condition number of a few times its size, and that decides
the error: the maps that are learned are bounded to ``affinequant.condition``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch

TOKENS = 256
# Name in the table: dtype of linears and products, dtype of the map, its inverse and the folding.
PRECISIONS = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "float32 linears, float64 map": (torch.float32, torch.float64),
}


@dataclass(frozen=True)
class MergeError:
    """One draw: the map's condition number (2-norm) and the mean squared error of the outputs by precision."""

    condition: float
    errors: dict[str, float]


def merge_error(size: int, seed: int) -> MergeError:
    """The experiment once, with linears of ``size`` x ``size``."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(rows, size, generator=generator, dtype=torch.float64)

    x, first, second, map = (
        normal(TOKENS),
        normal(size) / size**0.5,
        normal(size) / size**0.5,
        normal(size) / size**0.5,
    )
    errors = {}
    for name, (linears, maps) in PRECISIONS.items():
        a = map.to(maps)
        one, two = first.to(linears), second.to(linears)
        folded = (one.to(maps) @ torch.linalg.inv(a)).to(linears), (a @ two.to(maps)).to(linears)
        exact = x.to(linears) @ one @ two
        errors[name] = float((x.to(linears) @ folded[0] @ folded[1] - exact).double().square().mean())
    return MergeError(float(torch.linalg.cond(map)), errors)


def table(size: int, seeds: int) -> list[str]:
    """The draws as Markdown, one row a precision, one column a seed."""
    found = [merge_error(size, seed) for seed in range(seeds)]
    lines = [f"| {size} x {size} | " + " | ".join(f"condition {one.condition:.0f}" for one in found) + " |"]
    lines.append("|---|" + "---:|" * seeds)
    lines += [f"| {name} | " + " | ".join(f"{one.errors[name]:.1e}" for one in found) + " |" for name in PRECISIONS]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="width of the linears; the paper's is 4096")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print("\n".join(table(options.size, options.seeds)))


if __name__ == "__main__":
    main()
