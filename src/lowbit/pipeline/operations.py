"""How many operations a recipe takes on a layer: the formulas of docs/scale.md.

Products of hidden states follow from shapes alone and are exact. What elementwise operations read and write is counted
in accesses for each weight, and for each channel of a token; the numbers below were counted with torch's dispatcher
on the steps themselves, and a test counts them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lowbit.distributed.tree import divided, leaves
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.awq import AWQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.inputs import HELD
from lowbit.methods.options import with_options
from lowbit.methods.rtn import RTN
from lowbit.methods.smoothquant import SmoothQuant
from lowbit.methods.training import Schedule
from lowbit.methods.tune import Tune
from lowbit.pipeline.layer_shapes import LayerShape, Reads
from lowbit.pipeline.machine import Rates
from lowbit.pipeline.recipe import Step

FLOAT = 4  # bytes of arithmetic on weights
# Accesses for each channel of a token in a forward pass: of what linears read, and of hidden states.
READ, STREAM, QUANTIZED_INPUT, STATISTIC = 5, 24, 14, 8
# Accesses for each weight.
DEQUANTIZE, NEAREST, SEARCHED, LEARNED = 5, 18, 28, 64
COLUMN, COLUMN_CALLS, FACTOR_BYTES = 62, 12, 240  # of GPTQ: beside its rank-one updates; of a second moment
SENSITIVITY = 100  # accesses for each channel of a token, in each pass of the sensitivity
FIT_CALLS, CALLS = 190, 12  # small operations for each linear: of a learned step, of a pass
HEADS = 0.7  # of a weight's products with a map of a head's width


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


def _grams(shape: LayerShape, data: Tokens) -> Work:
    """Second moments of what quantized linears read."""
    groups = [r for r in shape.reads if r.formats]
    products = sum(2.0 * data.count * r.share * r.count * r.width**2 for r in groups)
    passes = data.value_bytes * STATISTIC * data.count * sum(r.share * r.count * r.width for r in groups)
    sent = FLOAT * sum(r.count * r.width**2 for r in groups)
    return Work(products, 0.0, passes).times(data.leaf_share) + Work(sent=sent)


def _stages(shape: LayerShape, data: Tokens) -> Work:
    """Passes that end at the last input that is asked for: one for each tensor that quantized linears read.

    Experts' moments are held as many at once as ``HELD`` bytes allow, and each part of them takes a pass.
    """
    before, total = 0.0, 0.0
    for group in shape.reads:
        if group.formats:
            total += before * _parts(group)
        before += group.active
    share = total / shape.active if shape.active else 0.0
    return forward(shape, data.count, data, True).times(share * data.leaf_share)


def _parts(group: Reads) -> int:
    held = max(1, HELD // (FLOAT * group.width**2))
    return math.ceil(group.count / held)


def _gptq(step: Step, shape: LayerShape, data: Tokens) -> Work:
    assert isinstance(step, GPTQ)
    work = _stages(shape, data) + _grams(shape, data)
    for group in shape.reads:
        for _, _, rows in group.formats:
            size = group.width * rows
            update = (
                4 * min(step.block_size, group.width) / 128
            )  # accesses: half a block, read and written, by column
            per_weight = FLOAT * (32 * update + COLUMN)
            calls = COLUMN_CALLS * group.width
            columns = Work(float(size * group.width), 0.0, per_weight * size, calls)
            work += columns.times(group.count)
        if group.formats:
            factor = Work(0.0, group.width**3 * 4 / 3, FACTOR_BYTES * group.width**2, 30)
            work += factor.times(group.count)
    return work


def _awq(step: Step, shape: LayerShape, data: Tokens) -> Work:
    assert isinstance(step, AWQ)
    ratios = int((1 - step.clip_least) * step.clip_grid + 1e-9) + 1 if step.clip else 0
    whole = forward(shape, data.count, data, False).times(0.75 * (2 if step.clip else 1) * data.leaf_share)
    work = whole + _grams(shape, data).times(2 if step.clip else 1)
    for group in shape.reads:
        for _, size, rows in group.formats:
            weights = group.width * rows * group.count
            scales = 2.0 * step.grid * weights * group.width
            clips = 2.0 * ratios * weights * (size or group.width)
            passes = FLOAT * SEARCHED * (step.grid + ratios) * weights
            work += Work(scales + clips, 0.0, passes, 40.0 * group.count * (step.grid + ratios))
    return work


def _smoothquant(step: Step, shape: LayerShape, data: Tokens) -> Work:
    passes = FLOAT * NEAREST / 2 * shape.quantized
    return forward(shape, data.count, data, False).times(data.leaf_share) + Work(passes=passes)


def _rtn(step: Step, shape: LayerShape, data: Tokens) -> Work:
    assert isinstance(step, RTN)
    tries = 8 if step.search else 1
    observed = forward(shape, data.count, data, True).times(step.passes * data.leaf_share)
    return observed + Work(passes=FLOAT * NEAREST * tries * shape.quantized, calls=24.0 * shape.linears * tries)


def learned_steps(schedule: Schedule, data: Tokens) -> tuple[float, float]:
    """Micro-batches that the busiest process computes in a fit, and windows that it validates on.

    >>> learned_steps(Schedule(2, batch=4, micro_batch=1), Tokens(16, 256, ranks=2))  # 14 windows of 16
    (16.0, 6.0)
    """
    train, held = schedule.split(data.samples)
    windows = schedule.per_epoch(len(train))
    steps = -(-windows // schedule.batch)
    if schedule.micro_batch:
        pieces = leaves(-(-schedule.batch // schedule.micro_batch))
        own = sum(len(pieces[at]) for at in divided(len(pieces), data.ranks)[0])
    else:
        own = 1
    batches = -(-len(held) // max(schedule.batch, 4)) if len(held) else 0
    validated = len(divided(batches, data.ranks)[0]) * max(schedule.batch, 4) if batches else 0
    return float(schedule.epochs * steps * own), (schedule.epochs + 1.0) * min(validated, len(held))


def fit_step(shape: LayerShape, windows: float, data: Tokens) -> Work:
    """Forward and backward of a learned step on so many windows: three passes, and the weights' quantization."""
    tokens = forward(shape, windows * data.length, data, True).times(3.0)
    maps = 2.0 * HEADS * shape.quantized * shape.head
    return tokens + Work(maps, 0.0, FLOAT * LEARNED * shape.quantized, FIT_CALLS * shape.linears)


def _affinequant(step: Step, shape: LayerShape, data: Tokens) -> Work:
    assert isinstance(step, AffineQuant)
    schedule = step.schedule
    start = forward(shape, data.count, data, True).times(2 * data.leaf_share)
    if not schedule.epochs:
        return start
    pieces, validated = learned_steps(schedule, data)
    windows = min(schedule.micro_batch or schedule.batch, schedule.batch)
    checked = forward(shape, validated * data.length, data, True)
    rounds = schedule.epochs * FLOAT * NEAREST * shape.quantized
    return start + fit_step(shape, windows, data).times(pieces) + checked + Work(passes=rounds)


def _passes_alone(step: Step, shape: LayerShape, data: Tokens) -> Work:
    whole = forward(shape, data.count, data, True)
    if step.schedule is None or not step.schedule.epochs:
        return whole.times(step.passes * data.leaf_share)
    before = with_options(step, epochs=0).passes
    learned = (step.passes - before) * step.schedule.per_epoch(data.samples) / data.samples
    return whole.times(before * data.leaf_share + learned * (data.leaf_share if step.schedule.micro_batch else 1.0))


COUNTED: dict[type[Step], Callable[[Step, LayerShape, Tokens], Work]] = {
    GPTQ: _gptq,
    AWQ: _awq,
    SmoothQuant: _smoothquant,
    RTN: _rtn,
    AffineQuant: _affinequant,
    Tune: _passes_alone,
}


def is_counted(step: Step) -> bool:
    """Whether all that takes long in a step is counted, and not its passes alone."""
    if isinstance(step, AffineQuant):
        return not (step.sites.matrix_behind_norm or step.sites.mixes)
    return type(step) in COUNTED and not isinstance(step, Tune)


def step_work(step: Step, shape: LayerShape, data: Tokens) -> Work:
    """What a step of a recipe takes on a layer; of one that is not in ``COUNTED`` its passes alone."""
    return COUNTED.get(type(step), _passes_alone)(step, shape, data)
