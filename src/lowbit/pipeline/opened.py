"""A model that somebody gave, opened and compared with its config, before anything is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowbit.checkpoints.resolve import Source, load_config, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.models.build import empty_model
from lowbit.models.skeleton import Skeleton
from lowbit.models.stored_names import StoredNames
from lowbit.models.validate import check_model, open_weights, report_build_errors
from lowbit.runs.carried import Carried, carried
from lowbit.runs.manifest import manifest_of


@dataclass(frozen=True)
class Opened:
    """A model that is no run folder.

    Attributes:
        source: where it is.
        config: its transformers config.
        checkpoint: its weights, as floats.
        skeleton: the text model without parameters.
        names: what its tensors are called in its files.
        others: what a run carries over as it is.
    """

    source: Source
    config: Any
    checkpoint: Checkpoint
    skeleton: Skeleton
    names: StoredNames
    others: Carried


def open_model(model: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> Opened:
    """Open a model; raises ``LowbitError`` for a run folder, and for files that do not match."""
    source = resolve(model, revision=revision, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code)
    if manifest_of(source.folder) is not None:
        raise LowbitError(
            f"{model} is a run folder, which is quantized already: give its float model; 'lowbit evaluate', "
            "'compare', 'export', 'generate', 'inspect' and 'report' take a run folder"
        )
    config = load_config(source.folder, trust_remote_code)
    checkpoint, names = open_weights(source.folder, config, trust_remote_code=trust_remote_code)
    unlisted = check_model(checkpoint, config, trust_remote_code=trust_remote_code)
    with report_build_errors(source.folder):
        skeleton = Skeleton(config, trust_remote_code)
        listed = empty_model(config, trust_remote_code).state_dict()
    others = carried(checkpoint, skeleton.architecture, listed, unlisted)
    return Opened(source, config, checkpoint, skeleton, names, others)
