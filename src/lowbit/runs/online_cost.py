"""What a run computes and stores beside the model's own graph: its runtime ops, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError, shown
from lowbit.models.ops import OPS
from lowbit.models.runtime_ops import RuntimeOp, linear_behind, parse_tensor_name
from lowbit.runs.manifest import MANIFEST, Manifest


@dataclass(frozen=True)
class OnlineCost:
    """The cost of a run's runtime ops.

    Attributes:
        counts: ops by kind, most frequent first.
        macs: multiply-adds of all of them for a token.
        linear_macs: those of the quantized linears for a token. Of a mixture both count all experts.
        bits: stored bits of their tensors.

    >>> cost = OnlineCost({"hadamard": 2}, 500, 10_000, 1024)
    >>> cost.share, cost.text
    (0.05, '2 hadamard: 5.00 % of the multiply-adds of the quantized linears')
    """

    counts: Mapping[str, int]
    macs: int
    linear_macs: int
    bits: int

    @property
    def share(self) -> float:
        """Multiply-adds, as a share of those of the quantized linears."""
        return self.macs / self.linear_macs

    @property
    def text(self) -> str:
        """Both in a line."""
        counts = ", ".join(f"{count} {kind}" for kind, count in self.counts.items())
        return f"{counts}: {self.share:.2%}".replace("%", " %") + " of the multiply-adds of the quantized linears"


def online_cost(
    checkpoint: Checkpoint, manifest: Manifest, shapes: Mapping[str, tuple[int, int]]
) -> OnlineCost | None:
    """The cost of a run's runtime ops; ``None`` for a run without any.

    Args:
        checkpoint: of the run.
        manifest: the run's.
        shapes: ``(out, in)`` of its quantized linears in decoder layers.

    Raises:
        LowbitError: the run does not hold the ops that its manifest lists.
    """
    if not manifest.runtime_ops:
        return None
    ops = stored_ops(checkpoint, manifest, shapes).values()
    counts = dict(Counter(op.kind for op in ops).most_common())
    linear_macs = sum(rows * columns for rows, columns in shapes.values())
    return OnlineCost(counts, sum(op.macs for op in ops), linear_macs, sum(op.bits for op in ops))


def stored_ops(
    checkpoint: Checkpoint, manifest: Manifest, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, RuntimeOp]:
    """A run's runtime ops by their places, as the manifest names them; arguments and errors of ``online_cost``."""
    stored: dict[str, dict[str, str]] = {}
    for name in checkpoint.names:
        if (parsed := parse_tensor_name(name)) is not None:
            module, _, tensor = parsed
            stored.setdefault(module, {})[tensor] = name
    return {
        module: _read(checkpoint, kind, module, stored.get(module, {}), shapes)
        for module, kind in manifest.runtime_ops.items()
    }


def _read(
    checkpoint: Checkpoint,
    kind: str,
    module: str,
    tensors: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
) -> RuntimeOp:
    """The op of a kind at a module."""
    linear = linear_behind(module) or module
    if linear in shapes:
        width = shapes[linear][1]
    else:
        gain = f"{module}.weight"
        width = len(checkpoint.read([gain])[gain])
    try:
        return OPS[kind].from_tensors({name: checkpoint.read([full])[full] for name, full in tensors.items()}, width)
    except (KeyError, ValueError) as error:
        raise LowbitError(
            f"{checkpoint.folder} holds no valid {shown(kind)} at '{module}', which {MANIFEST} lists: it is broken"
        ) from error
