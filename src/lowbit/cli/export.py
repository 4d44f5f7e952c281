"""The commands that write a run for a runtime and prove what was written: ``lowbit export | verify``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from lowbit.cli.console import Json, print_json, table
from lowbit.progress import say


def export(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    to: Annotated[str, typer.Option(help="The target: gguf (or llama.cpp), executorch, onnx, gptq, awq, vllm.")],
    out: Annotated[Path | None, typer.Option(help="What to write; by default beside the run folder.")] = None,
    embeddings: Annotated[
        str, typer.Option(help="gguf: type of float matrices: auto (lossless), f32, f16 or q8_0.")
    ] = "auto",
    pre: Annotated[str | None, typer.Option(help="gguf: llama.cpp's name of the pre-tokenizer.")] = None,
    gptq_format: Annotated[
        str, typer.Option(help="gptq: zero points: v1 (minus one), v2 (as they are), auto (v1 if symmetric).")
    ] = "auto",
    context: Annotated[
        int | None, typer.Option(help="executorch: tokens in the cache.", show_default="2048, or less")
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(help="onnx: 0 multiplies in float32, 4 with inputs at 8 bits.", show_default="as evaluated"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a finished run in the format of a runtime: the same codes.

    Nothing is quantized again. 'lowbit schemes' lists what each target takes.
    """
    from lowbit.exporters.api import export as write

    made = write(
        run,
        to,
        out=out,
        embeddings=embeddings,
        pre=pre,
        gptq_format=gptq_format,
        context=context,
        accuracy_level=accuracy_level,
    )
    for warning in made.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json({**asdict(made), "out": str(made.out)})
    else:
        print(f"{made.out}: {made.target}, {made.size_bytes / 1e6:.1f} MB")


def verify(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The run folder.")],
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="What 'lowbit export' wrote.")],
    logits: Annotated[bool, typer.Option(help="Run each whose runtime is installed, and compare logits.")] = True,
    as_json: Json = False,
) -> None:
    """Compare exports with their run, bit for bit.

    Exit code 1 if anything differs.
    """
    from lowbit.exporters.api import verify as read_back

    found = read_back(run, files, logits=logits)
    if as_json:
        print_json([{**asdict(one), "ok": one.ok} for one in found])
    else:
        rows = table("file", "format", "tensors", "exact", "max difference", "logits")
        for one in found:
            ran = "-" if one.logits is None else f"{one.logits:.2g}"
            row = (one.target, str(one.tensors), str(one.exact), f"{one.max_difference:.3g}", ran)
            rows.add_row(Text(Path(one.path).name), *row)
        Console().print(rows)
    for one in found:
        if not one.ok:
            named = [*one.differs, *one.other, *filter(None, [one.unreadable])]
            if not one.computes_the_same:
                named.append(f"logits by {one.logits:.2g}, of which {one.explained:.2g} is explained")
            say(f"{one.path} differs: {', '.join(named[:5])}")
    if not all(one.ok for one in found):
        raise typer.Exit(1)
