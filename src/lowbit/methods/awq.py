"""AWQ: activation-aware scales, then clipping ratios.

Source: Lin et al., MLSys 2024, arXiv 2306.00978. For each edge into which a scale folds (norms, v -> o, up -> down) a
grid search over ``s = mean|x|**ratio`` minimises the linears' output error ``||Q(W s) s^-1 x - W x||^2``
(equation 4); then a search over each group's clipping ratio minimises the same error.

Both errors are quadratic forms in the input's second moments ``G = sum x x^T``, so one pass over the data serves
all candidates: ``||dW x||^2 = tr(dW G dW^T)``. The released implementation measures the output of the attention or
MLP on a sample of tokens instead; this is the paper's equation on all tokens. As there, q and k are not clipped. With
grouped-query attention, where that implementation skips v -> o, one scale per channel of a KV head is shared by the
query heads that read it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lowbit.distributed.exchange import with_tensors
from lowbit.distributed.share import each, own_items
from lowbit.methods.cold import is_cold, moments_or_identity, with_cold_note
from lowbit.methods.inputs import held_together
from lowbit.methods.method import NO_OPS, Method, Needs
from lowbit.methods.options import check_bounds
from lowbit.methods.statistics import Statistics, input_statistics
from lowbit.models.architecture import LayerKind
from lowbit.models.block import Block, Calib
from lowbit.models.edges import Edge, first_edges
from lowbit.models.equivalence import move
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.format import Format
from lowbit.quant.integer import IntFormat


@dataclass(frozen=True)
class AWQ(Method):
    """Activation-aware scales and clipping ratios.

    Attributes:
        grid: candidates for the scale's exponent, ``0, 1/grid, .., (grid - 1)/grid``; 0 means no scaling.
        clip: also search clipping ratios.
        clip_grid: steps of the clipping ratio between 1 and 0.
        clip_least: smallest clipping ratio.
        clip_most: largest clipping ratio of formats other than integers. Their steps widen away from 0, so a range
            that is wider than the weights can fit them better: at 1.5 the largest weight of a group in E2M1 becomes a
            4 in place of a 6, and steps around it are 1 in place of 2.
    """

    grid: int = 20
    clip: bool = True
    clip_grid: int = 20
    clip_least: float = 0.5
    clip_most: float = 1.5
    rounds: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True
    needs: ClassVar[Needs] = "x_fp"
    closed_form: ClassVar[bool] = False
    moves_norms: ClassVar[bool] = True
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 2

    def __post_init__(self) -> None:
        bounds = {"grid": "1 or more", "clip_grid": "1 or more", "clip_least": "above 0 and at most 1"}
        bounds["clip_most"] = "1 or more"
        check_bounds("awq", self, bounds)

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """None: diagonals fold, and clipping ratios only affect weight qparams."""
        return NO_OPS

    def __call__(self, block: Block, calib: Calib) -> Block:
        """The block with scales folded and clipping ratios set; its float function is unchanged."""
        edges = first_edges(edge for edge in block.edges() if edge.kind != "qk" and edge.scales)
        readers = [edge.readers[0].module for edge in edges]
        wanted = ("gram", "magnitude")
        seen = input_statistics(block, calib.x_fp, readers, wanted, batch=calib.batch) if readers else {}
        params = dict(block.params)
        cold: dict[str, int] = {}
        for edge in edges:
            reader = edge.readers[0].module
            if is_cold(block, reader, seen[reader].count):
                cold[reader] = seen[reader].count
            elif (scale := self._best_scale(block, params, edge, seen[reader])) is not None:
                params = move(block, edge, scale, params)
        moved = with_cold_note(replace(block, params=params), "awq", cold, "no scale between up and down")
        return self._clipped(moved, calib) if self.clip else moved

    def _best_scale(self, block: Block, params: Mapping[str, Tensor], edge: Edge, seen: Statistics) -> Tensor | None:
        """The scale of least error over ``edge``; ``None`` if no linear that reads it is quantized."""
        readers = [dst for dst in edge.readers if dst.module in block.formats]
        targets = [(dst, dst.read_rows(params), block.weight_format(dst.module)) for dst in readers]
        if not targets:
            return None
        magnitude = (seen["magnitude"] / seen.count).clamp(min=1e-5)
        # The query heads of a group share the KV head's channels.
        magnitude = edge.pooled(edge.readers[0].inputs(magnitude), "mean")

        def scale_of(step: int) -> Tensor:
            scale = magnitude.pow(step / self.grid)
            return scale / (scale.max() * scale.min()).sqrt()

        def error_of(step: int) -> float:
            spread = edge.spread(scale_of(step))
            scaled = [(w, dst.outer(spread, w.shape[1]), format) for dst, w, format in targets]
            peak = torch.stack([(w * s).abs().max() for w, s, _ in scaled]).max()
            return sum(scaled_error(w, s, seen["gram"], format, peak) for w, s, format in scaled)

        errors = each(range(self.grid), error_of)
        return scale_of(errors.index(min(errors))).reshape(edge.diagonal_shape)

    def _clipped(self, block: Block, calib: Calib) -> Block:
        clips, skipped = dict(block.clips), _queries_and_keys(block)
        clipped = [[n for n in group if n in block.formats and n not in skipped] for group in block.linear_groups()]
        for groups in held_together(block, [tuple(group) for group in clipped if group]):
            readers = [group[0] for group in groups]
            seen = input_statistics(block, calib.x_fp, readers, ("gram",), batch=calib.batch)
            for group in groups:
                stats = seen.pop(group[0])
                gram = None if is_cold(block, group[0], stats.count) else stats["gram"]
                for linear in group:
                    format, weight, peak = (
                        block.weight_format(linear),
                        block.weight(linear),
                        block.tensor_peak(linear),
                    )
                    best_ratio = self._best_clip(weight, moments_or_identity(block, linear, gram), format, peak)
                    clips[linear] = (best_ratio, best_ratio)
        return replace(block, clips=clips)

    def _clip_ratios(self, format: Format) -> list[float]:
        """Candidates for a clipping ratio: 1, smaller ones and, except for integers, larger ones."""
        steps = int((1 - self.clip_least) * self.clip_grid + 1e-9)
        smaller = [1 - step / self.clip_grid for step in range(1, steps + 1) if step < self.clip_grid]
        if isinstance(format, IntFormat):
            return [1.0, *smaller]
        above = int((self.clip_most - 1) * self.clip_grid + 1e-9)
        return [1.0, *smaller, *(1 + step / self.clip_grid for step in range(1, above + 1))]

    def _best_clip(self, weight: Tensor, gram: Tensor, format: Format, tensor_peak: Tensor | None = None) -> Tensor:
        """The clipping ratio ``(rows, groups)`` of least output error for each group; 1 is tried first.

        The processes of a job share the ratios.
        """
        groups = format.groups(weight.shape[1])
        blocks = torch.stack(_diagonal_blocks(gram, format.group or len(gram)))
        start = weight.new_full((weight.shape[0], groups), torch.inf)
        own = (start, torch.ones_like(start))
        for ratio in own_items(self._clip_ratios(format)):
            delta = format.fake_quant_clipped(weight, ratio, ratio, tensor_peak) - weight
            split = format.split(delta).transpose(0, 1)  # (groups, rows, size)
            error = format.over_shared_rows(((split @ blocks) * split).sum(-1).T)
            own = _better(own, (error, torch.full_like(error, ratio)))
        best = (start, torch.ones_like(start))
        for _, (error, ratios) in with_tensors(None, own):
            best = _better(best, (error, ratios))
        return best[1]


def _better(best: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """By group the least error and its ratio; of equal errors those of ``best``."""
    return torch.minimum(other[0], best[0]), torch.where(other[0] < best[0], other[1], best[1])


def scaled_error(
    weight: Tensor, scale: Tensor, gram: Tensor, format: Format, tensor_peak: Tensor | None = None
) -> float:
    """``||Q(W s) s^-1 x - W x||^2`` summed over the tokens whose second moments are ``gram`` ``(in, in)``.

    ``tensor_peak`` is that of the scaled weights, see ``Format.from_range``.
    """
    scaled = weight * scale
    delta = format.fake_quant_clipped(scaled, tensor_peak=tensor_peak) / scale - weight
    return float(((delta @ gram) * delta).sum())


def _diagonal_blocks(gram: Tensor, size: int) -> list[Tensor]:
    """The moments of each ``size`` columns, a smaller last group filled up with zeros."""
    rest = -len(gram) % size
    gram = torch.nn.functional.pad(gram, (0, rest, 0, rest)) if rest else gram
    return [gram[i : i + size, i : i + size] for i in range(0, len(gram), size)]


def _queries_and_keys(block: Block) -> set[str]:
    """The linears that compute q and k, or q, k and v: their outputs meet in the softmax."""
    ends = {end.module for edge in block.edges() if edge.kind == "qk" for end in (edge.src, *edge.dst)}
    return ends | {
        f"{index}.{name}" for index, kind in zip(block.indices, block.kinds, strict=True) for name in _qk(kind)
    }


def _qk(kind: LayerKind) -> tuple[str, ...]:
    """Where an attention's edge ends in norms, or is unknown, q and k are the first two linears of its layer."""
    return kind.groups[0][:2] if kind.attention is not None and kind.groups else ()
