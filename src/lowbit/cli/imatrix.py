"""``lowbit imatrix``: llama.cpp's importance matrix from our calibration text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.console import Json, Model, Pickle, Remote, Revision, print_json


def imatrix(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="The file to write, which ends in .gguf.")],
    data: Annotated[
        list[str] | None, typer.Option(help="Calibration text, as for quantize.", show_default="builtin")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.", show_default="32")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a window.", show_default="512")] = None,
    seed: Annotated[int, typer.Option(help="Draws the windows.")] = 0,
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Write llama.cpp's importance matrix of a float model.

    For 'llama-quantize --imatrix', on the tokens that 'lowbit quantize' calibrates on; 'quantize --imatrix' reads it.
    """
    from lowbit.pipeline.imatrix import imatrix as write

    result = write(
        model,
        out,
        data=data or None,
        samples=samples,
        length=length,
        seed=seed,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json({**asdict(result), "out": str(result.out)})
    else:
        print(f"{result.out}: {result.linears} linears, {result.tokens:,} tokens of {result.corpus}")
