"""What the recorders find out of how a model calls its layers, and which models they refuse."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowbit.errors import LowbitError
from lowbit.models.architecture import LayerKind
from lowbit.models.arguments import PerSequence, PerText, for_batch
from lowbit.models.block import Block
from lowbit.models.forward import run
from lowbit.models.recorder import Recorders
from lowbit.models.stream import Form, Handed, State, Stream, digits_of

IDS = torch.tensor([[3, 1, 4, 1, 5]])
VOCABULARY, HIDDEN, HEADS = 8, 4, 2


class Layer(nn.Module):
    """A layer whose arguments have names, a default and others behind them."""

    sort = "full"

    def forward(self, states: Tensor, bias: Tensor | None = None, scale: float = 1.0, **more: object) -> Tensor:
        return states


class Model(nn.Module):
    """Two layers; ``call(recorder, x, ids, index)`` is how it calls one."""

    def __init__(self, call, again=1):
        super().__init__()
        self.table = torch.randn(VOCABULARY, HIDDEN, generator=torch.Generator().manual_seed(0))
        self.recorders = Recorders.of([Layer(), Layer()])
        self.call, self.again = call, again

    def forward(self, ids):
        x = self.table[ids]
        for _ in range(self.again):
            for index, layer in enumerate(self.recorders.modules):
                x = self.call(layer, x, ids, index)
        return x[..., -1:, :]

    def learn(self):
        self.recorders.learn(self, IDS, VOCABULARY)
        return self.recorders


def biases(ids):
    """A bias for each head and position, sequence by sequence: ``(sequences * heads, 1, length)``."""
    return torch.arange(HEADS * ids.shape[1]).float().reshape(HEADS, 1, -1).repeat(len(ids), 1, 1)


def test_arguments_are_recorded_by_name_however_they_are_given():
    recorders = Model(lambda layer, x, ids, index: layer(x, None, index + 0.5, kind=layer.sort)).learn()
    assert [recorders.arguments(i, 5) for i in range(2)] == [
        {"bias": None, "scale": 0.5, "kind": "full"},
        {"bias": None, "scale": 1.5, "kind": "full"},
    ]
    named = Model(lambda layer, x, ids, index: layer(scale=2.0, states=x)).learn()
    assert named.arguments(1, 5) == {"scale": 2.0}
    named.forget()
    with pytest.raises(KeyError):
        named.arguments(1, 5)


def test_layers_that_return_tuples_are_told_from_those_that_return_tensors():
    assert Model(lambda layer, x, ids, index: layer(x)[0], 1).learn().now.outputs == 1
    assert Model(lambda layer, x, ids, index: layer(x)).learn().now.outputs == 0


def test_layers_that_return_more_than_hidden_states_are_told_by_how_many_values_the_model_takes():
    def call(layer, x, ids, index):
        hidden, _ = layer(x)
        return hidden

    assert Model(call).learn().now.outputs == 2


def test_an_argument_with_rows_for_each_sequence_grows_with_the_batch_and_a_mask_does_not():
    mask = torch.ones(1, 1, 5, 5).tril()

    def call(layer, x, ids, index):
        return layer(x, biases(ids), mask=mask.expand(len(ids), -1, -1, -1), order=torch.arange(5))

    arguments = Model(call).learn().arguments(0, 5)
    assert isinstance(arguments["bias"], PerSequence)
    for sequences in (1, 3):
        x = torch.zeros(sequences, 5, HIDDEN, dtype=torch.float64)
        given = for_batch(arguments, x, x[..., :0])
        assert torch.equal(given["bias"], biases(torch.zeros(sequences, 5)).double())
        assert torch.equal(given["mask"], mask.double().expand(sequences, -1, -1, -1))
        assert torch.equal(given["order"], torch.arange(5))


def test_an_argument_of_the_text_is_made_anew_of_the_ids_of_the_sequences_that_run():
    def call(layer, x, ids, index):
        return layer(x, looked_up=index + ids[..., None] ** 2.0)

    recorders = Model(call).learn()
    assert recorders.streams == [Stream(ids=True)] * 3
    arguments = recorders.arguments(1, 5)
    assert isinstance(arguments["looked_up"], PerText)
    ids = torch.tensor([[2, 7, 1, 6, 0], [3, 1, 4, 1, 5], [5, 5, 2, 0, 7]])
    x = recorders.streams[1].pack(State(torch.zeros(3, 5, HIDDEN), digits_of(ids)))
    chosen = x[torch.tensor([2, 0])].half()  # sequences in another order, in another dtype
    given = for_batch(arguments, chosen, recorders.streams[1].unpack(chosen).digits)["looked_up"]
    assert torch.equal(given, 1 + ids[[2, 0], :, None].half() ** 2)


def test_hidden_states_that_are_stacked_in_front_of_the_sequences_are_one_tensor_by_sequence():
    def call(layer, x, ids, index):
        x = torch.stack([x, 2 * x, 3 * x]) if not index else x
        x = layer(x)
        return x.sum(0) if index else x

    stream = Model(call).learn().streams[1]
    assert stream == Stream(Form(sequences=1, tokens=2, shape=(3,)))
    hidden = torch.randn(3, 2, 5, HIDDEN)
    packed = stream.pack(State(hidden, digits_of(torch.zeros(2, 5).long())))
    assert packed.shape == (2, 5, 3 * HIDDEN)
    assert torch.equal(packed[1, 4, HIDDEN : 2 * HIDDEN], hidden[1, 1, 4])
    assert torch.equal(stream.unpack(packed).hidden, hidden)


REFUSED = {
    "changes": (lambda layer, x, ids, index: layer(x) * 2, "changes the hidden states between layers 0 and 1"),
    "flattens": (lambda layer, x, ids, index: layer(x.flatten(0, 1)), "layer 0 gets an input of shape (10, 4), not"),
    "reads": (
        lambda layer, x, ids, index: layer(x, more=(ids.float(),)),
        "gives layer 0 the argument 'more', which depends on the text",
    ),
    "stacks": (
        lambda layer, x, ids, index: layer(x, torch.zeros(3, len(ids), 5)),
        "gives layer 0 the argument 'bias', which depends on the text or does not have the sequences in front",
    ),
    "nests": (
        lambda layer, x, ids, index: layer(x, more={"biases": biases(ids)}),
        "the argument 'more' of layer 0 holds tensors with sequences",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
def test_a_model_that_does_anything_else_is_refused_by_what_it_does(call, message):
    with pytest.raises(LowbitError) as error:
        Model(call).learn()
    assert message in str(error.value)
    assert "choose another model" in str(error.value)


def test_a_model_that_calls_its_layers_again_is_refused():
    with pytest.raises(LowbitError, match="calls layer 0 again after layer 1"):
        Model(lambda layer, x, ids, index: layer(x), again=2).learn()


class Hands(nn.Module):
    """A layer that hands its input, by head, to later ones, or adds that of an earlier one to its own."""

    def __init__(self, reads: bool = False, form: str = "heads") -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(HIDDEN, device="meta"))
        self.reads, self.form = reads, form

    def forward(self, x: Tensor, shared: dict[str, tuple[Tensor, ...]] | None = None) -> Tensor:
        assert shared is not None
        if self.reads:
            (other,) = shared["full"]
            return x * self.gain + (other.transpose(1, 2).flatten(2) if other.ndim == 4 else other.sum())
        heads = (x * self.gain).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        shared["full"] = (heads,) if self.form == "heads" else (heads.sum((1, 2)),)
        shared["unread"] = (heads,)
        return x


class HandingModel(Model):
    """Its layers share one mapping, which is empty at first."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(None)
        self.recorders = Recorders.of(list(layers))

    def forward(self, ids):
        x, shared = self.table[ids], {}
        for layer in self.recorders.modules:
            x = layer(x, shared=shared)
        return x[..., -1:, :]


def test_what_a_layer_hands_to_later_ones_is_in_the_stream_up_to_the_last_that_reads_it():
    layers = [Hands(), Layer3(), Hands(reads=True), Layer3()]
    recorders = HandingModel(*layers).learn()
    own = Handed("shared", "full", (Form(0, 2, (HEADS,)),), (HIDDEN,))
    assert [stream.handed for stream in recorders.streams] == [(), (own,), (own,), (), ()]
    gains = torch.randn(4, HIDDEN)
    params = {f"{index}.gain": gains[index] for index in (0, 2)}
    kinds = (LayerKind((), (), attention=None),) * 4
    kwargs = tuple(recorders.arguments(index, 5) for index in range(4))
    block = Block(tuple(layers), 0, kwargs, kinds, "model.layers", params, streams=tuple(recorders.streams))
    x = torch.randn(3, 5, HIDDEN)
    wanted = x * gains[2] + x * gains[0]
    assert torch.equal(run(block, x), wanted)
    for index in range(4):  # one by one, with other sequences than the recorded one
        x = run(block.part(index, index + 1), x)
        assert x.shape[-1] == (2 * HIDDEN if index < 2 else HIDDEN)
    assert torch.equal(x, wanted)
    assert kwargs[0]["shared"] == {}


class Layer3(nn.Module):
    """A layer that does nothing with what others hand on."""

    def forward(self, x: Tensor, shared: object = None) -> Tensor:
        return x


def test_what_has_no_sequences_and_tokens_cannot_be_handed_on():
    with pytest.raises(LowbitError, match="layer 0 hands 'shared' to later layers in a form without sequences"):
        HandingModel(Hands(form="sum"), Hands(reads=True)).learn()
