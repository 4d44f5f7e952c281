"""Queries, keys and values whose heads are rotated by a Hadamard matrix before they are quantized.

A few channels of keys are far larger than the others, whatever the token, and set its range. A rotation spreads them
over the head (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456, section 4). With ``Q' = Q H`` and ``K' = K H`` the
products ``Q' K'^T = Q K^T`` stay; ``H`` is applied behind the rotary embedding, with which it does not commute.
Values need no such step: their rotation is folded into the rows of v and the columns of o before anything is
quantized.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.quant.activations import ActFormat, IntTokens


@dataclass(frozen=True)
class RotatedTokens(IntTokens):
    """Integers with one range for each token and head, behind a Hadamard rotation of the head."""

    @property
    def name(self) -> str:
        """``a4-asym-hadamard``."""
        return f"{super().name}-hadamard"


def kv_text(format: ActFormat | None) -> str:
    """The part of a scheme's name: ``kv4``, ``kv4h`` with rotated heads; empty for floats."""
    if not isinstance(format, IntTokens):
        return ""
    return f"kv{format.bits}{'h' * isinstance(format, RotatedTokens)}"
