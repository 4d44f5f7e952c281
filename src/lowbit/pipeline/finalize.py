"""The last files of a run folder: index, config, tokenizer, model card, timing, and the manifest after all."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lowbit.checkpoints.pypi import sha256_of
from lowbit.checkpoints.safetensors_folder import Checkpoint, read_json, write_bytes, write_json
from lowbit.quant.compressed_tensors import quantization_config
from lowbit.quant.runtimes import RUNTIMES
from lowbit.quant.scheme import Scheme, parse_scheme
from lowbit.runs.folder import FORMAT, MANIFEST, ONLINE, RUN, TIMING, block_file, notes_file, write_folder_index
from lowbit.runs.plan import Plan
from lowbit.runs.versions import versions

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


STOP = "maps stay online: only lowbit.load runs this folder"


def finish(
    out: Path, source: Path, plan: Plan, scheme: Scheme, identity: Mapping[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write everything that is not a shard, the manifest last; returns the manifest."""
    write_folder_index(out, len(rows))
    config = read_json(source / "config.json")
    config["quantization_config"] = quantization_config(scheme, plan.specs, plan.floats, plan.embed)
    online = _online(out, len(rows))
    if online:
        # The weights are those of another graph, and a stock loader must not run them. It skips a method that it does
        # not know and goes on with random weights; a group that it cannot read stops it, and is named in its error.
        config["quantization_config"]["config_groups"] = {
            STOP: {"targets": ["Linear"], "weights": {"num_bits": STOP}}
        }
    if plan.untie:
        config["tie_word_embeddings"] = False
    write_json(out / "config.json", config)
    for name in COPIED:
        if (source / name).exists():
            write_bytes(out / name, (source / name).read_bytes())
    manifest = _manifest(plan, identity, rows, online)
    write_bytes(out / "README.md", model_card(manifest).encode())
    timing = [{"block": i, **_without_notes(read_json(out / notes_file(i)))} for i in range(len(rows))]
    write_json(out / TIMING, {"blocks": timing})
    # Digests of what ships: the timing says when it was made, not what it is.
    ours = sorted(p for p in out.iterdir() if p.is_file() and p.name not in (TIMING, MANIFEST))
    manifest["files"] = {path.name: sha256_of(path) for path in ours}
    write_json(out / MANIFEST, manifest)
    shutil.rmtree(out / RUN, ignore_errors=True)
    return manifest


def _without_notes(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in ("notes", "record")}


def _online(out: Path, layers: int) -> dict[str, int]:
    """What stays beside the model's graph: full module names with their numbers of values."""
    shards = Checkpoint(out, [block_file(i) for i in range(layers)])
    names = [name for name in shards.names if name.endswith(ONLINE)]
    return {name.removesuffix(ONLINE): shards.read([name])[name].numel() for name in names}


def _why_not(plan: Plan, online: Mapping[str, int]) -> str | None:
    """Why stock ``transformers`` does not run the result."""
    linears = [values for name, values in online.items() if name in plan.specs]
    maps, clips = len(online) - len(linears), sum(values == 2 for values in linears)
    beside = [f"maps after {maps} norms"] * bool(maps)
    beside += [f"learned clipping before {clips} linears"] * bool(clips)
    beside += [f"rounding offsets before {len(linears) - clips} linears"] * (len(linears) > clips)
    if not beside:
        return plan.stock
    why = f"{' and '.join(beside)} stay online"
    return why if plan.stock is None else f"{why}; {plan.stock}"


def _manifest(
    plan: Plan, identity: Mapping[str, Any], rows: list[dict[str, Any]], online: Mapping[str, int]
) -> dict[str, Any]:
    extra, why_not = 32 * sum(online.values()), _why_not(plan, online)
    weights = plan.quantized_weights
    return {
        "format": FORMAT,
        "identity": dict(identity),
        "recipe": identity["recipe"],
        "scheme": identity["scheme"],
        "quantized": list(plan.specs),
        "float": list(plan.floats),
        "layout": plan.layout,
        "bits_per_weight": plan.bits_per_weight + extra / weights,
        "model_bits_per_weight": plan.model_bits_per_weight + extra / (weights + plan.float_weights),
        "online": list(online),
        "transformers": {"loads": why_not is None, "why_not": why_not, **_inputs(identity["scheme"])},
        "versions": versions(),
        "blocks": rows,
    }


def _inputs(scheme: Mapping[str, Any]) -> dict[str, str]:
    """What stock ``transformers`` computes with where a runtime's rounding of inputs is simulated."""
    runtime = scheme.get("target")
    if runtime is None or parse_scheme(scheme["scheme"]).act is not None or not RUNTIMES[runtime].rounds:
        return {}
    return {"inputs": f"float inputs; lowbit's figures are with those of {runtime}: {RUNTIMES[runtime].rounds}"}


def model_card(manifest: Mapping[str, Any]) -> str:
    """The README.md of a run folder: what was done, with what, and how to load it."""
    identity = manifest["identity"]
    steps = " -> ".join(next(iter(step)) for step in identity["recipe"]["steps"])
    data = identity["data"]
    overrides = identity["scheme"]["overrides"]
    lines = [
        "---",
        "library_name: transformers",
        "tags: [lowbit, compressed-tensors, quantized]",
        "---",
        f"# {identity['model']}, {identity['scheme']['scheme']}",
        "",
        f"Quantized by [lowbit](https://pypi.org/project/lowbit) {manifest['versions']['lowbit']}.",
        "",
        "| | |",
        "|---|---|",
        f"| recipe | {identity['recipe_name']} ({steps}) |",
        f"| scheme | {identity['scheme']['scheme']} |",
        *[f"| made for | {name} |" for name in [identity["scheme"].get("target")] if name],
        *[f"| override | `{glob}`: {text} |" for glob, text in (pair for one in overrides for pair in one.items())],
        f"| effective bits per rounded weight | {manifest['bits_per_weight']:.3f} (codes, scales, zeros, online) |",
        f"| rounded modules | {len(manifest['quantized'])} |",
        f"| left in float | {', '.join(manifest['float']) or 'nothing'}, embeddings unless rounded, norms |",
        f"| calibration | {data['corpus']}, {data['samples']} x {data['length']} tokens, seed {identity['seed']} |",
        f"| calibration hash | `{data['hash'][:16]}` |",
        f"| versions | {', '.join(f'{name} {v}' for name, v in manifest['versions'].items())} |",
        "",
        "## Loading",
        "",
    ]
    if manifest["transformers"]["loads"]:
        lines += [
            "With stock `transformers` and `compressed-tensors`:",
            "",
            "```python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            'model = AutoModelForCausalLM.from_pretrained("this/folder", dtype="float32")',
            'tokenizer = AutoTokenizer.from_pretrained("this/folder")',
            "```",
        ]
        if inputs := manifest["transformers"].get("inputs"):
            lines += ["", f"That computes with {inputs}. `lowbit.load` gives the model as it was measured."]
    else:
        lines += [
            f"Stock `transformers` does not run this scheme: {manifest['transformers']['why_not']}.",
            "With lowbit:",
            "",
            "```python",
            "import lowbit",
            "",
            'model = lowbit.load("this/folder")  # a transformers model',
            "```",
        ]
    notes = [f"- block {row['block']}: {note}" for row in manifest["blocks"] for note in row["notes"]]
    if notes:
        lines += ["", "## What happened on the way", "", *notes]
    return "\n".join(lines) + "\n"
