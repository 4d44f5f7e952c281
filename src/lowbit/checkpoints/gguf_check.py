"""Compares a converted tensor with the file's values, by rules that do not come from whoever converted it.

A model whose rows of q and k are in the wrong order has all its values and computes nonsense, so the order is checked
value for value: llama.cpp rotates adjacent rows ``(0, 1), (2, 3), ...`` of a head, transformers ``(0, d / 2),
(1, d / 2 + 1), ...``, and a model of GPT-NeoX has q, k and v of each head together. Gains of a Gemma are stored as
``1 + weight``. Everything else is stored as it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lowbit.errors import LowbitError

Values = npt.NDArray[Any]  # float32, of any shape
ADJACENT = frozenset({"llama", "smollm3", "granite", "mistral3"})
GAINS_PLUS_ONE = frozenset({"gemma2", "gemma3"})


def check_values(path: Path, architecture: str, name: str, source: Values, converted: Values, config: Any) -> None:
    """Raise ``LowbitError`` if a converted tensor does not hold the file's values in the right places.

    Args:
        path: the file, for the message.
        architecture: llama.cpp's name.
        name: the tensor's name in the file.
        source: values in the file, as the ``gguf`` package dequantizes them.
        converted: values in transformers' layout; only their order and, for gains, an offset may differ.
        config: the transformers config.
    """
    order = row_order(architecture, name, len(source), config)
    expected = source if order is None else source[order]
    if architecture in GAINS_PLUS_ONE and name.endswith("norm.weight"):
        # In float64, where the subtraction is exact, and rounded once.
        expected = (source.astype(np.float64) - 1.0).astype(np.float32)
    if name.endswith("ffn_gate_inp_shexp.weight"):  # a vector in the file, a linear of one output here
        expected = source[None]
    if name.endswith("shortconv.conv.weight"):  # a kernel for each channel by itself
        expected = source[:, None]
    if not np.array_equal(converted, expected, equal_nan=True):
        raise LowbitError(
            f"'{name}' of {path} changed while it was converted: the installed transformers has another layout for "
            f"'{architecture}'; install a version that lowbit's requirements allow, or use the model's own folder"
        )


def row_order(architecture: str, name: str, rows: int, config: Any) -> npt.NDArray[np.intp] | None:
    """Where each row of a tensor, in transformers' order, is in the file; ``None``: in its place."""
    if architecture in ADJACENT and (heads := _heads(name, config)):
        return transformers_rows(rows // heads, heads)
    if architecture == "gptneox" and ".attn_qkv." in name:
        return by_head(rows, int(config.num_attention_heads))
    return None


def by_head(rows: int, heads: int) -> npt.NDArray[np.intp]:
    """Where q, k and v of head 0, then of head 1, ... are in a file that has all of q, all of k, all of v.

    >>> by_head(12, 2).tolist()
    [0, 1, 4, 5, 8, 9, 2, 3, 6, 7, 10, 11]
    """
    order: npt.NDArray[np.intp] = np.arange(rows).reshape(3, heads, -1).swapaxes(0, 1).ravel()
    return order


def transformers_rows(width: int, heads: int) -> npt.NDArray[np.intp]:
    """Where each row of q or k, in transformers' order, is in the file.

    >>> transformers_rows(4, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    within = np.concatenate([np.arange(0, width, 2), np.arange(1, width, 2)])
    rows: npt.NDArray[np.intp] = (np.arange(heads)[:, None] * width + within).ravel()
    return rows


def _heads(name: str, config: Any) -> int:
    """Number of heads whose rows are interleaved in the file, or 0."""
    if ".attn_q." in name:
        return int(config.num_attention_heads)
    return int(config.num_key_value_heads) if ".attn_k." in name else 0
