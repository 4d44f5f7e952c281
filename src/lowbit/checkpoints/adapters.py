"""LoRA adapters: what one changes, read from its folder, and the model of base and adapter together.

A LoRA adapter holds two narrow matrices for each linear that it changes, ``A`` ``(rank, in)`` and ``B``
``(out, rank)``, and the linear computes with ``W + scale * B @ A``. ``scale`` is ``alpha / rank``, or
``alpha / sqrt(rank)`` with rank-stabilized scaling. Whatever else an adapter's config can ask for is refused by name:
to leave it out would give another model without an error.

An adapter names its base by a path or hub id of whoever trained it. Nothing is read from there: the caller says where
the base is.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.kinds import ADAPTER
from lowbit.errors import LowbitError, one_line, shown
from lowbit.finite import is_finite

WEIGHTS, PICKLED = "adapter_model.safetensors", "adapter_model.bin"
_PREFIX = "base_model.model."
# By field of ``adapter_config.json``: what a true or non-empty value asks for.
_OTHER = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "lora_bias": "LoRA with biases of its own",
    "layer_replication": "replicated layers",
    "target_parameters": "LoRA on parameters that are no linear's, as experts have",
    "trainable_token_indices": "trained rows of the embedding",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
}
# Values of ``init_lora_weights`` with which training starts from a changed base model: the adapter is no difference
# to the original one. Tools that turn it into one write ``true``.
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# What names of tensors end in: the two matrices of a linear, and of an embedding.
_PAIRS = {"weight": ("lora_A.weight", "lora_B.weight"), "embedding": ("lora_embedding_A", "lora_embedding_B")}


@dataclass(frozen=True)
class Change:
    """The change of one weight.

    Attributes:
        a: ``(rank, in)``.
        b: ``(out, rank)``.
        scale: factor of their product.
        transposed: the weight is stored as ``(in, out)``.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool

    @property
    def shape(self) -> tuple[int, int]:
        """The weight's shape, as it is stored."""
        out, inner = len(self.b), self.a.shape[1]
        return (inner, out) if self.transposed else (out, inner)

    def apply(self, weight: Tensor) -> Tensor:
        """The changed weight, computed in float32, in the dtype of ``weight``.

        >>> import torch
        >>> change = Change(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [3.0]]), scale=0.5, transposed=False)
        >>> change.apply(torch.zeros(2, 2)).tolist()
        [[0.5, 1.0], [1.5, 3.0]]
        """
        delta = self.scale * (self.b.float() @ self.a.float())
        return (weight.float() + (delta.mT if self.transposed else delta)).to(weight.dtype)


@dataclass(frozen=True)
class Adapter:
    """An adapter's content.

    Attributes:
        folder: its folder.
        changes: by name of the weight in the base model.
        replaced: tensors that it has trained whole, by name in the base model.
        ties: a tied tensor's other name has its change too (``ensure_weight_tying``).
    """

    folder: Path
    changes: Mapping[str, Change]
    replaced: Mapping[str, Tensor]
    ties: bool = False


def read_adapter(folder: Path) -> Adapter:
    """Read a LoRA adapter; raises ``LowbitError`` for anything that is none, and for any other kind of adapter."""
    if not (folder / ADAPTER).is_file():
        raise LowbitError(f"{folder} has no {ADAPTER}, so it is not an adapter: give an adapter's folder")
    config = read_json(folder / ADAPTER)
    _check_kind(folder, config)
    tensors = _tensors(folder)
    changes, used = {}, set()
    for kind, ends in _PAIRS.items():
        for name in [name for name in tensors if name.endswith(f".{ends[0]}")]:
            module = name.removesuffix(f".{ends[0]}")
            if (other := f"{module}.{ends[1]}") not in tensors:
                raise LowbitError(f"{folder} has '{name}' and lacks '{other}': fetch it again")
            changes[f"{_inner(module)}.weight"] = _change(folder, config, module, tensors[name], tensors[other], kind)
            used |= {name, other}
    rest = {name: value for name, value in tensors.items() if name not in used}
    if odd := [name for name in rest if "lora_" in name]:
        raise LowbitError(
            f"{folder} has a tensor {shown(odd[0])}, which plain LoRA does not have: merge it with peft"
        )
    replaced = {re.sub(r"\.(modules_to_save|base_layer)\.", ".", _inner(name)): value for name, value in rest.items()}
    if not changes and not replaced:
        raise LowbitError(f"{folder} changes nothing: its weights are empty")
    return Adapter(folder, changes, replaced, ties=bool(config.get("ensure_weight_tying")))


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise LowbitError(
            f"{folder} is an adapter of the kind {shown(kind)}; LORA is merged here: merge it with peft"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_OTHER_BASE):
        raise LowbitError(
            f"{folder} was trained from weights that {shown(start)} had changed, so it does not fit the model's own: "
            "convert it with peft's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    if found := next((what for field, what in _OTHER.items() if config.get(field)), None):
        raise LowbitError(f"{folder} is an adapter with {found}; plain LoRA is merged here: merge it with peft")


def _tensors(folder: Path) -> dict[str, Tensor]:
    path = folder / WEIGHTS
    if not path.is_file():
        if (folder / PICKLED).is_file():
            raise LowbitError(
                f"{folder} has pickled weights ({PICKLED}), a format that can run code: load it with peft and save "
                "it again, which writes safetensors"
            )
        raise LowbitError(f"{folder} lacks {WEIGHTS}, an adapter's weights: fetch it again")
    try:
        with safe_open(path, framework="pt") as file:
            out = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LowbitError(f"{path} is not a complete safetensors file ({one_line(error)}): fetch it again") from error
    for name, value in out.items():
        if not value.is_floating_point() or not is_finite(value):
            raise LowbitError(f"'{name}' in {path} holds no finite floats: the adapter is broken")
    return out


def _inner(name: str) -> str:
    """A name of the base model: peft puts two modules around it.

    >>> _inner("base_model.model.model.layers.0.self_attn.q_proj")
    'model.layers.0.self_attn.q_proj'
    """
    return name.removeprefix(_PREFIX)


def _change(folder: Path, config: Mapping[str, Any], module: str, a: Tensor, b: Tensor, kind: str) -> Change:
    rank = _number(folder, config, "r", "rank_pattern", _inner(module))
    alpha = _number(folder, config, "lora_alpha", "alpha_pattern", _inner(module))
    if a.ndim != 2 or b.ndim != 2 or not len(a) == b.shape[1] == rank:
        raise LowbitError(
            f"'{module}' in {folder} has matrices {tuple(a.shape)} and {tuple(b.shape)}, its {ADAPTER} says rank "
            f"{rank:g}: they do not match"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Change(a, b, scale, transposed=kind == "embedding" or bool(config.get("fan_in_fan_out")))


def _number(folder: Path, config: Mapping[str, Any], field: str, patterns: str, module: str) -> float:
    """A number that holds for all modules, or that of the first pattern that a module's name ends in."""
    own = config.get(patterns) or {}
    if not isinstance(own, dict):
        raise LowbitError(f"{folder / ADAPTER} has {patterns} = {shown(own)}: allowed is an object of numbers")
    value = next((value for key, value in own.items() if _matches(key, module)), config.get(field))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e6:
        raise LowbitError(f"{folder / ADAPTER} has {field} = {shown(value)}; allowed are numbers above 0")
    return value


def _matches(key: str, module: str) -> bool:
    """Whether a pattern, which may be a regular expression, is of a module: it matches the end of its name."""
    try:
        return re.match(rf"(.*\.)?({key})$", module) is not None
    except re.error:
        return False
