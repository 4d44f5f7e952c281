"""Stand-ins for a model's decoder layers: they record what the model calls its layers with, and compute nothing.

That a model is its layers, one after the other, is assumed nowhere: ``Recorders.learn`` makes the model's own
``forward`` show it on two sequences, and refuses a model that does anything else. What it finds:

* whether layers return a tensor, or a tuple with the hidden states in front (Bloom, Falcon, Bamba);
* which dimensions of their hidden states count sequences and tokens, and what a layer hands to later ones beside
  these (``Stream``);
* which of their arguments have rows for each sequence (Bloom's ``alibi``), rather than one that broadcasts (masks);
* which depend on the text (Gemma 4's ``per_layer_input``): a block is run with the arguments of one sequence for all
  of them, but for these, which the model's own code makes of the ids of the sequences that are run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.models.handed_on import handed_on
from lowbit.models.stream import ONE_STATE, PLAIN, Form, Handed, Stream, form_of, ids_of

ADVICE = "lowbit runs a model's layers one after the other, each with the arguments of one text: choose another model"
CLOSE = 1e-5  # of arguments: batched products round differently


@dataclass(frozen=True)
class PerSequence:
    """An argument that has rows for each sequence: ``value`` ``(rows, ...)`` is that of one sequence."""

    value: Tensor

    def for_batch(self, x: Tensor) -> Tensor:
        """``(sequences * rows, ...)`` for a stream ``x`` ``(sequences, length, width)``, in its dtype.

        >>> PerSequence(torch.tensor([1, 2])).for_batch(torch.zeros(2, 3, 4)).tolist()
        [1, 2, 1, 2]
        """
        value = self.value
        if len(value) == 1:
            rows = value.expand(len(x), *value.shape[1:])
        else:
            rows = value.repeat(len(x), *[1] * (value.ndim - 1))
        return rows.to(x.dtype) if rows.is_floating_point() else rows


@dataclass(frozen=True)
class PerText:
    """An argument that depends on the text: ``compute`` makes ``(sequences, ...)`` of ids ``(sequences, length)``."""

    compute: Callable[[Tensor], Tensor]

    def for_batch(self, x: Tensor, digits: Tensor) -> Tensor:
        """That of the sequences whose ids' digits are given, in the dtype of ``x``."""
        value = self.compute(ids_of(digits))
        return value.to(x.dtype) if value.is_floating_point() else value


def for_batch(arguments: Mapping[str, Any], x: Tensor, digits: Tensor) -> dict[str, Any]:
    """A layer's keyword arguments for a stream.

    Args:
        arguments: as recorded.
        x: ``(sequences, length, width)``.
        digits: of its token ids, see ``State``.
    """
    out = dict(arguments)
    for name, value in arguments.items():
        if isinstance(value, PerSequence):
            out[name] = value.for_batch(x)
        elif isinstance(value, PerText):
            out[name] = value.for_batch(x, digits)
    return out


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a layer returns: its output, or the first of a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple | list) else output
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
    """How the recorders behave.

    Attributes:
        outputs: how many values they return in a tuple; 0: the hidden states alone.
        form: of hidden states.
        calls: where they list their calls; ``None``: nowhere.
    """

    outputs: int = 0
    form: Form = ONE_STATE
    calls: list[_Call] | None = None


@dataclass(frozen=True)
class _Call:
    """One call of a layer: its index, its input, its output and its keyword arguments."""

    index: int
    hidden: Tensor
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
        form = self.now.form
        if hidden.shape[form.sequences] == 1:
            self.arguments[hidden.shape[form.tokens]] = arguments
        out = hidden if self.answer is None else self.answer
        if self.now.calls is not None:
            self._compare(hidden)
            self.now.calls.append(_Call(self.index, hidden, out, arguments))
        return as_returned(out, self.now.outputs)

    def _compare(self, hidden: Tensor) -> None:
        """Refuse an input that is not what the layer before gave."""
        assert self.now.calls is not None
        if hidden.ndim < 3:
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
        texts: names of those that depend on the text, by layer.
        streams: what goes into each layer and, at the end, out of the last one.
        learned: whether ``learn`` has run.
    """

    modules: list[_Recorder] = field(default_factory=list)
    rows: list[set[str]] = field(default_factory=list)
    texts: list[set[str]] = field(default_factory=list)
    streams: list[Stream] = field(default_factory=list)
    learned: bool = False
    now: _Pass = field(default_factory=_Pass)
    _forward: Callable[[Tensor], Tensor] = field(default=lambda ids: ids)  # the model's, once ``learn`` has run

    @classmethod
    def of(cls, layers: list[nn.Module]) -> Recorders:
        """A recorder for each layer."""
        now = _Pass()
        modules = [_Recorder(layer, index, now) for index, layer in enumerate(layers)]
        return cls(modules, [set() for _ in layers], [set() for _ in layers], [PLAIN] * (len(layers) + 1), now=now)

    def arguments(self, index: int, length: int) -> dict[str, Any]:
        """What layer ``index`` is called with, for sequences of a ``length`` that the model has seen."""
        recorded, rows = self.modules[index].arguments[length], self.rows[index]
        out = {name: PerSequence(value) if name in rows else value for name, value in recorded.items()}
        return out | {name: PerText(partial(self._given, index, name)) for name in self.texts[index]}

    @torch.no_grad()
    def _given(self, index: int, name: str, ids: Tensor) -> Tensor:
        """What the model gives layer ``index`` under a name for token ids ``(sequences, length)``."""
        value: Tensor = self._calls(self._forward, ids)[index].arguments[name]
        return value

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
        self._forward = forward
        two = self._first_that_runs(forward, torch.cat([ids, (ids + 1) % vocabulary]))
        one = self._calls(forward, ids)
        for first, second, rows, texts in zip(one, two, self.rows, self.texts, strict=True):
            found = _names_by_text(first.arguments, second.arguments, first.index)
            rows |= found[0]
            texts |= found[1]
        other = ids[:, :-1] if ids.shape[1] > 1 else torch.cat([ids, ids], 1)
        passes = one, two, self._calls(forward, other)
        form = form_of(*(calls[0].hidden for calls in passes))
        if form is None:
            raise LowbitError(
                f"layer 0 gets an input of shape {tuple(two[0].hidden.shape)} for 2 sequences of {ids.shape[1]} "
                f"tokens, not (sequences, length, hidden): {ADVICE}"
            )
        self.now.form = form
        handed = self._handed_on(passes)
        self.streams = [Stream(form, any(self.texts), tuple(own)) for own in handed]
        forward(ids)  # recorded by length, which only a stream tells
        self.learned = True

    def _handed_on(self, passes: Sequence[Sequence[_Call]]) -> list[list[Handed]]:
        """What the layers hand on, given the calls for one sequence, for two, and for a shorter one."""
        try:
            given = ([(call.hidden, call.arguments) for call in calls] for calls in passes)
            return handed_on([recorder.layer for recorder in self.modules], *given)
        except LowbitError as error:
            raise LowbitError(f"{error}: {ADVICE}") from error

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


def _names_by_text(one: Mapping[str, Any], two: Mapping[str, Any], layer: int) -> tuple[set[str], set[str]]:
    """Names of the arguments of ``layer`` with rows for each sequence, not broadcast, and names of those of the text.

    Args:
        one: the arguments for a sequence.
        two: those for that sequence and another of the same length.
        layer: its index.

    Raises:
        LowbitError: an argument within a tuple or mapping depends on the text, or one does not have the sequences in
            front.
    """
    names, texts = set(), set()
    for name, value in one.items():
        pairs = list(zip(_tensors(value), _tensors(two.get(name)), strict=False))
        if isinstance(value, Tensor) and pairs and _is_of_text(*pairs[0]):
            texts.add(name)
            continue
        if any(not _same(a, b) and not _doubled(a, b) for a, b in pairs):
            raise LowbitError(
                f"the model gives layer {layer} the argument '{name}', which depends on the text or does not have "
                f"the sequences in front: {ADVICE}"
            )
        if isinstance(value, Tensor) and any(not _same(a, b) for a, b in pairs):
            names.add(name)
        elif any(not _same(a, b) and len(a) > 1 for a, b in pairs):
            raise LowbitError(f"the argument '{name}' of layer {layer} holds tensors with sequences: {ADVICE}")
    return names, texts


def _is_of_text(one: Tensor, two: Tensor) -> bool:
    """Whether an argument has one row for each sequence, and another for another text."""
    fits = one.ndim > 0 and len(one) == 1 and len(two) == 2
    return fits and _same(one, two[:1]) and one.shape == two[1:].shape and not _same(one, two[1:])


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
