"""SmolLM2-135M-Instruct in ONNX Runtime: our graph beside that of its own quantizer, into ``docs/runtimes-onnx.md``.

    python benchmarks/runtimes_onnx.py --calibration FILE --evaluation FILE [--run FOLDER] [--tokens 8192]

The protocol is that of ``runtimes.py``. Both graphs come from the same float model through the same builder, have the
same operators in the same places, blocks of 32 and symmetric codes; embeddings and head are float32 in both. What
differs is the codes and scales. Theirs is the default of onnxruntime's MatMulNBitsQuantizer: round to nearest. Each
is measured at accuracy level 0 (float32 inputs) and 4 (inputs rounded to 8 bits). Needs ``lowbit[onnx]``.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxruntime_genai as genai
import torch
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from torch import Tensor

import lowbit
from lowbit.data import evaluation
from lowbit.evaluate.perplexity import perplexity
from lowbit.export.onnx import logits_of, write
from lowbit.export.onnx_read import GRAPH
from lowbit.export.run import Run, open_run
from lowbit.export.target import Options
from lowbit.source import load_tokenizer, resolve

ROOT = Path(__file__).resolve().parent.parent
SCHEME, RECIPE, SAMPLES, LENGTH, SEED, WINDOW, BLOCK = "w4a16g32-sym", "affinequant+gptq", 16, 256, 0, 512, 32
ROUNDS, DECODED = 5, 32
BASE = "onnxruntime, level {}"


def make_folders(run: Run, work: Path) -> dict[str, Path]:
    """Every folder that is measured, by name; the float one is what the others are made from."""
    folders = {"float": work / "float"}
    build_float(resolve("demo").folder, folders["float"])
    for level in (0, 4):
        ours, theirs = f"lowbit, level {level}", BASE.format(level)
        folders |= {ours: work / f"ours-{level}", theirs: work / f"theirs-{level}"}
        write(run, folders[ours], Options(accuracy_level=level))
        quantize_there(folders["float"], folders[theirs], level)
    return folders


def build_float(source: Path, folder: Path) -> None:
    """The float model through the builder that makes ours."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu", "-i", str(source)]
    command += ["-o", str(folder), "-c", str(folder / "cache"), "--extra_options", "hf_token=false"]
    command += ["shared_embeddings=true"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


def quantize_there(source: Path, folder: Path, level: int) -> None:
    """onnxruntime's own quantizer, with its default method, for every linear but the head."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(f"{GRAPH}*"))
    quantizer = MatMulNBitsQuantizer(
        onnx.load(source / GRAPH),
        block_size=BLOCK,
        is_symmetric=True,
        accuracy_level=level,
        nodes_to_exclude=["/lm_head/MatMul"],
    )
    quantizer.process()
    quantizer.model.save_model_to_file(str(folder / GRAPH), use_external_data_format=True)


def opened(folder: Path, threads: int) -> Any:
    """A folder as onnxruntime-genai loads it, with that many threads."""
    config = genai.Config(str(folder))
    session = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    return genai.Model(config)


def speeds(models: Mapping[str, Any], ids: list[int], threads: int) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of a prompt of one window and of single tokens after it, ``ROUNDS`` times each, in turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    out: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in models}
    for turn in range(ROUNDS + 1):
        for name, model in models.items():
            params = genai.GeneratorParams(model)
            params.set_search_options(
                do_sample=False, max_length=len(ids) + DECODED + 1, min_length=len(ids) + DECODED
            )
            generator = genai.Generator(model, params)
            began = clock()
            generator.append_tokens(ids)
            generator.generate_next_token()
            middle = clock()
            for _ in range(DECODED):
                generator.generate_next_token()
            ended = clock()
            if turn:  # the first one warms up
                out[name]["prefill"].append(len(ids) / (middle - began))
                out[name]["decode"].append(DECODED / (ended - middle))
    return out


def measure(folders: Mapping[str, Path], ids: Tensor, threads: int) -> list[dict[str, Any]]:
    """A row for each folder."""
    rows = []
    for name, folder in folders.items():
        size = sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*"))
        found = perplexity((window[None], logits_of(folder, window)[None]) for window in ids)
        rows.append({"file": name, "bytes": size, "perplexity": found})
        print(f"{name}: {found:.3f}", flush=True)
    timed = speeds({name: opened(folder, threads) for name, folder in folders.items()}, ids[0].tolist(), threads)
    for row in rows:
        name = str(row["file"])
        base = BASE.format(0 if name == "float" else name[-1])
        for what, values in timed[name].items():
            row[what] = statistics.median(values)
            row[f"{what}_ratio"] = statistics.median(a / b for a, b in zip(values, timed[base][what], strict=True))
    return rows


def simulated(run: Run, ids: Tensor) -> dict[str, float]:
    """The simulation's perplexity for each level."""
    out = {}
    with torch.no_grad():
        for level, runs_on in ((0, "float"), (4, "onnxruntime")):
            model = lowbit.load(run.folder, runs_on=runs_on)
            out[f"lowbit, level {level}"] = perplexity((w[None], model(w[None]).logits) for w in ids)
    return out


def page(found: Mapping[str, Any]) -> str:
    """The measurements as Markdown."""
    lines = [
        "# ONNX Runtime: our graph beside its own quantizer's",
        "",
        "Made by `python benchmarks/runtimes_onnx.py`, numbers in `runtimes-onnx.json`. SmolLM2-135M-Instruct.",
        "",
        f"* Our run: `{found['run']}`. It saw {found['calibration']}.",
        "* Theirs: `MatMulNBitsQuantizer` with its default method on the float graph that the same builder makes,",
        f"  blocks of {BLOCK}, symmetric. The operators are the same; embeddings and head are float32 in all.",
        f"* Perplexity: onnxruntime's own logits on {found['evaluation']},",
        "  no BOS, every token but a window's first; beside it the simulation's, where there is one.",
        f"* Speed, in onnxruntime-genai: {found['speed']};",
        "  in each round every folder has its turn. Medians; ratios are medians of each round's ratio to their graph",
        "  at the same level (float: at level 0). With one thread, time is the process's own CPU time.",
        f"* {found['runtime']}.",
        "",
        "| graph | MB | perplexity | simulation | prompt tok/s | ratio | decode tok/s | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        speed = [f"{row[what]:.0f} | {row[what + '_ratio']:.2f}" for what in ("prefill", "decode")]
        beside = f"{found['simulated'][row['file']]:.3f}" if row["file"] in found["simulated"] else ""
        cells = [row["file"], f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.3f}", beside, *speed]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", required=True, help="a text file, or builtin")
    parser.add_argument("--evaluation", required=True, help="another one")
    parser.add_argument("--run", type=Path, default=ROOT / "build" / "runtimes", help="our run, made if not there")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "runtimes-onnx.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)  # it tells of every node it skips
    drawn: dict[str, Any] = {"data": options.calibration, "samples": SAMPLES, "length": LENGTH, "seed": SEED}
    lowbit.quantize("demo", options.run, scheme=SCHEME, recipe=options.recipe, effort="quick", **drawn)
    run = open_run(options.run)
    ids = evaluation(options.evaluation, load_tokenizer(run.folder), WINDOW, options.tokens).ids
    with tempfile.TemporaryDirectory() as name:
        found: dict[str, Any] = {"rows": measure(make_folders(run, Path(name)), ids, options.threads)}
    found |= {
        "simulated": simulated(run, ids),
        "calibration": f"{SAMPLES} x {LENGTH} tokens of {Path(options.calibration).name}, seed {SEED}",
        "run": f"{SCHEME}, {options.recipe}, --effort quick",
        "evaluation": f"{ids.numel()} tokens of {Path(options.evaluation).name}, in windows of {WINDOW}",
        "speed": f"{options.threads} thread, a prompt of {WINDOW} tokens and {DECODED} single ones, {ROUNDS} rounds",
        "runtime": f"onnxruntime {version('onnxruntime')}, onnxruntime-genai {version('onnxruntime-genai')}",
    }
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.out.write_text(page(found))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
