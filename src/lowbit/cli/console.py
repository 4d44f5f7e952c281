"""Shared by the commands: options, tables, JSON on standard output."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, TypedDict, cast

import typer
from rich.table import Table

from lowbit.errors import LowbitError
from lowbit.progress import say

if TYPE_CHECKING:
    from lowbit.data.windows import Bos

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a hub id, a .gguf file, or 'demo' (SmolLM2-135M-Instruct)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
Device = Annotated[str, typer.Option(help="Where blocks run: cpu, cuda, cuda:N or mps.")]
DType = Annotated[str, typer.Option(help="Of blocks on a GPU: float32, bfloat16 or float16; a CPU takes float32.")]
BosOption = Annotated[
    str | None,
    typer.Option(
        "--bos",
        help="Special tokens before a window: auto (the tokenizer's), never, stream (once a text, as papers do).",
        show_default="auto",
    ),
]
TextOption = Annotated[
    list[str] | None,
    typer.Option(
        "--data",
        help="Text: builtin, builtin:KIND (wiki, c4, code, technical, multilingual, tiny), wikitext2, ptb, c4, or a "
        "file; repeatable.",
        show_default="builtin:wiki, and a kind that the run was not calibrated on",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub model.")]
Pickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights too (tensors only).")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run Python code of the model's repository.")]

STAR, STARRED = " *", "* the run was calibrated on this kind of text"


class Place(TypedDict):
    """Arguments of every function that opens a model: where it computes, and what it may load."""

    device: str
    dtype: str
    revision: str | None
    allow_pickle: bool
    trust_remote_code: bool


def place_of(device: str, dtype: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> Place:
    """The options ``--device`` to ``--trust-remote-code`` as keyword arguments."""
    return {
        "device": device,
        "dtype": dtype,
        "revision": revision,
        "allow_pickle": allow_pickle,
        "trust_remote_code": trust_remote_code,
    }


def bos_of(text: str | None) -> Bos:
    """The option ``--bos``; an unknown word is refused where windows are made."""
    return cast("Bos", text or "auto")


def table(*columns: str) -> Table:
    """An empty table; without any named column it has no header."""
    rows = Table(show_header=any(columns))
    for column in columns:
        rows.add_column(column)
    return rows


def print_json(content: Any) -> None:
    """Print one JSON document on standard output."""
    print(json.dumps(_as_json(content), indent=1, allow_nan=False))


def _as_json(content: Any) -> Any:
    """Replace infinity and NaN, which JSON lacks, by ``null``; a diverged model has infinite perplexity."""
    if isinstance(content, dict):
        return {key: _as_json(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_as_json(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def refuse_unused(given: Mapping[str, Any], reason: str) -> None:
    """Refuse options that nothing asked for uses.

    Args:
        given: values by the options' names; ``None``: not given.
        reason: what they are for, and what to do.

    Raises:
        LowbitError: one is given.
    """
    if names := [name for name, value in given.items() if value is not None]:
        raise LowbitError(f"--{names[0]} {reason}, or leave it out")


def warn(what: str | None, whose: str = "") -> None:
    """Print a warning on standard error; ``None``: there is nothing to tell."""
    if what is not None:
        say(f"warning: {f'{whose}: ' if whose else ''}{what}")
