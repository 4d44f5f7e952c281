"""Static inputs with one range for each cluster of consecutive channels.

Source: RPTQ, Yuan et al., 2023, arXiv 2304.01089, section 4.2: channels with similar ranges are brought side by side,
so that few ranges, fixed in advance, fit all of them. ``methods/rptq.py`` finds the order and the clusters; without
it, clusters are equal parts of the channels in the order that they have.

Qparams have one entry a channel ``(width,)``; those of a cluster are equal, and a file has them once, with the number
of channels that follow one another in it:

=========================== ======== =====================================================
``input_scale``             float32  ``(clusters,)``
``input_zero_point``        int8     ``(clusters,)``, a signed code; absent if symmetric
``input_cluster_size``      int32    ``(clusters,)``, channels; 0 for clusters not in use
=========================== ======== =====================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.quant.format import QParams
from lowbit.quant.layout import Stored
from lowbit.quant.static_activations import StaticIntegers

SIZES = "input_cluster_size"
MOST_CLUSTERS = 1024


@dataclass(frozen=True)
class StaticClusters(StaticIntegers):
    """Integers of 2 to 8 bits with at most ``clusters`` ranges, each of consecutive channels, for all tokens.

    Attributes:
        clusters: largest number of ranges of a linear's input.

    >>> format = StaticClusters(4, symmetric=False, clusters=2)
    >>> qparams = format.qparams(torch.tensor([0.0, 0.0, -30.0]), torch.tensor([1.5, 1.5, 0.0]))
    >>> qparams.scale.tolist(), qparams.zero.tolist()
    ([0.10000000149011612, 0.10000000149011612, 2.0], [-8.0, -8.0, 7.0])
    >>> format.on_qparams(torch.tensor([0.32, 1.0, -29.1]), qparams).tolist()
    [0.30000001192092896, 1.0, -30.0]
    >>> format.pack(qparams)["input_cluster_size"].tolist()
    [2, 1]
    """

    clusters: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 2 <= self.clusters <= MOST_CLUSTERS:
            raise LowbitError(f"{self.clusters} clusters given; 2 to {MOST_CLUSTERS} are allowed")

    @property
    def name(self) -> str:
        """``a8-asym-static32``."""
        return f"{super().name}-static{self.clusters}"

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """See the module docstring."""
        shape = (self.clusters,)
        zero = {} if self.symmetric else {"input_zero_point": Stored(torch.int8, shape)}
        return {"input_scale": Stored(torch.float32, shape), **zero, SIZES: Stored(torch.int32, shape)}

    def parts(self, width: int) -> list[int]:
        """Sizes of equal parts of the channels, at most ``clusters`` of them.

        >>> StaticClusters(8, True, clusters=4).parts(10)
        [3, 3, 2, 2]
        """
        count = min(self.clusters, width)
        return [width // count + (index < width % count) for index in range(count)]

    def fake_quant(self, x: Tensor) -> Tensor:
        """``x`` ``(..., width)`` with equal parts of its channels in the ranges of their own values."""
        rows = x.detach().float().flatten(0, -2)
        sizes = self.parts(x.shape[-1])
        low, high = over_clusters(rows.amin(0), sizes, "amin"), over_clusters(rows.amax(0), sizes, "amax")
        return self.on_qparams(x, self.qparams(low, high))

    def pack(self, qparams: QParams) -> dict[str, Tensor]:
        """See ``StaticActs``: qparams of each cluster once."""
        pairs = torch.stack([value.detach().float().cpu() for value in qparams], 1)
        distinct, sizes = torch.unique_consecutive(pairs, dim=0, return_counts=True)
        assert len(sizes) <= self.clusters, f"{len(sizes)} ranges, {self.clusters} fit"
        unused = self.clusters - len(sizes)
        values = {
            "input_scale": torch.cat([distinct[:, 0], torch.ones(unused)]),
            "input_zero_point": torch.cat([distinct[:, 1], torch.zeros(unused)]),
            SIZES: torch.cat([sizes, torch.zeros(unused, dtype=sizes.dtype)]),
        }
        return {name: values[name].to(stored.dtype, copy=True) for name, stored in self.tensors.items()}

    def unpack(self, stored: Mapping[str, Tensor]) -> QParams:
        """See ``StaticActs``."""
        scale, sizes = stored["input_scale"], stored[SIZES].long()
        zero = stored.get("input_zero_point", torch.zeros_like(scale)).to(scale.dtype)
        if not bool((scale.isfinite() & (scale > 0)).all()):
            raise ValueError("input_scale has something other than positive numbers")
        low_code, high_code = self.codes
        if not bool(((zero >= low_code) & (zero <= high_code)).all()):
            raise ValueError(f"input_zero_point has codes beyond {low_code} to {high_code}")
        if bool((sizes < 0).any()) or not 0 < int(sizes.sum()) < 1 << 24:
            raise ValueError(f"{SIZES} has sizes that no clusters have")
        return QParams(scale.repeat_interleave(sizes), zero.repeat_interleave(sizes))


def over_clusters(values: Tensor, sizes: Sequence[int], pooled: str) -> Tensor:
    """``amin`` or ``amax`` of the values ``(width,)`` of each cluster, for each of its channels.

    >>> over_clusters(torch.tensor([1.0, 5.0, 2.0, 3.0]), [3, 1], "amax").tolist()
    [5.0, 5.0, 5.0, 3.0]
    """
    ends = torch.stack([getattr(part, pooled)() for part in values.split(list(sizes))])
    return ends.repeat_interleave(torch.tensor(sizes, device=values.device))
