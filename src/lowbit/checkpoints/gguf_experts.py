"""Experts of ``.gguf`` files: the same matrix of all experts of a layer is one tensor there, and one of each here.

Checkpoints have a linear for each expert, and so have blocks; the library stacks them as it loads. A tensor of the
file is therefore taken apart into one for each expert, which is named after it: ``blk.0.ffn_up_exps.weight[3]``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

STACK = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
_ONE = re.compile(rf"{STACK.pattern}\[(\d+)\]")


def apart(tensor: Any) -> list[Any]:
    """A tensor as the ``gguf`` package describes it, or one for each expert of a stack.

    >>> from collections import namedtuple
    >>> Tensor = namedtuple("Tensor", "name data n_elements")
    >>> [one.name for one in apart(Tensor("blk.0.ffn_up_exps.weight", np.zeros((2, 8, 4)), 64))]
    ['blk.0.ffn_up_exps.weight[0]', 'blk.0.ffn_up_exps.weight[1]']
    """
    if STACK.fullmatch(tensor.name) is None or tensor.data.ndim != 3:
        return [tensor]
    count = len(tensor.data)
    return [
        tensor._replace(name=f"{tensor.name}[{i}]", data=own, n_elements=tensor.n_elements // count)
        for i, own in enumerate(tensor.data)
    ]


def scales_apart(name: str, values: Any) -> dict[str, np.float32]:
    """The factor on each matrix of a tensor, by the names that ``apart`` gives."""
    if STACK.fullmatch(name) is None:
        return {name: np.float32(values.ravel()[0])}
    return {f"{name}[{i}]": np.float32(value) for i, value in enumerate(values.ravel())}


def model_name(name: str, module: str) -> str | None:
    """The checkpoint's name of an expert's matrix; ``None`` for any other tensor.

    >>> model_name("blk.2.ffn_down_exps.weight[5]", "mlp.experts")
    'model.layers.2.mlp.experts.5.down_proj.weight'
    """
    if (found := _ONE.fullmatch(name)) is None:
        return None
    return f"model.layers.{found[1]}.{module}.{found[3]}.{found[2]}_proj.weight"


def stored_shapes(model: Any, module: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's parameters as a checkpoint has them: those of three dimensions are one for each expert.

    Args:
        model: the library's, whose experts are ``gate_up_proj`` ``(experts, 2 width, hidden)`` and ``down_proj``.
        module: module path of the experts within a layer; empty: the model has none.
    """
    return dict(_stored(((name, tuple(p.shape)) for name, p in model.named_parameters()), module))


def _stored(named: Iterable[tuple[str, tuple[int, ...]]], module: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name, shape in named:
        before, _, linear = name.rpartition(f".{module}.") if module else ("", "", "")
        if not before:
            yield name, shape
            continue
        count, rows, columns = shape
        halves: Mapping[str, int] = (
            {"gate_proj": rows // 2, "up_proj": rows // 2} if linear == "gate_up_proj" else {linear: rows}
        )
        for own, height in halves.items():
            for i in range(count):
                yield f"{before}.{module}.{i}.{own}.weight", (height, columns)
