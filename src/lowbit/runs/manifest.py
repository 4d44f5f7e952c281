"""The manifest of a run, ``lowbit.json``: the request, what was done, and the results.

A single parser reads it and names the key of any invalid value.
"""

from __future__ import annotations

import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from lowbit.checkpoints.json_file import read_json
from lowbit.data.windows import Bos
from lowbit.errors import LowbitError
from lowbit.models.block import LEAST_TOKENS

MANIFEST = "lowbit.json"
FORMAT = 3
T = TypeVar("T")


@dataclass(frozen=True)
class Calibration:
    """The calibration data.

    Attributes:
        corpus: its name.
        samples, length: number of windows, and tokens in one.
        bos: what a window starts with: ``auto``, ``never`` or ``stream``.
        special: the special tokens in front of each window, as text.
        hash: digest of the tokens.
        kinds: number of windows of each kind of text; empty in manifests of versions that did not record it.
        held_out: the kind that learned steps do not train on: its windows are their validation split. ``None``: that
            split has a share of every kind.
    """

    corpus: str
    samples: int
    length: int
    bos: Bos
    special: str
    hash: str
    kinds: dict[str, int] = field(default_factory=dict)
    held_out: str | None = None

    def mixture(self) -> str:
        """The kinds of text in words, the largest first; empty for a single one.

        >>> Calibration("a", 8, 64, "auto", "", "0f", {"wiki": 7, "code": 1}, "code").mixture()
        '7 windows of wiki, 1 of code; learned steps validate on code alone'
        """
        if len(self.kinds) < 2:
            return ""
        (first, count), *others = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))
        parts = [f"{count} windows of {first}", *(f"{count} of {kind}" for kind, count in others)]
        validated = "on a share of every kind" if self.held_out is None else f"on {self.held_out} alone"
        return f"{', '.join(parts)}; learned steps validate {validated}"


@dataclass(frozen=True)
class PrefixFacts:
    """A run's prefix: fixed tokens in front of every text, whose keys and values stay float; see ``docs/prefix.md``.

    Attributes:
        ids: its tokens; none where the search found that the text needs none.
        text: what they stand for.
        massive_before: massive tokens in a window without the prefix, on average; ``None``: not counted, since the
            prefix was given.
        massive_after: the same behind it.
    """

    ids: list[int]
    text: str
    massive_before: float | None
    massive_after: float | None

    def sentence(self) -> str:
        """The facts in words.

        >>> PrefixFacts([13, 1], ".<s>", 2.0, 0.125).sentence()
        "prefix of 2 tokens '.<s>': 0.12 massive tokens in a window behind it, 2 without it"
        >>> PrefixFacts([], "", 0.0, 0.0).sentence()
        'no prefix: a window has 0 massive tokens, and no prefix makes that less'
        """
        if not self.ids:
            return f"no prefix: a window has {self.massive_before:.2g} massive tokens, and no prefix makes that less"
        without = "" if self.massive_before is None else f", {self.massive_before:.2g} without it"
        return (
            f"prefix of {len(self.ids)} token{'s' * (len(self.ids) > 1)} {self.text!r}: {self.massive_after:.2g} "
            f"massive tokens in a window behind it{without}"
        )


@dataclass(frozen=True)
class Identity:
    """Everything that determines a run's output: two runs of one identity have the same bytes.

    Attributes:
        model: name of the float model; for a path its last component.
        fingerprint: digest of its weights and config.
        recipe: every step with every option, and the window.
        recipe_name: the recipe's name in results.
        scheme: name, overrides and target runtime, as ``scheme_from_dict`` reads them.
        data: the calibration data.
        seed, device, dtype: as requested.
        versions: of Python and of the packages that compute and write the run.
        compiled: whether training ran with fused fake quantization.
        expert_tokens: experts that fewer calibration tokens reach are quantized without calibration data.
        all_experts: experts' statistics are from all tokens, not from those that reach them.
        source_files: digest of the source's other files, tokenizer included, which the run folder copies.
        input_range: how the ranges of static inputs were estimated; ``None`` for schemes without any.
        prefix: as requested: ``none``, ``auto``, token ids or text.
        imatrix: digest of the importance matrix that searches of scales were given; ``None``: none.
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
    expert_tokens: int = LEAST_TOKENS
    all_experts: bool = False
    source_files: str = ""
    input_range: str | None = None
    prefix: str = "none"
    imatrix: str | None = None

    @property
    def steps(self) -> list[str]:
        """Names of the recipe's steps in order."""
        return [next(iter(step)) for step in self.recipe["steps"]]


@dataclass(frozen=True)
class BlockRow:
    """The results of one decoder layer.

    Attributes:
        block: the layer's index.
        notes: notes for the report: a raised damping, a fallback.
        relative_error: of the layer's output hidden states, relative to the float model's.
        sensitivity: sensitivity of the layer's linears; see ``analysis/linear_error.py``.
        steps: figures by step name; ``awq-2`` is the second step of that name.
        routing: calibration tokens that reach each expert in the float model; empty for a layer without experts.
    """

    block: int
    notes: list[str]
    relative_error: float
    sensitivity: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    routing: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class StockLoading:
    """How stock ``transformers`` loads the folder.

    Attributes:
        loads: whether it gives the simulated logits.
        why_not: the reason if it does not.
        inputs: the inputs that it computes with, if a target runtime's input quantization was simulated.
        dtype: the dtype of the model in which its logits are the simulated ones.
        dense: it makes the weights dense when it loads them, see ``runs/stock.py``.
    """

    loads: bool
    why_not: str | None = None
    inputs: str | None = None
    dtype: str = "float32"
    dense: bool = False


@dataclass(frozen=True)
class Manifest:
    """A finished run.

    Attributes:
        identity: everything that determines the run's output.
        request: the user's request, from which the command that repeats the run is printed.
        quantized: full names of the quantized modules, in order.
        floats: linears, the head included, that stay float.
        layouts: layouts of the stored codes, the most common one first.
        bits_per_weight: effective bits per quantized weight: codes, scales, zero points and runtime ops.
        model_bits_per_weight: the same over the whole model, with its float part counted at 16 bits.
        runtime_ops: kinds of runtime ops by the full name of their module.
        transformers: how stock ``transformers`` loads the folder.
        versions: of Python and of the packages that wrote the run.
        blocks: one row per layer.
        files: SHA-256 of every other file by name.
        architecture: where the model's layers are, and the structure of each kind; see ``models/description.py``.
        kept_experts: parameters of experts that stay float, since code of the model's own computes with them.
        carried: what the run took over from its source as it is, a sentence for each kind.
        prefix: the prefix of every text; ``None``: none was asked for.
        format: version of the manifest's format.
    """

    identity: Identity
    request: dict[str, Any]
    quantized: list[str]
    floats: list[str]
    layouts: list[str]
    bits_per_weight: float
    model_bits_per_weight: float
    runtime_ops: dict[str, str]
    transformers: StockLoading
    versions: dict[str, str]
    blocks: list[BlockRow]
    files: dict[str, str]
    architecture: dict[str, Any] = field(default_factory=dict)
    kept_experts: list[str] = field(default_factory=list)
    carried: list[str] = field(default_factory=list)
    prefix: PrefixFacts | None = None
    format: int = FORMAT

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as stored in ``lowbit.json``."""
        return asdict(self)

    @property
    def prefix_ids(self) -> tuple[int, ...]:
        """The tokens of the prefix, if there is one."""
        return () if self.prefix is None else tuple(self.prefix.ids)


def manifest_of(folder: Path) -> Manifest | None:
    """The manifest of a finished run folder; ``None`` for any other folder.

    Raises:
        LowbitError: the manifest is of another format, or broken.
    """
    path = folder / MANIFEST
    if not path.exists():
        return None
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise LowbitError(
            f"{path} has format {content.get('format')!r}; this lowbit reads {FORMAT}: quantize again, or use the "
            "version of lowbit that wrote it"
        )
    manifest = parse(Manifest, content, str(path))
    _check_parts(manifest, str(path))
    return manifest


def _check_parts(manifest: Manifest, where: str) -> None:
    """Refuse parts that readers rely on and that ``parse`` takes as they are."""
    steps = manifest.identity.recipe.get("steps")
    if not isinstance(steps, list) or not all(isinstance(step, Mapping) and len(step) == 1 for step in steps):
        raise _invalid(where, "identity.recipe.steps")
    if not isinstance(manifest.identity.scheme.get("target"), str | None):
        raise _invalid(where, "identity.scheme.target")
    if not manifest.blocks:
        raise _invalid(where, "blocks")
    if not all(math.isfinite(bits) for bits in (manifest.bits_per_weight, manifest.model_bits_per_weight)):
        raise _invalid(where, "bits_per_weight")


def require_trust(folder: Path, manifest: Manifest | None, trust_remote_code: bool) -> None:
    """Refuse a run whose model computes by code of its own, unless this call permits that code.

    ``transformers`` may have a class of that name, which need not compute the same. A run made without that
    permission keeps no reference to such code.
    """
    if manifest is None or trust_remote_code or not manifest.request.get("trust_remote_code"):
        return
    if (folder / "config.json").is_file() and read_json(folder / "config.json").get("auto_map"):
        raise LowbitError(
            f"{folder} was quantized with --trust-remote-code and computes by Python code of its own: read that "
            "code, then pass --trust-remote-code (in Python trust_remote_code=True)"
        )


def parse(kind: type[T], content: Any, where: str) -> T:
    """A dataclass from plain data; the inverse of ``asdict``. Unknown keys are ignored.

    Args:
        kind: a dataclass of plain values, containers and other such dataclasses.
        content: parsed JSON.
        where: name of the file, for errors.

    >>> parse(StockLoading, {"loads": True}, "lowbit.json")
    StockLoading(loads=True, why_not=None, inputs=None, dtype='float32', dense=False)
    """
    value: T = _parse(kind, content, where, "")
    return value


def _parse(kind: Any, content: Any, where: str, key_path: str) -> Any:
    if is_dataclass(kind):
        return _parse_dataclass(kind, content, where, key_path)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return content
    if origin is typing.Literal and content in inner:
        return content
    if origin is types.UnionType:
        if content is None and type(None) in inner:
            return None
        return _parse(next(member for member in inner if member is not type(None)), content, where, key_path)
    if origin is list and isinstance(content, list):
        return [_parse(inner[0], value, where, f"{key_path}.{i}") for i, value in enumerate(content)]
    if origin is dict and isinstance(content, Mapping):
        return {str(key): _parse(inner[1], value, where, f"{key_path}.{key}") for key, value in content.items()}
    if kind is float and isinstance(content, int) and not isinstance(content, bool):
        return float(content) if abs(content) < 2**1000 else math.inf
    if origin is None and isinstance(content, kind) and (kind is bool or not isinstance(content, bool)):
        return content
    raise _invalid(where, key_path)


def _parse_dataclass(kind: Any, content: Any, where: str, key_path: str) -> Any:
    hints = typing.get_type_hints(kind)
    items = content if isinstance(content, Mapping) else {}
    values = {}
    for entry in fields(kind):
        required = entry.default is MISSING and entry.default_factory is MISSING
        if entry.name in items:
            values[entry.name] = _parse(hints[entry.name], items[entry.name], where, f"{key_path}.{entry.name}")
        elif required:
            raise _invalid(where, f"{key_path}.{entry.name}")
    return kind(**values)


def _invalid(where: str, key_path: str) -> LowbitError:
    key = key_path.removeprefix(".")
    return LowbitError(f"{where} has no valid '{key}': it is broken; quantize again into another folder")
