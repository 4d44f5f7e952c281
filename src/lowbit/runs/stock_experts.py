"""Whether stock ``transformers`` computes a run folder's mixtures of experts as they were simulated."""

from __future__ import annotations

import torch
from torch import nn

from lowbit.models.build import text_config
from lowbit.models.skeleton import Skeleton
from lowbit.quant.compressed_tensors import stock_loads_experts
from lowbit.quant.scheme import ModelFormats


def stock_experts(skeleton: Skeleton, formats: ModelFormats) -> str | None:
    """Why stock ``transformers`` cannot run a mixture's experts and routers, or ``None`` if it can."""
    architecture = skeleton.architecture
    apart = _apart(skeleton) if formats.modules else set()
    experts = _stacked(skeleton, apart)
    for index, (layer, kind) in enumerate(zip(skeleton.layers, architecture.layers, strict=True)):
        for name in kind.routers:
            full = f"{architecture.blocks}.{index}.{name}"
            if full in formats.modules and not isinstance(layer.get_submodule(name), nn.Linear):
                return f"{full} chooses the experts, and transformers has no quantized linear in its place"
        together = kind.experts is not None and not kind.experts.apart and index not in apart
        if together and kind.experts is not None and any(name in formats.modules for name in experts):
            whole = f"{architecture.blocks}.{index}.{kind.experts.module}.{kind.experts.writes.parameter}"
            return f"transformers stores the experts of a layer together ({whole}) and reads no codes of one expert"
    if experts and (why := stock_loads_experts(formats, experts, architecture.embed)) is not None:
        return why
    return _replaced_experts(skeleton)


def read_together(skeleton: Skeleton) -> tuple[str, ...]:
    """Linears that need one format for stock ``transformers``: the experts of all layers, which it reads as one kind.

    It finds their format by the first group of ``quantization_config`` that names experts, so linears with "experts"
    in their names (shared ones) are among them. Empty for a model whose experts, if any, are linears there.
    """
    experts = _stacked(skeleton, _apart(skeleton))
    if not experts:
        return ()
    chosen, routers = set(experts), skeleton.architecture.routers()
    return tuple(n for n in skeleton.architecture.linears() if n in chosen or ("experts" in n and n not in routers))


def _apart(skeleton: Skeleton) -> set[int]:
    """Layers whose experts ``transformers`` makes linears in a quantized model."""
    return {index for index, _ in enumerate(skeleton.architecture.layers) if _become_linears(skeleton, index)}


def _stacked(skeleton: Skeleton, apart: set[int]) -> list[str]:
    """Linears of experts that ``transformers`` puts together, those of the layers ``apart`` left out."""
    architecture = skeleton.architecture
    prefixes = tuple(f"{architecture.blocks}.{i}." for i, _ in enumerate(architecture.layers) if i not in apart)
    return [n for n in architecture.linears() if architecture.is_experts(n) and n.startswith(prefixes)]


def _become_linears(skeleton: Skeleton, index: int) -> bool:
    """Whether ``transformers`` puts linears of each expert, under the names that they have here, in a module's place.

    It does so in quantized models for some experts that a model's own code multiplies with (Llama 4).
    """
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    experts = skeleton.architecture.layers[index].experts
    if experts is None or not experts.own_code:
        return False
    own = type(skeleton.layers[index].get_submodule(experts.module)).__name__
    if own not in MODULES_TO_PATCH_FOR_QUANTIZATION:
        return False
    with torch.device("meta"):
        module = MODULES_TO_PATCH_FOR_QUANTIZATION[own]["module_name"](text_config(skeleton.config))
    theirs = {f"{experts.module}.{name}" for name, one in module.named_modules() if isinstance(one, nn.Linear)}
    return theirs == {name for group in experts.groups for name in group}


def _replaced_experts(skeleton: Skeleton) -> str | None:
    """Experts that stay float, and that ``transformers`` replaces by other modules in a quantized model."""
    from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

    for layer, kind in zip(skeleton.layers, skeleton.architecture.layers, strict=True):
        for parameter in kind.kept:
            own = type(layer.get_submodule(parameter.rpartition(".")[0])).__name__
            if own in MODULES_TO_PATCH_FOR_QUANTIZATION:
                return f"transformers replaces {own} in a quantized model by linears of each expert"
    return None
