"""Sums over micro-batches in an order that does not depend on how many processes take them.

Floating-point addition is not associative, so a sum has one result only if it has one order. Here the micro-batches
of a pass are dealt out to at most ``LEAVES`` leaves, consecutive ones to each, which are added one after the other.
Leaves merge in pairs, pairs in pairs, as the binary digits of their numbers say. A process that has some consecutive
leaves merges what it can; whoever gets the nodes of all processes in order merges the rest. The merges are the same
for every division of the leaves, one process included.

Rejected: a leaf for every micro-batch, of which a single process would hold one partial sum for each binary digit of
their number, and partial sums may be matrices as large as a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Generic, TypeVar

T = TypeVar("T")

LEAVES = 8
PARTIAL_SUMS = LEAVES.bit_length()  # that one process holds at most: one for each binary digit, and that of a leaf


def divided(count: int, parts: int) -> list[range]:
    """The numbers below ``count`` as ``parts`` consecutive ranges, the longer ones first; some may be empty.

    >>> divided(5, 3)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    short, longer = divmod(count, parts)
    ends = [short * part + min(part, longer) for part in range(parts + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def leaves(micro_batches: int) -> list[range]:
    """The micro-batches of each leaf.

    >>> leaves(3)
    [range(0, 1), range(1, 2), range(2, 3)]
    >>> [len(leaf) for leaf in leaves(20)]
    [3, 3, 3, 3, 2, 2, 2, 2]
    """
    return divided(micro_batches, min(LEAVES, micro_batches)) if micro_batches else []


@dataclass(frozen=True)
class Node(Generic[T]):
    """The merged value of the leaves from ``start`` to before ``start + length``."""

    start: int
    length: int
    value: T


class Tree(Generic[T]):
    """Leaves or nodes, added in order, and merged as early as their numbers allow.

    Attributes:
        merge: of two neighbours, the left one first; it may reuse the memory of the left one.
        nodes: what has been added and is not merged into something larger.

    >>> whole, one, two = (Tree(lambda a, b: f"({a}{b})") for _ in range(3))
    >>> for at, letter in enumerate("abcdefg"):
    ...     whole.add(Node(at, 1, letter))
    ...     (one if at < 3 else two).add(Node(at, 1, letter))
    >>> whole.total()
    '(((ab)(cd))((ef)g))'
    >>> [node.value for node in one.nodes], [node.value for node in two.nodes]
    (['(ab)', 'c'], ['d', '(ef)', 'g'])
    >>> joint = Tree(lambda a, b: f"({a}{b})")
    >>> for node in [*one.nodes, *two.nodes]:
    ...     joint.add(node)
    >>> joint.total() == whole.total()
    True
    """

    def __init__(self, merge: Callable[[T, T], T]) -> None:
        self.merge = merge
        self.nodes: list[Node[T]] = []

    def add(self, node: Node[T]) -> None:
        """Add the node behind all others."""
        self.nodes.append(node)
        while len(self.nodes) > 1 and _are_halves(*self.nodes[-2:]):
            right, left = self.nodes.pop(), self.nodes.pop()
            self.nodes.append(Node(left.start, 2 * left.length, self.merge(left.value, right.value)))

    def total(self) -> T | None:
        """The merged value of all leaves, the shorter nodes at the end first; ``None`` if there are none."""
        values = [node.value for node in self.nodes]
        while len(values) > 1:
            right, left = values.pop(), values.pop()
            values.append(self.merge(left, right))
        return values[0] if values else None


def _are_halves(left: Node[T], right: Node[T]) -> bool:
    return left.length == right.length and left.start % (2 * left.length) == 0


def own_part(count: int, rank: int, size: int) -> range:
    """Which of ``count`` leaves, or other pieces of work, process ``rank`` of ``size`` takes.

    >>> own_part(8, 1, 3)
    range(3, 6)
    """
    return divided(count, size)[rank]


def sequences_of(leaf: Sequence[int], micro_batch: int) -> slice:
    """The sequences of a leaf's micro-batches.

    >>> sequences_of(range(2, 4), 4)
    slice(8, 16, None)
    """
    return slice(leaf[0] * micro_batch, (leaf[-1] + 1) * micro_batch)
