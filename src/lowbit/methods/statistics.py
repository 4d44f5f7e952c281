"""What is measured on calibration data: sums, maxima and samples over tokens, gathered while a block runs.

One accumulator, ``Statistics``, holds whatever is asked for. Each figure says how tokens enter it and how two shares
of it come together, so that several processes can each see some of the sequences.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lowbit.models.block import Block, Calib
from lowbit.models.forward import observe
from lowbit.models.offload import batches


def _sum(total: Tensor, part: Tensor) -> Tensor:
    """In the place of ``total``: no third matrix is made."""
    return total.add_(part)


def _cat(total: Tensor, part: Tensor) -> Tensor:
    return torch.cat([total, part])


def _even(rows: Tensor) -> Tensor:
    """Every token over its root mean square, so that a few with massive activations do not decide alone."""
    return rows / _rms(rows)


def _rms(rows: Tensor) -> Tensor:
    return rows.square().mean(1, keepdim=True).sqrt().clamp(min=1e-30)


def _gram(rows: Tensor) -> Tensor:
    return rows.T @ rows


Merge = Callable[[Tensor, Tensor], Tensor]
# Of rows ``x`` (tokens, in): what a share of the tokens gives, and how two shares come together.
FIGURES: dict[str, tuple[Callable[[Tensor], Tensor], Merge]] = {
    # sum x x^T (in, in)
    "gram": (lambda x: _gram(x), _sum),
    # the same with every token over its root mean square
    "normalized_gram": (lambda x: _gram(_even(x)), _sum),
    # sum |x| (in,)
    "magnitude": (lambda x: x.abs().sum(0), _sum),
    # max |x| (in,)
    "peak": (lambda x: x.abs().amax(0), torch.maximum),
    # min x, max x (in,)
    "low": (lambda x: x.amin(0), torch.minimum),
    "high": (lambda x: x.amax(0), torch.maximum),
    # sum (|x| / rms(x))^8 (in,): how often, and how far, a channel stands out in its token. The eighth root of the
    # mean lies between a mean and a maximum, and no single token decides it.
    "crest": (lambda x: _even(x).pow(8).sum(0), _sum),
    # the tokens themselves, for ``every`` > 1 some of them
    "tokens": (lambda x: x.clone(), _cat),
}
# Of rows of the quantized model's input ``x_q`` and of the float model's ``x`` (tokens, in) at the same tokens.
PAIRED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # sum x x_q^T (in, in)
    "cross": lambda x_q, x: x.T @ x_q,
    # the same with both over the root mean square of x_q, token by token
    "normalized_cross": lambda x_q, x: (x / _rms(x_q)).T @ _even(x_q),
}


@dataclass
class Statistics:
    """Figures over tokens of a linear's input; see ``FIGURES`` and ``PAIRED`` for what they are.

    Attributes:
        want: names of the figures.
        every: of which tokens figures take one in so many, evenly spread.
        values: the figures so far, in float32.
        count: tokens seen.

    >>> seen = Statistics(("magnitude", "peak"))
    >>> seen.add(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
    >>> seen["magnitude"].tolist(), seen["peak"].tolist(), seen.count
    ([4.0, 2.0], [3.0, 2.0], 2)
    """

    want: tuple[str, ...]
    every: int = 1
    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    def __getitem__(self, name: str) -> Tensor:
        """One figure, after at least one token."""
        return self.values[name]

    def add(self, x: Tensor, exact: Tensor | None = None) -> None:
        """Count ``x`` ``(..., in)`` in, whatever its dtype; ``exact`` is the float model's, for paired figures."""
        rows = x.detach().flatten(0, -2)[:: self.every].float()
        other = None if exact is None else exact.detach().flatten(0, -2)[:: self.every].float()
        for name in self.want:
            if name in FIGURES:
                self._merge(name, FIGURES[name][0](rows))
            else:
                assert other is not None, f"{name} needs the float model's input too"
                self._merge(name, PAIRED[name](rows, other))
        self.count += len(rows)

    def merge(self, other: Statistics) -> None:
        """Take in what another share of the tokens gave."""
        for name, value in other.values.items():
            self._merge(name, value.clone())
        self.count += other.count

    def _merge(self, name: str, value: Tensor) -> None:
        merge = FIGURES[name][1] if name in FIGURES else _sum
        self.values[name] = merge(self.values[name].to(value.device), value) if name in self.values else value


def input_statistics(
    block: Block,
    x: Tensor,
    linears: Iterable[str],
    want: tuple[str, ...],
    params: Mapping[str, Tensor] | None = None,
    *,
    quantized: bool = False,
    batch: int = 4,
    every: int = 1,
) -> dict[str, Statistics]:
    """Statistics of the named linears' inputs while ``block`` runs over ``x``; see ``block.run`` for the rest."""
    seen = {name: Statistics(want, every) for name in linears}
    observe(block, x, {name: one.add for name, one in seen.items()}, params, quantized=quantized, batch=batch)
    return seen


def paired_statistics(quantized: Block, exact: Block, calib: Calib, linear: str, want: tuple[str, ...]) -> Statistics:
    """Statistics of one linear's input in the quantized model beside the float model's.

    Args:
        quantized: the block as it will ship up to the linear.
        exact: the same in the float model.
        calib: the hidden states before the block.
        linear: its name.
        want: names of figures.
    """
    seen = Statistics(want)
    params = quantized.quantized_params()
    both = (batches(x, calib.batch, exact.device) for x in (calib.x_q, calib.x_fp))
    for x_q, x_fp in zip(*both, strict=True):
        inputs: list[Tensor] = []
        observe(quantized, x_q, {linear: inputs.append}, params, quantized=True, batch=calib.batch)
        observe(exact, x_fp, {linear: inputs.append}, batch=calib.batch)
        seen.add(*inputs)
    return seen
