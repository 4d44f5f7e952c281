"""What ``runtimes.py``, ``runtimes_native.py`` and ``runtimes_onnx.py`` measured, as pages."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

OURS, THEIRS, FLOAT = "lowbit", "llama.cpp", "float F32"
NEAR = 0.01


def llamacpp(found: Mapping[str, Any]) -> str:
    """The page on llama.cpp."""
    return "\n".join(
        [
            *heading("lowbit in llama.cpp, compared with its own quantizer", "runtimes", found),
            "* llama.cpp's files: its own quantizer on the same float model; imatrix: with an importance matrix from",
            "  the calibration tokens, the mean square of each linear's inputs.",
            *protocol(found, "file", "llama.cpp's Q4_0"),
            *files(found["rows"]),
            *equal_size(found["rows"]),
            *likeness(found["agreement"]),
        ]
    )


def onnx(found: Mapping[str, Any]) -> str:
    """The page on ONNX Runtime."""
    return "\n".join(
        [
            *heading("lowbit in ONNX Runtime, compared with its own quantizer", "runtimes-onnx", found),
            "* onnxruntime's graphs: `MatMulNBitsQuantizer` with its default method, round to nearest, on the float",
            "  graph of the same builder: blocks of 32, symmetric. Operators are the same; embeddings and head are",
            "  float32.",
            "* Level 0 multiplies in float32, level 4 quantizes the inputs of every linear to 8 bits.",
            *protocol(found, "graph", "onnxruntime's graph at the same level (float: at level 0)"),
            *graphs(found["rows"], found["simulated"]),
            "## Agreement with the simulation",
            "",
            *gaps("onnxruntime-genai"),
            *greedy(found["greedy"], "onnxruntime-genai"),
        ]
    )


def native(found: Mapping[str, Any]) -> str:
    """The page on llama.cpp's own formats."""
    lines = [
        "# llama.cpp's own formats in llama.cpp, compared with its quantizer",
        "",
        "Files of `lowbit export --to gguf` and of llama.cpp's quantizer, of the same float model and with the same",
        "type for all linears, run by llama.cpp. Made by `make runtimes-native`; the figures are in",
        "`runtimes-native.json`.",
        "",
        "## Protocol",
        "",
        f"* lowbit: `--recipe {found['recipe']} --effort quick`, calibrated on {found['calibration']}, mean ±",
        "  standard deviation.",
        "* llama.cpp: round-to-nearest, and with an importance matrix from the same tokens and seeds.",
        f"* Perplexity: llama.cpp's logits on {found['evaluation']};",
        "  embeddings, keys and values in float32. *Simulation* is lowbit's own, with the inputs of linears in",
        "  floating point, and with inputs rounded to 8 bits as llama.cpp's kernels do.",
        "* *Small Llama* has 4 layers of width 256, and was trained for some minutes on the built-in text",
        "  (`benchmarks/small_llama.py`): K-quants need rows of 256.",
        f"* {found['runtime']}.",
        "",
    ]
    for model, one in found["models"].items():
        lines += [
            f"## {model}",
            "",
            f"Perplexity of the float model: {one['float']['perplexity']:.3f}. Its logits in llama.cpp differ from",
            f"those of the model that lowbit reads from the file by {one['source']['distance']:.1e} of their spread.",
            "",
            "| format | lowbit | llama.cpp, imatrix | llama.cpp | simulation | simulation, inputs at 8 bits |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        divergences = []
        for format, row in one["formats"].items():
            cells = [
                f"`{format}`",
                seeds(row["ours"], "llama.cpp"),
                seeds(row["imatrix"], "llama.cpp"),
                f"{row['plain']['llama.cpp']:.3f}",
                seeds(row["ours"], "simulation"),
                seeds(row["ours"], "simulation, inputs at 8 bits"),
            ]
            lines.append(f"| {' | '.join(cells)} |")
            theirs = [row["imatrix"], [row["plain"]]]
            if all("KL" in one for rows in (row["ours"], *theirs) for one in rows):
                own = [seeds(rows, "KL", 6) for rows in (row["ours"], *theirs)]
                divergences.append(f"| {' | '.join([f'`{format}`', *own])} |")
        if divergences:
            heads = ["| format | lowbit | llama.cpp, imatrix | llama.cpp |", "|---|---:|---:|---:|"]
            lines += ["", "Mean KL divergence from the float model, nats a token:", "", *heads, *divergences]
        lines.append("")
    return "\n".join(lines)


def seeds(rows: Sequence[Mapping[str, float]], name: str, digits: int = 3) -> str:
    """The mean of a figure over seeds, with the standard deviation where there are several.

    >>> seeds([{"a": 1.0}, {"a": 3.0}], "a"), seeds([{"a": 1.0}], "a")
    ('2.000 ± 1.414', '1.000')
    """
    values = [row[name] for row in rows]
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def heading(title: str, target: str, found: Mapping[str, Any]) -> list[str]:
    """Title and our runs."""
    return [
        f"# {title}",
        "",
        "Size, perplexity and speed of SmolLM2-135M-Instruct in the runtime itself, and agreement with the",
        "simulation.",
        f"Made by `make {target}`; the figures are in `{target}.json`.",
        "",
        "## Protocol",
        "",
        f"* lowbit's runs, calibrated on {found['calibration']}:",
        *(f"  `{command}`" for command in found["runs"]),
    ]


def protocol(found: Mapping[str, Any], what: str, base: str) -> list[str]:
    """How perplexity and speed were measured."""
    return [
        f"* Perplexity: the runtime's own logits on {found['evaluation']},",
        "  no BOS, every token except the first of a window.",
        f"* Speed: {found['speed']};",
        f"  every round measures each {what} in turn. Medians; ratios are medians of each round's ratio to",
        f"  {base}. With one thread, time is the CPU time of the process.",
        f"* {found['runtime']}.",
        f"* {found['machine']}.",
        "",
        "## Results",
        "",
    ]


def speed(row: Mapping[str, Any]) -> str:
    return " | ".join(f"{row[what]:.0f} | {row[what + '_ratio']:.2f}" for what in ("prefill", "decode"))


def files(rows: list[dict[str, Any]]) -> list[str]:
    """The table of files."""
    lines = [
        "| file | MB | matrices | perplexity | prompt tok/s | ratio | decode tok/s | ratio |",
        "|---|---:|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row["file"], f"{row['bytes'] / 1e6:.1f}", row["types"], f"{row['perplexity']:.3f}", speed(row)]
        lines.append(f"| {' | '.join(cells)} |")
    return [
        *lines,
        "",
        "* This model's width, 576, is not a multiple of 256; llama.cpp then replaces K types by larger types, so",
        "  its Q4_K_M is a larger file.",
        "* Q4_1 is omitted: the reference weights come from a Q4_1 file, which that type reproduces by construction.",
        "  With an importance matrix, llama.cpp assigns it (in a Q5_0 file: Q5_1) to some matrices, see the column.",
        "* Embeddings, which are also the head, are Q8_0 in all quantized files.",
        "* Files of lowbit and of llama.cpp (without importance matrix) of the same name have the same types in the",
        "  same places, so they run at the same speed except for noise.",
        "",
    ]


def equal_size(rows: list[dict[str, Any]]) -> list[str]:
    """What is better and what is worse than each file of ours, at its size."""
    lines = [f"## At equal size (within {NEAR:.0%})", ""]
    for ours in (row for row in rows if row["file"].startswith(OURS)):
        near = [row for row in rows if row is not ours and abs(row["bytes"] / ours["bytes"] - 1) < NEAR]
        near.sort(key=lambda row: float(row["perplexity"]))
        better, worse = (
            [row for row in near if (row["perplexity"] < ours["perplexity"]) is is_] for is_ in (True, False)
        )
        lines += [
            f"* **{ours['file']}**, {ours['bytes'] / 1e6:.1f} MB, perplexity {ours['perplexity']:.3f}.",
            f"  Better than it: {_named(better, ours)}.",
            f"  Worse than it: {_named(worse, ours)}.",
        ]
    return [*lines, ""]


def _named(rows: list[dict[str, Any]], ours: Mapping[str, Any]) -> str:
    told = []
    for row in rows:
        name, change = row["file"].replace(", ", " with "), row["perplexity"] / ours["perplexity"] - 1
        told.append(f"{name} ({row['perplexity']:.3f}, {change:+.1%})")
    return ", ".join(told) or "none"


def likeness(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How llama.cpp's results compare with the simulation's."""
    names = ("simulation", "simulation, inputs at 8 bits", "llama.cpp")
    lines = [
        "## Agreement with the simulation",
        "",
        "Perplexity on the same tokens; lowbit's files with float embeddings, keys and values in float32:",
        "",
        f"| perplexity | {' | '.join(found)} |",
        f"|---|{'---:|' * len(found)}",
        *(f"| {name} | {' | '.join(f'{one[name]:.3f}' for one in found.values())} |" for name in names),
        "",
    ]
    lines += gaps("llama.cpp")
    for name, one in found.items():
        lines += [f"### {name}, greedy text", "", *greedy(one["greedy"], "llama.cpp")]
    return lines


def gaps(runtime: str) -> list[str]:
    """What the last column of ``greedy`` is."""
    return [
        f"Greedy text: where {runtime} and the simulation (float inputs) first differ, the table gives the gap",
        "between the two tokens in the simulation's logits, in units of their spread. A small gap is a near-tie.",
        "",
    ]


def greedy(rows: list[dict[str, Any]], runtime: str) -> list[str]:
    """The table of a runtime's continuations."""
    lines = [
        f"| prompt | continuation in {runtime} | same tokens | gap |",
        "|---|---|---:|---:|",
    ]
    for one in rows:
        gap = "-" if one["gap"] is None else f"{one['gap']:.3f}"
        text = json.dumps(one["text"], ensure_ascii=False).replace("|", "\\|")
        lines.append(f"| {one['prompt']} | {text} | {one['same']} of {one['of']} | {gap} |")
    return [*lines, ""]


def graphs(rows: list[dict[str, Any]], simulated: Mapping[str, float]) -> list[str]:
    """The table of graphs, the simulation's perplexity beside ours."""
    lines = [
        "| graph | MB | perplexity | simulation | prompt tok/s | ratio | decode tok/s | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        beside = f"{simulated[row['file']]:.3f}" if row["file"] in simulated else ""
        cells = [row["file"], f"{row['bytes'] / 1e6:.1f}", f"{row['perplexity']:.3f}", beside, speed(row)]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    found = {row["file"]: row["perplexity"] for row in rows}
    for name in simulated:
        theirs = found[name.replace(OURS, "onnxruntime")]
        lines.append(f"* {name}: {found[name] / theirs - 1:+.1%} in perplexity against theirs, at equal size.")
    return [*lines, ""]
