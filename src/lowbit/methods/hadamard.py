"""Random-sign Hadamard transforms before linears, which stay online: outliers are spread over all channels.

Source: QuaRot, Ashkboos et al., NeurIPS 2024, arXiv 2404.00456, whose transforms behind norms are merged into the
residual stream here are not: there one rotation serves the whole model, here every input has its own, which costs an
operation and depends on nothing else. With ``D`` random signs and ``H`` the orthogonal, symmetric matrix of
``models/hadamard.py``

    x W^T  =  (x D H) (W D H)^T

so the weights take the transform that the activations take. Nothing is learned and no data is read. Every token's
largest value falls to about ``sqrt(2 log(width))`` times its root mean square, whatever outliers it has.

``input_clip`` also cuts every token's range: spread values have light tails, and few of them lie near its ends.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from lowbit.errors import LowbitError
from lowbit.methods.method import Method, Needs
from lowbit.methods.mixing import MIXED, MixSite, mix_sites, without_choices
from lowbit.methods.options import check_bounds
from lowbit.models.block import Block, Calib
from lowbit.models.fixed_hadamard import FixedHadamard, largest_power
from lowbit.models.hadamard import Hadamard, random_flips
from lowbit.models.runtime_ops import Clip, RuntimeOp
from lowbit.quant.activations import ActFormat

BLOCKS = ("whole", "group")


@dataclass(frozen=True)
class RandomHadamard(Method):
    """A random-sign Hadamard transform at each of the chosen sites.

    Attributes:
        qkv: mix what q, k and v read.
        heads: mix what o_proj reads, across heads.
        mlp: mix what gate and up (fc1) read.
        channels: mix what down_proj (fc2) reads.
        block: ``whole``: all channels together; ``group``: within the groups that share a scale in the weights, for
            formats with small ones; or a width, which divides that of every input.
        signs: flip random signs first. Without them the op is one that stock runtimes have: blocks are powers of two,
            ``whole`` is the largest that divides the width.
        input_clip: share of every token's range that is kept at both ends, for inputs with dynamic integer ranges; 1
            leaves them as they are.
        seed: of the signs.
    """

    qkv: bool = True
    heads: bool = True
    mlp: bool = True
    channels: bool = True
    block: str | int = "whole"
    signs: bool = True
    input_clip: float = 1.0
    seed: int = 0
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True
    needs: ClassVar[Needs] = "none"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = False
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 0

    def __post_init__(self) -> None:
        check_bounds("hadamard", self, {"input_clip": "above 0 and at most 1", "seed": "0 or more"})
        if self.block not in BLOCKS and not (isinstance(self.block, int) and self.block >= 2):
            raise LowbitError(
                f"hadamard.block {self.block!r} given; allowed: whole, group, or a width of 2 or more channels"
            )
        if not self.signs and isinstance(self.block, int) and self.block & (self.block - 1):
            raise LowbitError(
                f"hadamard.block {self.block} with hadamard.signs=false given; a power of two is allowed: give "
                f"{largest_power(self.block)}, or leave the signs on"
            )
        if not any(getattr(self, name) for name in MIXED) and self.input_clip == 1:
            raise LowbitError(f"hadamard: no site is chosen; set at least one of {', '.join(MIXED)} to true")

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """Hadamard transforms, and clips where ``input_clip`` is below 1 and inputs have ranges to clip."""
        mixes = any(getattr(self, name) for name in MIXED)
        ops: set[type[RuntimeOp]] = {Hadamard if self.signs else FixedHadamard} if mixes else set()
        if self.input_clip < 1 and inputs is not None and inputs.clippable:
            ops.add(Clip)
        return frozenset(ops)

    def folded(self) -> None:
        """Nothing: every transform is online."""
        return

    @torch.no_grad()
    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with transforms online and folded into the weights; its float function is unchanged."""
        sites = [site for site in mix_sites(block) if getattr(self, site.name)]
        block = without_choices(block, sites)
        params, ops = dict(block.params), dict(block.ops)
        for site in sites:
            op = self._op(block, site).to(block.device)
            site.fold(params, lambda weight, op=op: op(weight.double()))  # type: ignore[misc]
            ops |= site.ops(op)
        done = replace(block, params=params, ops=ops)
        return self._clipped(done) if self.input_clip < 1 else done

    def _op(self, block: Block, site: MixSite) -> Hadamard | FixedHadamard:
        """The transform of a site; signs ``(blocks, n)`` by the seed, the layer and the site's name."""
        size: int | None = self.block if isinstance(self.block, int) else None
        if self.block == "group":
            size = site.group(block)
        if not self.signs:
            size = largest_power(site.width if size is None else size)
        size = site.width if size is None else size
        if site.width % size:
            raise LowbitError(
                f"hadamard.block {size} given; it does not divide the {site.width} channels that "
                f"{site.readers[0].module} reads: give a width that divides all, or whole"
            )
        if not self.signs:
            return FixedHadamard.of(site.width, size)
        seed = (self.seed * 1_000_003 + site.layer) * len(MIXED) + MIXED.index(site.name)
        return Hadamard(random_flips(site.width // size, size, seed))

    def _clipped(self, block: Block) -> Block:
        """The block with the clip before every quantized linear whose input has a range; offsets there stay."""
        ops = dict(block.ops)
        ratios = torch.full((2,), self.input_clip, device=block.device)
        for name in block.quantized_linears():
            inputs, before = block.input_format(name), ops.get(name)
            if inputs is not None and inputs.clippable and (before is None or isinstance(before, Clip)):
                ops[name] = Clip(ratios, None if before is None else before.offset)
        if ops == block.ops:
            text = "hadamard.input_clip clips nothing: no input has a range that is found while the model runs"
            return block.with_notes("hadamard", text)
        return replace(block, ops=ops)
