"""Stand-ins for a model's decoder layers: they record what the model calls its layers with, and compute nothing.

That a model is its layers, one after the other, is assumed nowhere: ``Recorders.learn`` makes the model's own
``forward`` show it on two sequences, and refuses a model that does anything else. What it finds:

* whether layers return a tensor, or a tuple with the hidden states in front (Bloom, Falcon, Bamba);
* which of their arguments have rows for each sequence (Bloom's ``alibi``), rather than one that broadcasts (masks);
* that no argument depends on the text, since a block is run with the arguments of one sequence for all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError

ADVICE = "lowbit runs a model's layers one after the other, each with the arguments of one text: choose another model"
CLOSE = 1e-5  # of arguments: batched products round differently


@dataclass(frozen=True)
class PerSequence:
    """An argument that has rows for each sequence: ``value`` ``(rows, ...)`` is that of one sequence."""

    value: Tensor

    def for_batch(self, x: Tensor) -> Tensor:
        """``(sequences * rows, ...)`` for hidden states ``x`` ``(sequences, length, hidden)``, in their dtype.

        >>> PerSequence(torch.tensor([1, 2])).for_batch(torch.zeros(2, 3, 4)).tolist()
        [1, 2, 1, 2]
        """
        rows = self.value.repeat(len(x), *[1] * (self.value.ndim - 1))
        return rows.to(x.dtype) if rows.is_floating_point() else rows


def for_batch(arguments: Mapping[str, Any], x: Tensor) -> dict[str, Any]:
    """A layer's keyword arguments for hidden states ``x`` ``(sequences, length, hidden)``."""
    rows = {name: value.for_batch(x) for name, value in arguments.items() if isinstance(value, PerSequence)}
    return {**arguments, **rows}


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a layer returns: its output, or the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def as_returned(hidden: Tensor, outputs: int) -> Any:
    """Hidden states as a layer returns them: in front of a tuple of ``outputs`` values, or alone for 0.

    >>> as_returned(torch.ones(1), 2)
    (tensor([1.]), None)
    """
    return (hidden, *[None] * (outputs - 1)) if outputs else hidden


MOST_OUTPUTS = 3  # values in the tuple that a layer returns


@dataclass
class _Pass:
    """How the recorders behave: how many values they return in a tuple (0: none), and where they list their calls."""

    outputs: int = 0
    calls: list[_Call] | None = None


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its index, its output and its keyword arguments."""

    index: int
    out: Tensor
    arguments: Mapping[str, Any]


class _Recorder(nn.Module):
    """Replaces a decoder layer: records its arguments, returns its input or ``answer`` if that is set."""

    def __init__(self, layer: nn.Module, index: int, now: _Pass) -> None:
        super().__init__()
        object.__setattr__(self, "layer", layer)  # no submodule: its parameters are not the skeleton's
        self.index, self.now = index, now
        self.signature = inspect.signature(layer.forward)
        self.arguments: dict[int, Mapping[str, Any]] = {}  # by sequence length, their only dependence
        self.answer: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        """What the model reads of its layers, such as their type, is the layer's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer":  # of a copy that is being made
                raise
            return getattr(self.layer, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The hidden states, as the layer would return them."""
        hidden, arguments = self._bound(args, kwargs)
        # Masks for one sequence broadcast over any batch; those of a batch fit that batch only.
        if hidden.shape[0] == 1:
            self.arguments[hidden.shape[1]] = arguments
        out = hidden if self.answer is None else self.answer
        if self.now.calls is not None:
            self._compare(hidden)
            self.now.calls.append(_Call(self.index, out, arguments))
        return as_returned(out, self.now.outputs)

    def _compare(self, hidden: Tensor) -> None:
        """Refuse an input that is not what the layer before gave."""
        assert self.now.calls is not None
        if hidden.ndim != 3:
            raise _Unlike(
                f"layer {self.index} gets an input of shape {tuple(hidden.shape)}, not (sequences, length, hidden)"
            )
        if self.now.calls and not _same(hidden, self.now.calls[-1].out):
            raise _Unlike(f"the model changes the hidden states between layers {self.index - 1} and {self.index}")

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """The hidden states, which are the first argument, and the others by name."""
        bound = self.signature.bind(*args, **kwargs)
        arguments: dict[str, Any] = {}
        for name, value in bound.arguments.items():
            kind = self.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= value
            elif kind is inspect.Parameter.VAR_POSITIONAL:
                raise _Unlike(f"the model gives layer {self.index} arguments without names")
            else:
                arguments[name] = value
        hidden = arguments.pop(next(iter(self.signature.parameters)), None)
        if not isinstance(hidden, Tensor):
            raise _Unlike(f"the first argument of layer {self.index} is no tensor of hidden states")
        return hidden, arguments


@dataclass
class Recorders:
    """A model's recorders.

    Attributes:
        modules: one for each layer.
        rows: names of the arguments that have rows for each sequence, by layer.
        learned: whether ``learn`` has run.
    """

    modules: list[_Recorder] = field(default_factory=list)
    rows: list[set[str]] = field(default_factory=list)
    learned: bool = False
    now: _Pass = field(default_factory=_Pass)

    @classmethod
    def of(cls, layers: list[nn.Module]) -> Recorders:
        """A recorder for each layer."""
        now = _Pass()
        return cls([_Recorder(layer, i, now) for i, layer in enumerate(layers)], [set() for _ in layers], now=now)

    def arguments(self, index: int, length: int) -> dict[str, Any]:
        """What layer ``index`` is called with, for sequences of a ``length`` that the model has seen."""
        recorded, rows = self.modules[index].arguments[length], self.rows[index]
        return {name: PerSequence(value) if name in rows else value for name, value in recorded.items()}

    def forget(self) -> None:
        """Drop the recorded arguments."""
        for recorder in self.modules:
            recorder.arguments.clear()

    def learn(self, forward: Callable[[Tensor], Tensor], ids: Tensor, vocabulary: int) -> None:
        """Find out how the model calls its layers.

        Args:
            forward: the model, from token ids to logits of the last position ``(sequences, 1, vocabulary)``.
            ids: a sequence ``(1, length)``.
            vocabulary: number of embeddings.

        Raises:
            LowbitError: the model does something else between its layers, or gives them what depends on the text.
        """
        pair = torch.cat([ids, (ids + 1) % vocabulary])
        calls = self._first_that_runs(forward, pair)
        forward(ids)
        for call, recorder, rows in zip(calls, self.modules, self.rows, strict=True):
            rows |= _names_with_rows(recorder.arguments[ids.shape[1]], call.arguments, call.index)
        self.learned = True

    def _first_that_runs(self, forward: Callable[[Tensor], Tensor], ids: Tensor) -> list[_Call]:
        """The calls of a pass in which the recorders return what the model takes: a tensor, or some tuple."""
        problems: list[Exception] = []
        for outputs in range(MOST_OUTPUTS + 1):
            self.now.outputs = outputs
            try:
                return self._calls(forward, ids)
            except (AttributeError, IndexError, LowbitError, RuntimeError, TypeError, ValueError) as error:
                problems.append(error)
        if isinstance(problems[0], _Unlike):
            raise LowbitError(f"{problems[0]}: {ADVICE}")
        raise problems[0]  # of a config that computes nothing

    def _calls(self, forward: Callable[[Tensor], Tensor], ids: Tensor) -> list[_Call]:
        """The calls of the layers in a pass: one after the other, each with what the one before gave."""
        calls: list[_Call] = []
        self.now.calls = calls
        try:
            logits = forward(ids)
        finally:
            self.now.calls = None
        if [call.index for call in calls] != list(range(len(self.modules))):
            raise _Unlike(f"the model calls its {len(self.modules)} layers {len(calls)} times, or in another order")
        if logits.ndim != 3:
            raise _Unlike(f"behind the last layer the model has an output of shape {tuple(logits.shape)}")
        return calls


class _Unlike(LowbitError):
    """A model does something else than calling its layers one after the other."""


def _names_with_rows(one: Mapping[str, Any], two: Mapping[str, Any], layer: int) -> set[str]:
    """Names of the arguments of ``layer`` that have rows for each sequence and do not broadcast.

    Args:
        one: the arguments for a sequence.
        two: those for that sequence and another of the same length.
        layer: its index.

    Raises:
        LowbitError: an argument depends on the text, or does not have the sequences in front.
    """
    names = set()
    for name, value in one.items():
        pairs = list(zip(_tensors(value), _tensors(two.get(name)), strict=False))
        if any(not _same(a, b) and not _doubled(a, b) for a, b in pairs):
            raise LowbitError(
                f"the model gives layer {layer} the argument '{name}', which depends on the text or does not have "
                f"the sequences in front: {ADVICE}"
            )
        if any(not _same(a, b) and len(a) > 1 for a, b in pairs):
            if not isinstance(value, Tensor):
                raise LowbitError(f"the argument '{name}' of layer {layer} holds tensors with sequences: {ADVICE}")
            names.add(name)
    return names


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in an argument: itself, or those in a tuple, list or mapping."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have one shape and, but for rounding, the same values."""
    if a.shape != b.shape:
        return False
    return torch.allclose(a, b, CLOSE, CLOSE, True) if a.is_floating_point() else torch.equal(a, b)


def _doubled(a: Tensor, b: Tensor) -> bool:
    """Whether ``b`` is ``a`` twice, one behind the other."""
    return a.ndim > 0 and len(b) == 2 * len(a) and _same(a, b[: len(a)]) and _same(a, b[len(a) :])
