"""Runs a ``.pte`` decoder in ExecuTorch's own runtime: logits and greedy text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Session:
    """A loaded decoder; its cache is filled by position, so a new text starts at 0.

    Attributes:
        context: capacity of the cache in tokens.
    """

    def __init__(self, path: Path) -> None:
        """Load the file at ``path``."""
        # Imported for the operators that they register.
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401
        from executorch.runtime import Runtime

        self._program: Any = Runtime.get().load_program(path)
        self._forward: Any = self._program.load_method("forward")
        self.context = int(self._program.load_method("get_max_context_len").execute([])[0])

    def step(self, tokens: Sequence[int], position: int) -> Tensor:
        """Logits ``(vocabulary,)`` after ``tokens``, the first of which is at ``position``."""
        inputs = (torch.tensor([list(tokens)]), torch.tensor([position]))
        logits: Tensor = self._forward.execute(inputs)[0]
        return logits.flatten().clone()

    def logits(self, ids: Sequence[int], prompt: int) -> Tensor:
        """Logits ``(len(ids) - prompt + 1, vocabulary)`` after the first ``prompt`` tokens and after each later one.

        The prompt is passed at once, the others one by one: prefill and decoding as in a runtime.
        """
        rows = [self.step(ids[:prompt], 0)]
        rows += [self.step([token], position) for position, token in enumerate(ids[prompt:], prompt)]
        return torch.stack(rows)

    def greedy(self, ids: Sequence[int], stop: Sequence[int] = ()) -> Iterator[int]:
        """Tokens that follow ``ids``, each the most likely one, until one of ``stop`` or the end of the cache."""
        token = int(self.step(ids, 0).argmax())
        for position in range(len(ids), self.context):
            yield token
            if token in stop:
                return
            token = int(self.step([token], position).argmax())


def methods_of(path: Path) -> dict[str, list[Any]]:
    """The values of the program's constant methods, by name."""
    from executorch.runtime import Runtime

    program: Any = Runtime.get().load_program(path)
    return {name: list(program.load_method(name).execute([])) for name in program.method_names - {"forward"}}


def set_threads(count: int) -> None:
    """Set XNNPACK's number of threads for the whole process; no program may be running."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    _unsafe_reset_threadpool(count)
