"""Runs whose blocks are quantized by processes that share nothing but the run folder.

Where every step reads the float model's hidden states alone, a block does not depend on how those before it were
quantized, and any process may quantize any block. Each process walks through the float model and takes a block that
is neither finished nor somebody's: it holds the lock of a file in ``.run/claims`` (``checkpoints.lock``), which the
system frees when the process dies, and whose time of change is a lease for processes on other machines. When all
shards are there, one process takes the folder for itself and makes of it what a single process makes: the walk that
runs the shards and measures them, and the last files.

Rejected: files that are made with ``O_EXCL`` and deleted at the end. Only their age would tell a dead owner, also on
the same machine, and after a reboot.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from lowbit.checkpoints.lock import Locked, hold, holder
from lowbit.errors import LowbitError
from lowbit.models.block import Calib
from lowbit.models.forward import run_all
from lowbit.pipeline.hidden_states import embed_tokens
from lowbit.pipeline.recipe import Recipe
from lowbit.pipeline.runner import Walk
from lowbit.progress import say
from lowbit.runs.folder import CLAIMS, InUse, State, block_file, claimed, join_folder
from lowbit.runs.manifest import MANIFEST, Identity
from lowbit.runs.plan import Plan

POLL = 0.5  # seconds between two looks at what the others do


def check_claimable(recipe: Recipe, plan: Plan, prefix: str) -> None:
    """Refuse a run whose blocks depend on each other.

    Raises:
        LowbitError: names the step that reads the quantized model's hidden states.
    """
    if recipe.tune is not None:
        raise LowbitError(f"--claim given: {recipe.name} has the step tune, which needs all blocks: leave one out")
    if prefix != "none":
        raise LowbitError(f"--claim and --prefix '{prefix[:80]}' given: leave out one of them")
    inputs = {formats.input for formats in plan.formats.modules.values()} or {None}
    for name, step in recipe.block_steps:
        if any(step.reads_quantized(own) for own in inputs):
            raise LowbitError(
                f"--claim given: {name} of recipe {recipe.name} reads hidden states of the quantized blocks before; "
                "choose a recipe of awq, hadamard, rtn, signs and smoothquant without static inputs, set "
                "affinequant.inputs=float, or leave the option out"
            )


def join(out: Path, identity: Identity, check_new: Callable[[], None], stay: ExitStack) -> State:
    """Make ``out`` the folder of this run, together with other processes, and return its state.

    As long as ``stay`` is open, processes that do not claim are refused.
    """
    return _in_turn(out, lambda: join_folder(out, identity, check_new, stay))


@contextmanager
def claimed_in_turn(out: Path, identity: Identity) -> Iterator[State]:
    """``claimed``, when the other processes of the run have let go of the folder and of its blocks."""
    with ExitStack() as stack:
        yield _in_turn(out, lambda: stack.enter_context(claimed(out, identity, joined=True)))


def _in_turn(out: Path, take: Callable[[], State]) -> State:
    waited = False
    while True:
        try:
            return take()
        except InUse as error:
            if not waited:
                say(f"waiting: {error.who} is at work on {out}")
            waited = True
            time.sleep(POLL)


def claim_blocks(walk: Walk, ids: Tensor) -> None:
    """Quantize blocks that nobody else does until the shards of all are there.

    Args:
        walk: the run's walk; its folder is joined.
        ids: calibration tokens ``(sequences, length)``.
    """
    layers = len(walk.skeleton.layers)
    windows = [(start, min(walk.recipe.window, layers - start)) for start in range(0, layers, walk.recipe.window)]
    while missing := [start for start, count in windows if not _done(walk, start, count)]:
        if any(holder(_claim(walk, start)) is None for start in missing):
            try:
                _pass(walk, ids, windows)
            except FileNotFoundError:  # whoever finishes a run deletes the files that are of use to nobody then
                if not (walk.out / MANIFEST).exists():
                    raise
        else:
            time.sleep(POLL)


def _pass(walk: Walk, ids: Tensor, windows: list[tuple[int, int]]) -> None:
    """One pass through the float model that quantizes what is free on the way, up to the last missing block."""
    walk.fill_float()
    x = embed_tokens(walk.skeleton, ids, walk.device)
    last = max(start for start, count in windows if not _done(walk, start, count))
    for start, count in windows:
        if start > last:
            return
        began, block = time.monotonic(), walk.float_block(start, count)
        y = run_all(block, x, batch=walk.batch)
        if not _done(walk, start, count):
            try:
                with hold(_claim(walk, start)):
                    if not _done(walk, start, count):  # by a process that has just let go
                        walk.quantize(block, Calib(x, x, y, walk.batch, walk.input_range), began)
            except Locked:
                pass
        x = y


def _claim(walk: Walk, start: int) -> Path:
    return walk.out / CLAIMS / f"block-{start:05d}"


def _done(walk: Walk, start: int, count: int) -> bool:
    return all((walk.out / block_file(index)).exists() for index in range(start, start + count))
