"""The expected divergence of every choice in every format: a table that a file keeps, so that it is made once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.analysis.curvature import curvatures
from lowbit.analysis.expected_loss import expected_loss
from lowbit.analysis.token_frequency import smoothed
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.writing import write_json, write_tensors
from lowbit.exporters.footprint import Choice, Footprint
from lowbit.quant.format import Format
from lowbit.quant.scheme_names import override_text
from lowbit.runs.streamed_model import StreamedModel

TABLE, COLUMNS = "sensitivity.json", "sensitivity.safetensors"
Formats = Mapping[str, Format | None]  # by full name of a module


@dataclass(frozen=True)
class Losses:
    """Expected divergence in nats per token.

    Attributes:
        by_module: by module and format's text; of a tied embedding under the embedding's name.
        factors: by format's text, by what a measured divergence is larger; see ``probes``.
        blocks: by block's index, or -1 outside, the same around a solution; see ``rounds``.
    """

    by_module: dict[str, dict[str, float]]
    factors: dict[str, float]
    blocks: dict[int, float]

    def of(self, choice: Choice, format: Format | None, blocks_at: str) -> float:
        """Expected divergence when only this choice has a format that is not float."""
        return sum(self.by_block(choice, format, blocks_at).values())

    def by_block(self, choice: Choice, format: Format | None, blocks_at: str) -> dict[int, float]:
        """The same by the block that a module is in: experts of several blocks may be one choice."""
        out: dict[int, float] = {}
        if format is None:
            return out
        text = override_text(format)
        for module in choice.modules:
            index = block_of(module, blocks_at)
            raw = self.by_module[module][text] if module in self.by_module else 0.0
            out[index] = out.get(index, 0.0) + raw * self.factors.get(text, 1.0) * self.blocks.get(index, 1.0)
        return out


def block_of(module: str, blocks_at: str) -> int:
    """The index of the block that a module is in, -1 outside.

    >>> block_of("model.layers.7.mlp.up_proj", "model.layers"), block_of("lm_head", "model.layers")
    (7, -1)
    """
    prefix = f"{blocks_at}."
    return int(module.removeprefix(prefix).partition(".")[0]) if module.startswith(prefix) else -1


def measure_losses(
    model: StreamedModel, ids: Tensor, footprint: Footprint, seed: int
) -> tuple[Losses, dict[str, Tensor]]:
    """The table of a model, and each module's curvature by column ``(in,)``, which weights searches of scales."""
    wanted: dict[str, list[Format]] = {}
    for choice in footprint.choices:
        formats = [option.format for option in choice.options if option.format is not None]
        wanted |= dict.fromkeys(choice.modules, formats)
    by_module: dict[str, dict[str, float]] = {}
    columns: dict[str, Tensor] = {}
    outside = (model.skeleton.architecture.embed, model.skeleton.architecture.head)
    for curved in curvatures(model, ids, seed):
        if curved.module == model.skeleton.architecture.embed and not model.skeleton.tied:  # a head has all tokens
            curved = replace(curved, curvature=smoothed(curved.curvature, ids.numel()))
        searched = curved.module not in outside  # a run rounds these to nearest
        by_module[curved.module] = {
            override_text(format): expected_loss(curved, format, searched) for format in wanted.get(curved.module, [])
        }
        columns[curved.module] = curved.curvature.mean(0).cpu()
    return Losses(by_module, {}, {}), columns


def save(folder: Path, key: Mapping[str, Any], losses: Losses, columns: Mapping[str, Tensor]) -> None:
    """Write the table to a folder, the file that says it is complete last."""
    write_tensors(folder / COLUMNS, dict(columns))
    plain = asdict(losses)
    write_json(folder / TABLE, {"key": dict(key), **plain, "blocks": {str(k): v for k, v in losses.blocks.items()}})


def saved(folder: Path, key: Mapping[str, Any]) -> tuple[Losses, dict[str, Tensor]] | None:
    """The table in a folder, if it was made with the same ``key``."""
    if not (folder / TABLE).is_file():
        return None
    content = read_json(folder / TABLE)
    if content.get("key") != dict(key):
        return None
    blocks = {int(index): float(factor) for index, factor in content["blocks"].items()}
    file = Checkpoint(folder, [COLUMNS])
    return Losses(content["by_module"], content["factors"], blocks), file.read(file.names, torch.float32)


def formats_of(choices: Sequence[Choice], picks: Iterable[int]) -> dict[str, Format | None]:
    """The format of every module when each choice takes the option at a position."""
    pairs = zip(choices, picks, strict=True)
    return {module: choice.options[pick].format for choice, pick in pairs for module in choice.modules}


def least_formats(choices: Sequence[Choice]) -> dict[str, Format | None]:
    """The format of every module when each choice takes its smallest."""
    sizes = ([option.size for option in choice.options] for choice in choices)
    return formats_of(choices, [own.index(min(own)) for own in sizes])
