"""Runtime ops in an ONNX graph, behind the norm or on the input of the linears that they stand before.

================== ============================================================================================
``Hadamard``       Mul by the signs, then a Reshape and a MatMul with the small matrix of each factor
``FixedHadamard``  the same without signs
``Kronecker``      a Reshape and a MatMul for each of the two factors
``DiagonalBlocks`` Reshape, Transpose, one batched MatMul, and back
``Matrix``         MatMul
``Reorder``        Gather
================== ============================================================================================

Linears that read one tensor through equal ops share the result. Everything is float32; of a graph with quantized
inputs the rounding comes behind. The initializers have the names of the run's tensors, as far as they are the same::

    model.layers.3.mlp.down_proj.input.runtime.kronecker.left

so that a reader finds each op by itself: ``read`` gives the run's own tensors again, and with those of a Hadamard
transform its matrices, which a run does not store.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.exporters.onnx_names import linear_of, renamed
from lowbit.exporters.run import Run
from lowbit.models.diagonal_blocks import DiagonalBlocks
from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.hadamard import Hadamard, factors
from lowbit.models.kronecker import Kronecker
from lowbit.models.reorder import Reorder
from lowbit.models.runtime_ops import Matrix, RuntimeOp, at_input, linear_behind, parse_tensor_name, tensor_name

OPS: frozenset[type[RuntimeOp]] = frozenset({Hadamard, FixedHadamard, Kronecker, DiagonalBlocks, Matrix, Reorder})
FACTOR = "factor_"  # starts the names of a Hadamard transform's matrices
TOKENS = [0, 0]  # of a Reshape: batch and length stay
ROUNDS = ("QuantizeLinear", "DequantizeLinear")


@dataclass
class _Chain:
    """Nodes one behind the other, from ``x`` ``(batch, length, width)`` on.

    Attributes:
        base: the op's name, ``MODULE.runtime.KIND``.
        last: the tensor that the next node reads.
        nodes, initializers: what was made.
    """

    base: str
    last: str
    nodes: list[Any] = field(default_factory=list)
    initializers: list[Any] = field(default_factory=list)

    def node(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> None:
        """A node; an input ``""`` stands for the last tensor."""
        from onnx import helper

        own = name or f"/{self.base}/{kind}_{len(self.nodes)}"
        sources = [source or self.last for source in inputs]
        self.nodes.append(helper.make_node(kind, sources, [f"{own}/output_0"], own, **attributes))
        self.last = self.nodes[-1].output[0]

    def stored(self, key: str, value: Tensor) -> str:
        """An initializer of the op, float32 or int64; its name."""
        from onnx.numpy_helper import from_array

        self.initializers.append(from_array(value.detach().contiguous().numpy(), f"{self.base}.{key}"))
        return f"{self.base}.{key}"

    def reshape(self, shape: list[int], name: str | None = None) -> None:
        """A Reshape; the shape is a constant of the graph, as the builder's are."""
        from onnx import TensorProto, helper

        own = f"/{self.base}/shape_{len(self.nodes)}"
        value = helper.make_tensor(own, TensorProto.INT64, [len(shape)], shape)
        self.nodes.append(helper.make_node("Constant", [], [f"{own}/output_0"], own, value=value))
        self.node("Reshape", "", f"{own}/output_0", name=name)

    def factors(self, matrices: Mapping[str, Tensor], width: int) -> None:
        """``x`` times a Kronecker product, or several side by side, factor by factor as ``times_kronecker`` does."""
        for (key, matrix), inner in zip(matrices.items(), _inner(matrices), strict=True):
            size = len(matrix)
            if inner == 1:
                self.reshape([*TOKENS, -1, size])
                self.node("MatMul", "", self.stored(key, matrix))
            else:
                self.reshape([*TOKENS, -1, size, inner])
                self.node("MatMul", self.stored(key, matrix.mT), "")
        self.reshape([*TOKENS, width])


def _inner(matrices: Mapping[str, Tensor]) -> list[int]:
    """For each factor the channels that a step of its index passes over; one that is not 1 is stored transposed."""
    sizes = [len(matrix) for matrix in matrices.values()]
    return [math.prod(sizes[at + 1 :]) for at in range(len(sizes))]


def _append(chain: _Chain, op: RuntimeOp) -> None:
    """The nodes of one op."""
    if isinstance(op, Hadamard):
        chain.reshape([*TOKENS, *op.flips.shape])
        chain.node("Mul", "", chain.stored("signs", 1 - 2 * op.flips.float()))
        chain.factors(hadamard_factors(op.flips.shape[1]), op.width)
    elif isinstance(op, FixedHadamard):
        chain.reshape([*TOKENS, len(op.sizes), op.size])
        chain.factors(hadamard_factors(op.size), op.width)
    elif isinstance(op, Kronecker):
        chain.factors({"left": op.left.float(), "right": op.right.float()}, op.width)
    elif isinstance(op, DiagonalBlocks):
        count, size = op.blocks.shape[:2]
        chain.reshape([*TOKENS, count, size])
        chain.node("Transpose", "", perm=[0, 2, 1, 3])
        chain.node("MatMul", "", chain.stored("blocks", op.blocks.float()))
        chain.node("Transpose", "", perm=[0, 2, 1, 3])
        chain.reshape([*TOKENS, op.width])
    elif isinstance(op, Matrix):
        chain.node("MatMul", "", chain.stored("matrix", op.matrix.float()))
    else:
        assert isinstance(op, Reorder), "others are refused before"
        chain.node("Gather", "", chain.stored("idx", op.idx.long()), axis=-1)


def hadamard_factors(size: int) -> dict[str, Tensor]:
    """The matrices of ``H_n``, in float32, by the names that they have in the graph behind the op's.

    >>> {name: tuple(matrix.shape) for name, matrix in hadamard_factors(576).items()}
    {'factor_0': (64, 64), 'factor_1': (9, 9)}
    """
    found = factors(size, torch.float32, torch.device("cpu"))
    return {f"{FACTOR}{at}": matrix for at, matrix in enumerate(found)}


def expected_factor(run: Run, name: str) -> Tensor | None:
    """The matrix of a Hadamard transform that a name of ``read`` stands for; ``None`` for any other name."""
    module, kind, key = parse_tensor_name(name) or ("", "", "")
    if not key.startswith(FACTOR):
        return None
    if kind == FixedHadamard.kind:
        return hadamard_factors(int(run.tensor(tensor_name(module, FixedHadamard, "sizes"))[0]))[key]
    return hadamard_factors(run.tensor(tensor_name(module, Hadamard, "flips")).shape[1])[key]


def splits_heads(run: Run) -> bool:
    """Whether q, k and v have ops of their own on their inputs, so that the graph may not pack them into one."""
    behind = (linear_behind(place) for place in run.manifest.runtime_ops)
    return any(name is not None and name.endswith((".q_proj", ".k_proj", ".v_proj")) for name in behind)


def put_ops_in(model: Any, run: Run) -> None:
    """Put a run's runtime ops into the builder's graph.

    Args:
        model: the ``onnx.ModelProto``, before inputs are quantized in it; changed in place.
        run: the run, with ops of ``OPS`` alone.

    Raises:
        LowbitError: the graph has no place for an op.
    """
    graph, ops = model.graph, run.ops()
    stored = {tensor.name for tensor in graph.initializer}
    nodes: list[Any] = []
    placed: set[str] = set()
    mixed: dict[str, str] = {}  # by a norm's output
    shared: dict[tuple[str, bytes], str] = {}  # by the tensor that linears read, and the op

    def put(place: str, source: str) -> str:
        op = ops[place]
        chain = _Chain(tensor_name(place, op, "").removesuffix("."), source)
        _append(chain, op)
        nodes.extend(chain.nodes)
        graph.initializer.extend(chain.initializers)
        return chain.last

    for node in graph.node:
        for at, source in enumerate(node.input):
            node.input[at] = mixed.get(source, source)
        module = linear_of(run, node, stored)
        if module is not None and at_input(module) in ops:
            placed.add(at_input(module))
            key = node.input[0], _bytes(ops[at_input(module)])
            if key not in shared:
                shared[key] = put(at_input(module), node.input[0])
            node.input[0] = shared[key]
        nodes.append(node)
        norm = _norm_of(node, stored)
        if norm in ops:
            placed.add(norm)
            mixed[node.output[0]] = put(norm, node.output[0])
    if missing := sorted(ops.keys() - placed):
        raise LowbitError(f"the installed onnxruntime-genai builds no place for the op at '{missing[0]}': use 0.18")
    del graph.node[:]
    graph.node.extend(nodes)


def _norm_of(node: Any, stored: set[str]) -> str:
    """The model's name of the norm that a node is; empty for any other."""
    if not node.op_type.endswith("LayerNormalization"):
        return ""
    gain = next((name for name in node.input if name in stored and name.endswith(".weight")), "")
    return renamed(gain).removesuffix(".weight")


def _bytes(op: RuntimeOp) -> bytes:
    parts = [op.kind.encode(), *(value.numpy().tobytes() for value in op.to_tensors().values())]
    return b"".join(parts)


def read(run: Run, model: Any, value: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of every op in a graph, in float32, by the run's names and those of ``hadamard_factors``.

    Args:
        run: the run, for the names of linears that the graph names otherwise.
        model: the ``onnx.ModelProto``.
        value: the content of an initializer.
    """
    found: dict[str, tuple[str, dict[str, Tensor]]] = {}
    for tensor in model.graph.initializer:
        if (parsed := parse_tensor_name(tensor.name)) is not None:
            place, kind, key = parsed
            found.setdefault(place, (kind, {}))[1][key] = value(tensor.name)
    for place, (kind, constants) in found.items():
        if kind == FixedHadamard.kind:  # no tensor of the graph has these
            constants["sizes"] = _sizes(model, f"{place}.runtime.{kind}")
    places = {place: [place] for place in found}
    for place, reader in _readers(run, model, found):
        if linear_behind(place) is not None and reader not in places[place]:
            places[place].append(reader)
    for place, (kind, constants) in found.items():
        for key, content in _as_stored(kind, constants).items():
            for own in places[place]:
                yield f"{own}.runtime.{kind}.{key}", content.float().contiguous()


def _sizes(model: Any, base: str) -> Tensor:
    """The sizes of a transform's blocks, from the first shape that its input takes."""
    from onnx.numpy_helper import to_array

    node = next((node for node in model.graph.node if node.name == f"/{base}/shape_0"), None)
    if node is None:
        raise LowbitError(f"the graph has no shape for '{base}': export the run again")
    *_, blocks, size = to_array(node.attribute[0].t).tolist()
    return torch.full((blocks,), size)


def _readers(run: Run, model: Any, found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """``(place of an op, the name that it has on the input of a linear)`` for each linear that reads one."""
    makers = {output: node for node in model.graph.node for output in node.output}
    weights = {tensor.name for tensor in model.graph.initializer}
    weights |= {name for name, maker in makers.items() if maker.op_type == ROUNDS[1]}
    bases = {f"/{place}.runtime.{kind}/": place for place, (kind, _) in found.items()}
    for node in model.graph.node:
        module = linear_of(run, node, weights)
        if module is None or module not in run.subject.shapes:
            continue
        maker = makers.get(node.input[0])
        while maker is not None and maker.op_type in ROUNDS:
            maker = makers.get(maker.input[0])
        name = maker.name if maker is not None else ""
        if (place := next((own for base, own in bases.items() if name.startswith(base)), None)) is not None:
            yield place, at_input(module)


def _as_stored(kind: str, constants: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An op's tensors as a run stores them, from the graph's; raises ``KeyError`` if one is missing."""
    if kind == Hadamard.kind:
        return {"flips": (1 - constants["signs"]) / 2, **{key: v for key, v in constants.items() if key != "signs"}}
    if kind == Kronecker.kind:
        left, right = constants["left"], constants["right"]
        return {"left": left if len(right) == 1 else left.mT, "right": right}
    return dict(constants)
