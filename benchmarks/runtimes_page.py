"""What ``runtimes.py`` measured, as a page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def page(found: Mapping[str, Any]) -> str:
    """The measurements as Markdown."""
    return "\n".join([*heading(found), *comparison(found["rows"]), *likeness(found["agreement"])])


def heading(found: Mapping[str, Any]) -> list[str]:
    """What was measured and how."""
    return [
        "# llama.cpp: our file beside its own quantizer's",
        "",
        "Made by `python benchmarks/runtimes.py`; the numbers are in `runtimes.json`. SmolLM2-135M-Instruct.",
        "",
        f"* Our run: `{found['run']}`.",
        f"  It and the importance matrix (imatrix) saw {found['calibration']}.",
        f"* Perplexity: llama.cpp's own logits on {found['evaluation']},",
        "  no BOS, every token but a window's first.",
        f"* Speed: {found['speed']};",
        "  in each round every file has its turn. Medians; ratios are medians of each round's ratio to llama.cpp's",
        "  Q4_0. With one thread, time is the process's own CPU time.",
        f"* {found['runtime']}.",
        "",
    ]


def comparison(rows: list[dict[str, Any]]) -> list[str]:
    """The table of files."""
    lines = [
        "| file | MB | matrices | perplexity | prompt tok/s | ratio | decode tok/s | ratio |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        speed = [f"{row[what]:.0f} | {row[what + '_ratio']:.2f}" for what in ("prefill", "decode")]
        cells = [row["file"], f"{row['bytes'] / 1e6:.1f}", row["types"], f"{row['perplexity']:.3f}", *speed]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "This model's width, 576, is no multiple of 256: llama.cpp gives K types' matrices larger types there, so",
        "its Q4_K_M is a larger file. Its Q4_1 is left out: the reference weights come from a Q4_1 file, which that",
        "type reproduces by construction; in a Q4_0 file with an importance matrix it gives that type to some",
        "matrices, see the column. Embeddings, which are the head too, are Q8_0 in all rounded files. Our Q4_0 file",
        "and llama.cpp's have the same types in the same places, so they run at the same speed but for noise.",
        "",
    ]


def likeness(found: Mapping[str, Any]) -> list[str]:
    """How llama.cpp's results compare with the simulation's."""
    names = ("simulation", "simulation, inputs at 8 bits", "llama.cpp")
    lines = [
        "## Does llama.cpp compute what was evaluated?",
        "",
        "On the same tokens, our file with float embeddings, keys and values in float32:",
        "",
        "| | perplexity |",
        "|---|---:|",
        *(f"| {name} | {found[name]:.3f} |" for name in names),
        "",
        "Greedy text. Where llama.cpp and the simulation (inputs in float) part, the gap between their tokens is",
        "given, in the simulation's logits and in units of their spread: a small one is a near-tie, which inputs",
        "at 8 bits may decide.",
        "",
        "| prompt | llama.cpp goes on | same tokens | gap there |",
        "|---|---|---:|---:|",
    ]
    for one in found["greedy"]:
        gap = "-" if one["gap"] is None else f"{one['gap']:.3f}"
        text = json.dumps(one["text"], ensure_ascii=False).replace("|", "\\|")
        lines.append(f"| {one['prompt']} | {text} | {one['same']} of {one['of']} | {gap} |")
    return [*lines, ""]
