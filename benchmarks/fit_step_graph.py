"""A step of a fit whose forward and backward pass are launched as one CUDA graph; for ``fit_step.py``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowbit.methods.adam import Adam
from lowbit.methods.affine_fit import AffineFit

WARM = 3  # steps on a side stream before the recording: kernels are compiled and workspaces made there


class NotRecorded(Exception):
    """A step did something that a CUDA graph cannot hold, such as a copy from the host; the message says what."""


def graph_stepper(fit: AffineFit, chosen: Tensor) -> Callable[[Tensor], None]:
    """One optimisation step for as many sequences as ``chosen`` has, with a recorded forward and backward pass.

    The rows of each step are copied into the tensors that the graph reads; the optimiser and the projections, which
    look at numbers on the host, run behind it as they are.

    Raises:
        NotRecorded: the pass cannot be recorded.
    """
    groups = fit.groups()
    adam, leaves = Adam(groups), [leaf for group, _ in groups for leaf in group]
    rows = fit.rows
    fixed = [tensor.clone() for tensor in rows(chosen)]
    fit.rows = lambda indices: fixed  # type: ignore[assignment]
    graph = torch.cuda.CUDAGraph()
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM):
                _pass(fit, leaves, chosen)
        torch.cuda.current_stream().wait_stream(side)
        for leaf in leaves:
            leaf.grad = None
        with torch.cuda.graph(graph):
            fit.loss(chosen).backward()
    except RuntimeError as error:
        raise NotRecorded(str(error).splitlines()[0]) from error
    finally:
        fit.rows = rows

    def step(indices: Tensor) -> None:
        for target, source in zip(fixed, rows(indices), strict=True):
            target.copy_(source)
        graph.replay()
        adam.step(1.0)
        with torch.no_grad():
            fit.project()

    return step


def _pass(fit: AffineFit, leaves: list[Tensor], chosen: Tensor) -> None:
    for leaf in leaves:
        leaf.grad = None
    fit.loss(chosen).backward()
