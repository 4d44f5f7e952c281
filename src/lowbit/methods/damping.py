"""How much second moments of few tokens are shrunk before their inverse is used."""

from __future__ import annotations


def damping_of(damping: float, shrinkage: float, inputs: int, tokens: int) -> float:
    """The damping of second moments of ``inputs`` inputs from ``tokens`` tokens, as a share of their diagonal's mean.

    What second moments of ``p`` inputs from ``n`` tokens say beside the truth grows with ``p / n``; estimators that
    shrink them towards a multiple of the identity do so by a share of that kind (Ledoit and Wolf 2004, A
    well-conditioned estimator for large-dimensional covariance matrices, section 3). Without it GPTQ and reassembly
    compensate along directions that few tokens have shown, at a loss on any other text. Tokens of one text depend on
    each other, so that they count for fewer than they are: a ``shrinkage`` of 1 is more than what independent tokens
    need.

    Args:
        damping: the share that any number of tokens gets.
        shrinkage: what ``p / n`` is multiplied with.
        inputs: ``p``.
        tokens: ``n``, at least one.

    >>> damping_of(0.01, 1.0, 576, 57_600), damping_of(0.01, 1.0, 1536, 1024)
    (0.02, 1.51)
    """
    return damping + shrinkage * inputs / tokens
