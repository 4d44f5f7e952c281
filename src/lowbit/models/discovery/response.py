"""How a layer responds when one output channel of one linear or norm is scaled.

All channels of an owner go into one forward pass: sample 0 is left alone, in sample ``i`` channel ``i - 1`` is
times ``SCALE``. Where a linear reads channels that are exactly ``SCALE ** p`` times those of sample 0, for every
token, they are put back to what sample 0 has: that is what a factor in the reader's columns would do. A channel after
which nothing is left of the change, the layer's output included, can take a scale; any other is refuted where it is
first seen to differ in another way.

Example: ``up`` scaled by 1.37 in channel 5 changes column 5 of ``down``'s input by 1.37 and, once it is put back,
nothing else; ``gate`` changes it by a factor that depends on the token.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lowbit.models.discovery.capture import Call, output_of, sequence_axis
from lowbit.models.discovery.experts import all_experts
from lowbit.models.discovery.sites import Role, Sites

SCALE = 1.37
POWERS = (1, 2, -1, 3)
SAMPLES = 96  # channels in a pass
REDRAWS = 3
_OF_CHANNEL, _OF_ALL = (
    1e-9,
    1e-12,
)  # differences below these parts of a channel's and of all channels' peak are rounding
Key = tuple[str, str, int]  # owner, side, and which call of it


@dataclass
class Trace:
    """A pass for one sequence: what was called, in order.

    Attributes:
        order: ``(owner, side, call)`` of every site.
        axes: the dimension that counts sequences.
        inputs: input of each owner at its first call.
        attention: the module, and the shape of queries, keys and values, of each attention.
        output_axis: the dimension of the layer's output that counts sequences.
        flat: owners that read ``(tokens, width)``.
        routed: an expert reads the tokens that reach it, however many these are.
    """

    order: list[Key] = field(default_factory=list)
    shapes: dict[Key, torch.Size] = field(default_factory=dict)
    axes: dict[Key, int | None] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    attention: list[tuple[str, dict[Role, torch.Size]]] = field(default_factory=list)
    output_axis: int | None = None
    routed: bool = False

    def write(self, name: str, value: Tensor) -> Tensor:
        """Note the shape."""
        self._note(name, "out", value)
        return value

    def read(self, name: str, value: Tensor) -> Tensor:
        """Note the shape and the first value."""
        self._note(name, "in", value)
        self.inputs.setdefault(name, value)
        return value

    def attend(self, module: str, role: Role, value: Tensor) -> None:
        """Note the shape."""
        if role == "q":
            self.attention.append((module, {}))
        self.attention[-1][1][role] = value.shape

    def _note(self, name: str, side: str, value: Tensor) -> None:
        call = sum(key[:2] == (name, side) for key in self.order)
        self.order.append((name, side, call))
        self.shapes[name, side, call] = value.shape

    def without(self, owners: Collection[str]) -> Trace:
        """The trace without the sites of some owners; what they read stays."""
        order = [key for key in self.order if key[0] not in owners]
        return replace(self, order=order, axes={key: self.axes[key] for key in order})

    @property
    def flat(self) -> frozenset[str]:
        """Owners that read ``(tokens, width)``."""
        return frozenset(name for name, value in self.inputs.items() if value.ndim == 2)


def trace(sites: Sites, call: Call) -> Trace:
    """The sites of a layer in execution order, from passes with one and with two sequences."""
    passes, outputs = [], []
    for sequences in (1, 2):
        found = Trace(routed=bool(sites.routed))
        args, kwargs = call.arguments(sequences)
        with all_experts(sites.layer):
            outputs.append(output_of(sites.run(found, args, kwargs)).shape)
        passes.append(found)
    one, two = passes
    one.axes = {key: sequence_axis(shape, two.shapes.get(key, shape)) for key, shape in one.shapes.items()}
    one.output_axis = sequence_axis(*outputs)
    return one


@dataclass
class Response:
    """What became of each channel of an owner.

    Attributes:
        hits: by reader, ``(channels, columns)`` powers of ``SCALE`` that were put back; 0: none.
        refuted: by channel, where it first differed otherwise; empty: nowhere.
        touched: by attention and role, ``(channels, heads, width)``: which channels of Q, K and V changed.
        strange: by reader, ``(channels, columns)``: what differed otherwise where a channel was refuted.
    """

    hits: dict[str, Tensor]
    refuted: list[str]
    touched: dict[tuple[int, Role], Tensor]
    strange: dict[str, Tensor] = field(default_factory=dict)

    def silent(self) -> list[int]:
        """Channels that change nothing."""
        heard = torch.tensor([bool(where) for where in self.refuted])
        for powers in self.hits.values():
            heard |= powers.any(1)
        return (~heard).nonzero().flatten().tolist()

    def replace(self, channels: list[int], other: Response) -> None:
        """Take the response of some channels from another pass."""
        for name, powers in other.hits.items():
            self.hits[name][channels] = powers
        for key, value in other.touched.items():
            self.touched[key][channels] = value
        for name, where in other.strange.items():
            self.strange[name][channels] = where
        for channel, place in zip(channels, other.refuted, strict=True):
            self.refuted[channel] = place


def respond(sites: Sites, call: Call, found: Trace, owner: str) -> Response:
    """The response to every output channel of an owner.

    A channel that changes nothing, such as one behind a relu that no token passes, is asked again with other hidden
    states.
    """
    channels = next(found.shapes[key][-1] for key in found.order if key[:2] == (owner, "out"))
    factors = 1 + (SCALE - 1) * torch.eye(channels, dtype=torch.float64)
    response = _joined([_pass(sites, call, _Scaled(found, {owner: some})) for some in factors.split(SAMPLES)])
    for seed in range(REDRAWS):
        dead = response.silent()
        if not len(dead) or len(dead) == channels:
            break
        again = _pass(sites, call.redrawn(seed + 1), _Scaled(found, {owner: factors[dead]}))
        response.replace(dead, again)
    return Response(
        {name: powers for name, powers in response.hits.items() if bool(powers.any())},
        response.refuted,
        {key: value for key, value in response.touched.items() if bool(value.any())},
        {name: where for name, where in response.strange.items() if bool(where.any())},
    )


def _joined(parts: Sequence[Response]) -> Response:
    hits = {name: torch.cat([part.hits[name] for part in parts]) for name in parts[0].hits}
    touched = {key: torch.cat([part.touched[key] for part in parts]) for key in parts[0].touched}
    strange = {name: torch.cat([part.strange[name] for part in parts]) for name in parts[0].strange}
    return Response(hits, [where for part in parts for where in part.refuted], touched, strange)


def _pass(sites: Sites, call: Call, listener: _Scaled) -> Response:
    args, kwargs = call.arguments(listener.samples + 1)
    with all_experts(sites.layer):
        output = output_of(sites.run(listener, args, kwargs))
    return listener.finish(output)


def stays(sites: Sites, call: Call, found: Trace, factors: Mapping[str, Tensor]) -> Tensor:
    """Whether scaling channels of several owners together leaves the layer's output.

    Args:
        sites, call, found: the layer.
        factors: by owner, ``(samples, channels)``.

    Returns:
        ``(samples,)``.
    """
    return torch.tensor([not where for where in _pass(sites, call, _Scaled(found, factors, undo=False)).refuted])


@dataclass
class _Scaled:
    """Scales channels of owners, in every sample others, and puts back what their readers can undo.

    Attributes:
        found: the layer's trace.
        factors: by owner, ``(samples, channels)`` factors in each sample but sample 0.
        undo: whether readers put channels back.
    """

    found: Trace
    factors: Mapping[str, Tensor]
    undo: bool = True

    def __post_init__(self) -> None:
        self.samples = len(next(iter(self.factors.values())))
        self.calls: dict[tuple[str, str], int] = {}
        self.hits = {key[0]: torch.zeros(self.samples, self.found.shapes[key][-1], dtype=torch.int8)
                     for key in self.found.order if key[1] == "in"}  # fmt: skip
        self.strange = {name: torch.zeros_like(powers, dtype=torch.bool) for name, powers in self.hits.items()}
        self.refuted = [""] * self.samples
        self.touched: dict[tuple[int, Role], Tensor] = {}
        self.attentions = -1

    def write(self, name: str, value: Tensor) -> Tensor:
        axis, whole = self._axis(name, "out", value)
        if name not in self.factors or axis is None or not whole:
            return value
        given = self.factors[name]
        factor = torch.cat([torch.ones_like(given[:1]), given]).to(value.dtype)
        rows, restore = by_sample(value, axis, self.samples + 1)
        return restore(rows * factor.view(len(factor), *[1] * (rows.ndim - 2), -1))

    def read(self, name: str, value: Tensor) -> Tensor:
        axis, whole = self._axis(name, "in", value)
        if not whole:
            self.refuted = [where or f"the input of {name}" for where in self.refuted]
        if axis is None or not self.undo or not whole:
            return value
        rows, restore = by_sample(value, axis, self.samples + 1)
        powers, strange = compared(rows)
        for sample in strange.any(1).nonzero().flatten().tolist():
            if not self.refuted[sample]:
                self.refuted[sample] = f"the input of {name}"
                self.strange[name][sample] = strange[sample]
        free = torch.tensor([not where for where in self.refuted])
        powers = powers * free[:, None]
        self.hits[name] = torch.where(powers != 0, powers, self.hits[name])
        undone = powers != 0
        if self.found.routed:  # else experts would read other tokens in a sample than in sample 0
            undone |= ~free[:, None]
        if not bool(undone.any()):
            return value
        back = torch.cat([torch.zeros_like(undone[:1]), undone])
        return restore(torch.where(back.view(len(back), *[1] * (rows.ndim - 2), -1), rows[:1], rows))

    def attend(self, module: str, role: Role, value: Tensor) -> None:
        self.attentions += role == "q"
        heads = value.reshape(self.samples + 1, -1, *value.shape[-2:])  # (samples, heads, tokens, width)
        scale = heads[0].abs().amax(1)  # (heads, width)
        different = (heads[1:] - heads[:1]).abs().amax(2)
        self.touched[self.attentions, role] = different > _OF_CHANNEL * scale + _OF_ALL * scale.max()

    def finish(self, output: Tensor) -> Response:
        """The response, once the layer has returned ``output``."""
        for sample in self.left(output).nonzero().flatten().tolist():
            self.refuted[sample] = self.refuted[sample] or "the layer's output"
        return Response(self.hits, self.refuted, self.touched, self.strange)

    def left(self, output: Tensor) -> Tensor:
        """``(samples,)``: whether the layer's output differs from that of sample 0."""
        if self.found.output_axis is None:
            return torch.ones(self.samples, dtype=torch.bool)
        rows, _ = by_sample(output, self.found.output_axis, self.samples + 1)
        flat = rows.flatten(1)
        return (flat[1:] - flat[:1]).abs().amax(1) > _OF_CHANNEL * flat[0].abs().max()

    def _axis(self, name: str, side: str, value: Tensor) -> tuple[int | None, bool]:
        """The dimension of a site's value that counts sequences, and whether each has as many rows as in the trace.

        It has not where a change decides which tokens reach an expert.
        """
        call = self.calls.get((name, side), 0)
        self.calls[name, side] = call + 1
        key = name, side, call
        if (axis := self.found.axes.get(key)) is None:
            return None, not self.found.routed or key in self.found.shapes
        return axis, value.shape[axis] == self.found.shapes[key][axis] * (self.samples + 1)


def by_sample(value: Tensor, axis: int, samples: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A tensor as ``(samples, ..., width)``, and the function that gives such a tensor its old shape."""
    shape = value.shape
    rows = value.unflatten(axis, (samples, -1)).movedim(axis, 0)

    def restore(changed: Tensor) -> Tensor:
        return changed.movedim(0, axis).reshape(shape)

    return rows, restore


def compared(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Samples against sample 0.

    Args:
        rows: ``(1 + samples, ..., width)``.

    Returns:
        ``(samples, width)`` powers of ``SCALE`` by which channels differ (0: they do not), and ``(samples, width)``:
        whether they differ in another way.
    """
    flat = rows.reshape(len(rows), -1, rows.shape[-1])
    base, others = flat[0], flat[1:]
    peak = base.abs().amax(0)
    tolerance = _OF_CHANNEL * peak + _OF_ALL * peak.max()
    powers = torch.zeros(len(others), rows.shape[-1], dtype=torch.int8)
    unexplained = (others - base).abs().amax(1) > tolerance
    for power in POWERS:
        factor = SCALE**power
        fits = unexplained & ((others - factor * base).abs().amax(1) <= tolerance * factor)
        powers[fits] = power
        unexplained = unexplained & ~fits
    return powers, unexplained
