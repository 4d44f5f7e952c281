"""By how much a folder's loader changes scales: it reads them in the dtype that the folder's config requests."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lowbit.quant.format import QTensor


@dataclass
class RoundedScales:
    """The scales that were seen, and what the dtype does to them.

    Attributes:
        dtype: the requested dtype.
        modules: how many were seen; ``rounded``: how many have a scale that the dtype does not hold.
        worst: the largest relative change.
    """

    dtype: torch.dtype
    modules: int = 0
    rounded: int = 0
    worst: float = 0.0

    def see(self, q: QTensor) -> None:
        """Count a weight.

        A scale of 1.003 is 1 + 1/341; bfloat16's next numbers are 1 and 1 + 1/128, so that it becomes 1:

        >>> from lowbit.quant.format import QParams
        >>> from lowbit.quant.integer import IntFormat
        >>> format, seen = IntFormat(4, scale_dtype=torch.float32), RoundedScales(torch.bfloat16)
        >>> seen.see(QTensor(torch.zeros(1, 2), QParams(torch.tensor([[1.003]]), torch.zeros(1, 1)), format))
        >>> seen.rounded, round(seen.worst, 4)
        (1, 0.003)
        """
        scale = q.qparams.scale.float()
        change = ((scale.to(self.dtype).float() - scale).abs() / scale).nan_to_num(nan=0.0)  # a scale of 0 stays
        self.modules += 1
        self.rounded += bool(change.any())
        self.worst = max(self.worst, float(change.max()))

    def warnings(self) -> list[str]:
        """A line where scales change."""
        if not self.rounded:
            return []
        name = str(self.dtype).removeprefix("torch.")
        return [
            f"the folder is loaded in {name}: scales of {self.rounded} of {self.modules} linears are rounded, by "
            f"{self.worst:.2%} at most; codes are unchanged"
        ]
