"""SmolLM2-135M-Instruct in llama.cpp: our file beside those of llama.cpp's own quantizer, into ``docs/runtimes.md``.

    python benchmarks/runtimes.py --calibration FILE --evaluation FILE [--run FOLDER] [--tokens 8192]

All files are made from the same float model, the importance matrix from the texts that our run calibrates on. Size,
perplexity and speed are measured in llama.cpp itself, the speeds in turns: each round measures every file once. With
one thread the process's own CPU time is taken, so that other work on the machine does not count. Needs
``pip install 'lowbit[llamacpp]'``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import llama_cpp.llama_cpp as native
import torch
from torch import Tensor

import lowbit
from lowbit.checkpoint import Checkpoint
from lowbit.data import calibration, evaluation
from lowbit.evaluate.perplexity import perplexity
from lowbit.export import gguf as exporter
from lowbit.export.llamacpp import Session, loaded, quiet
from lowbit.export.run import Run, Subject, open_run
from lowbit.export.target import Options
from lowbit.scheme import parse_scheme
from lowbit.source import load_config, load_tokenizer, resolve
from runtimes_page import page

ROOT = Path(__file__).resolve().parent.parent
SCHEME, RECIPE, SAMPLES, LENGTH, SEED, WINDOW = "w4a16g32-sym", "affinequant+gptq", 16, 256, 0, 512
OURS, FLOAT = "lowbit Q4_0", "float F32"
# name: llama.h's LLAMA_FTYPE_MOSTLY_*, and whether the importance matrix is given
THEIRS = {
    "llama.cpp Q4_0": (2, False),
    "llama.cpp Q4_0, imatrix": (2, True),
    "llama.cpp Q5_0": (8, False),
    "llama.cpp Q4_K_M": (15, False),
    "llama.cpp Q4_K_M, imatrix": (15, True),
}
ROUNDS, DECODED = 5, 32
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "In the beginning",
    "A good way to learn a language is",
]
ANSWER = 32


def float_run(folder: Path) -> Run:
    """A float model as the exporter reads runs: nothing rounded."""
    subject = Subject(load_config(folder), parse_scheme(SCHEME), {}, {})
    return Run(
        folder, {"identity": {"model": "SmolLM2-135M-Instruct"}}, subject, "pack-quantized", Checkpoint(folder)
    )


def importance(source: Run, ids: Tensor) -> dict[str, Tensor]:
    """Mean square of each input channel by the file's names of linears: what llama.cpp's llama-imatrix measures."""
    model, sums = lowbit.load(source.folder), dict[str, Tensor]()

    def watch(name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...]) -> None:
            sums[name] = sums.get(name, torch.zeros(args[0].shape[-1])) + args[0].square().sum((0, 1))

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(watch(exporter.gguf_name(source, f"{name}.weight")))
    with torch.no_grad():
        for window in ids:
            model.model(window[None])
    return {name: total / ids.numel() for name, total in sums.items()}


def quantize_there(source: Path, target: Path, kind: int, matrix: Mapping[str, Tensor] | None) -> None:
    """llama.cpp's own quantizer, ``kind`` being its file type."""
    options = native.llama_model_quantize_default_params()
    options.nthread, options.ftype = 1, kind
    values = {name: value.contiguous().numpy() for name, value in (matrix or {}).items()}
    entries = (native.llama_model_imatrix_data * (len(values) + 1))()  # the last one stays empty: the end
    for entry, (name, value) in zip(entries, values.items(), strict=False):
        entry.name, entry.size = name.encode(), value.size
        entry.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if values:
        options.imatrix = ctypes.cast(entries, ctypes.POINTER(native.llama_model_imatrix_data))
    quiet()
    if code := native.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(options)):
        raise SystemExit(f"llama_model_quantize gives {code} for {target.name}")


def make_files(run: Run, work: Path, corpus: str) -> dict[str, Path]:
    """Every file that is measured, by name; beside them ``lossless.gguf``, ours with float embeddings."""
    source = float_run(resolve("demo").folder)
    ids = calibration(corpus, load_tokenizer(source.folder), SAMPLES, LENGTH, SEED).ids
    files = {FLOAT: work / "float.gguf", OURS: work / "ours.gguf"}
    exporter.write(source, files[FLOAT], Options(embeddings="f32"))
    # llama.cpp's quantizer gives these types a Q8_0 embedding where its width is no multiple of 256.
    exporter.write(run, files[OURS], Options(embeddings="q8_0"))
    exporter.write(run, work / "lossless.gguf", Options())
    matrix = importance(source, ids)
    for i, (name, (kind, guided)) in enumerate(THEIRS.items()):
        files[name] = work / f"theirs-{i}.gguf"
        quantize_there(files[FLOAT], files[name], kind, matrix if guided else None)
    return files


def speeds(sessions: Mapping[str, Session], ids: list[int], threads: int) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of a prompt of one window and of single tokens after it, ``ROUNDS`` times each, in turns."""
    clock = time.process_time if threads == 1 else time.perf_counter
    out: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in sessions}
    for turn in range(ROUNDS + 1):
        for name, session in sessions.items():
            session.forget()
            began = clock()
            session.decode(ids, 0)
            middle = clock()
            for i in range(DECODED):
                session.decode([ids[i]], len(ids) + i)
            ended = clock()
            if turn:  # the first one warms up
                out[name]["prefill"].append(len(ids) / (middle - began))
                out[name]["decode"].append(DECODED / (ended - middle))
    return out


def contents(path: Path) -> str:
    """The types of a file's matrices."""
    found = Counter(t.tensor_type.name for t in gguf.GGUFReader(path).tensors if len(t.shape) == 2)
    return ", ".join(f"{count} {name}" for name, count in found.most_common())


def measure(files: Mapping[str, Path], ids: Tensor, threads: int) -> list[dict[str, Any]]:
    """A row for each file."""
    rows = []
    with ExitStack() as stack:
        opened = {name: stack.enter_context(loaded(path, WINDOW + DECODED, threads)) for name, path in files.items()}
        for name, session in opened.items():
            found = perplexity((window[None], session.logits(window.tolist())[None]) for window in ids)
            row = {"file": name, "bytes": files[name].stat().st_size, "types": contents(files[name])}
            rows.append(row | {"perplexity": found})
            print(f"{name}: {found:.3f}", flush=True)
        timed = speeds(opened, ids[0].tolist(), threads)
    for row in rows:
        for what, values in timed[str(row["file"])].items():
            base = timed["llama.cpp Q4_0"][what]
            row[what] = statistics.median(values)
            row[f"{what}_ratio"] = statistics.median(a / b for a, b in zip(values, base, strict=True))
    return rows


def agreement(run: Run, file: Path, ids: Tensor) -> dict[str, Any]:
    """llama.cpp on our file with float embeddings beside the simulation: perplexity and greedy text."""
    plain = lowbit.load(run.folder)
    out: dict[str, Any] = {"greedy": []}
    with torch.no_grad(), loaded(file, WINDOW, exact=True) as session:
        tokenizer = load_tokenizer(run.folder)
        for prompt in PROMPTS:
            out["greedy"].append(greedy(plain, session, tokenizer, prompt))
        out["llama.cpp"] = perplexity((w[None], session.logits(w.tolist())[None]) for w in ids)
        out["simulation"] = perplexity((w[None], plain(w[None]).logits) for w in ids)
        rounding = lowbit.load(run.folder, runs_on="llama.cpp")
        out["simulation, inputs at 8 bits"] = perplexity((w[None], rounding(w[None]).logits) for w in ids)
    return out


def greedy(model: Any, session: Session, tokenizer: Any, prompt: str) -> dict[str, Any]:
    """Both continuations of a prompt; where they part, how close the two tokens are for the simulation."""
    given = tokenizer(prompt, return_tensors="pt").input_ids
    if session.tokenize(prompt) != given[0].tolist():
        raise SystemExit(f"llama.cpp cuts {prompt!r} into other tokens")
    ours = model.generate(given, max_new_tokens=ANSWER, do_sample=False, eos_token_id=None)[
        0, given.shape[1] :
    ].tolist()
    theirs = session.greedy(given[0].tolist(), ANSWER)
    same = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), ANSWER)
    out = {"prompt": prompt, "text": tokenizer.decode(theirs), "same": same, "of": ANSWER, "gap": None}
    if same < ANSWER:
        scores = model(torch.cat([given[0], torch.tensor(ours[:same], dtype=given.dtype)])[None]).logits[0, -1]
        out["gap"] = float(scores[ours[same]] - scores[theirs[same]]) / float(scores.std())
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calibration", required=True, help="a text file, or builtin")
    parser.add_argument("--evaluation", required=True, help="another one")
    parser.add_argument("--run", type=Path, default=ROOT / "build" / "runtimes", help="our run, made if not there")
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "runtimes.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    drawn: dict[str, Any] = {"data": options.calibration, "samples": SAMPLES, "length": LENGTH, "seed": SEED}
    lowbit.quantize("demo", options.run, scheme=SCHEME, recipe=options.recipe, effort="quick", **drawn)
    run = open_run(options.run)
    ids = evaluation(options.evaluation, load_tokenizer(run.folder), WINDOW, options.tokens).ids
    with tempfile.TemporaryDirectory() as name:
        files = make_files(run, Path(name), options.calibration)
        found = {
            "rows": measure(files, ids, options.threads),
            "agreement": agreement(run, Path(name) / "lossless.gguf", ids),
        }
    found |= {
        "calibration": f"{SAMPLES} x {LENGTH} tokens of {Path(options.calibration).name}, seed {SEED}",
        "run": f"{SCHEME}, {options.recipe}, --effort quick",
        "evaluation": f"{ids.numel()} tokens of {Path(options.evaluation).name}, in windows of {WINDOW}",
        "speed": f"{options.threads} thread, a prompt of {WINDOW} tokens and {DECODED} single ones, {ROUNDS} rounds",
        "runtime": f"llama-cpp-python {version('llama-cpp-python')}; {processor()}",
    }
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    options.out.write_text(page(found))
    print(f"wrote {options.out}")


def processor() -> str:
    """What llama.cpp uses of the processor."""
    said = native.llama_print_system_info().decode()
    found = [part.split("=")[0].split(":")[-1].strip() for part in said.split("|") if part.strip().endswith("= 1")]
    return ", ".join(name for name in found if name.startswith(("AVX", "NEON", "ARM", "REPACK")))


if __name__ == "__main__":
    main()
