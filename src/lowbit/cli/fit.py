"""``lowbit fit``: the best file of a given size for a target runtime."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from lowbit.cli.console import Json, Model, Pickle, Remote, Revision, print_json, table
from lowbit.errors import LowbitError
from lowbit.paths import user_path

if TYPE_CHECKING:
    from lowbit.allocation.api import Fitted
    from lowbit.allocation.frontier import Frontier


def fit(
    model: Model,
    target: Annotated[
        str, typer.Option("--target", help="The target: llama.cpp, onnxruntime, executorch, vllm or transformers.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder: new, empty, or of the same command.")],
    size: Annotated[str | None, typer.Option(help="The largest size of the file, such as 90MB or 1.8GiB.")] = None,
    memory: Annotated[
        str | None,
        typer.Option(help="In place of a size: the largest memory of weights, keys and values, such as 300MB."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            help="Tokens that --memory has keys and values for.", show_default="2048, or the model's positions"
        ),
    ] = None,
    bits: Annotated[
        float | None, typer.Option(help="In place of a size: bits per weight that has a format, such as 4.2.")
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(help="In place of a size: the largest ratio of perplexity to the float model's, such as 1.05."),
    ] = None,
    frontier: Annotated[
        bool, typer.Option("--frontier", help="Show the expected divergence at all sizes, and make some in full.")
    ] = False,
    full: Annotated[
        int, typer.Option(help="Of --frontier: how many sizes are made in full; 0: nothing is quantized.")
    ] = 3,
    recipe: Annotated[str, typer.Option(help="A recipe that 'lowbit recipes' lists, or FILE.yaml.")] = "gptq",
    effort: Annotated[str | None, typer.Option(help="As for quantize.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="As for quantize; repeatable.", show_default="gptq.search=true gptq.head=true for gptq"
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text of the sensitivity and the calibration, as for quantize.", show_default="builtin"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows, as for quantize.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a calibration window, as for quantize.")] = None,
    seed: Annotated[int, typer.Option(help="Draws windows and the tokens of gradients.")] = 0,
    pre: Annotated[str | None, typer.Option(help="llama.cpp: its name of the pre-tokenizer.")] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Text that the result is measured on, as for compare.", show_default="that of compare"),
    ] = None,
    tokens: Annotated[int, typer.Option(help="Of each text that the result is measured on.")] = 8192,
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Make the best file of a given size: a format for every tensor.

    Measures how sensitive each tensor is in each format of the target, chooses, then quantizes, exports, verifies and
    compares; the commands are printed. Interrupted, the same command goes on.
    """
    from lowbit.allocation.api import fit as run
    from lowbit.allocation.frontier_run import PAGE
    from lowbit.allocation.frontier_run import frontier as predict
    from lowbit.checkpoints.writing import write_bytes
    from lowbit.reports.frontier_page import render

    if frontier:
        if any(given is not None for given in (size, memory, context, bits, quality)):
            raise LowbitError(
                "--frontier given with --size, --memory, --context, --bits or --quality: it shows all sizes; leave "
                "one out"
            )
        found = predict(
            model,
            out,
            target=target,
            full=full,
            recipe=recipe,
            effort=effort,
            settings=set_ or None,
            data=data or None,
            samples=samples,
            length=length,
            seed=seed,
            pre=pre,
            text=text or None,
            tokens=tokens,
            revision=revision,
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
        if full:
            write_bytes(user_path(out) / PAGE, render(found).encode())
        if as_json:
            print_json(found.to_dict())
        else:
            _show_frontier(found)
        if not all(point.verified for point in found.full):
            raise typer.Exit(1)
        return
    result = run(
        model,
        out,
        target=target,
        size=size,
        memory=memory,
        context=context,
        bits=bits,
        quality=quality,
        recipe=recipe,
        effort=effort,
        settings=set_ or None,
        data=data or None,
        samples=samples,
        length=length,
        seed=seed,
        pre=pre,
        text=text or None,
        tokens=tokens,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        _show(result)
    if not result.verified:
        raise typer.Exit(1)


def _show(result: Fitted) -> None:
    """Print the file beside the float model and uniform choices, then what each module got."""
    texts = list(result.perplexity)
    rows = table("", "size", "expected KL", *(f"{kind} {name}" for name in texts for kind in ("perplexity", "KL")))
    floats = [cell for name in texts for cell in (f"{result.float_perplexity[name]:.3f}", "0")]
    rows.add_row("float", "-", "0", *floats)
    ours = [cell for name in texts for cell in (f"{result.perplexity[name]:.3f}", f"{result.kl[name]:.4f}")]
    rows.add_row(Text(result.file.name), _mb(result.size_bytes), f"{result.expected:.4f}", *ours)
    for name, one in sorted(result.uniform.items(), key=lambda pair: pair[1]["size_bytes"]):
        rows.add_row(f"{name} everywhere", _mb(one["size_bytes"]), f"{one['expected']:.4f}", *["-"] * len(ours))
    Console().print(rows)
    counts = ", ".join(f"{count} {name}" for name, count in sorted(result.formats.items()))
    says = "equals the run bit for bit" if result.verified else "DIFFERS from the run"
    print(f"{result.file}: {result.size_bytes:,} bytes, {says}; modules: {counts}")
    if result.memory_bytes is not None:
        print(f"in memory with keys and values: {result.memory_bytes:,} bytes")


def _show_frontier(found: Frontier) -> None:
    rows = table("size", "bits per weight", "expected KL", "modules")
    for point in found.points:
        counts = ", ".join(f"{count} {name}" for name, count in sorted(point.formats.items()))
        rows.add_row(_mb(point.size_bytes), f"{point.bits:.3f}", f"{point.expected:.4g}", counts)
    Console().print(rows)
    for made in found.full:
        says = "equals the run bit for bit" if made.verified else "DIFFERS from the run"
        scores = _scores(made.perplexity, made.kl)
        print(f"{made.file}: {made.size_bytes:,} bytes, {says}; expected KL {made.expected:.4g}; {scores}")
    for theirs in found.quantizer:
        print(f"{theirs.file}: {theirs.size_bytes:,} bytes; {_scores(theirs.perplexity, theirs.kl)}")


def _scores(perplexity: dict[str, float], kl: dict[str, float]) -> str:
    return ", ".join(f"{name}: KL {kl[name]:.4f}, perplexity {perplexity[name]:.3f}" for name in kl)


def _mb(size: float) -> str:
    return f"{size / 1e6:.2f} MB"
