"""The last files of a run folder: index, config, tokenizer, model card, timing and, last, the manifest."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lowbit.checkpoints.companions import CONFIG, companions, copy_companion, without_code
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.pypi import sha256_of
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.shards import INDEX
from lowbit.checkpoints.shipped_config import shipped_config, untie
from lowbit.checkpoints.writing import write_bytes, write_json
from lowbit.models.build import auto_class
from lowbit.models.description import to_dict
from lowbit.models.kv_ratios import RATIOS
from lowbit.models.ops import OPS
from lowbit.models.prefix import KEYS, VALUES
from lowbit.models.runtime_ops import RuntimeOp, parse_tensor_name
from lowbit.models.stored_names import StoredNames
from lowbit.pipeline.opened import Opened
from lowbit.progress import say
from lowbit.quant.compressed_tensors import quantization_config, stock_dtype
from lowbit.quant.runtimes import RUNTIMES, RuntimeInput
from lowbit.quant.scheme import ModelFormats
from lowbit.runs.activation_stats import OBSERVED
from lowbit.runs.carried import CARRIED, write_carried
from lowbit.runs.folder import REST, RUN, TIMING, block_file, notes_file, write_folder_index
from lowbit.runs.manifest import MANIFEST, BlockRow, Identity, Manifest, PrefixFacts, StockLoading, manifest_of
from lowbit.runs.plan import Plan
from lowbit.runs.versions import versions

STOP = "maps stay online: only lowbit.load runs this folder"
STOP_PREFIX = "texts come behind a prefix: only lowbit.load runs this folder"
CARD = "README.md"
_MAY_NAME_CODE = ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json")


def finish(
    out: Path,
    opened: Opened,
    plan: Plan,
    identity: Identity,
    rows: list[BlockRow],
    request: Mapping[str, Any],
    prefix: PrefixFacts | None = None,
) -> Manifest:
    """Write all files other than the blocks' shards, the manifest last; return the manifest."""
    source = opened.source.folder
    write_carried(opened.checkpoint, opened.others, out)
    write_folder_index(out, len(rows))
    trusted = bool(request["trust_remote_code"])
    config = shipped_config(read_json(source / CONFIG), trusted)
    config["quantization_config"] = quantization_config(plan.formats, (*plan.floats, *plan.outside), plan.embed)
    ops = _runtime_ops(out, len(rows), opened.names)
    has_prefix = prefix is not None and bool(prefix.ids)
    if ops or has_prefix:
        # The weights belong to a graph that a stock loader does not have and must not run without. It ignores an
        # unknown method and continues with random weights; an unreadable group makes it fail with the group's name.
        stop = STOP if ops else STOP_PREFIX
        config["quantization_config"]["config_groups"] = {
            stop: {"targets": ["Linear"], "weights": {"num_bits": stop}}
        }
    if not plan.tied:
        untie(config)
    copied = _copy_companions(source, out, trusted)
    write_json(out / CONFIG, config)
    extra = sum(stored.bits for stored in ops.values()) + _attention_bits(out, len(rows), opened.names)
    manifest = _manifest(plan, identity, rows, ops, extra, request, opened, prefix)
    write_bytes(
        out / CARD, model_card(manifest, auto_class(opened.config).__name__).encode(errors="backslashreplace")
    )
    timing = [{"block": i, **_without_notes(read_json(out / notes_file(i)))} for i in range(len(rows))]
    write_json(out / TIMING, {"blocks": timing})
    # Digests cover what the run made and nothing else in the folder; the timing differs between identical runs.
    carried = [CARRIED] if opened.others.files else []
    shards = [*map(block_file, range(len(rows))), REST, *carried]
    observed = [OBSERVED] if (out / OBSERVED).is_file() else []
    ours = sorted([*shards, INDEX, CONFIG, CARD, *observed, *copied])
    manifest = replace(manifest, files={name: sha256_of(out / name) for name in ours})
    write_json(out / MANIFEST, manifest.to_dict())
    shutil.rmtree(out / RUN, ignore_errors=True)
    return manifest


def finished(out: Path) -> Manifest:
    """The manifest of a folder that holds this run already."""
    manifest = manifest_of(out)
    assert manifest is not None  # ``look`` has found it
    shutil.rmtree(out / RUN, ignore_errors=True)  # left by a run that was killed right after writing its manifest
    say(f"{out} already holds this run, finished")
    return manifest


def _copy_companions(source: Path, out: Path, trusted: bool) -> list[str]:
    """Copy the files that come along, without references to code unless it was permitted; return their names."""
    names = companions(source, code=trusted)
    for name in names:
        content = read_json(source / name) if not trusted and name in _MAY_NAME_CODE else {}
        if "auto_map" in content:
            write_json(out / name, without_code(content))
        else:
            copy_companion(source, out, name)
    return names


def _without_notes(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("notes", "record")}


@dataclass(frozen=True)
class _StoredOp:
    """A runtime op in a run's shards and its size in bits."""

    op: type[RuntimeOp]
    bits: int


def _runtime_ops(out: Path, layers: int, names: StoredNames) -> dict[str, _StoredOp]:
    """Runtime ops by full module name."""
    shards = Checkpoint(out, [block_file(i) for i in range(layers)])
    shards.rename(names.rename)
    ops: dict[str, _StoredOp] = {}
    for name in shards.names:
        if (parsed := parse_tensor_name(name)) is not None:
            module, kind, _ = parsed
            value = shards.read([name])[name]
            bits = ops[module].bits if module in ops else 0
            ops[module] = _StoredOp(OPS[kind], bits + value.numel() * value.element_size() * 8)
    return ops


def _attention_bits(out: Path, layers: int, names: StoredNames) -> int:
    """Bits that a prefix's keys and values, and the clipping ratios of Q, K and V, take in a run's shards."""
    shards = Checkpoint(out, [block_file(i) for i in range(layers)])
    shards.rename(names.rename)
    own = tuple(f".{name}" for name in (KEYS, VALUES, RATIOS))
    stored = shards.read([name for name in shards.names if name.endswith(own)])
    return sum(value.numel() * value.element_size() * 8 for value in stored.values())


def _why_not(plan: Plan, ops: Mapping[str, _StoredOp], prefix: PrefixFacts | None) -> str | None:
    """Why stock ``transformers`` does not run the result; ``None`` where it does."""
    reasons = []
    if ops:
        count = Counter(stored.op for stored in ops.values())
        reasons.append(f"{' and '.join(f'{n} {op.why}' for op, n in count.items())} stay online")
    if prefix is not None and prefix.ids:
        reasons.append(f"texts come behind a prefix of {len(prefix.ids)} tokens")
    return "; ".join([*reasons, *([plan.stock] if plan.stock else [])]) or None


def _manifest(
    plan: Plan,
    identity: Identity,
    rows: list[BlockRow],
    ops: Mapping[str, _StoredOp],
    extra: int,
    request: Mapping[str, Any],
    opened: Opened,
    prefix: PrefixFacts | None,
) -> Manifest:
    """The manifest; ``extra`` bits are stored beside weights, scales and zero points."""
    why_not, formats = _why_not(plan, ops, prefix), plan.formats
    weights = plan.quantized_weights
    return Manifest(
        identity=identity,
        request=dict(request),
        quantized=list(formats.modules),
        floats=list(plan.floats),
        kept_experts=list(plan.kept),
        layouts=formats.layouts,
        bits_per_weight=plan.bits_per_weight + extra / weights,
        model_bits_per_weight=plan.model_bits_per_weight + extra / (weights + plan.float_weights),
        runtime_ops={module: stored.op.kind for module, stored in ops.items()},
        transformers=StockLoading(why_not is None, why_not, _inputs(formats), stock_dtype(formats), formats.dense),
        versions=versions(),
        blocks=rows,
        architecture=to_dict(plan.architecture),
        carried=list(opened.others.notes),
        prefix=prefix,
        files={},  # digests are added once all other files are written
    )


def _inputs(formats: ModelFormats) -> str | None:
    """The activations that stock ``transformers`` uses where the run simulates a runtime's quantization of inputs."""
    runtimes = {f.input.runtime for f in formats.modules.values() if isinstance(f.input, RuntimeInput)}
    if not runtimes:
        return None
    runtime = runtimes.pop()
    return f"float inputs; lowbit's results simulate those of {runtime}: {RUNTIMES[runtime].rounds}"


def _calibration(identity: Identity) -> list[str]:
    """Rows of the model card on the calibration text."""
    data = identity.data
    if not data.samples:
        return ["| calibration | none: codes, scales and zero points are the source's |"]
    return [
        f"| calibration | {data.corpus}, {data.samples} x {data.length} tokens, seed {identity.seed} |",
        *([f"| kinds of text | {mixture} |"] if (mixture := data.mixture()) else []),
        f"| special tokens | `--bos {data.bos}`: {f'`{data.special}`' if data.special else 'none'} before a window |",
        f"| calibration hash | `{data.hash[:16]}` |",
    ]


def model_card(manifest: Manifest, auto: str = "AutoModelForCausalLM") -> str:
    """The README.md of a run folder: recipe, scheme, calibration, versions and how to load it.

    ``auto``: the automatic class of ``transformers`` that loads it.
    """
    identity = manifest.identity
    steps = " -> ".join(identity.steps)
    overrides = [pair for override in identity.scheme["overrides"] for pair in override.items()]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [lowbit, compressed-tensors, quantized]",
        "---",
        f"# {identity.model}, {identity.scheme['scheme']}",
        "",
        f"Quantized by [lowbit](https://pypi.org/project/lowbit) {manifest.versions['lowbit']}.",
        "",
        "| | |",
        "|---|---|",
        f"| recipe | {identity.recipe_name} ({steps}) |",
        f"| scheme | {identity.scheme['scheme']} |",
        *[f"| target runtime | {name} |" for name in [identity.scheme.get("target")] if name],
        *[f"| override | `{glob}`: {text} |" for glob, text in overrides],
        "| effective bits per quantized weight | "
        f"{manifest.bits_per_weight:.3f} (codes, scales, zero points, runtime ops) |",
        f"| quantized modules | {len(manifest.quantized)} |",
        f"| left in float | {', '.join(manifest.floats) or 'nothing'}, embeddings unless quantized, norms |",
        *[f"| prefix | {facts.sentence()} |" for facts in [manifest.prefix] if facts],
        *[f"| experts left in float | {', '.join(names)} |" for names in [manifest.kept_experts] if names],
        *[f"| carried over | {note} |" for note in manifest.carried],
        *_calibration(identity),
        f"| versions | {', '.join(f'{name} {v}' for name, v in manifest.versions.items())} |",
        "",
        "## Loading",
        "",
    ]
    if manifest.transformers.loads:
        lines += [
            "With stock `transformers` and `compressed-tensors`:",
            "",
            "```python",
            f"from transformers import {auto}, AutoTokenizer",
            "",
            f'model = {auto}.from_pretrained("this/folder", dtype="{manifest.transformers.dtype}")',
            'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
            "```",
        ]
        if inputs := manifest.transformers.inputs:
            lines += ["", f"This computes with {inputs}. `lowbit.load` gives the model as evaluated."]
    else:
        lines += [
            f"Stock `transformers` does not run this scheme: {manifest.transformers.why_not}.",
            "With lowbit:",
            "",
            "```python",
            "import lowbit",
            "",
            'model = lowbit.load("this/folder")  # a transformers model',
            "```",
        ]
    notes = [f"- block {row.block}: {note}" for row in manifest.blocks for note in row.notes]
    if notes:
        lines += ["", "## Notes", "", *notes]
    return "\n".join(lines) + "\n"
