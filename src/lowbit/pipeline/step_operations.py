"""How many operations each step of a recipe takes on a layer: the formulas of docs/scale.md."""

from __future__ import annotations

import math
from collections.abc import Callable

from lowbit.distributed.share import TILE
from lowbit.distributed.tree import divided, leaves
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.awq import AWQ
from lowbit.methods.gptq import GPTQ
from lowbit.methods.inputs import HELD
from lowbit.methods.options import with_options
from lowbit.methods.rtn import RTN
from lowbit.methods.smoothquant import SmoothQuant
from lowbit.methods.training import Schedule
from lowbit.methods.triangular import WIDTH
from lowbit.methods.tune import Tune
from lowbit.pipeline.layer_shapes import LayerShape, Reads
from lowbit.pipeline.operations import FLOAT, Tokens, Work, forward
from lowbit.pipeline.recipe import Step

# Accesses for each weight.
NEAREST, SEARCHED, LEARNED = 13, 28, 64
COLUMN, COLUMN_CALLS, FACTOR_BYTES = 62, 12, 240  # of GPTQ: beside its rank-one updates; of a second moment
SMOOTHED = 9  # for each weight that a diagonal scales
STATISTIC = 8  # for each channel of a token
FIT_CALLS = 190  # small operations of a learned step for each linear
HEADS = 0.7  # of a weight's products with a map of a head's width


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
    """Ranks divide experts among them, where there are enough, or a weight's rows; a factor of their own each has."""
    assert isinstance(step, GPTQ)
    work = _stages(shape, data) + _grams(shape, data)
    for group in shape.reads:
        experts = group.count >= data.ranks
        count = _busiest(group.count, data.ranks) if experts else group.count
        for _, _, rows in group.formats:
            own = rows if experts else min(rows, TILE * _busiest(max(1, rows // TILE), data.ranks) + rows % TILE)
            update = 4 * min(step.block_size, group.width) / 128  # accesses: half a block, by column
            per_weight = FLOAT * (32 * update + COLUMN)
            products = float(own * group.width**2)
            columns = Work(products, 0.0, per_weight * group.width * own, COLUMN_CALLS * group.width)
            work += columns.times(count) + Work(sent=float(rows * group.width * group.count))
        if group.formats:
            factor = Work(0.0, _factor(group.width), FACTOR_BYTES * group.width**2, 30)
            work += factor.times(count)
    return work


def _busiest(items: int, ranks: int) -> int:
    """How many of some items the rank with the most takes.

    >>> _busiest(10, 4), _busiest(3, 4)
    (3, 1)
    """
    return max(map(len, divided(items, ranks)))


def _factor(width: int) -> float:
    """Operations of the factor of a Hessian's inverse: Cholesky's and a triangular inverse by blocks of columns.

    >>> _factor(3), round(_factor(512) / 512**3, 3)
    (36.0, 0.958)
    """
    blocks = (range(start, min(start + WIDTH, width)) for start in range(0, width, WIDTH))
    return width**3 / 3 + sum(len(own) * own.stop**2 for own in blocks)


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
    passes = FLOAT * SMOOTHED * shape.quantized
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
