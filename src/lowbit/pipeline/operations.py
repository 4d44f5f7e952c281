"""How many operations a recipe takes on a layer: the formulas of docs/scale.md.

Products follow from shapes alone and are exact. What elementwise operations read and write is counted in accesses,
for each weight and for each channel of a token; the numbers below are those of torch's dispatcher on the steps
themselves, and a test counts them again.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.distributed.tree import divided, leaves
from lowbit.pipeline.layer_shapes import LayerShape
from lowbit.pipeline.machine import Rates

FLOAT = 4  # bytes of arithmetic on weights
# Accesses for each channel of a token in a forward pass: of what linears read, and of hidden states.
READ, STREAM, QUANTIZED_INPUT = 5, 24, 14
DEQUANTIZE = 5  # accesses for each weight
SENSITIVITY = 100  # accesses for each channel of a token, in each pass of the sensitivity
CALLS = 12  # small operations of a pass for each linear


@dataclass(frozen=True)
class Work:
    """What one process computes; numbers of operations and bytes.

    Attributes:
        products: floating-point operations of products, in the dtype of the blocks.
        factors: of factorisations in float64.
        passes: bytes read and written by elementwise operations.
        calls: operations, each of which takes a while to start.
        sent: bytes that it exchanges with other processes, where there are any.
    """

    products: float = 0.0
    factors: float = 0.0
    passes: float = 0.0
    calls: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.products + other.products,
            self.factors + other.factors,
            self.passes + other.passes,
            self.calls + other.calls,
            self.sent + other.sent,
        )

    def times(self, factor: float) -> Work:
        """So many times the work.

        >>> Work(products=2.0, calls=1.0).times(3).products
        6.0
        """
        return Work(*(factor * own for own in (self.products, self.factors, self.passes, self.calls, self.sent)))

    def seconds(self, rates: Rates, ranks: int = 1) -> float:
        """Its time, with one kind of operation after the other.

        >>> Work(products=4e9, passes=1e9).seconds(Rates(2e9, 1e9, 1e10, 1e-6))
        2.1
        """
        alone = self.products / rates.products + self.factors / rates.factors + self.passes / rates.bandwidth
        return alone + self.calls * rates.call + (self.sent / rates.network if ranks > 1 else 0.0)


NOTHING = Work()


@dataclass(frozen=True)
class Tokens:
    """The calibration data of a run.

    Attributes:
        samples: windows.
        length: tokens of a window.
        value_bytes: of a hidden state.
        batch: windows that go through a block together.
        ranks: processes that share them.
    """

    samples: int
    length: int
    value_bytes: int = FLOAT
    batch: int = 4
    ranks: int = 1

    @property
    def count(self) -> int:
        """Tokens of all windows."""
        return self.samples * self.length

    @property
    def share(self) -> float:
        """The part of the micro-batches that the busiest process takes.

        >>> Tokens(32, 512).share, Tokens(32, 512, ranks=2).share, Tokens(32, 512, ranks=3).share
        (1.0, 0.5, 0.375)
        """
        pieces = -(-self.samples // self.batch)
        return len(divided(pieces, self.ranks)[0]) / pieces

    @property
    def leaf_share(self) -> float:
        """The same of statistics, which are taken over at most eight leaves.

        >>> Tokens(128, 512, ranks=16).share, Tokens(128, 512, ranks=16).leaf_share
        (0.0625, 0.125)
        """
        own = leaves(-(-self.samples // self.batch))
        taken = divided(len(own), self.ranks)[0]
        return sum(len(own[at]) for at in taken) / sum(map(len, own))


def forward(shape: LayerShape, tokens: float, data: Tokens, quantized: bool) -> Work:
    """One pass of a layer over so many tokens, in windows of ``data.length``.

    Products: two for each weight that a token meets, and four for each pair of a query's channel and a key (keys
    behind the query included, whose products are taken and masked).
    """
    products = tokens * (2.0 * shape.active + 4.0 * data.length * shape.attention)
    inputs = sum(r.width * r.count * r.share for r in shape.reads if r.inputs) if quantized else 0.0
    accesses = READ * shape.widths + STREAM * shape.hidden + QUANTIZED_INPUT * inputs
    calls = CALLS * shape.linears * tokens / (data.batch * data.length)
    return Work(products, 0.0, data.value_bytes * accesses * tokens, calls)


def walk(shape: LayerShape, data: Tokens) -> Work:
    """What every recipe takes: a float and a quantized pass, and the sensitivity of every linear on one window."""
    passes = forward(shape, data.count, data, False) + forward(shape, data.count, data, True)
    stream = data.value_bytes * shape.hidden * data.count
    passes = passes.times(data.share) + Work(sent=2.0 * stream)
    batches = -(-data.samples // data.batch)
    weights = FLOAT * DEQUANTIZE * (shape.quantized + shape.expert_weights * batches * data.share)
    quantized = [r for r in shape.reads if r.formats]
    inputs = any(r.inputs for r in quantized)
    # Of an expert only its own linears run again.
    whole = 2 + (2 if inputs else 1) * sum(r.linears for r in quantized if not r.expert)
    again = forward(shape, data.length, data, inputs).times(whole)
    errors = Work(
        passes=FLOAT * SENSITIVITY * shape.hidden * data.length * shape.linears, calls=200.0 * shape.linears
    )
    return passes + Work(passes=weights) + again + errors
