"""The proof of an edge: a random map over all of it leaves the layer's output and the model's logits, in float64.

The source's side alone must change the output, or the map proves nothing. What the whole map leaves is compared with
what the source's side alone does, not with the output: a half of a layer that contributes little to the residual
stream, as attention beside a large recurrent state, passes no false edge for that and loses no true one.

A layer that hands keys and values to a later one keeps its own output under a map that the later layer does not know:
hence the model, with the maps on every layer of the kind.

A clamp whose bound no activation of the random model reaches hides that a map does not commute with it: what
functions with a bound read must stay as well, see ``thresholds``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.models.architecture import DeclaredEdge, Limit, module_of
from lowbit.models.discovery.capture import Call, output_of
from lowbit.models.discovery.fold import Params, draw, fold
from lowbit.models.discovery.readers import Owners
from lowbit.models.discovery.sites import InFloat64
from lowbit.models.discovery.small_model import SmallModel
from lowbit.models.discovery.thresholds import Thresholds, crossed

SAME = 1e-9  # of what the source's side alone changes; exact maps leave 1e-16 to 1e-13
ROUNDING = 1e-14  # of the output: what sums in another order leave
DIFFERENT = 1e-10  # of the output; 1e4 times what is taken for rounding
_AMPLIFIED = (
    1e3  # times what a perturbation of 1e-14 does to the logits: products of deep random layers amplify rounding
)
Move = tuple[int, DeclaredEdge, Owners, Tensor]  # a layer's index, an edge in it, its owners, and the map
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
        self.bounded = Thresholds()
        self.wanted = self.output(self.params, self.bounded)

    @torch.no_grad()
    def output(self, params: Params, seen: Thresholds | None = None) -> Tensor:
        """The layer's output with these parameters; ``seen`` keeps what functions with a bound read."""
        args, kwargs = self.call.arguments(1)
        with InFloat64(), seen or nullcontext():
            return output_of(torch.func.functional_call(self.layer, params, args=args, kwargs=kwargs))

    def refutation(self, edge: DeclaredEdge, map: Tensor) -> str:
        """Why the edge is none; empty if nothing speaks against it."""
        left, alone = self.effects(edge, map)
        if not alone > DIFFERENT:
            return "the source alone does not change the layer's output"
        if not left < allowed(alone, ROUNDING):
            return f"the layer's output changes by {left:.0e} under a {edge.limit} map"
        seen = Thresholds()
        self.output(fold(edge, self.owners, self.params, map), seen)
        if name := crossed(self.bounded, seen):
            return f"{name}, which has a bound, lies across it"
        return ""

    def effects(self, edge: DeclaredEdge, map: Tensor) -> tuple[float, float]:
        """The relative change of the output under a map across the edge, and under its source's side alone."""
        both = (fold(edge, self.owners, self.params, map, source_only=alone) for alone in (False, True))
        left, alone = (relative(self.output(params), self.wanted) for params in both)
        return left, alone


class ModelProof:
    """The small model's logits, and maps on several layers at once."""

    def __init__(self, small: SmallModel) -> None:
        self.small = small
        names = dict(small.model.named_parameters(remove_duplicate=False))
        first = {id(value): name for name, value in reversed(names.items())}
        self.stored = {name: first[id(value)] for name, value in names.items()}  # layers may share a parameter
        self.params: Params = dict(small.model.named_parameters())
        self.wanted = self.small.logits({})
        self.rounding = _AMPLIFIED * self._amplification()

    def _amplification(self) -> float:
        name = f"{self.small.embed}.weight"
        if name not in self.params:
            return 0.0
        noise = torch.randn(self.params[name].shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        return relative(self.small.logits({name: self.params[name] * (1 + 1e-14 * noise)}), self.wanted)

    def change(self, moves: Sequence[Move], source_only: bool = False) -> float:
        """The relative change of the logits under maps across edges of layers, or their sources' sides alone."""
        changed: Params = {}
        for index, edge, owners, map in moves:
            prefix = f"{self.small.blocks}.{index}."
            names = [name for name in self.stored if name.startswith(prefix)]
            own = {name.removeprefix(prefix): self._value(self.stored[name], changed) for name in names}
            folded = fold(edge, owners, own, map, source_only=source_only)
            moved = {name: value for name, value in folded.items() if value is not own[name]}
            changed |= {self.stored[prefix + name]: value for name, value in moved.items()}
        return relative(self.small.logits(changed), self.wanted)

    def _value(self, name: str, changed: Params) -> Tensor:
        return changed.get(name, self.params[name])

    def refutation(self, moves: Sequence[Move]) -> str:
        """Why the maps are not invisible; empty if they are."""
        left = self.change(moves)
        passes = left < self.rounding or left < allowed(self.change(moves, source_only=True), self.rounding)
        return "" if passes else f"the model's logits change by {left:.0e}"


def allowed(alone: float, rounding: float) -> float:
    """The change that a proven map may leave, given that of its source's side alone, both relative to the output.

    >>> [f"{allowed(alone, 1e-14):.1e}" for alone in (1e-8, 1e-3, 20.0)]
    ['1.0e-14', '1.0e-12', '1.0e-09']
    """
    return SAME * min(alone, 1.0) + rounding


def relative(output: Tensor, reference: Tensor) -> float:
    """The largest difference in a token's channels relative to the token's largest value, over all tokens.

    Tokens are compared one by one: at random parameters a recurrent state may grow from token to token, and the last
    one would hide every other.

    >>> relative(torch.tensor([[1.0, 2.0], [9.0, 99.0]]), torch.tensor([[1.0, 4.0], [0.0, 100.0]]))
    0.5

    Args:
        output: ``(..., tokens, channels)``.
        reference: what it is compared with.
    """
    largest = reference.abs().amax(-1).clamp(min=torch.finfo(reference.dtype).tiny)
    return float(((output - reference).abs().amax(-1) / largest).max())


def random_moves(edge: DeclaredEdge, owners: Owners, layers: Sequence[int], generator: torch.Generator) -> list[Move]:
    """One random map on each layer."""
    return [(index, edge, owners, draw(edge, owners, edge.limit, generator)) for index in layers]
