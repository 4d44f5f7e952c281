"""LLM.int8(): the few channels with large activations stay in float, everything else is rounded to nearest.

Source: Dettmers et al., NeurIPS 2022, arXiv 2208.07339. A channel is an outlier of a linear's input where its largest
absolute value exceeds a threshold, 6.0 in the paper (section 3.2). Its activations and the column of the weight that
reads it keep 16 bits; the rest is rounded to nearest with ranges that do not contain the outliers, one a row and one
a token (vector-wise quantization, section 3.1). The paper's format is ``w8a8-sym``.

Differences from the paper:

* Outlier channels are chosen once, on the calibration data, and stored. The paper chooses them in every call, from
  the tokens of the batch, so that a result depends on what it is batched with.
* A linear whose inputs have stored ranges (``-static``), or that an earlier step has given a runtime op, gets no
  outlier columns; a note says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.finite import is_finite
from lowbit.methods.cold import is_cold, with_cold_note
from lowbit.methods.input_ranges import with_input_ranges
from lowbit.methods.inputs import input_groups
from lowbit.methods.method import Method, Needs
from lowbit.methods.options import check_bounds
from lowbit.methods.statistics import input_statistics
from lowbit.models.block import Block, Calib
from lowbit.models.outlier_columns import OutlierColumns
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.static_activations import StaticActs


@dataclass(frozen=True)
class LLMInt8(Method):
    """Round to nearest, without the channels whose activations exceed a threshold.

    Attributes:
        threshold: largest absolute activation of a channel that is quantized.
    """

    threshold: float = 6.0
    rounds: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = False
    needs: ClassVar[Needs] = "x_q"
    closed_form: ClassVar[bool] = True
    moves_norms: ClassVar[bool] = False
    schedule: ClassVar[None] = None
    passes: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_bounds("llm-int8", self, {"threshold": "above 0"})

    def runtime_ops(self, inputs: ActFormat | None) -> frozenset[type[RuntimeOp]]:
        """Outlier columns, unless inputs have stored ranges."""
        return frozenset() if isinstance(inputs, StaticActs) else frozenset({OutlierColumns})

    @torch.no_grad()
    def __call__(self, block: Block, calib: Calib) -> Block:
        """Codes for every linear that has a format, and the outlier columns of those that have any."""
        block = with_input_ranges(block, calib)
        kept, figures, cold = self._outliers(block, calib)
        params = dict(block.params)
        for name, outlier in kept.items():
            params[f"{name}.weight"] = block.weight(name).masked_fill(outlier, 0)
        # All of them first: linears that a runtime fuses may share a scale of their whole tensors.
        rest = replace(block, params=params)
        qweights = dict(block.qweights)
        for name in block.quantized_linears():
            qweights[name] = block.weight_format(name).quantize(rest.weight(name), rest.qparams(name))
        ops = {name: outlier_columns(block, name, outlier) for name, outlier in kept.items()}
        done = replace(block, qweights=qweights, ops={**block.ops, **ops})
        if skipped := [name for name in block.quantized_linears() if not _can_keep(block, name)]:
            text = f"no columns kept where inputs have stored ranges or runtime ops: {', '.join(skipped)}"
            done = done.with_notes("llm-int8", text)
        done = with_cold_note(done, "llm-int8", cold, "no columns kept")
        return done.with_record("llm-int8", figures) if figures else done

    def _outliers(
        self, block: Block, calib: Calib
    ) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], dict[str, int]]:
        """Outlier channels ``(in,)`` bool of linears that have any; figures; tokens that reach cold experts."""
        groups = [group for group in input_groups(block) if _can_keep(block, group[0])]
        firsts = [group[0] for group in groups]
        seen = input_statistics(block, calib.x_q, firsts, ("peak",), batch=calib.batch) if firsts else {}
        kept: dict[str, Tensor] = {}
        figures: dict[str, dict[str, Any]] = {}
        cold: dict[str, int] = {}
        for group in groups:
            if is_cold(block, group[0], seen[group[0]].count):
                cold[group[0]] = seen[group[0]].count
                continue
            peak = seen[group[0]]["peak"]
            outlier = peak > self.threshold
            figures |= {name: {"outlier_columns": int(outlier.sum()), "peak": float(peak.max())} for name in group}
            if bool(outlier.any()):
                kept |= dict.fromkeys(group, outlier)
        return kept, figures, cold


def _can_keep(block: Block, linear: str) -> bool:
    return linear not in block.ops and not isinstance(block.input_format(linear), StaticActs)


def outlier_columns(block: Block, linear: str, outlier: Tensor) -> OutlierColumns:
    """A linear's outlier columns in 16 bits.

    Args:
        block: holds the float weight.
        linear: its name.
        outlier: bool ``(in,)``.

    Raises:
        LowbitError: a weight is too large for float16.
    """
    columns = block.weight(linear)[:, outlier].half()
    if not is_finite(columns):
        raise LowbitError(
            f"llm-int8: {linear} has weights beyond float16 in its outlier columns; choose another recipe"
        )
    return OutlierColumns(outlier.to(torch.uint8), columns)
