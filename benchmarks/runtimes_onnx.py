"""SmolLM2-135M-Instruct in ONNX Runtime: our graph beside that of its own quantizer, into ``docs/runtimes-onnx.md``.

    python benchmarks/runtimes_onnx.py [--calibration FILE] [--evaluation FILE] [--run FOLDER] [--tokens 8192]

The protocol is that of ``runtimes.py``. Both graphs come from the same float model through the same builder, have the
same operators in the same places, blocks of 32 and symmetric codes; embeddings and head are float32 in both. What
differs is the codes and scales. Theirs is the default of onnxruntime's MatMulNBitsQuantizer: round to nearest. Each
is measured at accuracy level 0 (float32 inputs) and 4 (inputs rounded to 8 bits). Needs ``lowbit[onnx]``.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

try:
    import onnx
    import onnxruntime_genai as genai
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
except ModuleNotFoundError as error:
    raise SystemExit(f"{error.name} is not installed: pip install 'lowbit[onnx]'") from error

import lowbit
import runtimes_page
import turns
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.cli.main import guarded
from lowbit.errors import LowbitError
from lowbit.exporters.onnx import LEVELS, logits_of, write
from lowbit.exporters.onnx_read import GRAPH
from lowbit.exporters.run import Run
from lowbit.exporters.target import Options
from lowbit.quant.scheme_names import parse_scheme

SCHEME, BLOCK = "w4a16g32-sym", 32
OURS, THEIRS, FLOAT = "lowbit, level {}", "onnxruntime, level {}", "float"


def make_folders(run: Run, source: Path, work: Path) -> dict[str, Path]:
    """Every folder that is measured, by name; the float one is what the others are made from."""
    folders = {FLOAT: work / "float"}
    build_float(source, folders[FLOAT])
    for level in LEVELS:
        ours, theirs = OURS.format(level), THEIRS.format(level)
        folders |= {ours: work / f"ours-{level}", theirs: work / f"theirs-{level}"}
        write(run, folders[ours], Options(accuracy_level=level))
        quantize_there(folders[FLOAT], folders[theirs], level)
    return folders


def build_float(source: Path, folder: Path) -> None:
    """The float model through the builder that makes ours."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu", "-i", str(source)]
    command += ["-o", str(folder), "-c", str(folder / "cache"), "--extra_options", "hf_token=false"]
    command += ["shared_embeddings=true"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise LowbitError(f"onnxruntime-genai's model builder gave up on the float model: {said[:300]}")


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


def opened(folder: Path, threads: int, **changes: Any) -> Any:
    """A folder as onnxruntime-genai loads it, with that many threads."""
    config = genai.Config(str(folder))
    session = {"intra_op_num_threads": threads}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}, **changes}}))
    return genai.Model(config)


def generator(model: Any, length: int, least: int = 0) -> Any:
    """Greedy, for texts of up to ``length`` tokens, at ``least`` of which the model may end them."""
    params = genai.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=length, min_length=least)
    return genai.Generator(model, params)


def start(model: Any, ids: list[int]) -> turns.Start:
    """A turn of a model: the prompt gives the first token already, each step one more."""

    def begin() -> Any:
        made = generator(model, len(ids) + turns.DECODED + 1, len(ids) + turns.DECODED)

        def read() -> None:
            made.append_tokens(ids)
            made.generate_next_token()

        return read, lambda _: made.generate_next_token()

    return begin


def measure(folders: Mapping[str, Path], ids: Tensor, threads: int) -> list[dict[str, Any]]:
    """A row for each folder."""
    rows = []
    for name, folder in folders.items():
        size = sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*"))
        found = turns.scored(functools.partial(logits_of, folder), ids)
        rows.append({"file": name, "bytes": size, "perplexity": found})
        print(f"{name}: {found:.3f}", flush=True)
    starts = {name: start(opened(folder, threads), ids[0].tolist()) for name, folder in folders.items()}
    timed = turns.speeds(starts, turns.WINDOW, threads)
    figures = turns.medians(timed, lambda name: THEIRS.format(0 if name == FLOAT else name[-1]))
    return [row | figures[str(row["file"])] for row in rows]


def continuations(run: Run, folder: Path, threads: int) -> list[dict[str, Any]]:
    """Greedy text of our graph in onnxruntime-genai beside the simulation's; it goes on after an end of text."""
    # It stops at a token of its config, which must be one of the vocabulary: the last, which no text here has.
    model = opened(folder, threads, eos_token_id=run.subject.config.vocab_size - 1)

    def greedy(ids: list[int], tokens: int) -> list[int]:
        made = generator(model, len(ids) + tokens)
        made.append_tokens(ids)
        for _ in range(tokens):
            made.generate_next_token()
        return [int(token) for token in made.get_sequence(0)][len(ids) :]

    plain, tokenizer = lowbit.load(run.folder), load_tokenizer(run.folder)
    return [turns.beside(plain, tokenizer, prompt, greedy) for prompt in turns.PROMPTS]


def main() -> None:
    chosen = turns.options(__doc__, "runtimes-onnx.md")
    logging.getLogger(MatMulNBitsQuantizer.__module__).setLevel(logging.WARNING)  # it tells of every node it skips
    texts = turns.texts_of(chosen)
    (run, *more) = turns.runs_of(chosen, texts, SCHEME)
    if more or run.subject.scheme != parse_scheme(SCHEME):
        raise LowbitError(f"--run: give one run, of {SCHEME}, which their quantizer's graph is made like")
    with tempfile.TemporaryDirectory() as name:
        folders = make_folders(run, texts.source.folder, Path(name))
        spoken = continuations(run, folders[OURS.format(0)], chosen.threads)
        rows = measure(folders, texts.scored.ids, chosen.threads)
        busy = turns.machine(chosen.threads)
    found = {"rows": rows, "greedy": spoken, "runs": turns.commands([run])} | texts.told
    found |= {
        "simulated": {
            OURS.format(level): turns.simulated(run, texts.scored.ids, on) for level, (on, _) in LEVELS.items()
        },
        "speed": turns.timing(turns.WINDOW, chosen.threads),
        "machine": busy,
        "runtime": f"onnxruntime {version('onnxruntime')}, onnxruntime-genai {version('onnxruntime-genai')}",
    }
    chosen.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    chosen.out.write_text(runtimes_page.onnx(found))
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    sys.exit(guarded(main))
