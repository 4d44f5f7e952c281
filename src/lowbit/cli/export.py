"""``lowbit export`` and ``lowbit verify``: write a run for a runtime, and compare exports with their run."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from lowbit.cli.console import Json, Remote, print_json, table
from lowbit.progress import say


def export(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder.")],
    to: Annotated[
        str, typer.Option(help="The target: gguf (or llama.cpp), executorch, onnx, gptq, awq, vllm, gemma.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Path to write; by default next to the run folder.")
    ] = None,
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
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Write a finished run in the format of a runtime: the same codes.

    Nothing is quantized again. 'lowbit schemes' lists what each target supports.
    """
    from lowbit.exporters.api import export as write

    result = write(
        run,
        to,
        out=out,
        embeddings=embeddings,
        pre=pre,
        gptq_format=gptq_format,
        context=context,
        accuracy_level=accuracy_level,
        trust_remote_code=trust_remote_code,
    )
    for warning in result.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json({**asdict(result), "out": str(result.out)})
    else:
        print(f"{result.out}: {result.target}, {result.size_bytes / 1e6:.1f} MB")


def verify(
    run: Annotated[Path, typer.Argument(metavar="DIR", help="The run folder.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[FILE]", help="Output of 'lowbit export'; without any, DIR in stock transformers."),
    ] = None,
    logits: Annotated[bool, typer.Option(help="Compare logits too, where the runtime is installed.")] = True,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compare exports with their run, bit for bit.

    Without exports, stock transformers loads the run, and its logits are compared.

    Exit code 1 if anything differs.
    """
    from lowbit.exporters.api import verify as read_back

    results = read_back(run, files or [], logits=logits, trust_remote_code=trust_remote_code)
    if as_json:
        print_json([{**asdict(result), "ok": result.ok} for result in results])
    else:
        rows = table("file", "format", "tensors", "exact", "max difference", "logits")
        for result in results:
            error = "-" if result.logits is None else f"{result.logits:.2g}"
            row = (result.target, str(result.tensors), str(result.exact), f"{result.max_difference:.3g}", error)
            rows.add_row(Text(Path(result.path).name), *row)
        Console().print(rows)
    for result in results:
        if result.ok and result.passes > 1:
            say(f"{result.path}: its runtime's logits were the simulation's in pass {result.passes} only")
        if not result.ok:
            for fault in result.faults:
                say(f"{result.path}: {fault}")
            differences = [*result.differs, *result.other, *filter(None, [result.unreadable])]
            if not result.computes_the_same:
                differences.append(f"logits by {result.logits:.2g}, of which {result.explained:.2g} is explained")
            if differences:
                say(f"{result.path} differs: {', '.join(differences[:5])}")
    if not all(result.ok for result in results):
        raise typer.Exit(1)
