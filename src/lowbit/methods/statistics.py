"""Statistics of calibration data: sums, maxima and samples over tokens, accumulated while a block runs.

One accumulator, ``Statistics``, holds the requested figures. Each figure defines its value on some tokens and how two
partial values merge: micro-batches are shared between processes and merged in the order of ``distributed.tree``, so
that any number of processes gives the same figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowbit.distributed.exchange import total
from lowbit.distributed.tree import Node, Tree, leaves, own_part, sequences_of
from lowbit.distributed.world import here
from lowbit.errors import LowbitError
from lowbit.methods.cold import is_cold
from lowbit.methods.inputs import input_groups
from lowbit.models.block import Block, Calib
from lowbit.models.forward import observe, routing_of
from lowbit.models.linear_input import Tap
from lowbit.models.offload import batches
from lowbit.models.shard import States


def _sum(total: Tensor, part: Tensor) -> Tensor:
    """In place in ``total``, without allocating a third matrix."""
    return total.add_(part)


def _cat(total: Tensor, part: Tensor) -> Tensor:
    return torch.cat([total, part])


def _normalized(rows: Tensor) -> Tensor:
    """Per-token normalized rows (divided by their root mean square): massive activations do not dominate."""
    return rows / _rms(rows)


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)


def _gram(rows: Tensor) -> Tensor:
    return rows.T @ rows


Merge = Callable[[Tensor, Tensor], Tensor]
# For rows ``x`` (tokens, in): the figure on a part of the tokens, and how two partial figures merge.
FIGURES: dict[str, tuple[Callable[[Tensor], Tensor], Merge]] = {
    # sum x x^T (in, in)
    "gram": (lambda x: _gram(x), _sum),
    # the same over per-token normalized rows
    "normalized_gram": (lambda x: _gram(_normalized(x)), _sum),
    # sum (x / rms(x))^2 (in,)
    "normalized_square": (lambda x: _normalized(x).square().sum(0), _sum),
    # sum x^2 (in,)
    "square": (lambda x: x.square().sum(0), _sum),
    # sum |x| (in,)
    "magnitude": (lambda x: x.abs().sum(0), _sum),
    # max |x| (in,)
    "peak": (lambda x: x.abs().amax(0), torch.maximum),
    # min x, max x (in,)
    "low": (lambda x: x.amin(0), torch.minimum),
    "high": (lambda x: x.amax(0), torch.maximum),
    # sum (|x| / rms(x))^8 (in,): how often, and how far, a channel stands out in its token. The eighth root of the
    # mean lies between a mean and a maximum, and no single token determines it.
    "crest": (lambda x: _normalized(x).pow(8).sum(0), _sum),
    # the tokens themselves, subsampled by ``every``
    "tokens": (lambda x: x.clone(), _cat),
}
# For rows ``x_q`` of the quantized model's input and ``x`` of the float model's (tokens, in), at the same tokens.
PAIRED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # sum x x_q^T (in, in)
    "cross": lambda x_q, x: x.T @ x_q,
    # the same with both divided by the root mean square of x_q, per token
    "normalized_cross": lambda x_q, x: (x / _rms(x_q)).T @ _normalized(x_q),
}


@dataclass
class Statistics:
    """Figures over tokens of a linear's input; see ``FIGURES`` and ``PAIRED``.

    Attributes:
        want: names of the figures.
        every: use one token in ``every``, evenly spread; see ``stride_for``.
        values: the figures so far, in float32.
        count: number of tokens used.
        given: number of tokens, with those in between.
        first: place of the first of them among all tokens, of which one in ``every`` is used.

    >>> seen = Statistics(("magnitude", "peak"))
    >>> seen.add(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    >>> seen["magnitude"].tolist(), seen["peak"].tolist(), seen.count
    ([4.0, 2.0], [3.0, 2.0], 2)
    """

    want: tuple[str, ...]
    every: int = 1
    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0
    given: int = 0
    first: int = 0

    def __getitem__(self, name: str) -> Tensor:
        """One figure; needs at least one token, which experts may not have."""
        return self.values[name]

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Accumulate ``x`` ``(..., in)`` of any dtype; ``exact`` is the float model's input, for paired figures."""
        chosen = slice((self.every // 2 - self.first - self.given) % self.every, None, self.every)
        self.given += x.shape[:-1].numel()
        rows = x.detach().flatten(0, -2)[chosen].float()
        if not len(rows):
            return
        exact_rows = None if exact is None else exact.detach().flatten(0, -2)[chosen].float()
        for name in self.want:
            if name in FIGURES:
                self._merge(name, FIGURES[name][0](rows))
            else:
                assert exact_rows is not None, f"{name} needs the float model's input"
                self._merge(name, PAIRED[name](rows, exact_rows))
        self.count += len(rows)

    def merge(self, other: Statistics) -> None:
        """Merge the statistics of other tokens."""
        for name, value in other.values.items():
            self._merge(name, value if name in self.values else value.clone())
        self.count += other.count
        self.given += other.given

    def _merge(self, name: str, value: Tensor) -> None:
        merge = FIGURES[name][1] if name in FIGURES else _sum
        self.values[name] = merge(self.values[name].to(value.device), value) if name in self.values else value


def stride_for(shape: Sequence[int], tokens: int) -> int:
    """The distance of about ``tokens`` tokens that are evenly spread over windows ``(sequences, length)``.

    It has no divisor in common with the length, so that the tokens are of all positions alike. With 32, every 16th
    position of a window would be seen, among them the first in each, which is often massive.

    >>> stride_for((128, 512), 2048), stride_for((128, 512), 100_000)
    (31, 1)
    """
    wanted = -(-math.prod(shape) // tokens)
    near = sorted(range(1, 2 * wanted + 1), key=lambda stride: abs(stride - wanted))
    return next(stride for stride in near if math.gcd(stride, shape[-1]) == 1)  # 1 is among them


def input_statistics(
    block: Block,
    x: States,
    linears: Iterable[str],
    want: tuple[str, ...],
    params: Mapping[str, Tensor] | None = None,
    *,
    quantized: bool = False,
    batch: int = 4,
    every: int = 1,
) -> dict[str, Statistics]:
    """Statistics of the named linears' inputs of ``block`` over ``x``; for other arguments see ``observe``."""
    names = list(linears)

    def of_leaf(part: slice) -> dict[str, Statistics]:
        before = range(len(x))[part].start * x.shape[1]
        seen = {name: Statistics(want, every, first=before) for name in names}
        taps = {name: stats.add for name, stats in seen.items()}
        observe(block, x[part], taps, params, quantized=quantized, batch=batch)
        return seen

    return over_leaves(len(x), batch, of_leaf)


def over_leaves(
    sequences: int, micro_batch: int, of_leaf: Callable[[slice], dict[str, Statistics]]
) -> dict[str, Statistics]:
    """The statistics of all sequences, of which each process takes some leaves of ``distributed.tree``.

    Args:
        sequences: their number, at least one.
        micro_batch: sequences of a micro-batch.
        of_leaf: the statistics of some consecutive sequences, by name.
    """
    parts = leaves(-(-sequences // micro_batch))
    tree = Tree(_merged)
    for number in own_part(len(parts), here().rank, here().size):
        tree.add(Node(number, 1, of_leaf(sequences_of(parts[number], micro_batch))))
    merged = total(tree, _packed, _unpacked)
    assert merged is not None, "there are no sequences"
    return merged


def everyones(seen: Mapping[str, Statistics]) -> dict[str, Statistics]:
    """Statistics of which every process has a part, merged in the order of processes: for figures without sums."""
    tree = Tree(_merged)
    tree.add(Node(2 * here().rank + 1, 1, dict(seen)))  # odd numbers have no other half
    merged = total(tree, _packed, _unpacked)
    assert merged is not None
    return merged


def _merged(left: dict[str, Statistics], right: dict[str, Statistics]) -> dict[str, Statistics]:
    """Statistics of neighbours, in ``left``."""
    for name, stats in right.items():
        left[name].merge(stats)
    return left


def _packed(seen: dict[str, Statistics]) -> tuple[Any, list[Tensor]]:
    """Statistics as plain data and tensors."""
    data = [[name, own.want, own.every, own.count, own.given, list(own.values)] for name, own in seen.items()]
    return data, [value for own in seen.values() for value in own.values.values()]


def _unpacked(data: Any, tensors: list[Tensor]) -> dict[str, Statistics]:
    values = iter(tensors)
    return {
        name: Statistics(tuple(want), every, {figure: next(values) for figure in figures}, count, given)
        for name, want, every, count, given, figures in data
    }


def paired_statistics(
    quantized: Block, exact: Block, calib: Calib, linears: Sequence[str], want: tuple[str, ...]
) -> dict[str, Statistics]:
    """Statistics of linears' inputs in the quantized model, paired with the float model's at the same tokens.

    Two models may send a token to different experts: an expert's input in the float model is what it would read of
    the tokens that reach it in the quantized one.

    Args:
        quantized: the block with quantized weights up to the linears.
        exact: the block of the float model.
        calib: the hidden states before the block.
        linears: their names.
        want: names of figures.
    """
    params = quantized.quantized_params()
    routed = {name: _router_tap(quantized, name) for name in linears if quantized.expert_of(name) is not None}
    ours, theirs = quantized, exact
    if routed:
        ours, theirs = replace(quantized, every_token=True), replace(exact, every_token=True)
    chosen: dict[str, Tensor] = {}

    def keep(inputs: dict[str, Tensor], name: str, value: Tensor) -> None:
        expert = quantized.expert_of(name)
        if expert is not None and not quantized.every_token:
            value = value[chosen[routed[name]].eq(expert).any(1)]
        inputs[name] = value

    def of_leaf(part: slice) -> dict[str, Statistics]:
        seen = {name: Statistics(want) for name in linears}
        inputs_by_batch = (batches(x[part], calib.batch, exact.device) for x in (calib.x_q, calib.x_fp))
        for x_q, x_fp in zip(*inputs_by_batch, strict=True):
            inputs: dict[str, Tensor] = {}
            wanted: dict[str, Tensor] = {}
            # An experts module shows its routing before the inputs of its linears.
            taps: dict[str, Tap] = {name: partial(chosen.__setitem__, name) for name in routed.values()}
            taps |= {name: partial(keep, inputs, name) for name in linears}
            observe(ours, x_q, taps, params, quantized=True, batch=calib.batch)
            observe(theirs, x_fp, {name: partial(keep, wanted, name) for name in linears}, batch=calib.batch)
            for name in linears:
                seen[name].add(inputs[name], wanted[name])
        return seen

    return over_leaves(len(calib.x_q), calib.batch, of_leaf)


def _router_tap(block: Block, linear: str) -> str:
    """The name under which ``forward.run`` shows which experts each token of a layer is sent to."""
    experts = block.kind_of(linear).experts
    if experts is None or experts.own_code:
        raise LowbitError(
            f"{block.full_name(linear)} is an expert that code of the model's own runs, and its inputs in two "
            "models cannot be paired token by token: choose a recipe without refit, and gptq.target=weights"
        )
    return routing_of(f"{linear.partition('.')[0]}.{experts.module}")


def column_importance(
    block: Block, calib: Calib, linears: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, int]]:
    """Mean squares of the columns of each linear's quantized input ``(in,)``, by linear.

    They are over tokens that are divided by their root mean square, so that a few massive ones do not dominate.

    Returns:
        The mean squares, and the tokens of linears that have none since too few reach their expert.
    """
    groups = [group for group in input_groups(block) if not set(group).isdisjoint(linears)]
    if not groups:
        return {}, {}
    readers = [group[0] for group in groups]
    seen = input_statistics(block, calib.x_q, readers, ("normalized_square",), quantized=True, batch=calib.batch)
    cold = {name: seen[name].count for name in readers if is_cold(block, name, seen[name].count)}
    warm = [(group, seen[group[0]]) for group in groups if group[0] not in cold]
    means = {group: stats["normalized_square"] / stats.count for group, stats in warm}
    return {name: mean for group, mean in means.items() for name in group if name in linears}, cold
