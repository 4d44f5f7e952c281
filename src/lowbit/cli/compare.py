"""``lowbit compare``: runs against their float model, token by token."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from lowbit.cli.console import (
    STAR,
    STARRED,
    BosOption,
    Device,
    DType,
    Json,
    Pickle,
    Remote,
    Revision,
    TextOption,
    bos_of,
    place_of,
    print_json,
    table,
    warn,
)

if TYPE_CHECKING:
    from lowbit.evaluation.compare import Compared


def compare(
    exact: Annotated[str, typer.Argument(metavar="FLOAT", help="The float model, as for quantize.")],
    runs: Annotated[list[str], typer.Argument(metavar="DIR", help="Run folders of that model.")],
    data: TextOption = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    tokens: Annotated[int | None, typer.Option(help="At most this many tokens of each text.")] = None,
    bos: BosOption = None,
    seed: Annotated[int, typer.Option(help="Draws the windows of the bootstrap.")] = 0,
    prompt: Annotated[str | None, typer.Option(help="Text for all models to continue.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="At most this many tokens after the prompt; 64.")] = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="Show each block's error; --json has it anyway.")] = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compare runs with their float model, token by token.

    KL divergence, top-1 agreement, perplexity ratio and each block's error against FLOAT.
    """
    from lowbit.evaluation.compare import compare as run

    compared = run(
        exact,
        runs,
        data=data or None,
        length=length,
        tokens=tokens,
        bos=bos_of(bos),
        seed=seed,
        prompt=prompt,
        new_tokens=new_tokens,
        **place_of(device, dtype, revision, allow_pickle, trust_remote_code),
    )
    for one, ratios in zip(compared.runs, compared.ratios, strict=True):
        warn(ratios.warning(), one["run"])
    if as_json:
        print_json(compared.to_dict())
        return
    _show(exact, compared, length, blocks)


def _show(exact: str, compared: Compared, length: int, blocks: bool) -> None:
    """Print one table per text, each block's error on request, then the continuations side by side."""
    heads = [escape(one["run"]) for one in compared.runs]
    for name, text in compared.texts.items():
        rows = table("", "perplexity", "ratio", "95 % interval", "KL mean", "KL 99 %", "same top-1", "worst block")
        # A name may hold [brackets], which are markup in a string.
        title = f"{Path(name).name}: {text['tokens']:,} tokens in windows of {length}"
        rows.title = Text(title, style="table.title")
        rows.add_row(Text(exact), f"{text['perplexity']:.4f}", *["-"] * 6)
        for one, row in zip(compared.runs, text["runs"], strict=True):
            worst = max(range(len(row["block_error"])), key=row["block_error"].__getitem__)
            interval = f"{row['ratio_low']:.4f} - {row['ratio_high']:.4f}" if row["ratio_low"] is not None else "-"
            rows.add_row(
                Text(one["run"]),
                f"{row['perplexity']:.4f}",
                f"{row['ratio']:.4f}",
                interval,
                f"{row['kl_mean']:.4f}",
                f"{row['kl_p99']:.4f}",
                f"{100 * row['top1_agreement']:.2f} %",
                f"{worst} ({row['block_error'][worst]:.3f})",
            )
        Console().print(rows)
        if blocks:
            errors = table("block error", *heads)
            for block, row in enumerate(zip(*(row["block_error"] for row in text["runs"]), strict=True)):
                errors.add_row(str(block), *(f"{error:.4f}" for error in row))
            Console().print(errors)
    if len(compared.texts) > 1:
        _show_ratios(compared)
    if compared.generations:
        texts = table(escape(exact), *heads)
        texts.add_row(*map(Text, [compared.generations["float"], *compared.generations["runs"]]))
        Console().print(texts)


def _show_ratios(compared: Compared) -> None:
    """Print each run's ratios over all texts; a text of a kind that it was calibrated on has a star."""
    rows = table("ratio to float", "mean", "worst", *(escape(Path(name).name) for name in compared.texts))
    for one, ratios, seen in zip(compared.runs, compared.ratios, compared.calibrated, strict=True):
        cells = [f"{ratio:.4f}{STAR if seen[name] else ''}" for name, ratio in ratios.by_text.items()]
        rows.add_row(Text(one["run"]), f"{ratios.mean:.4f}", f"{ratios.by_text[ratios.worst]:.4f}", *cells)
    Console().print(rows)
    if any(any(seen.values()) for seen in compared.calibrated):
        print(STARRED)
