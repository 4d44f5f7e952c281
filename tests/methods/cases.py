"""For each method the case that it exists for, and by which factor it beats rounding to nearest there.

A case plants what the method is made for, in the block or in its hidden states: most are an equivalent transform that
spreads channels badly and that the method has to find and undo. ``factor`` is the share of round-to-nearest's squared
output error that may be left; ``found`` is what was measured. The slack between the two is for the order of sums on
other machines, and it ends below what a method with a part missing leaves: ``MUTANTS`` shows that for those listed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lowbit.models.block import Block, Calib
from lowbit.models.equivalence import can_shift, move
from lowbit.models.forward import run_all
from tiny import block_of, planned, tiny_model

FEW = (5, 9, 33, 60)


def outliers(block: Block, kind: str = "norm", channels: Sequence[int] = FEW, times: float = 30.0) -> Block:
    """Some channels behind every norm (or other edges) larger, and the weights that read them smaller."""
    params = dict(block.params)
    for edge in block.edges():
        if edge.kind == kind:
            map = torch.ones(edge.width)
            map[list(channels)] = 1 / times
            params = move(block, edge, map, params)
    return replace(block, params=params)


def shifted(block: Block, channels: Sequence[int] = range(20, 28), by: float = 10.0) -> Block:
    """Some channels behind every norm off zero, to either side in turn, where biases take it back."""
    params = dict(block.params)
    for edge in block.edges():
        if edge.kind == "norm" and can_shift(block, edge):
            width = edge.width
            shift = torch.zeros(width)
            shift[list(channels)] = by * torch.tensor([1.0, -1.0]).repeat(len(channels) // 2)
            params = move(block, edge, torch.ones(width), params, shift)
    return replace(block, params=params)


def mixed_heads(block: Block) -> Block:
    """Values of every head mixed by a dense matrix, which the output projection undoes: no diagonal does."""
    generator, params = torch.Generator().manual_seed(0), dict(block.params)
    for edge in block.edges():
        if edge.kind == "heads":
            dim = edge.layout.dim
            noise = torch.randn(edge.layout.kv, dim, dim, generator=generator) / dim**0.5
            params = move(block, edge, torch.eye(dim) + noise, params)
    return replace(block, params=params)


def salient(block: Block, channels: Sequence[int] = FEW, times: float = 30.0) -> Block:
    """Some channels behind every norm larger and the weights as they are: errors of their weights count most."""
    params = dict(block.params)
    for edge in block.edges():
        if edge.kind == "norm":
            for name in (edge.src.parameter, edge.src.bias):
                if name in params:
                    params[name] = params[name].clone()
                    params[name][list(channels)] *= times
    return replace(block, params=params)


def correlated(x: Tensor, rank: int = 8) -> Tensor:
    """Hidden states in a few directions, and a little noise."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(*x.shape[:2], rank, generator=generator) @ torch.randn(rank, x.shape[2], generator=generator)
    return few / rank**0.5 + 0.05 * torch.randn(x.shape, generator=generator)


def one_sided(x: Tensor) -> Tensor:
    """Hidden states of which some channels are always positive and as many always negative."""
    x, size = x.clone(), 5 * x.std()
    x[..., 4:20:2] -= size
    x[..., 5:20:2] += size
    return x


@dataclass(frozen=True)
class Case:
    """What a method exists for.

    Attributes:
        what: is planted.
        factor: share of round-to-nearest's error that may be left.
        found: what is left.
        family: of the tiny model.
        scheme: inputs are quantized unless the method is about weights alone.
        options: of the method.
        block, hidden: what is done to a window of two layers, and to its hidden states.
        drift: how far the quantized model's hidden states are off the float model's, in their standard deviations.
    """

    what: str
    factor: float
    found: float
    family: str = "llama-odd"
    scheme: str = "w4a8"
    options: dict[str, Any] = field(default_factory=dict)
    block: Callable[[Block], Block] = lambda block: block
    hidden: Callable[[Tensor], Tensor] = lambda x: x
    drift: float = 0.0

    def build(self) -> tuple[Block, Calib]:
        """The block and its calibration data."""
        block, x = block_of(tiny_model(self.family), 1, 2)
        block, x = planned(self.block(block), self.scheme), self.hidden(x)
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(4))
        return block, Calib(x, x + self.drift * x.std() * noise, run_all(block, x))


CASES: dict[str, Case] = {
    "rtn": Case("nothing: it is the baseline", 1.0, 1.0),
    # The scales without the activations' maxima leave 0.47, no scales 1.
    "smoothquant": Case("outlier channels behind norms", 0.2, 0.12, block=lambda b: outliers(b, times=100)),
    "signs": Case("channels of one sign", 0.65, 0.46, family="opt", scheme="w8a4", hidden=one_sided),
    # Shifts without scales leave 0.27, scales without shifts 0.54.
    "outlier-suppression+": Case(
        "outlier channels and shifted ones", 0.18, 0.11, family="opt", block=lambda b: shifted(outliers(b))
    ),
    # A threshold above all channels leaves 1.
    "llm-int8": Case(
        "outlier channels behind norms", 0.001, 0.0003, scheme="w8a8", block=lambda b: outliers(b, times=300)
    ),
    # Round to nearest has as many ranges, of equal parts of the channels.
    "rptq": Case("outlier channels behind norms", 0.2, 0.105, scheme="w8a4-static8", block=outliers),
    # Behind norms alone 0.25, before o_proj and down_proj alone 0.96.
    "hadamard": Case(
        "an outlier channel behind norms",
        0.4,
        0.25,
        family="llama",
        scheme="w8a4",
        block=lambda b: outliers(b, channels=(5,)),
    ),
    # Scales alone leave 0.40, clips alone 0.68.
    "awq": Case("salient weights", 0.35, 0.24, family="opt", scheme="w3a8g16", block=salient),
    # The error is measured on the calibration tokens, which are few: shrinkage leaves 0.29.
    "gptq": Case("correlated inputs", 0.2, 0.10, options={"shrinkage": 0.0}, hidden=correlated),
    # Learned scales with the nearest codes leave 0.60; the few steps here are too few for both.
    "rounding": Case(
        "correlated inputs",
        0.35,
        0.20,
        options={"epochs": 10, "held_out": 0.0, "scales": False},
        hidden=correlated,
    ),
    # GPTQ, which approximates the weights' output on the input as it is, leaves 0.92.
    "qronos": Case("correlated inputs that are off the float model's", 0.2, 0.11, hidden=correlated, drift=0.3),
    # Half of the weights are 0: the rest makes up for them where inputs have few directions.
    "sparsegpt": Case(
        "inputs in a few directions, at few bits", 0.45, 0.28, scheme="w3a8", hidden=lambda x: correlated(x, 2)
    ),
    # The start without learning leaves 0.52, diagonals alone 0.27.
    "affinequant": Case(
        "outlier channels, and heads mixed by matrices",
        0.2,
        0.12,
        family="qwen3",
        options={"epochs": 4},
        block=lambda b: mixed_heads(outliers(b, times=10)),
    ),
    # A fifth of the channels may be copies; with a fiftieth 0.46 is left.
    "reassemble": Case(
        "a few outlier channels before down_proj",
        0.45,
        0.29,
        family="opt",
        scheme="w8a4",
        options={"most": 0.2},
        block=lambda b: outliers(b, "channels", (5, 9)),
    ),
    "refit": Case("correlated inputs that are off the float model's", 0.6, 0.40, hidden=correlated, drift=0.3),
    "lkd": Case(
        "weights in groups of few bits", 0.45, 0.29, scheme="w3a8g16", options={"epochs": 6, "held_out": 0.0}
    ),
    "lowrank": Case(
        "errors of a window that a change of few directions makes up for",
        0.55,
        0.37,
        options={"epochs": 6, "held_out": 0.0},
        hidden=correlated,
        drift=0.05,
    ),
}

# Options under which a method does what it does not by default: leaves runtime ops, looks at other hidden states.
VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "rtn": ({"search": True},),
    "hadamard": ({"input_clip": 0.9}, {"qkv": False, "mlp": False, "block": 8}, {"signs": False}),
    "gptq": ({"target": "output"}, {"search": True}),
    "rounding": ({"start": "gptq"}, {"parametrisation": "sigmoid"}, {"parametrisation": "gumbel", "bound": 1.0}),
    "qronos": ({"act_order": False, "search": True},),
    "sparsegpt": ({"pattern": "unstructured"}, {"pattern": "4:8", "search": True}),
    "affinequant": (
        {"qkv": "matrix", "mlp": "matrix"},
        {"act_clip": True},
        {"qkv": "kronecker", "mlp": "hadamard-matrix", "heads": "hadamard", "channels": "blocks"},
    ),
    "reassemble": (
        {"sites": "all", "theta": "most", "most": 0.2},
        {"sites": "norms", "assembly": "bipartite", "theta": "most", "most": 0.2},
        {"offsets": "both", "theta": "most", "most": 0.2},
    ),
    "refit": ({"search": False},),
    "lkd": ({"inputs": "float", "loss": "mse"}, {"norms": False}),
    "lowrank": ({"norms": True, "share": "input"},),
}
