"""Every causal language model of the installed transformers: discovered, proven, quantized, loaded again.

    python benchmarks/architectures.py [--types llama,gpt2] [--again failed|all] [--no-runs] [--page architectures.md]

A child process for each type, with limits on its memory and on the processor time of each stage. Rows are kept as
they come, so that a run that was stopped goes on where it was; a row that other sources or versions made is made
again.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import os
import resource
import signal
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, GPT2LMHeadModel, LlamaForCausalLM, MixtralForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CLASSES

import architectures_page
from architectures_edges import experts_in
from architectures_page import Row, summary
from architectures_steps import RECIPES, went, whole_way
from lowbit.errors import one_line
from lowbit.models.discovery import discover
from rows import ROOT, sources

ROWS = ROOT / "docs" / "architectures.json"
PAGE = ROOT / "docs" / "architectures.md"
SECONDS = 60  # of processor time, for discovery and for each step
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
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}


def configured(type: str) -> Any:
    """The default config of a type, with what it needs to be a decoder."""
    return CONFIG_MAPPING[type](**DECODER.get(type, {}))


def measure(type: str, folder: Path) -> Iterator[Row]:
    """One type, in this process: its row after discovery, and again after each step in an empty folder."""
    config = configured(type)
    with limited():
        found = discover(config, most_bytes=REAL_BYTES)
    row = {"ok": True, "seconds": found.record.seconds, **summary(found)}
    yield row
    os.environ["LOWBIT_CACHE"] = str(folder / "cache")  # what other sources have found is not read
    for steps in whole_way(config, folder, limited):
        yield row | {"steps": steps}


@contextmanager
def limited(seconds: float = SECONDS) -> Iterator[None]:
    """Within the context, ``TimeoutError`` after so many seconds of processor time.

    The signal comes once more a second later, should a library catch the first error.
    """

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped: longer than {seconds} s")

    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def in_a_child(type: str) -> Row:
    """One type in a process of its own; why there is no row of it, if it fails."""
    with tempfile.TemporaryDirectory() as folder:
        return _forked(type, Path(folder))


def _forked(type: str, folder: Path) -> Row:
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        _child(type, folder, write)
        os._exit(0)
    os.close(write)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(WALL)
    with os.fdopen(read, "rb") as stream:
        said = [line for line in stream if line.endswith(b"\n")]
    signal.alarm(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    row: Row = json.loads(said[-1]) if said else {"ok": False}
    if status:
        row |= _stopped(row, f"stopped by signal {-status}: out of memory, or longer than {WALL} s")
    return row


def _stopped(row: Row, why: str) -> Row:
    """What a row lacks whose process ended: the reason for each step that is not there."""
    if not row["ok"]:
        return {"why": why}
    return {"steps": {recipe: {"run": why} for recipe in RECIPES} | row.get("steps", {})}


def _child(type: str, folder: Path, pipe: int) -> None:
    """Write rows to the pipe, a line each; the last one counts."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):  # what a model's own code prints
        os.dup2(nowhere, stream)
    with os.fdopen(pipe, "w") as lines:
        try:
            for row in measure(type, folder):
                print(json.dumps(row), file=lines, flush=True)
        except Exception as error:
            print(json.dumps({"ok": False, "why": one_line(error)}), file=lines, flush=True)


@functools.cache
def made_by() -> str:
    """A digest of what a row depends on: the package, this program, and the libraries' versions."""
    own = hashlib.sha256(repr((sources(), transformers.__version__, torch.__version__)).encode())
    for name in ("architectures.py", "architectures_steps.py"):
        own.update((Path(__file__).parent / name).read_bytes())
    return own.hexdigest()[:16]


def run(types: Iterable[str], kept: dict[str, Row], file: Path) -> None:
    """Rows of the types that have none, each written as it comes."""
    for type in types:
        if type in kept:
            continue
        start = time.monotonic()
        kept[type] = {"class": CLASSES[type], **in_a_child(type), "made_by": made_by()}
        passing = file.with_suffix(".part")
        passing.write_text(json.dumps(kept, indent=1) + "\n")
        passing.replace(file)
        print(f"{type}: {said_of(kept[type])} ({time.monotonic() - start:.0f} s)", flush=True)


def said_of(row: Row) -> str:
    """A row in one line."""
    if not row["ok"]:
        return str(row["why"])
    edges = "; ".join(", ".join(kind["edges"]) or "no edge" for kind in row["kinds"])
    steps = (f"{recipe} {' / '.join(step.values())}" for recipe, step in row.get("steps", {}).items())
    return "; ".join([edges, *steps])


def page(rows: dict[str, Row]) -> str:
    """The page on all types."""
    return architectures_page.page(rows, CLASSES, DECODER, {type: _experts(type) for type in rows})


def _experts(type: str) -> int:
    """How many experts a layer of a type has; 0 where its config cannot be made."""
    try:
        return experts_in(configured(type))
    except Exception:  # the row says why
        return 0


def kept_of(found: dict[str, Row], types: Iterable[str], again: str | None) -> dict[str, Row]:
    """The rows to keep: of ``types`` those that these sources made, of others all."""

    def stale(type: str, row: Row) -> bool:
        return row["made_by"] != made_by() or again == "all" or (again == "failed" and not _good(row))

    asked = set(types)
    return {t: row for t, row in found.items() if t in CLASSES and not (t in asked and stale(t, row))}


def _good(row: Row) -> bool:
    return bool(row["ok"]) and went(row, "rtn", "gptq")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--types", help="only these, separated by commas")
    parser.add_argument("--again", choices=["failed", "all"], help="rows to make again")
    parser.add_argument("--rows", type=Path, default=ROWS, help="where the rows are kept")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--no-runs", action="store_true", help="write the page from the rows that are there")
    options = parser.parse_args()
    types = options.types.split(",") if options.types else sorted(CLASSES)
    if unknown := set(types) - set(CLASSES):
        parser.error(f"no causal language model of transformers: {', '.join(sorted(unknown))}")
    found: dict[str, Row] = json.loads(options.rows.read_text()) if options.rows.exists() else {}
    kept = found if options.no_runs else kept_of(found, types, options.again)
    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    if not options.no_runs:
        run(types, kept, options.rows)
    options.page.write_text(page(kept))
    print(f"{sum(row['ok'] for row in kept.values())} of {len(kept)} discovered and proven: {options.page}")


if __name__ == "__main__":
    main()
