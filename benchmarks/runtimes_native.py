"""llama.cpp's own formats in llama.cpp: our files beside those of its quantizer, into ``docs/runtimes-native.md``.

    python benchmarks/runtimes_native.py [--recipe awq+gptq] [--calibration FILE] [--evaluation FILE] [--seeds 3]
    python benchmarks/runtimes_native.py --kept

A small Llama with widths of 256 (``small_llama.py``) in every format, and SmolLM2 in those whose blocks divide 576.
All matrices of a file have one type, on both sides; embeddings stay float32, so that the linears alone differ. The
importance matrix has the tokens that our runs calibrate on. Perplexities and divergences are of llama.cpp's own
logits. Rows are kept in ``docs/measured/runtimes-native``; ``--missing`` leaves those that other sources have
measured. ``--kept`` measures nothing and writes the page of the formats that have all rows. Needs
``pip install 'lowbit[llamacpp]'``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
import turns
from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.cli.main import guarded
from lowbit.data.text import calibration, evaluation
from lowbit.exporters import gguf as exporter
from lowbit.exporters.gguf_native import NATIVE
from lowbit.exporters.llamacpp import open_session, source_distance
from lowbit.exporters.llamacpp_quantizer import quantize_file
from lowbit.exporters.run import Run, open_run
from lowbit.exporters.target import Options
from lowbit.metrics.perplexity import perplexity
from rows import ROOT, digest, found, kept, text_identity
from runtimes import importance, model_run, processor, types
from runtimes_page import native
from small_llama import small_llama

MEASURED = ROOT / "docs" / "measured" / "runtimes-native"
SAMPLES, LENGTH, WINDOW = 16, 256, 512
# With ``pure`` all matrices get the type that the file is named after.
KINDS = {
    "q2_k": "Q2_K", "q3_k": "Q3_K_M", "q4_k": "Q4_K_M", "q5_k": "Q5_K_M", "q6_k": "Q6_K", "iq4_nl": "IQ4_NL",
    "mxfp4": "MXFP4",
}  # fmt: skip
SCHEMES = {format: format for format in KINDS} | {"mxfp4": "mxfp4a16"}  # llama.cpp's inputs are its own
MODELS = {"small Llama": tuple(KINDS), "SmolLM2": ("iq4_nl", "mxfp4")}


def figures_there(file: Path, ids: Tensor, source: Path) -> dict[str, float]:
    """llama.cpp's perplexity of a file, keys and values in float32, and its mean divergence from the float model."""
    model, divergences = lowbit.load(source), list[Tensor]()

    def logits(session: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for window in ids:
            there, exact = session.logits(window.tolist()), model(window[None]).logits[0]
            exact = exact.log_softmax(-1)
            divergences.append((exact.exp() * (exact - there.log_softmax(-1))).sum(-1).double())
            yield window[None], there[None]

    with torch.no_grad(), open_session(file, WINDOW, exact=True) as session:
        found = perplexity(logits(session))
    return {"llama.cpp": found, "KL": float(torch.cat(divergences).mean())}


def ours(source: Path, format: str, recipe: str, data: str, seed: int, ids: Tensor) -> dict[str, Any]:
    """Our file of a format: perplexity in llama.cpp, and simulated with float inputs and with llama.cpp's."""
    with tempfile.TemporaryDirectory() as name:
        folder, file = Path(name) / "run", Path(name) / "ours.gguf"
        drawn: dict[str, Any] = {"data": data, "samples": SAMPLES, "length": LENGTH, "seed": seed}
        lowbit.quantize(str(source), folder, scheme=SCHEMES[format], recipe=recipe, effort="quick", **drawn)
        run = open_run(folder)
        exporter.write(run, file, Options(embeddings="f32"))
        assert_pure(file, format)
        return {
            **figures_there(file, ids, source),
            "simulation": turns.simulated(run, ids, "float"),
            "simulation, inputs at 8 bits": turns.simulated(run, ids, "llama.cpp"),
        }


def theirs(source: Run, format: str, drawn: Tensor | None, ids: Tensor) -> dict[str, Any]:
    """llama.cpp's own file of a format, with an importance matrix where tokens are ``drawn``."""
    with tempfile.TemporaryDirectory() as name:
        plain, file = Path(name) / "float.gguf", Path(name) / "theirs.gguf"
        exporter.write(source, plain, Options(embeddings="f32"))
        matrix = None if drawn is None else importance(source, drawn)
        quantize_file(plain, file, KINDS[format], matrix, pure=True)
        assert_pure(file, format)
        return figures_there(file, ids, source.folder)


def assert_pure(file: Path, format: str) -> None:
    """One type for all linears of a file, or the rows of a table would not compare."""
    held = types(file)
    assert set(held) == {NATIVE[format].name, "F32"}, f"{file.name}: {dict(held)}"


def source_check(source: Run, ids: Tensor) -> float:
    """Distance between llama.cpp's logits of the float file and those of the model that is read from it."""
    with tempfile.TemporaryDirectory() as name:
        plain = Path(name) / "float.gguf"
        exporter.write(source, plain, Options(embeddings="f32"))
        return source_distance(plain, ids.tolist())


def rows_of(model: str, source: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """All figures of a model."""
    tokenizer = load_tokenizer(source)
    ids = evaluation(chosen.evaluation, tokenizer, WINDOW, chosen.tokens).ids
    plain, seeds = model_run(source), range(chosen.seeds)
    windows = [calibration(chosen.calibration, tokenizer, SAMPLES, LENGTH, seed).ids for seed in seeds]
    weights = digest(source.glob("*.safetensors"))[:16]  # the small Llama is trained: other machines, other weights
    key = (model, weights, text_identity(chosen.calibration), text_identity(chosen.evaluation), chosen.tokens)

    def row(what: object, measure: Any) -> dict[str, Any]:
        earlier = found(MEASURED, (key, what), any_code=True) if chosen.missing or chosen.kept else None
        if earlier is not None or chosen.kept:
            return earlier or {}
        made = kept(MEASURED, (key, what), measure, fresh=False)
        print(model, what, {name: round(value, 3) for name, value in made.items()}, flush=True)
        return made

    out: dict[str, Any] = {
        "float": row("float", lambda: {"perplexity": turns.simulated(plain, ids, None)}),
        "source": row("source", lambda: {"distance": source_check(plain, ids[0])}),
        "formats": {},
    }
    for format in MODELS[model]:
        out["formats"][format] = {
            "ours": [
                row(
                    (format, chosen.recipe, seed),
                    lambda format=format, seed=seed: ours(
                        source, format, chosen.recipe, chosen.calibration, seed, ids
                    ),
                )
                for seed in seeds
            ],
            "imatrix": [
                row((format, "imatrix", seed), lambda format=format, drawn=drawn: theirs(plain, format, drawn, ids))
                for seed, drawn in zip(seeds, windows, strict=True)
            ],
            "plain": row((format, "plain"), lambda format=format: theirs(plain, format, None, ids)),
        }
    whole = {name: own for name, own in out["formats"].items() if all((*own["ours"], *own["imatrix"], own["plain"]))}
    return {**out, "formats": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="awq+gptq")
    parser.add_argument("--calibration", default="builtin:wiki", help="a text file, or a built-in text")
    parser.add_argument("--evaluation", default="builtin:wiki", help="another one, or a built-in text")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", action="append", choices=[*MODELS], help="only this one")
    parser.add_argument("--missing", action="store_true", help="leave rows of other sources as they are")
    parser.add_argument("--kept", action="store_true", help="measure nothing: the page from the rows that are there")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "runtimes-native.md")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    sources = {"small Llama": small_llama, "SmolLM2": lambda: resolve("demo").folder}
    page: dict[str, Any] = {
        "recipe": chosen.recipe,
        "calibration": f"{SAMPLES} x {LENGTH} tokens of {Path(chosen.calibration).name}, {chosen.seeds} seeds",
        "evaluation": f"{chosen.tokens} tokens of {Path(chosen.evaluation).name} in windows of {WINDOW}",
        "runtime": f"llama-cpp-python {version('llama-cpp-python')}; {processor()}",
        "models": {model: rows_of(model, sources[model](), chosen) for model in chosen.model or MODELS},
    }
    chosen.out.with_suffix(".json").write_text(json.dumps(page, indent=1) + "\n")
    chosen.out.write_text(native(page))
    print(f"wrote {chosen.out}")


if __name__ == "__main__":
    sys.exit(guarded(main))
