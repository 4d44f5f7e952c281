"""The table of sensitivities of a model and a target: made once, then read from the folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lowbit.allocation.losses import TABLE, Losses, measure_losses, save, saved
from lowbit.allocation.probes import with_probes
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.positions import positions_of
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.data.text import Data, calibration
from lowbit.errors import LowbitError
from lowbit.exporters.footprint import Footprint
from lowbit.models.validate import check_ids
from lowbit.pipeline.opened import Opened
from lowbit.progress import say
from lowbit.runs.streamed_model import StreamedModel
from lowbit.runs.versions import versions

SEQUENCES, LENGTH = 8, 128  # of the gradients
WHAT = {"fingerprint": "model", "target": "target", "seed": "seed", "text": "text"}  # by key; seeds draw texts
WINDOWS = 4  # of them, on which divergence is measured


@dataclass(frozen=True)
class Text:
    """The text of a sensitivity: a corpus, and the seed that draws its windows."""

    data: Data | None
    seed: int


@dataclass(frozen=True)
class Table:
    """Losses of a model, what weights searches of scales, and the windows on which divergence is measured."""

    losses: Losses
    columns: dict[str, Tensor]
    ids: Tensor


def table_of(
    out: Path,
    opened: Opened,
    streamed: StreamedModel,
    footprint: Footprint,
    text: Text,
    target: str,
    trusted: bool,
    replaces: bool = False,
) -> Table:
    """The table of sensitivities, from the folder if it is there.

    Args:
        out: the folder that keeps it.
        opened, streamed: the model.
        footprint: its formats in the target.
        text: what gradients and probes are measured on.
        target: the target's name.
        trusted: the model's own code is permitted.
        replaces: the folder is the caller's, so that a table of another text there is made anew.

    Raises:
        LowbitError: the folder has the table of another model, target or text. One by other versions is made anew.
    """
    length = min(LENGTH, positions_of(streamed.skeleton.text_config) or LENGTH)
    tokenizer = load_tokenizer(opened.source.folder, trusted)
    drawn = calibration(text.data or "builtin", tokenizer, SEQUENCES, length, text.seed)
    check_ids(drawn.ids, streamed.skeleton, opened.source.folder)
    measured_on = drawn.ids[:: SEQUENCES // WINDOWS]  # of all kinds of text
    key = {"fingerprint": opened.source.identity, "target": target, "text": drawn.hash, "seed": text.seed}
    key["versions"] = versions()
    if (table := saved(out, key)) is not None:
        return Table(*table, measured_on)
    if not replaces and (differs := _differs(out, key)) is not None:
        raise LowbitError(f"--out {out} holds sensitivities of another {differs}: give a folder that is new or empty")
    say("sensitivity of every tensor in every format")
    losses, columns = measure_losses(streamed, drawn.ids, footprint, text.seed)
    losses = with_probes(losses, footprint, streamed, columns, measured_on)
    save(out, key, losses, columns)
    return Table(losses, columns, measured_on)


def _differs(out: Path, key: Mapping[str, Any]) -> str | None:
    """What the table in a folder is of that this one is not; ``None``: nothing, or there is none."""
    if not (out / TABLE).is_file():
        return None
    before = read_json(out / TABLE).get("key", {})
    return next((what for name, what in WHAT.items() if before.get(name) != key[name]), None)
