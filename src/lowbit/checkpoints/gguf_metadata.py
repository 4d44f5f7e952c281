"""The metadata of a ``.gguf`` file, key by key: typed, checked, and complete.

Whoever builds a config asks for the keys it understands; ``refuse_unread`` then refuses the file by the name of the
first key that nobody asked for, unless the key cannot change what the model computes. A key that a later llama.cpp
invents is thus a refusal and never a silently different model.

Three kinds of keys have no effect on the function: those about the file, its text and its making (``general.``,
``tokenizer.``, ``split.``, ``quantize.``, ``imatrix.``, and the prefixes of tools, which llama.cpp does not read),
those in ``INERT``, and those in ``NEUTRAL`` as long as their value says "off".

Sources: ``gguf.constants.Keys`` (all names), https://github.com/ggml-org/llama.cpp/blob/master/src/llama-model.cpp
(which are read, and their defaults).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gguf import MODEL_ARCH_NAMES

from lowbit.errors import LowbitError, shown

LARGEST = 1 << 31
# Prefixes besides the architecture's whose keys llama.cpp reads, or that mark a file that is not a language model.
EFFECTIVE = frozenset({"adapter", "clip", "diffusion", "xielu", *MODEL_ARCH_NAMES.values()})
# Keys of the architecture that describe the file or the training. Pooling applies to embeddings, not to logits.
INERT = frozenset({"tensor_data_layout", "rope.scaling.finetuned", "pooling_type"})
# Keys of the architecture for features that no architecture read here has, with the values that turn them off.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attention.output_scale": (0.0, 1.0),
    "attention.temperature_scale": (0.0,),
    "attention.temperature_length": (0,),
    "attention.shared_kv_layers": (0,),
    "attention.sliding_window": (0,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "router_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "logit_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "expert_shared_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "n_deepstack_layers": (0,),
    "use_parallel_residual": (False,),
    "swin_norm": (False,),
    "rope.scaling.alpha": (0.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "rope.scaling.yarn_ext_factor": (-1.0,),
}


class Metadata:
    """The keys of one file and which of them have been read.

    Keys are given without the architecture's name: ``count("block_count")`` reads ``llama.block_count``.
    """

    def __init__(self, path: Path, architecture: str, values: Mapping[str, Any]) -> None:
        self.path, self.architecture = path, architecture
        self._values = dict(values)
        self._unread = set(self._values)

    def has(self, key: str) -> bool:
        """Whether the file has the key."""
        return self._full(key) in self._values

    def count(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer from ``least`` on. An array, one value a layer, is accepted if all are equal.

        Raises ``LowbitError`` for another type or value, and for a missing key without a default.
        """
        value = self._read(key, default)
        if isinstance(value, list) and value:
            if any(v != value[0] or type(v) is not type(value[0]) for v in value):
                raise self.refusal(key, "one value a layer, which no transformers config of this model can express")
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < LARGEST:
            raise self.refusal(key, f"allowed are integers from {least} to {LARGEST - 1}")
        return value

    def number(self, key: str, default: float | None = None, accepts: Callable[[float], bool] | None = None) -> float:
        """A finite number; by default only positive ones are accepted. Raises as ``count`` does."""
        value = self._read(key, default)
        number = float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        if not math.isfinite(number) or not (accepts or (lambda x: x > 0))(number):
            raise self.refusal(key, "no number that is allowed there")
        return number

    def word(self, key: str, allowed: Sequence[str], default: str | None = None) -> str:
        """One of the allowed strings. Raises as ``count`` does."""
        value = self._read(key, default)
        if not isinstance(value, str) or value not in allowed:
            raise self.refusal(key, f"allowed are {', '.join(allowed)}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A boolean. Raises as ``count`` does."""
        value = self._read(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "allowed are true and false")
        return value

    def array(self, key: str, kind: type, length: int) -> list[Any]:
        """An array of ``length`` values of a type. Raises as ``count`` does."""
        value = self._read(key, None)
        if not isinstance(value, list) or len(value) != length or any(type(v) is not kind for v in value):
            raise self.refusal(key, f"allowed is an array of {length} values of type {kind.__name__}")
        return value

    def is_array(self, key: str) -> bool:
        """Whether the key's value is an array."""
        return isinstance(self._values.get(self._full(key)), list)

    def must_equal(self, key: str, expected: float, why: str, unset: float | None = None) -> None:
        """Refuse the key, if it is there, unless it says what the model does anyway (or the value for "unset")."""
        if self.has(key):
            value = self.number(key, accepts=lambda x: True)
            if value != unset and not math.isclose(value, expected, rel_tol=1e-6):
                raise self.refusal(key, f"{why} computes with {expected:g}")

    def refusal(self, key: str, why: str) -> LowbitError:
        """The error that names a key, its value and the reason."""
        full = self._full(key)
        if full not in self._values:
            return LowbitError(
                f"{self.path} lacks the metadata key {full}: fetch it again, or convert the model anew"
            )
        return LowbitError(f"{self.path} has {full} = {shown(self._values[full])}: {why}; use another file of it")

    def refuse_unread(self) -> None:
        """Raise ``LowbitError`` for the first key that nobody has read and that may change the function."""
        for full in sorted(self._unread):
            prefix, _, key = full.partition(".")
            if prefix != self.architecture:
                if prefix in EFFECTIVE:
                    raise self._unknown(full)
                continue
            value = self._values[full]
            if key in INERT or (not isinstance(value, list) and value in NEUTRAL.get(key, ())):
                continue
            raise self._unknown(full)

    def _unknown(self, full: str) -> LowbitError:
        return LowbitError(
            f"{self.path} has {full} = {shown(self._values[full])}, which may change what the model computes and "
            f"cannot be expressed in the transformers config of a '{self.architecture}': use the model's own folder"
        )

    def _full(self, key: str) -> str:
        return f"{self.architecture}.{key}"

    def _read(self, key: str, default: Any) -> Any:
        full = self._full(key)
        self._unread.discard(full)
        value = self._values.get(full, default)
        if value is None:
            raise self.refusal(key, "")
        return value
