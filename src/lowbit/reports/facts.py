"""Input of a report as plain data, gathered by ``lowbit.reports.build``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from numpy.typing import NDArray

from lowbit.runs.manifest import BlockRow, Manifest
from lowbit.runs.online_cost import OnlineCost

Array = NDArray[Any]


@dataclass(frozen=True)
class Target:
    """A loader, or a format of ``lowbit export``.

    Attributes:
        name: as the user would request it.
        carries: whether it supports the run; ``None`` if unknown.
        why: the reason if not, or how to find out.
    """

    name: str
    carries: bool | None
    why: str = ""


@dataclass(frozen=True)
class RunFacts:
    """One run.

    Attributes:
        name: of its folder, made unique.
        manifest: content of ``lowbit.json``.
        timing: for each block its seconds and the process's peak memory in bytes so far.
        size_bytes: size of its weights on disk.
        targets: loaders and export targets.
        command: reproduces the run; ``recipe`` is the YAML file that it needs, if any.
        scores: entries as in ``lowbit.evaluation.results``.
        block_error: by text, the error after each block, accumulated from the embeddings on
            (``lowbit compare``).
        peaks: for linears that share an input, the largest absolute value of each channel, ``(blocks, in)``, in the
            float model and in the run.
        pictures: learned matrices by block, step and site.
        online: what its runtime ops cost; ``None`` without any.
    """

    name: str
    manifest: Manifest
    timing: Sequence[Mapping[str, Any]]
    size_bytes: int
    targets: Sequence[Target]
    command: str
    recipe: str | None = None
    scores: Sequence[Mapping[str, Any]] = ()
    block_error: Mapping[str, Sequence[float]] = field(default_factory=dict)
    peaks: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    pictures: Mapping[tuple[int, str, str], Array] = field(default_factory=dict)
    online: OnlineCost | None = None

    @property
    def blocks(self) -> Sequence[BlockRow]:
        """The manifest's rows, one for each block."""
        return self.manifest.blocks


@dataclass(frozen=True)
class FloatFacts:
    """A float model that runs were made from.

    Attributes:
        name: as its runs name it.
        fingerprint: digest of its weights, as in the identity of its runs.
        scores: entries as in ``lowbit.evaluation.results``.
    """

    name: str
    fingerprint: str
    scores: Sequence[Mapping[str, Any]] = ()


def place_of(linear: str, modules: Sequence[str]) -> int:
    """Position of a linear, named without its layer, in execution order; last if it is not in ``modules``.

    >>> place_of("mlp.up_proj", ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"])
    1
    """
    return next((index for index, name in enumerate(modules) if name.endswith(f".{linear}")), len(modules))
