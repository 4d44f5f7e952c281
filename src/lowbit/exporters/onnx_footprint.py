"""Bytes of ``model.onnx`` and ``model.onnx.data`` with MatMulNBits, for every choice of formats.

Source: com.microsoft.MatMulNBits, https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md: codes
of 2, 4 or 8 bits in blocks, a float32 scale for each, and packed zero points where they are not the middle. Codes of
3, 5, 6 and 7 bits take 4 or 8, so they are no choice. Embedding and norms are float32; so is a head that shares
the embedding's matrix, which the graph stores once. The graph holds the tables of the rotary embedding, two numbers
for each position and pair.
"""

from __future__ import annotations

from collections.abc import Iterable

from lowbit.exporters.footprint import FloatModel, Footprint
from lowbit.exporters.linear_footprint import FLOAT, PackedLinears
from lowbit.exporters.linear_footprint import footprint as of_linears
from lowbit.exporters.offered import Refuses
from lowbit.exporters.onnx_grid import block_of, stored_bits
from lowbit.exporters.onnx_names import FUSED
from lowbit.models.skeleton import Skeleton
from lowbit.quant.integer import IntFormat

FORMATS = (
    *(IntFormat(bits, group, symmetric) for bits in (2, 4) for group in (128, 64, 32) for symmetric in (True, False)),
    IntFormat(4, 16),
    *(IntFormat(8, group) for group in (128, 64, 32)),
)
GRAPH = (32 * 1024, 16 * 1024)  # nodes, names, shapes: 9 to 12 kB for each layer of the tests' models


def weight_size(format: IntFormat, shape: tuple[int, int]) -> int:
    """Bytes of a weight ``(out, in)``.

    Two rows of 64 codes of 4 bits are 64 bytes, two blocks a row have 4 scales of 4 bytes, and with zero points one
    byte a row more:

    >>> weight_size(IntFormat(4, 32), (2, 64)), weight_size(IntFormat(4, 32, symmetric=False), (2, 64))
    (80, 82)
    """
    rows, columns = shape
    bits, block = stored_bits(format.bits), block_of(format.group or columns)
    assert block is not None, "groups that are no multiple of 16 are refused before"
    blocks = -(-columns // block)
    zeros = 0 if format.symmetric else -(-blocks * bits // 8)
    return rows * (blocks * (block * bits // 8 + FLOAT) + zeros)


def groups_of(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Linears that have one format, from those of all blocks: q, k and v of a layer.

    The builder packs them into one matrix where their formats are alike, one product in place of three.

    >>> groups_of(["l.0.attn.q_proj", "l.0.attn.k_proj", "l.0.attn.v_proj", "l.0.attn.o_proj"])
    [('l.0.attn.q_proj', 'l.0.attn.k_proj', 'l.0.attn.v_proj'), ('l.0.attn.o_proj',)]
    """
    out: dict[str, list[str]] = {}
    for name in names:
        parent, _, own = name.rpartition(".")
        out.setdefault(parent if own in FUSED["qkv_proj"] else name, []).append(name)
    return [tuple(group) for group in out.values()]


STORES = PackedLinears("onnxruntime", FORMATS, weight_size, None, GRAPH, tied_twice=False)


def footprint(model: FloatModel, skeleton: Skeleton, refuses: Refuses) -> Footprint:
    """The files' footprint; ``refuses``: why the target has no place for a plan."""
    edges = [edge for kind in skeleton.architecture.layers for edge in kind.edges]
    pairs = max(len(edge.pairs) for edge in edges)
    tables = 2 * FLOAT * pairs * int(model.config.max_position_embeddings)
    return of_linears(model, skeleton, groups_of(model.modules), refuses, STORES, tables)
