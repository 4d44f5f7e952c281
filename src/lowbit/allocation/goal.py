"""What a fit is to reach: a size of the file or of memory, bits per weight, or a quality."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from lowbit.allocation.losses import Losses
from lowbit.allocation.size import bytes_in
from lowbit.allocation.solution import Solution, best_within, check_size, smallest_within
from lowbit.errors import LowbitError
from lowbit.exporters.footprint import Footprint


@dataclass(frozen=True)
class Goal:
    """One of the first four is set.

    Attributes:
        size: bytes of the file.
        bits: per weight that has a format.
        quality: ratio of perplexities.
        memory: bytes of the weights, which the target keeps as packed as in the file, and of keys and values.
        beside: bytes of keys and values, with ``memory``; see ``behind``.
    """

    size: int | None = None
    bits: float | None = None
    quality: float | None = None
    memory: int | None = None
    beside: int = 0

    @classmethod
    def of(
        cls, size: str | int | None, bits: float | None, quality: float | None, memory: str | int | None = None
    ) -> Goal:
        """A goal as a user gives it; exactly one argument is not ``None``."""
        if sum(given is not None for given in (size, bits, quality, memory)) != 1:
            raise LowbitError("give one of --size, --memory, --bits and --quality, for example --size 90MB")
        if bits is not None and not 0 < bits <= 32:
            raise LowbitError(f"--bits {bits:g} given; give bits per weight, above 0 and at most 32, such as 4.2")
        if quality is not None and not 1 < quality < math.inf:
            raise LowbitError(f"--quality {quality:g} given; give a ratio of perplexities above 1, such as 1.05")
        parsed = bytes_in(memory, "--memory") if isinstance(memory, str) else memory
        return cls(bytes_in(size) if isinstance(size, str) else size, bits, quality, parsed)

    def behind(self, beside: int) -> Goal:
        """The same with ``beside`` bytes of keys and values in the memory."""
        return replace(self, beside=beside)

    def room(self, footprint: Footprint) -> int | None:
        """The largest size of the file in bytes; ``None`` for a quality.

        Two choices of 1000 weights beside 500 bytes, at 4 bits per weight: 500 + 2000 * 4 / 8 = 1500; those bytes are
        also of choices that are float alone. Of a memory of 2000 bytes, 400 of them keys and values, 1600 are left.
        """
        if self.bits is not None:
            return footprint.beside + int(self.bits * footprint.weights / 8)
        if self.memory is not None:
            return self.memory - self.beside
        return self.size

    def check(self, footprint: Footprint, target: str) -> None:
        """Refuse what cannot be reached, before any work."""
        room = self.room(footprint)
        if self.bits is not None and room is not None and room < footprint.least:
            raise LowbitError(
                f"--bits {self.bits:g} given; with the smallest formats of {target} it is more: the smallest that "
                f"can be is --bits {_least_bits(footprint):.3f}"
            )
        if room is not None:
            check_size(footprint, room, target, "--size" if self.memory is None else "--memory", self.beside)

    def prefers(self, second: Solution, again: float, first: Solution, whole: float) -> bool:
        """Whether a second solution with the measured divergence ``again`` beats a first one with ``whole``.

        For a size that is the lower divergence; for a quality the smaller file of those that reach it.

        >>> small, large = Solution({}, 10, 0.0), Solution({}, 20, 0.0)
        >>> Goal(size=20).prefers(small, 0.3, large, 0.2), Goal(quality=1.5).prefers(small, 0.3, large, 0.2)
        (False, True)
        """
        most = math.inf if self.quality is None else math.log(self.quality)
        if (again <= most) != (whole <= most):
            return again <= most
        if self.quality is not None and again <= most:
            return second.size < first.size
        return again < whole

    def solve(self, footprint: Footprint, losses: Losses, blocks_at: str) -> Solution:
        """The best assignment for this goal."""
        if (room := self.room(footprint)) is not None:
            return best_within(footprint, losses, room, blocks_at)
        assert self.quality is not None
        return smallest_within(footprint, losses, math.log(self.quality), blocks_at)


def _least_bits(footprint: Footprint) -> float:
    """The fewest bits per weight, in thousandths, for which there is room.

    >>> from lowbit.exporters.footprint import Choice, Option
    >>> from lowbit.quant.integer import IntFormat
    >>> _least_bits(Footprint(100, (Choice(("a",), 300, (Option(IntFormat(2), 100),)),)))
    2.667
    """
    thousandths = math.ceil(8000 * (footprint.least - footprint.beside) / footprint.weights)
    while (Goal(bits=thousandths / 1000).room(footprint) or 0) < footprint.least:  # what floats round away
        thousandths += 1
    return thousandths / 1000
