"""Assembly against its absence: the error of single layers whose split channels get places of their own.

A checkpoint has one width for all layers, so a layer that is wider by its copies can be run but not stored. Here it
is run: block by block of SmolLM2-135M-Instruct on its float input, one site reassembled at a time, rounded to w4a4.
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
from lowbit.methods.reassemble import candidate_counts, fold, gate_of
from lowbit.methods.rtn import RTN
from lowbit.methods.statistics import input_moments
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.architecture import Edge, module_of
from lowbit.models.block import Block, Calib, run_all
from lowbit.models.skeleton import Skeleton
from lowbit.quant.scheme import parse_scheme

SCHEME = parse_scheme("w4a4")
SITES = {"norm": "after norms", "channels": "before down_proj"}


def first_blocks(count: int, sequences: int, length: int) -> Iterator[tuple[Block, Calib]]:
    """The model's first blocks, each with its float input for windows of the built-in text."""
    folder = resolve("demo").folder
    skeleton, checkpoint = Skeleton(load_config(folder)), Checkpoint(folder)
    skeleton.fill({name: value.float() for name, value in checkpoint.read(skeleton.rest_names).items()})
    x = skeleton.start(calibration("builtin", load_tokenizer(folder), sequences, length, 0).ids)
    for index in range(count):
        params = block_params(checkpoint, skeleton.family.blocks, index, skeleton.layers[index])
        block = skeleton.block(index, params)
        y = run_all(block, x)
        yield block, Calib(x, x, y)
        x = y


def error(block: Block, calib: Calib) -> float:
    """Of the rounded layer's output, each token relative to its float output."""
    rounded = RTN()(block, calib, SCHEME)
    y = run_all(rounded, calib.x_q, rounded.quantized_params(), SCHEME)
    return float(relative_loss(y, calib.y_fp, loss_unit(calib.y_fp, "token")))


def wider(block: Block, edge: Edge, weight: Tensor, copies: Tensor) -> Block:
    """The layer with its copies behind all its channels: as wide as it takes, nothing dropped, nothing merged."""
    idx = torch.cat([torch.arange(len(copies)), torch.arange(len(copies)).repeat_interleave(copies - 1)])
    if edge.kind == "norm":
        return fold(block, edge, idx, copies[idx].double(), weight)
    (down,), up, gate = edge.dst, module_of(edge.src), gate_of(block, edge.src)
    assert gate is not None
    params = dict(block.params)
    params[f"{module_of(gate)}.weight"] = block.weight(module_of(gate))[idx]
    params[f"{up}.weight"] = block.weight(up)[idx] / copies[idx, None]
    params[f"{module_of(down)}.weight"] = block.weight(module_of(down))[:, idx]
    return replace(block, params=params)


def width_errors(blocks: int, ratios: tuple[float, ...]) -> dict[str, Any]:
    """Mean error over blocks and sites, ``{site: {way to make room: {ratio: error}}}``.

    Moments are of the first half of 8 x 256 tokens, errors of the second.
    """
    sums: dict[str, dict[str, dict[str, list[float]]]] = {}
    for block, calib in first_blocks(blocks, 8, 256):
        scored = Calib(calib.x_fp[4:], calib.x_q[4:], calib.y_fp[4:])
        plain = error(block, scored)
        for edge in block.edges():
            if edge.kind not in SITES:
                continue
            readers = [module_of(dst) for dst in edge.dst]
            moments = input_moments(block, calib.x_fp[:4], readers[:1], ("even_gram", "peak"))[readers[0]]
            weight = torch.cat([block.weight(name) for name in readers])
            for ratio in ratios:
                counts = candidate_counts(moments.peak, ratio, 200)
                copies = counts[-1] if counts else torch.ones_like(moments.peak, dtype=torch.long)
                extra, keep = int((copies - 1).sum()), copies > 1
                found = {"not split": plain, "no assembly, wider": error(wider(block, edge, weight, copies), scored)}
                plans: dict[str, DropPlan | MergePlan] = {"drop": DropPlan(weight, moments.even_gram, 0.01, keep)}
                if edge.kind == "norm":
                    for kind in ("bipartite", "one-to-one"):
                        plans[kind] = MergePlan(weight, moments.even_gram, keep, kind == "one-to-one")
                for kind, plan in plans.items():
                    found[kind] = error(fold(block, edge, *plan.without(extra, copies)), scored)
                for way, value in found.items():
                    sums.setdefault(SITES[edge.kind], {}).setdefault(way, {}).setdefault(str(ratio), []).append(value)
    return {
        site: {way: {r: sum(v) / len(v) for r, v in by.items()} for way, by in ways.items()}
        for site, ways in sums.items()
    }
