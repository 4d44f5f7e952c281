"""A model that somebody gave, opened and compared with its config, before anything is made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lowbit.checkpoints.resolve import Source, load_config, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params
from lowbit.errors import LowbitError
from lowbit.models.build import empty_model
from lowbit.models.skeleton import Skeleton
from lowbit.models.stored_names import StoredNames
from lowbit.models.validate import check_computes, check_model, open_weights, report_build_errors
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


def computed(opened: Opened) -> Skeleton:
    """A skeleton that has computed two tokens, and so knows how the model calls its layers.

    It is filled for that, and is not the one that a run keeps.

    Raises:
        LowbitError: the library's code cannot compute with the config; see ``check_computes``.
    """
    skeleton, checkpoint = opened.skeleton.empty(), opened.checkpoint
    blocks = skeleton.architecture.blocks
    skeleton.fill(checkpoint.read(skeleton.shared_names, torch.float32))
    check_computes(
        skeleton,
        lambda: skeleton.block(0, block_params(checkpoint, blocks, 0, skeleton.parameter_shapes(0))),
        checkpoint.folder,
    )
    return skeleton
