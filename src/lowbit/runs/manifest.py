"""The manifest of a run, ``lowbit.json``, as values: what was asked for, what was done, what came of it.

One parser reads it, and says which place is broken where one is; everything else takes these values.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowbit.checkpoints.safetensors_folder import read_json
from lowbit.errors import LowbitError

MANIFEST = "lowbit.json"
FORMAT = 2
T = TypeVar("T")


@dataclass(frozen=True)
class Calibration:
    """What methods calibrated on: the corpus's name, how many windows of how many tokens, and the tokens' digest."""

    corpus: str
    samples: int
    length: int
    hash: str


@dataclass(frozen=True)
class Identity:
    """What makes a run another one than others: two runs of one identity have the same bytes.

    Attributes:
        model: name of the float model; of a path its last part.
        fingerprint: digest of its weights.
        recipe: every step with every option, and the window.
        recipe_name: what results call it.
        scheme: name, overrides and target runtime, as ``scheme_from_dict`` reads them.
        data: what was calibrated on.
        seed, device, dtype: as asked for.
        versions: of what computes and of what is written with.
        compiled: fake quantization was fused while learning.
    """

    model: str
    fingerprint: str
    recipe: dict[str, Any]
    recipe_name: str
    scheme: dict[str, Any]
    data: Calibration
    seed: int
    device: str
    dtype: str
    versions: dict[str, str]
    compiled: bool = False

    @property
    def steps(self) -> list[str]:
        """Names of the recipe's steps in order."""
        return [next(iter(step)) for step in self.recipe["steps"]]


@dataclass(frozen=True)
class BlockRow:
    """What happened to one decoder layer.

    Attributes:
        block: its index.
        notes: what a reader must know: a damping raised, a fit that gave up.
        relative_error: of the hidden states behind it, against the float model's.
        sensitivity: its linears' sensitivity; see ``analysis/linear_error.py``.
        steps: figures by the step's name.
    """

    block: int
    notes: list[str]
    relative_error: float
    sensitivity: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StockLoading:
    """What stock ``transformers`` makes of the folder.

    Attributes:
        loads: it gives the simulated logits.
        why_not: otherwise the reason.
        inputs: what it computes with where a target runtime's quantization of inputs was simulated.
    """

    loads: bool
    why_not: str | None = None
    inputs: str | None = None


@dataclass(frozen=True)
class Manifest:
    """A finished run.

    Attributes:
        identity: what makes it another run than others.
        request: what was asked for, from which the command that repeats it is printed.
        quantized: full names of the quantized modules, in order.
        floats: linears, the head included, that stay float.
        layout: how codes are stored.
        bits_per_weight: effective bits of the quantized weights: codes, scales, zeros and runtime ops, over weights.
        model_bits_per_weight: the same over the whole model, its float part counted at 16 bits.
        runtime_ops: kinds of runtime ops by the full name of the module where they stand.
        transformers: what stock ``transformers`` makes of it.
        versions: of what wrote it.
        blocks: a row for each layer.
        files: SHA-256 of every other file by its name.
        format: of this file.
    """

    identity: Identity
    request: dict[str, Any]
    quantized: list[str]
    floats: list[str]
    layout: str
    bits_per_weight: float
    model_bits_per_weight: float
    runtime_ops: dict[str, str]
    transformers: StockLoading
    versions: dict[str, str]
    blocks: list[BlockRow]
    files: dict[str, str]
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as ``lowbit.json`` holds it."""
        return asdict(self)


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a finished run folder; ``None`` for any other folder.

    Raises:
        LowbitError: it is of another format, or broken.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise LowbitError(
            f"{path} has format {content.get('format')!r}; this lowbit reads {FORMAT}: quantize again, or use the "
            "lowbit that made it"
        )
    return parse(Manifest, content, str(path))


def parse(kind: type[T], content: Any, where: str) -> T:
    """A dataclass from plain data; the inverse of ``asdict``. Keys that it does not know are ignored.

    Args:
        kind: a dataclass of plain values, containers and other such dataclasses.
        content: what JSON gives.
        where: the file, for errors.

    >>> parse(StockLoading, {"loads": True}, "lowbit.json")
    StockLoading(loads=True, why_not=None, inputs=None)
    """
    found: T = _parsed(kind, content, where, "")
    return found


def _parsed(kind: Any, content: Any, where: str, at: str) -> Any:
    if is_dataclass(kind):
        return _dataclass(kind, content, where, at)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return content
    if origin is types.UnionType:
        if content is None and type(None) in inner:
            return None
        return _parsed(next(one for one in inner if one is not type(None)), content, where, at)
    if origin is list and isinstance(content, list):
        return [_parsed(inner[0], value, where, f"{at}.{i}") for i, value in enumerate(content)]
    if origin is dict and isinstance(content, Mapping):
        return {str(key): _parsed(inner[1], value, where, f"{at}.{key}") for key, value in content.items()}
    if kind is float and isinstance(content, int) and not isinstance(content, bool):
        return float(content)
    if origin is None and isinstance(content, kind) and (kind is bool or not isinstance(content, bool)):
        return content
    raise _broken(where, at)


def _dataclass(kind: Any, content: Any, where: str, at: str) -> Any:
    hints = typing.get_type_hints(kind)
    given = content if isinstance(content, Mapping) else {}
    values = {}
    for one in fields(kind):
        required = one.default is MISSING and one.default_factory is MISSING
        if one.name in given:
            values[one.name] = _parsed(hints[one.name], given[one.name], where, f"{at}.{one.name}")
        elif required:
            raise _broken(where, f"{at}.{one.name}")
    return kind(**values)


def _broken(where: str, at: str) -> LowbitError:
    place = at.removeprefix(".")
    return LowbitError(f"{where} has no valid '{place}': it is broken; quantize again into another folder")
