"""How much memory a rank takes, on its host and on its device: the formulas of docs/scale.md.

A run holds embeddings and head, one window of blocks and the hidden states. Where blocks run on a device of their
own, hidden states stay on the host, in pinned buffers, whose sizes are powers of two; without one, all is the host's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from lowbit.distributed.tree import PARTIAL_SUMS
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.gptq import GPTQ
from lowbit.methods.inputs import HELD
from lowbit.methods.rounding import Rounding
from lowbit.methods.tune import Tune
from lowbit.pipeline.layer_shapes import LayerShape
from lowbit.pipeline.machine import Machine
from lowbit.pipeline.operations import FLOAT, Tokens
from lowbit.pipeline.recipe import Recipe, Step

PROCESS, CONTEXT = 450_000_000, 600_000_000  # Python, torch and transformers; a device's own context
LEAF_COPIES = 6  # of a learned parameter: value, best value, gradient, Adam's two moments and step counts
MOMENTS = 52  # bytes for each second moment while it is inverted in float64
COLUMNS = 26  # bytes for each weight of the linears whose columns are quantized together
LEARNED_COPIES = 12  # of a window's weights: folded, quantized, and what a backward pass reads, beside the weights
OTHER_COPIES = 2.5  # of any other step: what it moves, codes, dequantized weights
LOGITS = 6  # copies of a window's logits in end-to-end tuning

Place = Literal["host", "device"]


@dataclass(frozen=True)
class Item:
    """Something that is held while a run has its peak.

    Attributes:
        what: what it is, for people.
        place: whose memory it takes; without a device of its own all of a rank is the host's.
        size: its bytes.
    """

    what: str
    place: Place
    size: int


@dataclass(frozen=True)
class Needs:
    """What a rank holds at its peak."""

    items: tuple[Item, ...]

    def of(self, place: Place) -> int:
        """Bytes on the host or on the device.

        >>> Needs((Item("states", "host", 5), Item("block", "device", 7))).of("device")
        7
        """
        return sum(item.size for item in self.items if item.place == place)


def needs_of(
    shapes: Iterable[LayerShape], recipe: Recipe, data: Tokens, machine: Machine, shared: int, vocabulary: int
) -> Needs:
    """What the rank that takes the most windows holds; hidden states alone are divided.

    Args:
        shapes: of the model's layers.
        recipe: its steps.
        data: the calibration windows.
        machine: where a rank runs.
        shared: parameters of embeddings, norms and head.
        vocabulary: rows of the head.
    """
    layers = list(shapes)
    place: Place = "device" if machine.has_device else "host"
    hidden, value = layers[0].hidden, machine.value_bytes
    stream = math.ceil(data.count * data.share) * hidden * value
    # x_fp and x_q with their successors; a step that runs a window block by block has four more, one of them shared
    # with the window.
    streams = 7 if recipe.window > 1 else 4
    states = streams * (power_of_two(stream) if machine.has_device else stream)
    largest = max(layers, key=lambda shape: shape.weights)
    # Read as stored and made float32, then on the device in its dtype; on a host both are there while it fills.
    items = [
        Item("process", "host", PROCESS),
        Item("hidden states", "host", states),
        Item("embeddings and head", place, shared * (value if machine.has_device else 2 * FLOAT)),
        Item("weights of a window of blocks", place, FLOAT * largest.weights * recipe.window),
        Item("activations", place, _activations(layers, data)),
    ]
    if machine.has_device:
        items.append(Item("context", "device", CONTEXT))
        items.append(Item("weights being read", "host", max(shared * FLOAT, FLOAT * largest.weights)))
        items.append(
            Item("weights in the dtype of activations", "device", value * largest.weights if value < 4 else 0)
        )
    worst = max((_of_step(step, layers, data, recipe.window) for _, step in recipe.block_steps), key=lambda i: i.size)
    items.append(Item(worst.what, place, worst.size))
    if recipe.tune is not None:
        items.append(Item("end-to-end tuning", place, _tuned(recipe.tune, layers, data, vocabulary)))
    return Needs(tuple(item for item in items if item.size))


def power_of_two(size: int) -> int:
    """The smallest power of two that is no smaller: the size of a pinned buffer.

    >>> power_of_two(5), power_of_two(8)
    (8, 8)
    """
    return 1 << (size - 1).bit_length() if size > 1 else 1


def _activations(layers: list[LayerShape], data: Tokens) -> int:
    """Of a micro-batch in a pass without gradients: a few tensors of the widest kind are there at a time."""
    widest = max(max(group.width, group.rows) for shape in layers for group in shape.reads)
    return data.batch * data.length * widest * data.value_bytes * 4


def _of_step(step: Step, layers: list[LayerShape], data: Tokens, window: int) -> Item:
    name = type(step).__name__.lower()
    return Item(name, "host", max(_step_bytes(step, shape, data, window) for shape in layers))


def _step_bytes(step: Step, shape: LayerShape, data: Tokens, window: int) -> int:
    weights = FLOAT * shape.weights * window
    if isinstance(step, GPTQ):
        square, held = shape.widest**2, PARTIAL_SUMS - 1
        groups = max((group.count for group in shape.reads if group.width == shape.widest), default=1)
        moments = held * max(square * FLOAT, min(groups * square * FLOAT, HELD)) + MOMENTS * square
        columns = max(group.width * sum(rows for _, _, rows in group.formats) for group in shape.reads)
        dense = FLOAT * (shape.weights - shape.expert_weights)
        return moments + COLUMNS * columns + dense + shape.weights  # and a byte for each code
    if isinstance(step, AffineQuant) and step.schedule.epochs:
        windows = step.schedule.micro_batch or step.schedule.batch
        tokens = windows * data.length * data.value_bytes
        return LEARNED_COPIES * weights + int(tokens * (24 * shape.hidden + 10 * shape.widths)) * window
    if isinstance(step, Rounding):
        return weights * (1 + step.options.copies)
    return int(OTHER_COPIES * weights)


def _tuned(step: Tune, layers: list[LayerShape], data: Tokens, vocabulary: int) -> int:
    pairs = [
        (rows, group.width) for shape in layers for group in shape.reads for _, _, rows in group.formats * group.count
    ]
    return FLOAT * (step.parameter_count(pairs) * LEAF_COPIES + LOGITS * data.length * vocabulary)
