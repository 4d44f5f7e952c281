"""The proof of an edge: a random map over all of it leaves the layer's output and the model's logits, in float64.

The source's side alone must change the output, or the map proves nothing. A layer that hands keys and values to a
later one keeps its own output under a map that the later layer does not know: hence the model, with the maps on every
layer of the kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.models.architecture import DeclaredEdge, Limit, module_of
from lowbit.models.discovery.capture import Call, output_of
from lowbit.models.discovery.fold import Params, draw, fold
from lowbit.models.discovery.readers import Owners
from lowbit.models.discovery.sites import InFloat64
from lowbit.models.discovery.small_model import SmallModel

SAME = 1e-9  # relative; exact maps leave 1e-16 to 1e-13
DIFFERENT = 1e-4
_AMPLIFIED = (
    1e3  # times what a perturbation of 1e-14 does to the logits: products of deep random layers amplify rounding
)
_LADDER: Mapping[Limit, tuple[Limit, ...]] = {
    "matrix": ("matrix", "diagonal", "positive"),
    "rotation": ("rotation",),
    "diagonal": ("diagonal", "positive"),
    "positive": ("positive",),
}


def attempts(edge: DeclaredEdge, owners: Owners) -> Iterator[DeclaredEdge]:
    """The edge with each group of maps, the larger one first, and with both ways to store a gain."""
    is_gain = owners[module_of(edge.src)].kind == "norm"
    for limit in _LADDER[edge.limit]:
        for offset in (0.0, 1.0) if is_gain else (0.0,):
            yield replace(edge, limit=limit, offset=offset)


@dataclass
class LayerProof:
    """A layer with one sequence.

    Attributes:
        layer: the library's module.
        args, kwargs: what the model calls it with.
        owners: its linears, norms and experts.
    """

    layer: nn.Module
    call: Call
    owners: Owners

    def __post_init__(self) -> None:
        self.params: Params = dict(self.layer.named_parameters())
        self.wanted = self.output(self.params)

    @torch.no_grad()
    def output(self, params: Params) -> Tensor:
        """The layer's output with these parameters."""
        args, kwargs = self.call.arguments(1)
        with InFloat64():
            return output_of(torch.func.functional_call(self.layer, params, args=args, kwargs=kwargs))

    def refutation(self, edge: DeclaredEdge, map: Tensor) -> str:
        """Why the edge is none; empty if nothing speaks against it."""
        moved = fold(edge, self.owners, self.params, map)
        left = relative(self.output(moved), self.wanted)
        if not left < SAME:
            return f"the layer's output changes by {left:.0e} under a {edge.limit} map"
        alone = relative(self.output(fold(edge, self.owners, self.params, map, source_only=True)), self.wanted)
        if not alone > DIFFERENT:
            return "the source alone does not change the layer's output"
        return ""


class ModelProof:
    """The small model's logits, and maps on several layers at once."""

    def __init__(self, small: SmallModel) -> None:
        self.small = small
        names = dict(small.model.named_parameters(remove_duplicate=False))
        first = {id(value): name for name, value in reversed(names.items())}
        self.stored = {name: first[id(value)] for name, value in names.items()}  # layers may share a parameter
        self.params: Params = dict(small.model.named_parameters())
        self.wanted = self.small.logits({})
        self.tolerance = max(SAME, _AMPLIFIED * self._amplification())

    def _amplification(self) -> float:
        name = f"{self.small.embed}.weight"
        if name not in self.params:
            return 0.0
        noise = torch.randn(self.params[name].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return relative(self.small.logits({name: self.params[name] * (1 + 1e-14 * noise)}), self.wanted)

    def change(self, moves: Sequence[tuple[int, DeclaredEdge, Owners, Tensor]]) -> float:
        """The relative change of the logits under maps across edges of layers, by index."""
        changed: Params = {}
        for index, edge, owners, map in moves:
            prefix = f"{self.small.blocks}.{index}."
            names = [name for name in self.stored if name.startswith(prefix)]
            own = {name.removeprefix(prefix): self._value(self.stored[name], changed) for name in names}
            folded = fold(edge, owners, own, map)
            moved = {name: value for name, value in folded.items() if value is not own[name]}
            changed |= {self.stored[prefix + name]: value for name, value in moved.items()}
        return relative(self.small.logits(changed), self.wanted)

    def _value(self, name: str, changed: Params) -> Tensor:
        return changed.get(name, self.params[name])

    def refutation(self, moves: Sequence[tuple[int, DeclaredEdge, Owners, Tensor]]) -> str:
        """Why the maps are not invisible; empty if they are."""
        left = self.change(moves)
        return "" if left < self.tolerance else f"the model's logits change by {left:.0e}"


def relative(output: Tensor, reference: Tensor) -> float:
    """The largest difference relative to the largest value.

    >>> relative(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))
    0.5
    """
    return float((output - reference).abs().max() / reference.abs().max())


def random_moves(
    edge: DeclaredEdge, owners: Owners, layers: Sequence[int], generator: torch.Generator
) -> list[tuple[int, DeclaredEdge, Owners, Tensor]]:
    """One random map on each layer."""
    return [(index, edge, owners, draw(edge, owners, edge.limit, generator)) for index in layers]
