"""What every method promises, as functions that take a step: a wrong variant is handed to them like the real one.

Each check takes a step, a block and its calibration data, and raises ``AssertionError`` where a promise is broken.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.methods import METHODS, RTN
from lowbit.methods import training as training_loop
from lowbit.methods.inputs import input_groups
from lowbit.methods.method import Method
from lowbit.methods.mixing import mix_sites
from lowbit.methods.options import with_options
from lowbit.methods.rounding import Rounding
from lowbit.methods.rounding_fit import target
from lowbit.methods.training import loss_unit, relative_loss
from lowbit.models.block import Block, Calib
from lowbit.models.equivalence import move, op_between
from lowbit.models.forward import relative_error, run_all, run_quantized
from lowbit.models.runtime_ops import Clip
from lowbit.pipeline.block_writing import shared_exponent_of
from lowbit.pipeline.recipe import Recipe
from lowbit.quant.static_activations import StaticActs

# Float32: two products of a few dozen terms, rescaled by factors within a few powers of ten.
CLOSE = 1e-4
# Options that make a search short.
SHORT: dict[str, dict[str, Any]] = {"outlier-suppression+": {"grid": 8}}


def brief(step: Method, epochs: int = 1) -> Method:
    """The step as the contract tests run it: one that learns does so for ``epochs``, a search looks at few points."""
    fewer = {"epochs": epochs} if step.schedule is not None else {}
    return with_options(step, **fewer, **SHORT.get(name_of(step), {}))


def name_of(step: Method) -> str:
    """What recipes call a step, a wrong variant of it included."""
    return next(name for name, method in METHODS.items() if isinstance(step, method))


def everything(block: Block) -> dict[str, Tensor]:
    """Every tensor that a block holds, copied."""
    tensors = {f"params {k}": v for k, v in block.params.items()}
    tensors |= {f"clip {k} {i}": t for k, pair in block.clips.items() for i, t in enumerate(pair)}
    tensors |= {f"picture {k}": v for k, v in block.pictures.items()}
    for name, q in block.qweights.items():
        tensors |= {f"codes {name}": q.codes, f"scale {name}": q.qparams.scale, f"zero {name}": q.qparams.zero}
    for name, own in block.input_qparams.items():
        tensors |= {f"input scale {name}": own.scale, f"input zero {name}": own.zero}
    for name, op in block.ops.items():
        tensors |= {f"{op.kind} {name} {k}": v for k, v in op.to_tensors().items()}
    return {name: value.detach().clone() for name, value in tensors.items()}


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """The same names with the same bytes."""
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@dataclass(frozen=True)
class Attempt:
    """A step done once: what it was given, that before and behind it, and what came of it."""

    step: Method
    block: Block
    calib: Calib
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    done: Block


def attempt(step: Method, block: Block, calib: Calib) -> Attempt:
    """The step on a block."""
    before = everything(block) | streams(calib)
    done = step(block, calib)
    return Attempt(step, block, calib, before, everything(block) | streams(calib), done)


def streams(calib: Calib) -> dict[str, Tensor]:
    """The calibration data, copied."""
    return {name: getattr(calib, name).clone() for name in ("x_fp", "x_q", "y_fp")}


def check_input(tried: Attempt) -> None:
    """The given block stays as it is, and so do the library's layers."""
    block, done = tried.block, tried.done
    assert done is not block, "the block itself is given back"
    assert same(tried.before, tried.after), "a tensor that was given has changed"
    assert all(p.is_meta for layer in block.layers for p in layer.parameters())
    assert all(not m._forward_pre_hooks and not m._forward_hooks for layer in block.layers for m in layer.modules())
    assert done.notes[: len(block.notes)] == block.notes, "a note of an earlier step is gone"
    for index, steps in block.record.items():
        assert steps.items() <= done.record[index].items(), "figures of an earlier step are gone"
    assert all(done.pictures.get(name) is picture for name, picture in block.pictures.items()), "a picture is gone"


def check_result(tried: Attempt, does: bool = True) -> None:
    """Parameters keep names, shapes and dtypes; formats stay; everything is finite; it ``does`` something."""
    block, done = tried.block, tried.done
    assert {k: (v.shape, v.dtype) for k, v in done.params.items()} == {
        k: (v.shape, v.dtype) for k, v in block.params.items()
    }
    assert not any(v.requires_grad for v in done.params.values())
    assert done.formats == block.formats
    assert (done.layers, done.start, done.kv) == (block.layers, block.start, block.kv)
    assert all(bool(value.isfinite().all()) for value in everything(done).values()), "a tensor is not finite"
    for linear, pair in done.clips.items():
        rows, columns = block.weight(linear).shape
        shape = (rows, block.weight_format(linear).groups(columns))
        assert all(torch.broadcast_shapes(clip.shape, shape) == shape for clip in pair)
    if does and (
        tried.step.rounds or tried.step.keeps_function
    ):  # a search that corrects may find that nothing helps
        assert not same(everything(done), everything(block)), "a step that does nothing"


def check_codes(tried: Attempt) -> None:
    """``rounds``: codes for exactly the linears with a format, in that format; none otherwise."""
    block, done = tried.block, tried.done
    wanted = set(block.formats) if tried.step.rounds else set()
    assert set(done.qweights) == wanted, "codes and formats differ"
    for linear, q in done.qweights.items():
        format, weight = block.weight_format(linear), block.weight(linear)
        assert q.format == format
        assert q.codes.dtype == torch.uint8
        assert q.codes.shape == weight.shape
        assert q.qparams.scale.shape == q.qparams.zero.shape == (len(weight), format.groups(weight.shape[1]))
        assert int(q.codes.max()) < 2**format.elements.bits
        if format.zero == "code":
            assert torch.equal(q.qparams.zero, q.qparams.zero.round().clamp(0, 2**format.elements.bits - 1))
        exponent = shared_exponent_of(done, linear)
        layout = block.formats[linear].layout
        stored = layout.unpack(layout.pack(q, exponent), format)
        assert torch.equal(stored.codes, q.codes)
        assert torch.equal(stored.dequantize(), q.dequantize()), "scales that the format cannot store"
        if isinstance(tried.step, RTN):
            assert torch.equal(q.dequantize(), format.fake_quant(done.weight(linear), q.qparams))
    static = {name for name in done.formats if isinstance(done.input_format(name), StaticActs)}
    if tried.step.rounds:
        assert set(done.input_qparams) == static, "static inputs without qparams"
    for group in input_groups(done):
        assert len({id(done.input_qparams.get(name)) for name in group}) == 1, "an input with two ranges"


def check_function(tried: Attempt) -> None:
    """``keeps_function``: without quantization the block computes what it did, runtime ops included."""
    wanted = run_all(tried.block, tried.calib.x_fp)
    error = float((run_all(tried.done, tried.calib.x_fp) - wanted).abs().max() / wanted.abs().max())
    assert error < CLOSE, f"the float function changes by {error:.1e}"


def check_ops(tried: Attempt) -> None:
    """``runtime_ops``: what is left is declared, for the inputs that the block has; what was there stays."""
    step, block, done = tried.step, tried.block, tried.done
    inputs = {found.input for found in block.formats.values()} or {None}
    declared = {op for one in inputs for op in step.runtime_ops(one)}
    added = {name: op for name, op in done.ops.items() if op is not block.ops.get(name)}
    assert {type(op) for op in added.values()} <= declared, f"{added} left, {declared} declared"
    gone = {name: op for name, op in block.ops.items() if name not in done.ops}
    sites = [site for site in mix_sites(block) if set(site.places) & set(added)]
    mixed = {reader.module for site in sites for reader in site.readers}
    # What cuts and rounds an input is chosen for its channels: it goes where the step mixes them.
    assert all(isinstance(op, Clip) and name in mixed for name, op in gone.items()), (
        "a runtime op of an earlier step is gone"
    )
    for name in added:
        linear = name in block.linears()
        assert added[name].place == ("before a linear" if linear else "behind a norm"), name


def check_needs(step: Method, block: Block, calib: Calib) -> None:
    """``needs``: NaN in the hidden states that it does not declare reaches nothing."""
    hidden = {"none": ("x_fp", "x_q", "y_fp"), "x_fp": ("x_q",), "x_q": ("x_fp",), "both": ()}[step.needs]
    if not hidden:
        return
    blinded = replace(calib, **{name: torch.full_like(getattr(calib, name), torch.nan) for name in hidden})
    assert same(everything(step(block, calib)), everything(step(block, blinded))), f"it looks at {hidden}"


def looks_at(step: Method, block: Block, calib: Calib) -> set[str]:
    """Which of ``x_fp`` and ``x_q`` its result or its figures depend on."""
    done, found = step(block, calib), set()
    for name in ("x_fp", "x_q"):
        x = getattr(calib, name)
        drawn = x + 0.5 * x.std() * torch.randn(x.shape, generator=torch.Generator().manual_seed(11))
        other = step(block, replace(calib, **{name: drawn}))
        if other.record != done.record or not same(everything(other), everything(done)):
            found.add(name)
    return found


def check_seeds(step: Method, block: Block, calib: Calib) -> None:
    """The same input gives the same bytes and words under other global seeds, whatever is drawn before."""
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        for _ in range(seed):
            torch.rand(7), np.random.rand(5), random.random()
        done = step(block, calib)
        results.append((everything(done), done.notes, done.record))
    assert same(results[0][0], results[1][0]), "the bytes depend on the global seed"
    assert results[0][1:] == results[1][1:]


@contextmanager
def training_steps() -> Any:
    """The sequences of every training step that is taken within."""
    seen: list[list[int]] = []
    real = training_loop.backward

    def watch(tensors: Any, loss: Any, chosen: Tensor, *more: Any) -> float | None:
        seen.append(chosen.tolist())
        return real(tensors, loss, chosen, *more)

    with mock.patch.object(training_loop, "backward", watch):
        yield seen


def check_schedule(step: Method, block: Block, calib: Calib) -> None:
    """``schedule``: without one nothing is learned; with one its epochs are, never from the validation split."""
    with training_steps() as seen:
        done = step(block, calib)
    if step.schedule is None:
        assert not seen, "it learns by gradient descent and declares no schedule"
        return
    key = block.record_key(name_of(step))
    figures = [steps[key] for steps in done.record.values() if key in steps]
    train, held = (set(part.tolist()) for part in step.schedule.split(len(calib.x_q)))
    assert held
    assert figures
    assert len(seen) == len(figures) * step.schedule.epochs * -(-len(train) // step.schedule.batch)
    assert {i for chosen in seen for i in chosen} == train, "it trains on its validation split"
    for one in figures:
        assert len(one["loss"]) == step.schedule.epochs
        assert len(one["held_out"]) == step.schedule.epochs + 1
    with training_steps() as seen:
        with_options(step, epochs=0)(block, calib)
    assert not seen
    assert with_options(step, epochs=7).passes > step.passes > with_options(step, epochs=0).passes


def check_shipped(step: Method, block: Block, calib: Calib) -> None:
    """A learned step ships what it trains: the loss that it kept is that of its codes, or the nearest behind it."""
    done = step(block, calib)
    key = block.record_key(name_of(step))
    (figures,) = (steps[key] for steps in done.record.values() if key in steps)
    assert step.schedule is not None
    _, held = step.schedule.split(len(calib.x_q))
    got = run_quantized(done if step.rounds else RTN()(done, calib), calib.x_q[held])
    wanted = target(block, calib, step.options.correct) if isinstance(step, Rounding) else calib.y_fp
    wanted = wanted[held]
    error, kept = float(relative_loss(got, wanted, loss_unit(wanted, "token"))), min(figures["held_out"])
    assert kept == figures["held_out"][figures["best_epoch"]]
    assert abs(error - kept) <= 1e-3 * kept, f"the fit kept {kept:.5f}, the block ships {error:.5f}"


def check_behind(step: Method, block: Block, calib: Calib, left_by: Method) -> Attempt | None:
    """Behind a step that leaves runtime ops it works and keeps its word, or the recipe refuses the order.

    Args:
        step: the one behind.
        block: what ``left_by`` made of a block.
        calib: the hidden states before it.
        left_by: the step before.

    Returns:
        what it did; ``None`` where it is refused.
    """
    last = () if step.rounds else (("rtn", RTN()),)
    steps = ((name_of(left_by), left_by), (name_of(step), step), *last)
    refused = step.moves_norms and any(op.place == "behind a norm" for op in block.ops.values())
    if not refused:
        Recipe("contract", steps)
        tried = attempt(step, block, calib)
        check_input(tried)
        check_ops(tried)
        check_codes(tried)
        return tried
    with pytest.raises(LowbitError, match=f"{re.escape(name_of(step))} cannot come after {name_of(left_by)}"):
        Recipe("contract", steps)
    for edge in block.edges():
        if op_between(block, edge) is not None:
            with pytest.raises(LowbitError, match=r"follows the norm|is on the input of"):
                move(block, edge, torch.ones(edge.width))
    try:
        tried = attempt(step, block, calib)
    except LowbitError:
        return None
    check_function(tried)  # it leaves these norms alone
    return None


def output_error(block: Block, calib: Calib, *steps: Method) -> float:
    """The squared error of the block as it ships, relative to the float model's output."""
    for step in steps:
        block = step(block, calib)
    return relative_error(run_quantized(block, calib.x_q), calib.y_fp)


def check_factor(step: Method, block: Block, calib: Calib, factor: float) -> None:
    """With the step the output error is at most ``factor`` times that of rounding to nearest."""
    baseline = output_error(block, calib, RTN())
    found = output_error(block, calib, *((step,) if step.rounds else (step, RTN())))
    assert 0 < found <= factor * baseline, f"{found / baseline:.3f} of round-to-nearest's error; {factor} is allowed"
