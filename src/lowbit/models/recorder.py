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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.models.arguments import ADVICE, PerSequence, PerText, names_by_text, same
from lowbit.models.handed_on import handed_on
from lowbit.models.stream import ONE_STATE, PLAIN, Form, Handed, Stream, form_of


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
        if any(call.index == self.index for call in self.now.calls):
            raise _Unlike(f"the model calls layer {self.index} again after layer {self.now.calls[-1].index}")
        if self.now.calls and not same(hidden, self.now.calls[-1].out):
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
        # A mask may be left out for a length, where causality says all.
        own = {name for name in rows if isinstance(recorded.get(name), Tensor)}
        out = {name: PerSequence(value) if name in own else value for name, value in recorded.items()}
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
            found = names_by_text(first.arguments, second.arguments, first.index)
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
