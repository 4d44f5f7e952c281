"""Does the expected divergence of ``lowbit fit`` predict the measured one? For docs/fit.md.

    python benchmarks/fit_validation.py [--model demo] [--size 90MB] [--out build/fit-validation]

Four questions, on windows that neither gradients nor probes have seen: the rank correlation over single changes, one
module in one format each; the same over random assignments of random sizes, and over random assignments of one size;
and how the chosen assignment of that size and uniform formats compare with them. Weights are rounded to nearest with
searched scales, inputs are float. What is measured is kept in ``--out``, so that an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lowbit.allocation.divergence import divergences
from lowbit.allocation.losses import Formats, Losses, formats_of, measure_losses, save, saved
from lowbit.allocation.probes import with_probes
from lowbit.allocation.size import bytes_in
from lowbit.allocation.solution import best_within
from lowbit.allocation.target import footprint_of
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.checkpoints.writing import write_json
from lowbit.data.text import calibration, evaluation
from lowbit.exporters.footprint import Footprint
from lowbit.pipeline.opened import open_model
from lowbit.quant.scheme_names import override_text
from lowbit.runs.streamed_model import StreamedModel

SEQUENCES, LENGTH, WINDOWS, PROBED, SINGLES, RANDOM = 8, 128, 2, 4, 40, 20


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value in ascending order, from 0."""
    order = sorted(range(len(values)), key=values.__getitem__)
    out = [0.0] * len(values)
    for place, at in enumerate(order):
        out[at] = float(place)
    return out


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation; 1 for the same order."""
    a, b = ranks(one), ranks(other)
    middle = (len(a) - 1) / 2
    power = sum((x - middle) ** 2 for x in a)
    return sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True)) / power


def palette(footprint: Footprint, room: int, draw: random.Random) -> list[list[int]]:
    """Two random options of every choice, with the smaller ones of which the model fits ``room``.

    All assignments are drawn from these: what takes time is to quantize a weight, once for each format.
    """
    while True:
        pairs = [draw.sample(range(len(c.options)), min(2, len(c.options))) for c in footprint.choices]
        sizes = [[c.options[at].size for at in pair] for c, pair in zip(footprint.choices, pairs, strict=True)]
        if footprint.fixed + sum(map(min, sizes)) <= room <= footprint.fixed + sum(map(max, sizes)):
            return pairs


def drawn(footprint: Footprint, pairs: Sequence[Sequence[int]], room: int, draw: random.Random) -> list[int]:
    """A random assignment that fills ``room``: in random order choices take the larger of their options."""
    sizes = [[c.options[at].size for at in pair] for c, pair in zip(footprint.choices, pairs, strict=True)]
    picks = [pair[own.index(min(own))] for pair, own in zip(pairs, sizes, strict=True)]
    left = room - footprint.fixed - sum(map(min, sizes))
    for at in draw.sample(range(len(picks)), len(picks)):
        more = max(sizes[at]) - min(sizes[at])
        if more <= left:
            picks[at] = pairs[at][sizes[at].index(max(sizes[at]))]
            left -= more
    return picks


def sizes_of(footprint: Footprint, pairs: Sequence[Sequence[int]]) -> tuple[int, int]:
    """The smallest and the largest file of assignments from ``pairs``, in bytes."""
    sizes = [[c.options[at].size for at in pair] for c, pair in zip(footprint.choices, pairs, strict=True)]
    return footprint.fixed + sum(map(min, sizes)), footprint.fixed + sum(map(max, sizes))


def uniform(footprint: Footprint, room: int) -> dict[str, Formats]:
    """The assignments of at most ``room`` bytes that have one format wherever there is a choice, by its text."""
    texts = [
        {override_text(o.format): (at, o.size) for at, o in enumerate(choice.options) if o.format is not None}
        for choice in footprint.choices
    ]
    out: dict[str, Formats] = {}
    for text in [text for text in texts[0] if all(text in own for own in texts)]:
        if footprint.fixed + sum(own[text][1] for own in texts) <= room:
            out[text] = formats_of(footprint.choices, [own[text][0] for own in texts])
    return out


def table_of(out: Path, model: StreamedModel, footprint: Footprint, ids: Any, key: dict[str, Any]) -> Any:
    """The table of losses, from the folder if it is there."""
    if (found := saved(out, key)) is not None:
        return found
    losses, columns = measure_losses(model, ids, footprint, 0)
    save(out, key, losses, columns)
    return losses, columns


def singles(
    footprint: Footprint, losses: Losses, blocks_at: str, draw: random.Random
) -> list[tuple[Any, Any, float]]:
    """Random choices in random formats, with their expected divergence."""
    every = [
        (choice, option.format, losses.of(choice, option.format, blocks_at))
        for choice in footprint.choices
        for option in choice.options
        if option.format is not None
    ]
    return draw.sample([one for one in every if one[2] > 0], min(SINGLES, len(every)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Expected against measured divergence.")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--target", default="llama.cpp")
    parser.add_argument("--size", default="90MB")
    parser.add_argument("--out", type=Path, default=Path("build/fit-validation"))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    opened = open_model(given.model, None, False, False)
    footprint = footprint_of(given.target, given.model, opened)
    model = StreamedModel(opened.source.folder)
    tokenizer = load_tokenizer(opened.source.folder)
    ids = calibration("builtin", tokenizer, SEQUENCES, LENGTH, 0).ids
    raw, columns = table_of(given.out, model, footprint, ids, {"model": given.model, "target": given.target})
    blocks_at, kept = model.skeleton.architecture.blocks, given.out / "measured.json"
    measured: dict[str, Any] = read_json(kept) if kept.exists() else {}
    if "factors" not in measured:
        measured["factors"] = with_probes(raw, footprint, model, columns, ids[:: SEQUENCES // PROBED]).factors
        write_json(kept, measured)
    losses = Losses(raw.by_module, measured["factors"], {})
    held = evaluation("builtin", tokenizer, LENGTH, WINDOWS * LENGTH).ids
    ones = singles(footprint, losses, blocks_at, random.Random(0))
    if "singles" not in measured:
        singly: list[Formats] = [dict.fromkeys(choice.modules, format) for choice, format, _ in ones]
        measured["singles"] = divergences(model, singly, columns, held)
        write_json(kept, measured)
    room = bytes_in(given.size)
    chosen = best_within(footprint, losses, room, blocks_at)
    pairs = palette(footprint, room, random.Random(0))
    picks = [drawn(footprint, pairs, room, random.Random(seed)) for seed in range(RANDOM)]
    if "random" not in measured:
        assignments = [formats_of(footprint.choices, own) for own in picks]
        measured["random"] = divergences(model, assignments, columns, held)
        write_json(kept, measured)
    if "chosen" not in measured:
        (measured["chosen"],) = divergences(model, [chosen.formats], columns, held)
        write_json(kept, measured)

    def expected(own: Sequence[int]) -> float:
        pairs = zip(footprint.choices, own, strict=True)
        return sum(losses.of(choice, choice.options[at].format, blocks_at) for choice, at in pairs)

    smallest, largest = sizes_of(footprint, pairs)
    rooms = [random.Random(seed).randint(smallest, largest) for seed in range(RANDOM)]
    sized = [drawn(footprint, pairs, own, random.Random(seed)) for seed, own in enumerate(rooms)]
    if "sized" not in measured:
        measured["sized"] = divergences(model, [formats_of(footprint.choices, own) for own in sized], columns, held)
        write_json(kept, measured)
    if "uniform" not in measured:
        uniforms = uniform(footprint, room)
        found = divergences(model, list(uniforms.values()), columns, held)
        measured["uniform"] = dict(zip(uniforms, found, strict=True))
        write_json(kept, measured)
    sums, of_sizes = [expected(own) for own in picks], [expected(own) for own in sized]
    print(f"single changes: rank correlation {spearman([e for *_, e in ones], measured['singles']):.3f}")
    print(f"random assignments of random sizes: rank correlation {spearman(of_sizes, measured['sized']):.3f}")
    print(f"random assignments of {given.size}: rank correlation {spearman(sums, measured['random']):.3f}")
    print("| | expected | measured |\n|---|---:|---:|")
    print(f"| chosen | {chosen.expected:.4f} | {measured['chosen']:.4f} |")
    for text, found in measured["uniform"].items():
        print(f"| all in {text} | | {found:.4f} |")
    for own, one, found in sorted(zip(rooms, of_sizes, measured["sized"], strict=True)):
        print(f"| {own:,} bytes | {one:.4f} | {found:.4f} |")
    for seed, (one, found) in enumerate(zip(sums, measured["random"], strict=True)):
        print(f"| random {seed} | {one:.4f} | {found:.4f} |")
    for (choice, format, one), found in zip(ones, measured["singles"], strict=True):
        print(f"| {choice.modules[0]} in {override_text(format)} | {one:.3g} | {found:.3g} |")


if __name__ == "__main__":
    main()
