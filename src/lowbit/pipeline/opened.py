"""A model that somebody gave, opened and compared with its config, before anything is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.checkpoints.resolve import Source, load_config, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models.skeleton import Skeleton
from lowbit.models.validate import check_model, report_build_errors, settle_tied
from lowbit.pipeline.experts import refuse_experts
from lowbit.runs.manifest import manifest_of
from lowbit.sources.checkpoint import open_checkpoint


@dataclass(frozen=True)
class Opened:
    """A model that is no run folder.

    Attributes:
        source: where it is.
        config: its transformers config.
        checkpoint: its weights, as floats.
        skeleton: the model without parameters.
    """

    source: Source
    config: Any
    checkpoint: Checkpoint
    skeleton: Skeleton


def open_model(model: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> Opened:
    """Open a model; raises ``LowbitError`` for a run folder, and for files that do not match."""
    source = resolve(model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if manifest_of(source.folder) is not None:
        raise LowbitError(
            f"{model} is a run folder, which is quantized already: give its float model; 'lowbit evaluate', "
            "'compare', 'export', 'generate', 'inspect' and 'report' take a run folder"
        )
    config = load_config(source.folder, trust_remote_code)
    refuse_experts(config)
    checkpoint = open_checkpoint(source.folder, config)
    settle_tied(checkpoint, config)
    check_model(checkpoint, config, trust_remote_code=trust_remote_code)
    with report_build_errors(source.folder):
        skeleton = Skeleton(config, trust_remote_code)
    return Opened(source, config, checkpoint, skeleton)
