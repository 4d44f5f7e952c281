"""``lowbit.imatrix``: llama.cpp's importance matrix of a float model, from calibration text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.data.text import Data, calibration
from lowbit.errors import LowbitError
from lowbit.exporters.imatrix import Squares, check_imatrix, check_replaceable, write_imatrix
from lowbit.methods.statistics import input_statistics
from lowbit.models.block import Block
from lowbit.models.validate import check_ids
from lowbit.paths import user_path
from lowbit.pipeline.opened import open_model
from lowbit.pipeline.request import DEFAULTS
from lowbit.progress import track
from lowbit.runs.plan import check_length, check_sizes
from lowbit.runs.streamed_model import StreamedModel
from lowbit.torch_state import own_torch_state

BATCH = 4  # windows that go through a block together


@dataclass(frozen=True)
class Imatrix:
    """What ``imatrix`` wrote.

    Attributes:
        out: the file.
        linears: how many linears it has.
        tokens: of the calibration text.
        corpus: its name.
    """

    out: Path
    linears: int
    tokens: int
    corpus: str


@own_torch_state
def imatrix(
    model: str | Path,
    out: str | Path,
    *,
    data: Data | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Imatrix:
    """Write the importance matrix of a float model for ``llama-quantize --imatrix``; arguments as for ``quantize``.

    Sums are of the blocks' linears, the head is not among them, as in llama-imatrix's default.

    Raises:
        LowbitError: llama.cpp does not have the architecture, the text is too short, or ``out`` exists and is no
            importance matrix.
    """
    samples = DEFAULTS["samples"] if samples is None else samples
    length = DEFAULTS["length"] if length is None else length
    check_sizes(samples, length, seed)
    out = user_path(out)
    if out.suffix != ".gguf":
        raise LowbitError(f"--out {out} given; an importance matrix is a file that ends in .gguf")
    check_replaceable(out)
    opened = open_model(str(model), revision, allow_pickle, trust_remote_code)
    check_imatrix(opened.config)
    check_length(opened.config, length)
    tokenizer = load_tokenizer(opened.source.folder, trust_remote_code)
    text = calibration(data or DEFAULTS["data"], tokenizer, samples, length, seed)
    streamed = StreamedModel(opened.source.folder, trust_remote_code=trust_remote_code)
    check_ids(text.ids, streamed.skeleton, opened.source.folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    squares: dict[str, Squares] = {}
    with torch.no_grad():
        x = streamed.enter(text.ids)
        for index in track(range(streamed.blocks), "squares of inputs"):
            squares |= _squares(streamed.block(index), x)
            x = torch.cat(streamed.through(index, x.split(BATCH)))
    write_imatrix(out, opened.config, squares, text.corpus, samples, length)
    return Imatrix(out, len(squares), text.ids.numel(), text.corpus)


def _squares(block: Block, x: torch.Tensor) -> dict[str, Squares]:
    """Squares of the inputs of a block's linears by full name; those of a group read one tensor."""
    groups = [group for group in block.linear_groups() if not block.is_router(group[0])]
    seen = input_statistics(block, x, [group[0] for group in groups], ("square",))
    out = {}
    for group in groups:
        stats = seen[group[0]]
        for name in group:
            width = block.weight(name).shape[1]
            total = stats["square"] if stats.count else torch.zeros(width)
            out[block.full_name(name)] = Squares(total, stats.count)
    return out
