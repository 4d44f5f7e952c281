"""Which tensors a ``.gguf`` file has for a model's parameters, and where each parameter is in them.

Most tensors are one parameter under another name. Three things are stored differently and compute the same:

* Rows of q and k are interleaved within each head where llama.cpp rotates neighbouring dimensions:
  ``(heads, 2, d / 2) -> (heads, d / 2, 2)``; ``Architecture.rows`` has other orders.
* The same matrix of all experts of a layer is one tensor ``(experts, out, in)``, and so are norms of single heads.
* Some values are stored as what the graph computes from them, such as the ``1 + weight`` that a norm multiplies by;
  ``Architecture.values`` has them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import gguf
import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.exporters.gguf_architectures.architecture import Architecture
from lowbit.exporters.gguf_heads import head_dim
from lowbit.exporters.gguf_model import architecture
from lowbit.quant.format import Format, QParams, QTensor
from lowbit.quant.kquants import SUPERBLOCK, KQuant

_LAYER = re.compile(r"^.*?\.(?:layers|h|blocks)\.(\d+)\.(.+)$")
# Parameters that are stacked, by what follows the layer's number: number and end; their place within the layer.
_EXPERT = re.compile(r"^[\w.]*experts\.(\d+)\.(\w+)\.(weight|bias)$")
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
_HEAD_NORM = re.compile(r"^self_attn\.([qk])_layernorm\.norms\.(\d+)\.weight$")


@dataclass(frozen=True)
class Share:
    """Which rows of a parameter, in the file's order, a tensor has.

    Attributes:
        start, stop: its rows.
        total: of all tensors that share the parameter.
    """

    start: int
    stop: int
    total: int


@dataclass(frozen=True)
class FileTensor:
    """A tensor of the file.

    Attributes:
        name: in the file.
        parts: names of the model's parameters that it holds.
        stacked: the parts are along a first dimension; else there is one.
        share: of a parameter whose rows several tensors have.
    """

    name: str
    parts: tuple[str, ...]
    stacked: bool = False
    share: Share | None = None


def stack_of(name: str) -> tuple[str, int] | None:
    """The tensor that a parameter is stacked in, and its place there; ``None`` for one by itself.

    >>> stack_of("model.layers.3.mlp.experts.12.up_proj.weight"), stack_of("model.layers.3.mlp.gate.weight")
    (('blk.3.ffn_up_exps.weight', 12), None)
    """
    if (layer := _LAYER.match(name)) is None:
        return None
    if (match := _EXPERT.match(layer[2])) is not None and match[2] in _ROLES:
        return f"blk.{layer[1]}.ffn_{_ROLES[match[2]]}_exps.{match[3]}", int(match[1])
    if (match := _HEAD_NORM.match(layer[2])) is not None:
        return f"blk.{layer[1]}.attn_{match[1]}_norm.weight", int(match[2])
    return None


def file_tensors(config: Any, names: Iterable[str]) -> list[FileTensor]:
    """The tensors that hold the parameters ``names`` of a model.

    Raises:
        LowbitError: the installed ``gguf`` package has no name for one.
    """
    arch, out = architecture(config), list[FileTensor]()
    stacks: dict[str, dict[int, str]] = {}
    table = _table(arch, config.num_hidden_layers)
    for name in names:
        if (place := stack_of(name)) is not None:
            stacks.setdefault(place[0], {})[place[1]] = name
        elif shares := _shares(arch, config, name):
            out += [FileTensor(own, (name,), share=share) for own, share in shares.items()]
        else:
            out.append(FileTensor(_renamed(arch, table, name), (name,)))
    for stored, parts in stacks.items():
        if sorted(parts) != list(range(len(parts))):
            raise LowbitError(f"the model lacks some of the {max(parts) + 1} parts of {stored}: make the run again")
        out.append(FileTensor(stored, tuple(parts[i] for i in range(len(parts))), True))
    return out


def _shares(arch: Architecture, config: Any, name: str) -> dict[str, Share]:
    """The tensors that share a parameter's rows, or none."""
    if (layer := _LAYER.match(name)) is None or not (rows := arch.split(config, layer[2])):
        return {}
    ends = list(accumulate(rows.values()))
    return {
        f"blk.{layer[1]}.{own}": Share(end - rows[own], end, ends[-1]) for own, end in zip(rows, ends, strict=True)
    }


def _table(arch: Architecture, layers: int) -> Any:
    kind = next((key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == arch.name), None)
    if kind is None:
        raise LowbitError(f"the installed gguf package does not know {arch.name}: update gguf")
    return gguf.get_tensor_name_map(kind, layers)


def _renamed(arch: Architecture, table: Any, name: str) -> str:
    layer = _LAYER.match(name)
    if layer is not None and layer[2] in arch.names:
        return f"blk.{layer[1]}.{arch.names[layer[2]]}"
    # A text model within another has its tensors under a longer path: model.language_model.norm.weight.
    first, *rest = name.split(".")
    outer = ".".join([first, *rest[-2:]]) if layer is None else f"model.layers.{layer[1]}.{layer[2]}"
    stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
    stored = stored or table.get_name(outer, try_suffixes=(".weight", ".bias"))
    if stored is None:
        raise LowbitError(f"the installed gguf package has no name for '{name}': update gguf")
    return str(stored)


def stored_value(config: Any, name: str, value: Tensor) -> Tensor:
    """What the file holds for a parameter's value, but for the order of rows."""
    ends = architecture(config).values
    change = next((change for end, change in ends.items() if name.endswith(end)), None)
    return value if change is None else change(value)


def row_order(config: Any, name: str) -> Tensor | None:
    """The order in which a parameter's rows are written; ``None`` if unchanged."""
    arch = architecture(config)
    part = name.rpartition("self_attn.")[2].partition(".")[0]
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(part)
    if not arch.adjacent or heads is None:
        return arch.rows(config, name)
    count, dim = int(getattr(config, heads)), head_dim(config)
    return torch.arange(count * dim).reshape(count, 2, dim // 2).transpose(1, 2).flatten()


def column_order(config: Any, name: str) -> Tensor | None:
    """The order in which a matrix' columns are written; ``None`` if unchanged."""
    return architecture(config).columns(config, name)


def straddles(config: Any, module: str, format: Format) -> str | None:
    """Why the columns of a quantized matrix cannot be put in the file's order, which only whole groups can."""
    if column_order(config, f"{module}.weight") is None:
        return None
    piece, size = architecture(config).piece(config), SUPERBLOCK if isinstance(format, KQuant) else format.group
    if not isinstance(size, int) or piece % size == 0:
        return (
            None if size is None or isinstance(size, int) else f"{format.name} has tiles, whose columns cannot move"
        )
    return f"llama.cpp has pieces of {piece} columns in another order, and groups of {size} are not within one"


def with_columns(q: QTensor, order: Tensor) -> QTensor:
    """A weight with its columns in another order, in which each group stays together, see ``straddles``."""
    size = q.format.group
    assert size is None or isinstance(size, int)
    groups = None if size is None else order[::size] // size
    qparams = q.qparams if groups is None else QParams(*(x[:, groups] for x in q.qparams))
    return QTensor(q.codes[:, order], qparams, q.format)
