"""Static inputs in a run folder: calibrated qparams, stored beside the weight of their linear."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError, one_line
from lowbit.quant.format import QParams
from lowbit.quant.scheme import ModuleFormats
from lowbit.quant.static_activations import StaticActs


def input_names(module: str, formats: ModuleFormats) -> list[str]:
    """Full names of the tensors of a module's static input; none for other inputs."""
    return [f"{module}.{name}" for name in formats.input_tensors]


def read_input_qparams(
    checkpoint: Checkpoint, modules: Mapping[str, ModuleFormats], device: torch.device | str = "cpu"
) -> dict[str, QParams]:
    """Qparams of the modules' static inputs by full name, on ``device``; equal ones are one object.

    Raises:
        LowbitError: a number that no qparams have.
    """
    out: dict[str, QParams] = {}
    shared: dict[tuple[tuple[float, ...], ...], QParams] = {}
    for module, formats in modules.items():
        if not isinstance(formats.input, StaticActs):
            continue
        stored = checkpoint.read(input_names(module, formats))
        try:
            qparams = formats.input.unpack({name.removeprefix(f"{module}."): value for name, value in stored.items()})
        except ValueError as error:
            raise LowbitError(
                f"'{module}' in {checkpoint.folder} is broken: {one_line(error)}: copy the folder again, or quantize "
                "again"
            ) from error
        out[module] = shared.setdefault(tuple(tuple(value.tolist()) for value in qparams), qparams.to(device))
    return out
