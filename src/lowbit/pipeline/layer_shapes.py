"""The shapes of a model's layers, as far as time and memory depend on them; from the config alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from lowbit.models.architecture import LayerKind
from lowbit.models.build import text_config
from lowbit.models.skeleton import Skeleton
from lowbit.runs.plan import Plan

# What configs call the number of experts that a token reaches.
PER_TOKEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
    "moe_top_k",
)


@dataclass(frozen=True)
class Reads:
    """Linears that read one tensor, or ``count`` such groups of as many experts.

    Attributes:
        width: channels that they read.
        rows: rows of all of them together.
        formats: rows by their format's name and its group, of those that are quantized.
        linears: number of linears.
        count: number of experts that have such a group; 1 for linears that are no expert's.
        share: of the tokens, how many reach one of them.
        expert: whether they are an expert's.
        inputs: whether their input is quantized.
    """

    width: int
    rows: int
    formats: tuple[tuple[str, int | None, int], ...]
    linears: int
    count: int
    share: float
    expert: bool
    inputs: bool

    @property
    def weights(self) -> int:
        """Weights of all of them."""
        return self.width * self.rows * self.count

    @property
    def quantized(self) -> int:
        """Weights that are quantized."""
        return self.width * self.count * sum(rows for _, _, rows in self.formats)

    @property
    def active(self) -> float:
        """Weights that a token is multiplied with."""
        return self.weights * self.share


@dataclass(frozen=True)
class LayerShape:
    """What a layer computes with.

    Attributes:
        reads: groups of linears in execution order.
        hidden: width of the hidden states.
        attention: channels of all query heads; 0 for a layer without an attention function.
        head: channels of one head.
    """

    reads: tuple[Reads, ...]
    hidden: int
    attention: int
    head: int

    @cached_property
    def weights(self) -> int:
        """Weights of the layer's linears, those of all experts."""
        return sum(group.weights for group in self.reads)

    @cached_property
    def quantized(self) -> int:
        """Those that are quantized."""
        return sum(group.quantized for group in self.reads)

    @cached_property
    def active(self) -> float:
        """Weights that a token is multiplied with."""
        return sum(group.active for group in self.reads)

    @cached_property
    def expert_weights(self) -> int:
        """Weights of experts, whose quantized values are computed anew whenever they are read."""
        return sum(group.weights for group in self.reads if group.expert)

    @cached_property
    def widths(self) -> float:
        """Channels that a token's linears read, each tensor once."""
        return sum(group.width * group.count * group.share for group in self.reads)

    @cached_property
    def widest(self) -> int:
        """Most channels that a quantized linear reads."""
        return max((group.width for group in self.reads if group.formats), default=0)

    @cached_property
    def linears(self) -> int:
        """Number of linears."""
        return sum(group.linears * group.count for group in self.reads)


def experts_per_token(config: Any) -> int | None:
    """How many experts of a layer a token reaches, by the config; ``None`` if it does not say.

    >>> from transformers import Qwen3MoeConfig
    >>> experts_per_token(Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8))
    8
    """
    found = (getattr(text_config(config), name, None) for name in PER_TOKEN)
    return next((int(number) for number in found if isinstance(number, int) and number > 0), None)


def layer_shapes(skeleton: Skeleton, plan: Plan) -> Counter[LayerShape]:
    """How many layers of the model have each shape."""
    config = skeleton.text_config
    heads = getattr(config, "num_attention_heads", None) or 1
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    chosen = experts_per_token(skeleton.config)
    out: Counter[LayerShape] = Counter()
    for index, kind in enumerate(skeleton.architecture.layers):
        reads = Counter(_reads(plan, kind, index, group, chosen) for group in kind.groups)
        merged = tuple(_times(group, number) for group, number in reads.items())
        out[LayerShape(merged, config.hidden_size, heads * head if kind.attention else 0, head)] += 1
    return out


def _reads(plan: Plan, kind: LayerKind, index: int, group: tuple[str, ...], chosen: int | None) -> Reads:
    names = [f"{plan.architecture.blocks}.{index}.{name}" for name in group]
    shapes = [plan.shapes[name] for name in names]
    formats: Counter[tuple[str, int | None]] = Counter()
    for name, (rows, _) in zip(names, shapes, strict=True):
        if (own := plan.formats.modules.get(name)) is not None:
            formats[own.weight.name, own.weight.group] += rows
    expert = kind.expert_of(group[0]) is not None
    experts = kind.experts or kind.listed
    share = 1.0 if not expert or experts is None or chosen is None else min(1.0, chosen / experts.count)
    return Reads(
        width=shapes[0][1],
        rows=sum(rows for rows, _ in shapes),
        formats=tuple((name, size, rows) for (name, size), rows in formats.items()),
        linears=len(group),
        count=1,
        share=share,
        expert=expert,
        inputs=any(plan.formats.input(name) is not None for name in names),
    )


def _times(group: Reads, number: int) -> Reads:
    return replace(group, count=number * group.count)
