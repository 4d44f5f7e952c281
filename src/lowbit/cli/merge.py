"""``lowbit merge``: a LoRA adapter and its base model as one folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli.console import Json, Pickle, Remote, Revision, print_json


def merge(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="A LoRA adapter's folder.")],
    base: Annotated[str, typer.Option(help="The model that it was trained on: a folder, a hub id or a .gguf file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model folder to write, which must not exist.")],
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Merge a LoRA adapter into its base model."""
    from lowbit.pipeline.merge import merge as run

    result = run(
        adapter,
        base=base,
        out=out,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json({"out": str(result.out), "changed": result.changed, "replaced": result.replaced})
    else:
        print(f"{result.out}: {result.changed} weights changed, {result.replaced} replaced")
