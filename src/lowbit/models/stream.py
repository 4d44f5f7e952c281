"""What goes from one decoder layer to the next as one tensor ``(sequences, length, width)``.

For most models these are the hidden states. Two more things may be in it:

* Several hidden states for each token: Gemma 3n hands on four, stacked in front of the sequences.
* The token ids, where the model gives its layers what it looks up by token, as Gemma 4 does: a layer is then called
  with what the model's own code makes of the ids of the sequences that are run. Batches are taken from the stream by
  sequence everywhere, and so their ids are always at hand. Rejected: to carry what the layers get, which is several
  times as wide as the hidden states.

Ids are three channels of eight bits each behind the hidden states, in units of ``UNIT``: exact in every floating
dtype, and so small that they count nothing in an error of hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowbit.errors import LowbitError

BYTES = 3  # of a token id
UNIT = 2.0**-20


@dataclass(frozen=True)
class Stream:
    """How a model's hidden states and token ids become one tensor.

    Attributes:
        sequences, tokens: the dimensions of a layer's hidden states that count sequences and tokens; the last one
            counts channels.
        ids: whether token ids are behind the hidden states.
        shape: sizes of the other dimensions, in order: ``(4,)`` for four hidden states a token.
    """

    sequences: int = 0
    tokens: int = 1
    ids: bool = False
    shape: tuple[int, ...] = ()

    def count(self, hidden: Tensor) -> int:
        """Number of sequences in a layer's hidden states."""
        return hidden.shape[self.sequences]

    def length(self, hidden: Tensor) -> int:
        """Number of tokens of each sequence."""
        return hidden.shape[self.tokens]

    def pack(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """``(sequences, length, width)`` from hidden states as layers have them, and token ids or ``digits`` of them.

        >>> Stream(sequences=1, tokens=2, shape=(4,)).pack(torch.zeros(4, 2, 5, 8), torch.zeros(2, 5)).shape
        torch.Size([2, 5, 32])
        """
        flat = hidden.movedim((self.sequences, self.tokens), (0, 1)).flatten(2)
        if not self.ids:
            return flat
        own = digits(ids) if ids.ndim == 2 else ids
        return torch.cat([flat, own.to(flat)], -1)

    def unpack(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states as layers have them, and the digits of the token ids: ``(..., 3)``, or ``(..., 0)`` without.

        Differentiable in ``x``.
        """
        width = x.shape[-1] - BYTES * self.ids
        hidden = x[..., :width]
        if self.shape:
            hidden = hidden.unflatten(-1, (*self.shape, -1))
        return hidden.movedim((0, 1), (self.sequences, self.tokens)), x[..., width:]


PLAIN = Stream()  # hidden states alone, as most models hand on


def digits(ids: Tensor) -> Tensor:
    """Token ids ``(sequences, length)`` as ``(sequences, length, 3)`` in units of ``UNIT``, lowest byte first.

    >>> (digits(torch.tensor([[258]])) / UNIT).tolist()
    [[[2.0, 1.0, 0.0]]]
    """
    if int(ids.max()) >= 256**BYTES:
        raise LowbitError(f"token id {int(ids.max())} given; a model with text in its layers has fewer than 2^24")
    parts = [(ids >> (8 * at)) & 255 for at in range(BYTES)]
    return torch.stack(parts, -1).float() * UNIT


def ids_of(digits: Tensor) -> Tensor:
    """The token ids ``(sequences, length)`` of their digits, in any floating dtype.

    >>> ids_of(digits(torch.tensor([[70000, 5]])).half()).tolist()
    [[70000, 5]]
    """
    parts = (digits.detach().double() / UNIT).round().long()
    return sum(parts[..., at] << (8 * at) for at in range(BYTES))  # type: ignore[return-value]


def stream_of(one: Tensor, two: Tensor, shorter: Tensor, ids: bool) -> Stream | None:
    """The stream of a model from a layer's hidden states; ``None`` where sequences and tokens have no dimensions.

    Args:
        one: for one sequence.
        two: for two of its length.
        shorter: for one sequence of fewer tokens.
        ids: whether layers are given what depends on the text.

    >>> stream_of(torch.zeros(4, 1, 6, 8), torch.zeros(4, 2, 6, 8), torch.zeros(4, 1, 5, 8), ids=True)
    Stream(sequences=1, tokens=2, ids=True, shape=(4,))
    """
    sequences, tokens = _changed(one, two), _changed(one, shorter)
    if len(sequences) != 1 or len(tokens) != 1 or one.ndim < 3 or one.ndim - 1 in (*sequences, *tokens):
        return None
    if one.shape[sequences[0]] != 1 or two.shape[sequences[0]] != 2:
        return None
    rest = [size for at, size in enumerate(one.shape[:-1]) if at not in (sequences[0], tokens[0])]
    return Stream(sequences[0], tokens[0], ids, tuple(rest))


def _changed(one: Tensor, other: Tensor) -> Sequence[int]:
    if one.ndim != other.ndim:
        return ()
    return [at for at, (a, b) in enumerate(zip(one.shape, other.shape, strict=True)) if a != b]
