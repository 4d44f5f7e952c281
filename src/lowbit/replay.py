"""A step's loss and gradients as one CUDA graph: recorded once, launched as a whole.

One step of a fit is about two thousand small operations, whatever the model's size. To launch them one by one takes a
host some 20 to 40 ms, in which a GPU could do the work of a 7B model's block several times. Shapes and operations of
a step never change within a fit, so the second step on is replayed from a recording: the same kernels in the same
order, hence the same bits; only the launching is gone.

What is recorded reads and writes fixed memory: the chosen sequences are copied into the recording's own inputs before
each replay, parameters, masks and constants are changed in place by whoever changes them, and gradients appear in the
same tensors each time. What asks the GPU for a number while it computes cannot be recorded; such a fit goes on
operation by operation, and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lowbit.feed import Rows

EAGER = 2  # steps before the recording: libraries are loaded and buffers made by then


class Replay:
    """Loss and gradients of a fit on a GPU.

    Attributes:
        refused: why nothing could be recorded, in one line; empty as long as nothing went wrong.
        replayed: how many steps came from the recording.
    """

    def __init__(self, rows: Rows, error: Callable[[Sequence[Tensor]], Tensor]) -> None:
        """``error`` makes the loss from what ``rows`` gives for the chosen sequences, and from nothing that moves."""
        self.rows, self.error = rows, error
        self.refused, self.replayed = "", 0
        self._seen = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._loss = torch.empty(0)
        self._grads: list[Tensor | None] = []

    @property
    def wanted(self) -> bool:
        """Whether there are launches to save."""
        return self.rows.device.type == "cuda" and not self.refused

    def __call__(self, tensors: Sequence[Tensor], chosen: Tensor) -> Tensor | None:
        """The loss for the sequences ``chosen``, with gradients in ``tensors``, or ``None``: make it plainly.

        That is in the first steps, for another number of sequences than was recorded, and after a refusal.
        """
        self._seen += 1
        other = self._graph is not None and len(chosen) != len(self._inputs[0])
        if not self.wanted or self._seen <= EAGER or other:
            return None
        given = self.rows(chosen)
        if self._graph is None and not self._recorded(tensors, given):
            return None
        assert self._graph is not None
        for to, value in zip(self._inputs, given, strict=True):
            to.copy_(value)
        self._graph.replay()
        self.replayed += 1
        for tensor, grad in zip(tensors, self._grads, strict=True):
            tensor.grad = grad
        return self._loss

    def _recorded(self, tensors: Sequence[Tensor], given: Sequence[Tensor]) -> bool:
        """Record one step; nothing of it is computed yet."""
        self._inputs = [value.clone() for value in given]
        for tensor in tensors:
            tensor.grad = None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                loss = self.error(self._inputs)
                loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
                self._loss = loss.detach()
        except RuntimeError as error:
            self.refused = str(error).splitlines()[0][:160]
            torch.cuda.synchronize()
            return False
        finally:
            self._grads = [tensor.grad for tensor in tensors]
        self._graph = graph
        return True
