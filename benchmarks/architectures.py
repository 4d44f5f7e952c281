"""Every causal language model of the installed transformers: shrunk, its structure discovered and proven.

    python benchmarks/architectures.py [--types llama,gpt2] [--again failed|all] [--page docs/architectures.md]

A child process for each type, with limits on its memory and processor time. Rows are kept as they come, so that a run
that was stopped goes on where it was; a row of another version of transformers is made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GPT2LMHeadModel, LlamaForCausalLM, MixtralForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

from lowbit.errors import one_line
from lowbit.models.architecture import DeclaredEdge, LayerKind
from lowbit.models.discovery import Discovery, discover

ROOT = Path(__file__).resolve().parent.parent
ROWS = ROOT / "docs" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
SECONDS = 45  # of processor time
WALL = 3600  # seconds on the clock: a child may wait for something, or share the machine
ADDRESS_SPACE = 16 * 2**30
REAL_BYTES = 2**28  # for the proof at real shape: small layers only, the table is about structure
LOADED = (LlamaForCausalLM, GPT2LMHeadModel, MixtralForCausalLM)  # so that children find imported what all need
# Of types whose default config builds no decoder.
DECODER: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 5e5, "kv_n_heads": 8, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}
Row = dict[str, Any]


def configured(type: str) -> Any:
    """The default config of a type, with what it needs to be a decoder."""
    return CONFIG_MAPPING[type](**DECODER.get(type, {}))


def measure(type: str) -> Row:
    """One type, in this process."""
    found = discover(configured(type), most_bytes=REAL_BYTES)
    return {"ok": True, "seconds": found.record.seconds, **summary(found)}


def summary(found: Discovery) -> Row:
    """What a row keeps: the edges of each kind of layers, and the candidates that the proofs refuted."""
    own = found.architecture
    return {
        "kinds": [
            {"layers": own.layers.count(kind), "linears": sum(map(len, kind.groups)), "edges": edges_of(kind)}
            for kind in own.kinds()
        ],
        "refuted": [[one.edge, one.reason] for one in found.record.findings if one.offered and one.limit is None],
        "notes": list(found.record.notes),
    }


def edges_of(kind: LayerKind) -> list[str]:
    """The edges in short, equal ones counted: ``norm 3``, ``heads matrix``, ``channels diagonal x 2``."""
    counted = Counter(map(short, kind.edges))
    return [text if count == 1 else f"{text} x {count}" for text, count in counted.items()]


def short(edge: DeclaredEdge) -> str:
    """An edge in two or three words."""
    if edge.kind == "norm":
        return f"norm {len({ref if isinstance(ref, str) else ref.module for ref in edge.dst})}"
    dims = [f"{len(edge.pairs)} pairs"][: bool(edge.pairs)] + [f"{len(edge.free)} free"][: bool(edge.free)]
    power = [f"power {edge.power}"] if edge.power != 1 else []
    return " ".join([edge.kind, edge.limit, *dims, *power])


def in_a_child(type: str) -> Row:
    """One type in a process of its own; why there is no row of it, if it fails."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        os.write(write, json.dumps(_limited(type)).encode())
        os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(WALL)
    with os.fdopen(read, "rb") as stream:
        said = stream.read()
    signal.alarm(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if said:
        row: Row = json.loads(said)
        return row
    return {"ok": False, "why": f"stopped by signal {-status}: longer than {SECONDS} s, or out of memory"}


def _limited(type: str) -> Row:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what a model's own code prints
        os.dup2(nowhere, stream)
    try:
        return measure(type)
    except Exception as error:
        return {"ok": False, "why": one_line(error)}


def run(types: Iterable[str], kept: dict[str, Row], file: Path) -> None:
    """Rows of the types that have none, each written as it comes."""
    for type in types:
        if type in kept:
            continue
        start = time.monotonic()
        kept[type] = {"class": CLASSES[type], **in_a_child(type), "transformers": transformers.__version__}
        passing = file.with_suffix(".part")
        passing.write_text(json.dumps(kept, indent=1) + "\n")
        passing.replace(file)
        row = kept[type]
        said = "; ".join(", ".join(kind["edges"]) for kind in row["kinds"]) if row["ok"] else row["why"]
        print(f"{type}: {said} ({time.monotonic() - start:.0f} s)", flush=True)


def page(rows: Mapping[str, Row]) -> str:
    """The table in Markdown."""
    good = {type: row for type, row in sorted(rows.items()) if row["ok"]}
    bad = {type: row for type, row in sorted(rows.items()) if not row["ok"]}
    missing = sorted(set(CLASSES) - set(rows))
    lines = [
        "# Architectures",
        "",
        *_INTRODUCTION.format(good=len(good), all=len(rows), version=transformers.__version__).splitlines(),
        "",
        "| type | class | layers | edges |",
        "|---|---|---:|---|",
    ]
    for type, row in good.items():
        for at, kind in enumerate(row["kinds"]):
            name = f"`{type}` | {row['class']}" if not at else " |"
            lines.append(f"| {name} | {kind['layers']} | {', '.join(kind['edges']) or 'none'} |")
    lines += ["", "## Not discovered", "", "| type | class | reason |", "|---|---|---|"]
    lines += [f"| `{type}` | {row['class']} | {row['why'].replace('|', '/')} |" for type, row in bad.items()]
    if missing:
        names = ", ".join(f"`{type}`" for type in missing)
        lines += ["", "## Without a row", "", f"`make architectures` goes on with {names}."]
    return "\n".join(lines) + "\n"


_INTRODUCTION = """\
Written by `make architectures`: every causal language model that transformers {version} names, with the default
config of its type. {good} of {all} are discovered and proven.

Each config is shrunk, a random model of it is built, its structure is read off its responses, and every edge is
proven by a random map in the layer and in the model. Layers that differ have a row each; *layers* counts them in the
default config. Edges:

* `norm 3`: a norm's gain and its three readers
* `heads matrix`: v to o, any matrix per key/value head (`rotation`: orthogonal ones, `diagonal`: scales)
* `channels diagonal`: up to down, scales (`positive`: above 0; `power 2`: squared on the way)
* `qk matrix 8 pairs 4 free`: between queries and keys, a scaled rotation of each pair of a head's dimensions that the
  rotary embedding rotates together, and any matrix over those that it leaves alone; `qk diagonal`: scales of the
  gains of the norms on queries and keys. Widths are those of the default config."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", help="only these, separated by commas")
    parser.add_argument("--again", choices=["failed", "all"], help="rows to make again")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where the rows are kept")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    types = options.types.split(",") if options.types else sorted(CLASSES)
    kept: dict[str, Row] = json.loads(options.rows.read_text()) if options.rows.exists() else {}
    stale = {type for type, row in kept.items() if row["transformers"] != transformers.__version__}
    if options.again:
        stale |= {type for type in types if type in kept and (options.again == "all" or not kept[type]["ok"])}
    kept = {type: row for type, row in kept.items() if type not in stale and type in CLASSES}
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    run(types, kept, options.rows)
    options.page.write_text(page(kept))
    print(f"{sum(row['ok'] for row in kept.values())} of {len(kept)} discovered and proven: {options.page}")


if __name__ == "__main__":
    main()
