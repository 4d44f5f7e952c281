"""AffineQuant's ablations: the paper's three and ours, as tables and plots in ``docs/ablations``.

    python benchmarks/ablate_affinequant.py [--models opt smollm2] [--tables mask sites ...] [--epochs 6] [--fresh]

On two models: SmolLM2-135M-Instruct, of which the first ``--blocks`` decoder layers are quantized and the others stay
float (so that a row takes a minute and errors do not pile up), and a small OPT that is trained for one minute on the
built-in text, all of it quantized. Every row is one ``lowbit quantize`` and one ``lowbit evaluate`` in processes of
their own. Finished rows are kept in ``build/ablations`` by what they measured.

Needs matplotlib: pip install 'lowbit[plots]'
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rows import ROOT, Row, kept, pyplot

BUILD = ROOT / "build" / "ablations"
LENGTH, SEED = 256, 0
STABILITIES = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-8)
# Tables about matrices; on SmolLM2 in the paper's weight-only mode, whose matrices after norms are the large ones.
MATRICES = ("mask", "stability", "precision", "parametrisation", "dominance")
DENSE = ("qkv=matrix", "mlp=matrix")

# Table by table: the row's name and what it changes of the recipe `affinequant`.
TABLES: dict[str, tuple[str, list[tuple[str, list[str]]]]] = {
    "mask": (
        "Gradual mask (paper, table 6)",
        [("gradual (equation 6)", []), ("released code's schedule", ["mask=released"]), ("none", ["mask=none"])],
    ),
    "stability": (
        "Stability factor (paper, table 5)",
        [(f"{value:g}", [f"stability={value}"]) for value in STABILITIES],
    ),
    "precision": (
        "Precision of the transforms (paper, table 4)",
        [(name, [f"precision={name}"]) for name in ("float", "float-double", "double")],
    ),
    "parametrisation": (
        "Parametrization of the matrices",
        [(name, [f"parametrisation={name}"]) for name in ("masked", "lu", "blocks", "svd")],
    ),
    "dominance": (
        "Strict diagonal dominance",
        [(name, [f"dominance={name}"]) for name in ("report", "enforce")],
    ),
    "sites": (
        "Sites",
        [
            ("all", []),
            *((f"without {site}", [f"{site}=off"]) for site in ("qkv", "mlp", "heads", "qk", "channels")),
            ("v -> o diagonal", ["heads=diagonal"]),
            ("OmniQuant's: no up -> down, diagonals only", ["heads=diagonal", "qk=diagonal", "channels=off"]),
        ],
    ),
    "rates": (
        "Learning rates of transforms and clipping ratios",
        [
            ("0.02, 0.3, cosine", []),
            ("0.05, 0.3, cosine", ["lr_maps=0.05"]),
            ("0.02, 0.1, cosine", ["lr_clips=0.1"]),
            ("0.005, 0.01, constant (papers)", ["lr_maps=0.005", "lr_clips=0.01", "decay=none"]),
        ],
    ),
    "loss": (
        "Loss",
        [("per-token normalized", []), ("plain mean (papers)", ["loss=mse"]), ("with aug_loss", ["aug_loss=1.0"])],
    ),
}


@dataclass(frozen=True)
class Model:
    """What is quantized.

    Attributes:
        title: what the page calls it.
        model: a name or a folder.
        scheme: of the tables about sites, rates and the loss.
        matrix: scheme and settings of the tables about matrices (``MATRICES``).
        blocks: how many of the first ones are quantized; all, where ``None``.
        layers: how many there are.
        length: of an evaluated window.
    """

    title: str
    model: str
    scheme: str
    matrix: tuple[str, tuple[str, ...]]
    blocks: int | None
    layers: int
    length: int


def trained_opt(seconds: float = 60.0) -> Path:
    """A small OPT with a tokenizer of its own, trained on the part of the built-in text that calibrates."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

    from lowbit.data.text import calibration

    folder = BUILD / "opt"
    if (folder / "model.safetensors").exists():
        return folder
    from lowbit.checkpoints.resolve import load_tokenizer, resolve

    demo = load_tokenizer(resolve("demo").folder)
    ids = calibration("builtin", demo, 256, 1024, SEED).ids
    text = [demo.decode(row) for row in ids]
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(text, trainer)
    stream = torch.tensor([i for row in tokenizer.encode_batch(text) for i in row.ids])
    torch.manual_seed(SEED)
    config = OPTConfig(
        vocab_size=2048,
        hidden_size=192,
        word_embed_proj_dim=192,
        ffn_dim=768,
        num_hidden_layers=4,
        num_attention_heads=6,
        max_position_embeddings=512,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        architectures=["OPTForCausalLM"],
    )
    model = OPTForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(SEED)
    began, step = time.monotonic(), 0
    while (spent := time.monotonic() - began) < seconds:
        starts = torch.randint(0, len(stream) - 129, (16,), generator=generator)
        batch = torch.stack([stream[s : s + 128] for s in starts.tolist()])
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1.0, (step + 1) / 50) * (1.05 - spent / seconds)
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step += 1
    print(f"trained an OPT for {seconds:.0f} s, {step} steps, loss {float(loss.detach()):.3f}", flush=True)
    model.eval().save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)
    return folder


def row(
    model: Model, scheme: str, recipe: str, settings: Sequence[str], options: argparse.Namespace
) -> dict[str, Any]:
    """Quantize and evaluate once, or take what was measured by the same sources."""
    chosen = tuple(f"affinequant.{setting}" for setting in settings)
    if recipe == "affinequant":
        chosen = (*chosen, f"affinequant.epochs={options.epochs}")
    what = Row(
        model.model,
        scheme,
        recipe,
        model.layers,
        model.blocks,
        chosen,
        samples=options.samples,
        length=LENGTH,
        seed=SEED,
        window=model.length,
        tokens=options.tokens,
    )
    return kept(BUILD, what, what.measure, options.fresh)


def summary(found: dict[str, Any]) -> dict[str, float]:
    """The figures of a row that tables show."""
    records = [block["steps"]["affinequant"] for block in found["blocks"]]
    matrices = [site for record in records for site in record["sites"].values() if "margin" in site]
    return {
        "perplexity": found["perplexity"],
        "held_out": sum(record["held_out"][record["best_epoch"]] for record in records) / len(records),
        "condition": max((site["condition"] for site in matrices), default=1.0),
        "margin": min((site["margin"] for site in matrices), default=1.0),
        "merge_error": max(record["merge_error"] for record in records),
        "before_cast": max(record["merge_error_before_cast"] for record in records),
        "seconds": found["seconds"],
        "peak": found["peak_memory_bytes"] / 1e9,
    }


def table(title: str, rows: list[tuple[str, dict[str, Any]]]) -> list[str]:
    """One ablation as Markdown."""
    lines = [
        f"### {title}",
        "",
        "| | perplexity | held-out loss | worst condition | worst margin | merge error | before the cast | s | GB |",
    ]
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, found in rows:
        f = summary(found)
        lines.append(
            f"| {name} | {f['perplexity']:.3f} | {f['held_out']:.4f} | {f['condition']:.1f} | {f['margin']:.2f} | "
            f"{f['merge_error']:.0e} | {f['before_cast']:.0e} | {f['seconds']:.0f} | {f['peak']:.2f} |"
        )
    return [*lines, ""]


def plots(name: str, results: dict[str, list[tuple[str, dict[str, Any]]]], out: Path) -> list[str]:
    """Loss, margin and condition by block for the stability factors, loss by epoch; the page's links to them."""
    links = []
    if "stability" in results:
        stability_plot(results["stability"], out / f"affinequant-{name}-stability.png")
        links += [f"![loss, margin and condition by block](affinequant-{name}-stability.png)", ""]
    if "parametrisation" in results:
        loss_plot(results["parametrisation"], out / f"affinequant-{name}-loss.png")
        links += [f"![held-out loss by epoch](affinequant-{name}-loss.png)", ""]
    return links


def stability_plot(rows: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """By block, for each stability factor: held-out loss, and the worst margin and condition of its matrices."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), constrained_layout=True)
    for label, found in rows:
        records = [block["steps"]["affinequant"] for block in found["blocks"]]
        axes[0].plot([r["held_out"][r["best_epoch"]] for r in records], marker="o", label=f"$\\alpha$ = {label}")
        matrices = [[site for site in r["sites"].values() if "margin" in site] for r in records]
        axes[1].plot([min(site["margin"] for site in sites) for sites in matrices], marker="o")
        axes[2].semilogy([max(site["condition"] for site in sites) for sites in matrices], marker="o")
    axes[1].axhline(0, color="grey", lw=0.8)
    labels = ("held-out loss", "worst dominance margin", "worst condition (bound)")
    for axis, text in zip(axes, labels, strict=True):
        axis.set(xlabel="block", ylabel=text)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def loss_plot(rows: list[tuple[str, dict[str, Any]]], path: Path) -> None:
    """Held-out loss of the first block by epoch, for each parametrisation."""
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.4), constrained_layout=True)
    for label, found in rows:
        record = found["blocks"][0]["steps"]["affinequant"]
        axis.plot(record["held_out"], marker="o", label=label)
    axis.set(xlabel="epoch", ylabel="held-out loss, block 0")
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def heat_map(epochs: int, samples: int, out: Path) -> None:
    """The matrices over v -> o that SmolLM2's first block learns."""
    from fit_step import fit_of, planned
    from fit_step_blocks import first_block
    from lowbit.methods.affinequant import AffineQuant
    from lowbit.methods.options import with_options
    from lowbit.methods.training import fit

    block, calib = first_block(samples * LENGTH, "cpu")
    step = with_options(AffineQuant(), epochs=epochs)
    made = fit_of(step, planned(block, "w4a4"), calib)
    fit(made.groups(), made.loss, samples, step.schedule, begin=made.begin, project=made.project)
    site = next(site for site in made.sites if site.name == "heads")
    value = site.map.value()[0].detach()
    plt = pyplot()
    figure, axes = plt.subplots(1, len(value), figsize=(11, 3.8), constrained_layout=True)
    for axis, matrix, margin, condition in zip(axes, value, site.map.margins(), site.map.conditions(), strict=True):
        shown = axis.imshow(matrix, cmap="RdBu", vmin=-0.3, vmax=0.3)
        axis.set_title(f"margin {float(margin):.2f}, condition {float(condition):.0f}", fontsize=9)
    figure.colorbar(shown, ax=axes, shrink=0.8)
    figure.suptitle("SmolLM2 block 0, w4a4: the learned A over v → o, one matrix per KV head")
    figure.savefig(out / "affinequant-matrix.png", dpi=110)
    plt.close(figure)


def model_of(name: str, blocks: int) -> Model:
    """The model that a name stands for."""
    if name == "opt":
        title = "OPT, 4 layers of 192, trained for a minute on the built-in text"
        return Model(title, str(trained_opt()), "w3a16-asym", ("w3a16-asym", ()), None, 4, 256)
    title = f"SmolLM2-135M-Instruct, its first {blocks} blocks quantized"
    return Model(title, "demo", "w4a4", ("w3a16-asym", DENSE), blocks, 30, 512)


def head(model: Model, options: argparse.Namespace) -> list[str]:
    """The page's head: protocol, and what the tables' columns are."""
    plain = row(model, model.scheme, "float", (), options)["perplexity"]
    schemes = dict.fromkeys((model.scheme, model.matrix[0]))
    rounded = [f"{scheme}, RTN: {row(model, scheme, 'rtn', (), options)['perplexity']:.3f}" for scheme in schemes]
    dense = f" with {', '.join(model.matrix[1])} (at run time)" if model.matrix[1] else ""
    return [
        f"# AffineQuant ablations: {model.title}",
        "",
        "One aspect of `affinequant` varies per table. Made by `make ablations`.",
        "",
        "## Protocol",
        "",
        f"* Tables about matrices: scheme {model.matrix[0]}{dense}; others: {model.scheme}.",
        f"* Calibration {options.samples} x {LENGTH} tokens of the built-in text, seed {SEED}; {options.epochs}",
        f"  epochs; evaluation on its evaluation split, {options.tokens} tokens in windows of {model.length}.",
        f"* CPU, {torch.get_num_threads()} thread(s), torch {torch.__version__}.",
        "* Held-out loss: mean over blocks of the error on the validation split, relative to the float output.",
        "  Condition: an upper bound of the condition number. Margin: the smallest",
        "  $(|a_{ii}| - \\sum_j |a_{ij}|) / |a_{ii}|$ of any row, above 0 where all matrices are strictly diagonally",
        "  dominant. Merge error: relative squared error of the float block after folding, as stored in float32;",
        "  before the cast: what the transforms alone leave, in their own precision, measured in float64.",
        "  s, GB: seconds and peak memory of `lowbit quantize`.",
        "",
        "## Results",
        "",
        f"Perplexity without AffineQuant: float: {plain:.3f}; {'; '.join(rounded)}.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["opt", "smollm2"], choices=["opt", "smollm2"])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--samples", type=int, default=16, help="calibration sequences")
    parser.add_argument("--tokens", type=int, default=8192, help="that are evaluated")
    parser.add_argument("--blocks", type=int, default=3, help="SmolLM2's blocks that are quantized")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "ablations")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    BUILD.mkdir(parents=True, exist_ok=True)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        model = model_of(name, options.blocks)
        lines = head(model, options)
        results: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for key in options.tables:
            heading, cases = TABLES[key]
            scheme, base = model.matrix if key in MATRICES else (model.scheme, ())
            results[key] = []
            for case, settings in cases:
                found = row(model, scheme, "affinequant", (*base, *settings), options)
                results[key].append((case, found))
                print(json.dumps({"model": name, "table": key, "case": case, **summary(found)}), flush=True)
            lines += table(heading, results[key])
        lines += plots(name, results, options.out)
        if name == "smollm2":
            heat_map(options.epochs, options.samples, options.out)
            lines += ["![learned matrices](affinequant-matrix.png)", ""]
        (options.out / f"affinequant-{name}.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
