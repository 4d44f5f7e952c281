"""Saving a loaded run as a plain model: refused where that would be another model.

``save_pretrained`` writes parameters and nothing else. Runtime ops, the quantization of inputs, queries, keys and
values, and a prefix are not parameters; without them the saved model computes something else, and nothing says so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from lowbit.errors import LowbitError
from lowbit.models.attention import attention_name
from lowbit.models.runtime_ops import RuntimeOp
from lowbit.quant.activations import ActFormat
from lowbit.quant.scheme import ModelFormats


@dataclass
class SavingRefused:
    """Takes the place of a model's ``save_pretrained`` and ``push_to_hub``; copied and pickled with the model.

    Attributes:
        folder: the run folder.
        lost: what a saved model would lack.
        kv: format of queries, keys and values, whose attention function a process that unpickles the model lacks.
        attention: name of the attention function that quantizes nothing.
        prefix: tokens of the prefix.
    """

    folder: str
    lost: str
    kv: ActFormat | None
    attention: str
    prefix: int

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Raise the ``LowbitError``."""
        raise LowbitError(
            f"this model has {self.lost}, which save_pretrained and push_to_hub cannot store; copy the folder "
            f"{self.folder} itself, which lowbit.load reads, or write it for a runtime: lowbit export"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.kv is not None:
            attention_name(self.kv, self.attention, self.prefix)


def refuse_saving(
    model: Any,
    folder: Path,
    ops: Iterable[RuntimeOp],
    formats: ModelFormats,
    attention: str,
    prefix: int = 0,
) -> None:
    """Make a model with anything that is no parameter refuse to be saved; others are saved as usual.

    Args:
        model: the loaded model.
        folder: the run folder.
        ops: the runtime ops of the model.
        formats: formats of its modules.
        attention: name of the attention function before quantization.
        prefix: tokens of the prefix.
    """
    lost = [f"{count} {why}" for why, count in Counter(op.why for op in ops).items()]
    inputs = {format.name for name in formats.modules if (format := formats.input(name)) is not None}
    lost += [f"inputs quantized as {name}" for name in sorted(inputs)]
    lost += [] if formats.kv is None else [f"queries, keys and values quantized as {formats.kv.name}"]
    lost += [f"a prefix of {prefix} token{'s' * (prefix > 1)}"] if prefix else []
    if lost:
        refusal = SavingRefused(str(folder), " and ".join(lost), formats.kv, attention, prefix)
        model.save_pretrained = model.push_to_hub = refusal
