"""SmolLM2-135M-Instruct in llama.cpp: our files beside those of llama.cpp's own quantizer, into ``docs/runtimes.md``.

    python benchmarks/runtimes.py [--calibration FILE] [--evaluation FILE] [--run FOLDER ...] [--tokens 8192]

All files are made from the same float model, the importance matrix from the tokens that our runs calibrate on. Size,
perplexity and speed are measured in llama.cpp itself, the speeds in turns. Our runs are made in ``build/runtimes``
unless they are given. Needs ``pip install 'lowbit[llamacpp]'``.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

try:
    import llama_cpp.llama_cpp as native
except ModuleNotFoundError as error:
    raise SystemExit("llama.cpp is not installed: pip install 'lowbit[llamacpp]'") from error

import lowbit
import turns
from lowbit.checkpoints.resolve import load_config, load_tokenizer
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.cli.main import guarded
from lowbit.errors import LowbitError
from lowbit.exporters import gguf as exporter
from lowbit.exporters.float_run import float_run
from lowbit.exporters.gguf_tensors import file_tensors
from lowbit.exporters.llamacpp import Session, open_session
from lowbit.exporters.llamacpp_quantizer import quantize_file
from lowbit.exporters.run import Run
from lowbit.exporters.target import Options
from runtimes_page import FLOAT, OURS, THEIRS, llamacpp

SCHEMES = ("w4a16g32-sym", "w5a16g32-sym")
BASE = f"{THEIRS} Q4_0"
KINDS = ("Q4_0", "Q5_0", "Q4_K_M")


def model_run(folder: Path) -> Run:
    """A float model as the exporter reads runs."""
    return float_run(folder, load_config(folder), Checkpoint(folder), "SmolLM2-135M-Instruct")


def importance(source: Run, ids: Tensor) -> dict[str, Tensor]:
    """Mean square of each input channel by the file's names of linears: what llama.cpp's llama-imatrix measures."""
    model, sums = lowbit.load(source.folder), dict[str, Tensor]()

    def watch(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(args[0].shape[-1])) + args[0].square().sum((0, 1))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(watch(file_tensors(source.subject.config, [f"{name}.weight"])[0].name))
    with torch.no_grad():
        for window in ids:
            model.model(window[None])
    return {name: total / ids.numel() for name, total in sums.items()}


def our_files(runs: list[Run], work: Path) -> tuple[dict[str, Path], dict[str, tuple[Run, Path]]]:
    """By name our files, and beside each run one with float embeddings."""
    files, exact = dict[str, Path](), dict[str, tuple[Run, Path]]()
    for i, run in enumerate(runs):
        path, plain = work / f"ours-{i}.gguf", work / f"exact-{i}.gguf"
        # llama.cpp's quantizer gives these types a Q8_0 embedding where its width is no multiple of 256.
        exporter.write(run, path, Options(embeddings="q8_0"))
        exporter.write(run, plain, Options())
        name = f"{OURS} {types(path).most_common(1)[0][0]}"
        if name in files:
            raise LowbitError(f"{run.folder}: another run has given a file {name}")
        files[name], exact[name] = path, (run, plain)
    return files, exact


def their_files(source: Run, ids: Tensor, work: Path) -> dict[str, Path]:
    """By name the float file, and what llama.cpp's quantizer makes of it with and without importance matrix."""
    files = {FLOAT: work / "float.gguf"}
    exporter.write(source, files[FLOAT], Options(embeddings="f32"))
    matrix = importance(source, ids)
    for kind in KINDS:
        for name, given in ((f"{THEIRS} {kind}", None), (f"{THEIRS} {kind}, imatrix", matrix)):
            files[name] = work / f"theirs-{len(files)}.gguf"
            quantize_file(files[FLOAT], files[name], kind, given)
    return files


def types(path: Path) -> Counter[str]:
    """The types of a file's matrices."""
    return Counter(t.tensor_type.name for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2)


def scorer(session: Session) -> Callable[[Tensor], Tensor]:
    """A window's logits in llama.cpp."""
    return lambda window: session.logits(window.tolist())


def start(session: Session, ids: list[int]) -> turns.Start:
    """A turn of a file."""

    def begin() -> Any:
        session.forget()
        return lambda: session.decode(ids, 0), lambda i: session.decode([ids[i]], len(ids) + i)

    return begin


def measure(files: Mapping[str, Path], ids: Tensor, threads: int) -> list[dict[str, Any]]:
    """A row for each file."""
    rows = []
    with ExitStack() as stack:
        length = turns.WINDOW + turns.DECODED
        opened = {name: stack.enter_context(open_session(path, length, threads)) for name, path in files.items()}
        for name, path in files.items():
            held = ", ".join(f"{count} {kind}" for kind, count in types(path).most_common())
            found = turns.scored(scorer(opened[name]), ids)
            rows.append({"file": name, "bytes": path.stat().st_size, "types": held, "perplexity": found})
            print(f"{name}: {found:.3f}", flush=True)
        starts = {name: start(session, ids[0].tolist()) for name, session in opened.items()}
        timed = turns.medians(turns.speeds(starts, turns.WINDOW, threads), lambda _: BASE)
    return [row | timed[str(row["file"])] for row in rows]


def agreement(run: Run, file: Path, ids: Tensor) -> dict[str, Any]:
    """llama.cpp on our file with float embeddings beside the simulation: perplexity and greedy text."""
    tokenizer, model = load_tokenizer(run.folder), lowbit.load(run.folder)
    with open_session(file, turns.WINDOW, exact=True) as session:
        for prompt in turns.PROMPTS:
            if session.tokenize(prompt) != tokenizer(prompt).input_ids:
                raise LowbitError(f"llama.cpp cuts {prompt!r} into other tokens")
        return {
            "greedy": [turns.beside(model, tokenizer, prompt, session.greedy) for prompt in turns.PROMPTS],
            "llama.cpp": turns.scored(scorer(session), ids),
            "simulation": turns.simulated(run, ids, "float"),
            "simulation, inputs at 8 bits": turns.simulated(run, ids, "llama.cpp"),
        }


def processor() -> str:
    """What llama.cpp uses of the processor."""
    said = native.llama_print_system_info().decode()
    found = [part.split("=")[0].split(":")[-1].strip() for part in said.split("|") if part.strip().endswith("= 1")]
    return ", ".join(name for name in found if name.startswith(("AVX", "NEON", "ARM", "REPACK")))


def main() -> None:
    chosen = turns.options(__doc__, "runtimes.md")
    texts = turns.texts_of(chosen)
    runs = turns.runs_of(chosen, texts, *SCHEMES)
    with tempfile.TemporaryDirectory() as name:
        files, exact = our_files(runs, Path(name))
        theirs = their_files(model_run(texts.source.folder), texts.drawn.ids, Path(name))
        rows = measure({FLOAT: theirs[FLOAT], **files, **theirs}, texts.scored.ids, chosen.threads)
        busy = turns.machine(chosen.threads)
        beside = {name: agreement(run, path, texts.scored.ids) for name, (run, path) in exact.items()}
    found = {"rows": rows, "agreement": beside, "runs": turns.commands(runs)} | texts.told
    found |= {
        "speed": turns.timing(turns.WINDOW, chosen.threads),
        "machine": busy,
        "runtime": f"llama-cpp-python {version('llama-cpp-python')}; {processor()}",
    }
    chosen.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    chosen.out.write_text(llamacpp(found))
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    sys.exit(guarded(main))
