"""``lowbit.frontier``: expected divergence at all sizes, and a few of the sizes made in full."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lowbit.allocation.api import STATE, fit
from lowbit.allocation.frontier import Frontier, Full, Point, QuantizerFile, chosen, points_of
from lowbit.allocation.losses import COLUMNS, TABLE
from lowbit.allocation.quantizer_files import FOLDER, QuantizerText, available, quantizer_files
from lowbit.allocation.sensitivity import Text, table_of
from lowbit.allocation.steps import Measured, Recipe, check, window
from lowbit.allocation.target import footprint_of, target_of
from lowbit.checkpoints.partial import is_partial
from lowbit.checkpoints.writing import write_bytes, write_json
from lowbit.data.text import Data
from lowbit.errors import LowbitError, check_least
from lowbit.paths import user_path
from lowbit.pipeline.opened import Opened, open_model
from lowbit.pipeline.request import model_name
from lowbit.progress import say
from lowbit.runs.streamed_model import StreamedModel
from lowbit.torch_state import own_torch_state

RESULT, PAGE, SIZE = "frontier.json", "frontier.html", "size-"  # in a frontier's folder
FULL = 3  # sizes that are made in full


@own_torch_state
def frontier(
    model: str | Path,
    out: str | Path,
    *,
    target: str,
    full: int = FULL,
    recipe: str = "gptq",
    effort: str | None = None,
    settings: Sequence[str] | None = None,
    data: Data | None = None,
    samples: int | None = None,
    length: int | None = None,
    seed: int = 0,
    pre: str | None = None,
    text: Data | None = None,
    tokens: int = 8192,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Frontier:
    """The least expected divergence at sizes from the smallest file of a target to its largest.

    ``full`` of the sizes, spread over the range, are made as ``fit`` makes them, each in a folder of its own in
    ``out``; what is finished there is used again by the next call. The other arguments are those of ``fit``. With
    ``full=0`` nothing is quantized, and a ``fit`` of the same model, target and text into ``out`` goes on from the
    table of sensitivities that this leaves. Where llama.cpp is the target and installed, files of its own quantizer
    with an importance matrix are made and measured beside them.

    Raises:
        LowbitError: the folder holds another fit or other files, and everything that ``fit`` refuses.
    """
    target, out = target_of(target), user_path(out)
    check_least("--full", full, 0, "give how many sizes are made in full, 0 for none")
    opened = open_model(str(model), revision, allow_pickle, trust_remote_code)
    footprint = footprint_of(target, str(model), opened, pre)
    _check_folder(out)
    if full:
        permits = {"revision": revision, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
        chosen_recipe = Recipe(recipe, effort, tuple(settings or ()), data, samples, length, seed)
        check(str(model), opened, chosen_recipe, Measured(text, tokens), permits, target, footprint)
    out.mkdir(parents=True, exist_ok=True)
    streamed = StreamedModel(opened.source.folder, trust_remote_code=trust_remote_code)
    table = table_of(out, opened, streamed, footprint, Text(data, seed), target, trust_remote_code)
    points = points_of(footprint, table.losses, streamed.skeleton.architecture.blocks)
    found = Frontier(model_name(str(model)), target, points, [])
    del streamed, table  # of which every fit has its own
    given: dict[str, Any] = {"recipe": recipe, "effort": effort, "settings": settings, "data": data}
    given |= {"samples": samples, "length": length, "seed": seed, "pre": pre, "text": text, "tokens": tokens}
    given |= {"revision": revision, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    for point in chosen(points, full):
        say(f"{point.size_bytes:,} bytes in full")
        found = replace(found, full=[*found.full, _made(model, out, target, point, given)])
    if full:
        if available(target):
            found = replace(found, quantizer=_beside(str(model), opened, out, found.full[0], given))
        elif target == "llama.cpp":
            say("files of llama.cpp's own quantizer are not made: pip install 'lowbit[llamacpp]'")
        write_json(out / RESULT, found.to_dict())
    return found


def _check_folder(out: Path) -> None:
    """Refuse a folder with anything that no frontier wrote; whose table it has, ``table_of`` looks at."""
    own = [TABLE, COLUMNS, RESULT, PAGE, FOLDER, f"{SIZE}*"]
    if out.exists() and not out.is_dir():
        raise LowbitError(f"--out {out} is a file; give a folder that is new or empty")
    for entry in out.iterdir() if out.exists() else ():
        if not is_partial(entry) and not any(fnmatch.fnmatchcase(entry.name, glob) for glob in own):
            what = "another fit" if entry.name == STATE else f"{entry.name}, and is no frontier"
            raise LowbitError(f"--out {out} holds {what}; give a folder that is new or empty")


def _beside(model: str, opened: Opened, out: Path, measured: Full, given: dict[str, Any]) -> list[QuantizerFile]:
    """Files of the target's own quantizer, measured on the same text; where it refuses the model, none and a line."""
    length = window(opened.skeleton, given["tokens"])
    drawn = {name: given[name] for name in ("tokens", "data", "samples", "length", "seed")}
    permits = {name: given[name] for name in ("revision", "allow_pickle", "trust_remote_code")}
    try:
        return quantizer_files(
            model, opened, out, QuantizerText(list(measured.kl), length, **drawn), given["pre"], permits
        )
    except LowbitError as error:
        say(f"the frontier is without files of llama.cpp's own quantizer: {error}")
        return []


def _made(model: str | Path, out: Path, target: str, point: Point, given: dict[str, Any]) -> Full:
    """A size made in full, in a folder named after it, with the table of sensitivities of ``out``."""
    folder = out / f"{SIZE}{point.size_bytes}"
    if not (folder / TABLE).is_file():
        folder.mkdir(exist_ok=True)
        for name in (COLUMNS, TABLE):  # the latter says that both are there
            write_bytes(folder / name, (out / name).read_bytes())
    made = fit(model, folder, target=target, size=point.size_bytes, **given)
    return Full(
        made.size_bytes, made.expected, made.measured, made.perplexity, made.kl, made.verified, str(made.file)
    )
