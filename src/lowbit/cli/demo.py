"""``lowbit demo``: quantizes a model from a package registry with two recipes, measures and samples."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from lowbit.cli.console import Json, print_json, table
from lowbit.errors import LowbitError
from lowbit.paths import user_path
from lowbit.progress import duration, say

PROMPT = "The best way to learn a new language is"
SCHEME = "w4a16g64-sym"
RECIPES = ("rtn", "affinequant+gptq")
# Small, so that the slowest step (AffineQuant) takes one to two minutes on 2 cores.
SAMPLES, LENGTH, EPOCHS = 8, 256, 2
EVALUATED, WINDOW, NEW_TOKENS = 4096, 512, 24


@dataclass(frozen=True)
class Row:
    """One row of the demo's table: effective bits per weight, and the seconds of quantization."""

    recipe: str
    scheme: str
    bits_per_weight: float
    size_bytes: int
    perplexity: float
    seconds: float | None
    text: str


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the quantized model.")] = Path("demo-run"),
    as_json: Json = False,
) -> None:
    """Quantize SmolLM2-135M-Instruct and compare: 2 to 5 minutes.

    Size, perplexity and a sample of text of the float model, of round-to-nearest, and of AffineQuant with GPTQ.
    """
    result = run_demo(out)
    if as_json:
        print_json(result)
    else:
        _show(result)


def run_demo(out: Path) -> dict[str, Any]:
    """Quantize SmolLM2-135M-Instruct with two recipes and compare; the last one's folder remains at ``out``.

    Perplexity is on Wikipedia text; calibration is on other parts of the same package.

    Raises:
        LowbitError: ``out`` is the root of a file system, beside which there is no place.
    """
    from lowbit.checkpoints.resolve import resolve
    from lowbit.pipeline.quantize import quantize
    from lowbit.pipeline.recipe import SAMPLES_LEARNING
    from lowbit.pipeline.request import DEFAULTS

    out = user_path(out).resolve()
    if not out.name:
        raise LowbitError(f"--out {out} given, which has no name: name a folder to be made, such as demo-run")
    source = resolve("demo")
    say("evaluating the float model")
    rows = [_row("float", "float32", 32.0, source.folder, None)]
    for recipe in RECIPES:
        last = recipe == RECIPES[-1]
        folder = out if last else out.with_name(f"{out.name}-{recipe}")
        say(f"quantizing with {recipe}")
        result = quantize(
            "demo",
            folder,
            scheme=SCHEME,
            recipe=recipe,
            data="builtin",
            samples=SAMPLES,
            length=LENGTH,
            settings=[f"affinequant.epochs={EPOCHS}"] if "affinequant" in recipe else [],
        )
        rows.append(_row(recipe, SCHEME, result.bits_per_weight, folder, result.seconds))
        if not last:
            shutil.rmtree(folder)
    protocol = (
        f"SmolLM2-135M-Instruct; perplexity on {EVALUATED:,} tokens of Wikipedia text in windows of {WINDOW}; "
        f"calibration on {SAMPLES} windows of {LENGTH} tokens, AffineQuant for {EPOCHS} epochs. "
        "This is a short run for a first look; by default, 'lowbit quantize' uses "
        f"{SAMPLES_LEARNING} windows of {DEFAULTS['length']} tokens and more epochs"
    )
    return {"out": str(out), "prompt": PROMPT, "protocol": protocol, "rows": [asdict(row) for row in rows]}


def _row(recipe: str, scheme: str, bits: float, folder: Path, seconds: float | None) -> Row:
    from lowbit.checkpoints.safetensors_folder import Checkpoint
    from lowbit.evaluation.evaluate import evaluate
    from lowbit.evaluation.generate import generate_text

    perplexity = evaluate(str(folder), data="builtin", length=WINDOW, tokens=EVALUATED).perplexity["builtin"]
    size = sum(path.stat().st_size for path in Checkpoint(folder).files)
    return Row(recipe, scheme, bits, size, perplexity, seconds, generate_text(folder, PROMPT, NEW_TOKENS))


def _show(result: dict[str, Any]) -> None:
    """Print the table, the protocol, the samples and the next commands."""
    rows = table("recipe", "scheme", "bits", "on disk", "perplexity", "time")
    for row in result["rows"]:
        rows.add_row(
            row["recipe"],
            row["scheme"],
            f"{row['bits_per_weight']:.3f}",
            f"{row['size_bytes'] / 1e6:.0f} MB",
            f"{row['perplexity']:.2f}",
            "-" if row["seconds"] is None else duration(row["seconds"]),
        )
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(rows)
    console.print(f"{result['protocol']}.\n")
    for row in result["rows"]:
        console.print(f"{row['recipe']}: {' '.join(row['text'].split())}")
    out = result["out"]
    console.print(f"\nThe quantized model is in {out}; stock transformers loads it. Next:")
    for line, purpose in (
        (f"lowbit report {out} -o report.html", "an HTML report, block by block"),
        (f"lowbit export {out} --to gguf", "the same codes for llama.cpp; also executorch, onnx, gptq, awq, vllm"),
        (f"lowbit verify {out} {out}.gguf", "every exported value against the run, bit for bit"),
        (f"lowbit compare demo {out} --length {WINDOW} --tokens {EVALUATED}", "divergence from the float model"),
    ):
        console.print(f"  {line}\n      {purpose}", soft_wrap=True)
