"""What goes from one decoder layer to the next as one tensor ``(sequences, length, width)``.

For most models these are the hidden states. Three more things may be in it:

* Several hidden states for each token: Gemma 3n hands on four, stacked in front of the sequences.
* The token ids, where the model gives its layers what it looks up by token, as Gemma 4 does: a layer is then called
  with what the model's own code makes of the ids of the sequences that are run. Batches are taken from the stream by
  sequence everywhere, and so their ids are always at hand. Rejected: to carry what the layers get, which is several
  times as wide as the hidden states.
* What a layer hands to later ones beside its output: the keys and values that the last layers of Gemma 3n and 4 use
  once more.

Ids are three channels of eight bits each behind the hidden states, in units of ``UNIT``: exact in every floating
dtype, and so small that they count nothing in an error of hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError

BYTES = 3  # of a token id
UNIT = 2.0**-20


@dataclass(frozen=True)
class Form:
    """Which dimensions of a tensor count sequences and tokens; the last one counts channels.

    Attributes:
        sequences, tokens: the dimensions.
        shape: sizes of the others, in order: ``(4,)`` for four hidden states a token, ``(heads,)`` for keys.
    """

    sequences: int = 0
    tokens: int = 1
    shape: tuple[int, ...] = ()

    def flat(self, value: Tensor) -> Tensor:
        """``(sequences, length, width)``.

        >>> Form(sequences=1, tokens=2, shape=(4,)).flat(torch.zeros(4, 2, 5, 8)).shape
        torch.Size([2, 5, 32])
        """
        return value.movedim((self.sequences, self.tokens), (0, 1)).flatten(2)

    def restored(self, flat: Tensor) -> Tensor:
        """The tensor that ``flat`` makes ``flat`` of."""
        value = flat.unflatten(-1, (*self.shape, -1)) if self.shape else flat
        return value.movedim((0, 1), (self.sequences, self.tokens))


def form_of(one: Tensor, two: Tensor, shorter: Tensor) -> Form | None:
    """The form of a tensor; ``None`` where sequences and tokens have no dimensions of their own.

    Args:
        one: for one sequence.
        two: for two of its length.
        shorter: for one sequence of fewer tokens.

    >>> form_of(torch.zeros(4, 1, 6, 8), torch.zeros(4, 2, 6, 8), torch.zeros(4, 1, 5, 8))
    Form(sequences=1, tokens=2, shape=(4,))
    """
    sequences, tokens = _changed(one, two), _changed(one, shorter)
    if len(sequences) != 1 or len(tokens) != 1 or one.ndim - 1 in (*sequences, *tokens):
        return None
    if one.shape[sequences[0]] != 1 or two.shape[sequences[0]] != 2:
        return None
    rest = [size for at, size in enumerate(one.shape[:-1]) if at not in (sequences[0], tokens[0])]
    return Form(sequences[0], tokens[0], tuple(rest))


def _changed(one: Tensor, other: Tensor) -> Sequence[int]:
    if one.ndim != other.ndim:
        return ()
    return [at for at, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b]


@dataclass(frozen=True)
class Handed:
    """A tuple of tensors that a layer puts into an argument for later ones.

    Attributes:
        argument: the argument, a mapping.
        key: the tuple's key in it.
        forms: of its tensors.
        widths: of its tensors in the stream.
    """

    argument: str
    key: str
    forms: tuple[Form, ...]
    widths: tuple[int, ...]


HandedOn = Mapping[tuple[str, str], tuple[Tensor, ...]]  # by argument and key


@dataclass(frozen=True)
class State:
    """What a stream holds.

    Attributes:
        hidden: hidden states as layers have them.
        digits: of the token ids ``(sequences, length, 3)``, or ``(sequences, length, 0)`` where there are none.
        handed: what earlier layers hand on.
    """

    hidden: Tensor
    digits: Tensor
    handed: HandedOn = field(default_factory=dict)


ONE_STATE = Form()  # (sequences, length, hidden)


@dataclass(frozen=True)
class Stream:
    """How what goes into a layer becomes one tensor.

    Attributes:
        form: of the hidden states.
        ids: whether token ids are behind them.
        handed: what is behind these, in order.
    """

    form: Form = ONE_STATE
    ids: bool = False
    handed: tuple[Handed, ...] = ()

    def width(self, hidden: int) -> int:
        """Channels, for hidden states of width ``hidden``.

        >>> Stream(Form(1, 2, (4,)), ids=True).width(8)
        35
        """
        return hidden * math.prod(self.form.shape) + BYTES * self.ids + sum(sum(one.widths) for one in self.handed)

    def pack(self, state: State) -> Tensor:
        """``(sequences, length, width)``, in the dtype of the hidden states."""
        flat = self.form.flat(state.hidden)
        behind = [state.digits] * self.ids
        for one in self.handed:
            values = state.handed[one.argument, one.key]
            behind += [form.flat(value) for form, value in zip(one.forms, values, strict=True)]
        return torch.cat([flat, *(value.to(flat) for value in behind)], -1) if behind else flat

    def unpack(self, x: Tensor) -> State:
        """What a tensor of ``pack`` holds; differentiable."""
        widths = [BYTES * self.ids, *(width for one in self.handed for width in one.widths)]
        hidden, digits, *values = x.split([x.shape[-1] - sum(widths), *widths], -1)
        handed = {}
        for one in self.handed:
            own, values = values[: len(one.forms)], values[len(one.forms) :]
            parts = zip(one.forms, own, strict=True)
            handed[one.argument, one.key] = tuple(form.restored(value) for form, value in parts)
        return State(self.form.restored(hidden), digits, handed)


PLAIN = Stream()  # hidden states alone, as most models hand on


def digits_of(ids: Tensor) -> Tensor:
    """Token ids ``(sequences, length)`` as ``(sequences, length, 3)`` in units of ``UNIT``, lowest byte first.

    >>> (digits_of(torch.tensor([[258]])) / UNIT).tolist()
    [[[2.0, 1.0, 0.0]]]
    """
    if int(ids.max()) >= 256**BYTES:
        raise LowbitError(f"token id {int(ids.max())} given; a model whose layers read the text has fewer than 2^24")
    parts = [(ids >> (8 * at)) & 255 for at in range(BYTES)]
    return torch.stack(parts, -1).float() * UNIT


def ids_of(digits: Tensor) -> Tensor:
    """The token ids ``(sequences, length)`` of their digits, in any floating dtype.

    >>> ids_of(digits_of(torch.tensor([[70000, 5]])).half()).tolist()
    [[70000, 5]]
    """
    parts = (digits.detach().double() / UNIT).round().long()
    return torch.stack([parts[..., at] << (8 * at) for at in range(BYTES)]).sum(0)


class Noted(dict[str, Any]):
    """A mapping that layers hand things on in: which keys one reads and writes is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[str] = set()
        self.written: set[str] = set()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """As of a dict."""
        return self[key] if key in self else default  # noqa: SIM401  # it is ``get`` itself

    def __setitem__(self, key: str, value: Any) -> None:
        self.written.add(key)
        super().__setitem__(key, value)
