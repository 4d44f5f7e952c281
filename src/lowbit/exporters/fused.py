"""Linears that vLLM and SGLang fuse, whose formats they look up by the fused name alone.

Source: https://github.com/vllm-project/vllm, ``quantization/utils/gptq_utils.py`` (``get_dynamic_override``) and
``quantization/awq.py`` (``is_layer_skipped_awq``): both compare patterns with the name of the layer that is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowbit.exporters.run import Subject
from lowbit.quant.format import Format

PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class Fused:
    """Linears that runtimes fuse.

    Attributes:
        agree: by the fused name, the format that all members have; ``None``: they are float.
        differ: the members of the others, such as ``model.layers.0.mlp.gate_proj`` and ``up_proj`` beside it.
    """

    agree: dict[str, Format | None]
    differ: list[tuple[str, ...]]

    def warnings(self) -> list[str]:
        """A line where members differ."""
        if not self.differ:
            return []
        first, *others = self.differ[0]
        beside = " and ".join(name.rpartition(".")[2] for name in others)
        return [
            f"vLLM and SGLang fuse linears whose formats differ, in {len(self.differ)} places such as {first} with "
            f"{beside}, and do not read them: give these one format there; other loaders read each by itself"
        ]


def fused(subject: Subject) -> Fused:
    """The linears of a subject that runtimes fuse."""
    agree, differ = dict[str, Format | None](), list[tuple[str, ...]]()
    known = {*subject.weights, *subject.floats}
    for whole, parts in PARTS.items():
        for name in sorted(known):
            parent, _, own = name.rpartition(".")
            members = tuple(f"{parent}.{part}" for part in parts)
            if own != parts[0] or not known.issuperset(members):
                continue
            formats = {subject.weights.get(member) for member in members}
            if len(formats) == 1:
                agree[f"{parent}.{whole}"] = formats.pop()
            else:
                differ.append(members)
    return Fused(agree, differ)
