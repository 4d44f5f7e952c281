"""Assembly against its absence: the error of single layers whose split channels get places of their own.

A checkpoint has one width for all layers, so a layer that is wider by its copies can be run but not stored. Here it
is run: block by block of SmolLM2-135M-Instruct on its float input, one site reassembled at a time, quantized to w4a4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.resolve import load_config, load_tokenizer, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params
from lowbit.data.text import calibration
from lowbit.methods.assembly import MergePlan
from lowbit.methods.dropping import DropPlan
from lowbit.methods.reassemble import candidate_counts, fold
from lowbit.methods.rtn import RTN
from lowbit.methods.statistics import input_statistics
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.edges import Edge, Projection
from lowbit.models.forward import run_all, run_quantized
from lowbit.models.shard import own_states
from lowbit.models.skeleton import Skeleton
from lowbit.quant.scheme_names import parse_scheme
from lowbit.runs.plan import make_plan

SCHEME = parse_scheme("w4a4")
SITES = {"norm": "after norms", "channels": "before down_proj"}


def first_blocks(count: int, sequences: int, length: int) -> Iterator[tuple[Block, Calib]]:
    """The model's first blocks in the formats of ``SCHEME``, each with its float input for the built-in text."""
    folder = resolve("demo").folder
    skeleton, checkpoint = Skeleton(load_config(folder)), Checkpoint(folder)
    skeleton.fill({name: value.float() for name, value in checkpoint.read(skeleton.shared_names).items()})
    formats = make_plan(skeleton, SCHEME).formats
    x = skeleton.embed(calibration("builtin", load_tokenizer(folder), sequences, length, 0).ids)
    for index in range(count):
        params = block_params(checkpoint, skeleton.architecture.blocks, index, skeleton.parameter_shapes(index))
        block = skeleton.block(index, params, formats=formats)
        y = run_all(block, x)
        yield block, Calib(x, x, y)
        x = y


def error(block: Block, calib: Calib) -> float:
    """Of the quantized layer's output, each token relative to its float output."""
    y = run_quantized(RTN()(block, calib), calib.x_q)
    return float(relative_loss(own_states(y), own_states(calib.y_fp), loss_unit(calib.y_fp, "token")))


def wider(block: Block, edge: Edge, weight: Tensor, copies: Tensor) -> Block:
    """The layer with its copies behind all its channels: as wide as it takes, nothing dropped, nothing merged."""
    idx = torch.cat([torch.arange(len(copies)), torch.arange(len(copies)).repeat_interleave(copies - 1)])
    if edge.kind == "norm":
        return fold(block, edge, idx, copies[idx].double(), weight)
    up, gate, (down,) = edge.src, edge.partner, edge.readers
    assert isinstance(up, Projection)
    assert gate is not None
    params = dict(block.params)
    gate.change(params, lambda rows: rows[idx])
    up.change(params, lambda rows: rows[idx] / copies[idx].reshape(-1, *[1] * (rows.ndim - 1)))
    down.change_weight(params, lambda weight: weight[:, idx])
    return replace(block, params=params)


def width_errors(blocks: int, ratios: tuple[float, ...]) -> dict[str, Any]:
    """Mean error over blocks and sites, ``{site: {way to make room: {ratio: error}}}``.

    Second moments are of the first half of 8 x 256 tokens, errors of the second.
    """
    sums: dict[str, dict[str, dict[str, list[float]]]] = {}
    for block, calib in first_blocks(blocks, 8, 256):
        scored = Calib(calib.x_fp[4:], calib.x_q[4:], calib.y_fp[4:])
        plain = error(block, scored)
        for edge in block.edges():
            if edge.kind not in SITES:
                continue
            first = edge.readers[0].module
            seen = input_statistics(block, calib.x_fp[:4], [first], ("normalized_gram", "peak"))[first]
            peak, gram = seen["peak"], seen["normalized_gram"].double()
            weight = torch.cat([dst.read(block.params) for dst in edge.readers])
            for ratio in ratios:
                counts = candidate_counts(peak, ratio, 200)
                copies = counts[-1] if counts else torch.ones_like(peak, dtype=torch.long)
                extra, keep = int((copies - 1).sum()), copies > 1
                found = {"not split": plain, "no assembly, wider": error(wider(block, edge, weight, copies), scored)}
                plans: dict[str, DropPlan | MergePlan] = {"drop": DropPlan(weight, gram, 0.01, keep)}
                if edge.kind == "norm":
                    for kind in ("bipartite", "one-to-one"):
                        plans[kind] = MergePlan(weight, gram, keep, kind == "one-to-one")
                for kind, plan in plans.items():
                    found[kind] = error(fold(block, edge, *plan.without(extra, copies)), scored)
                for way, value in found.items():
                    sums.setdefault(SITES[edge.kind], {}).setdefault(way, {}).setdefault(str(ratio), []).append(value)
    return {
        site: {way: {r: sum(v) / len(v) for r, v in by.items()} for way, by in ways.items()}
        for site, ways in sums.items()
    }
