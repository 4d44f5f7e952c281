"""Mutate models at random and see that ``lowbit`` refuses each in one line or reads it as transformers does.

    python tests/fuzz.py --mutations 10000 --seed 0
    python tests/fuzz.py --seed 0 --only config:17     # one again, by the name that a failure has
    python tests/fuzz.py --area gguf --mutations 500

``fuzzing/`` has the mutators, the models and the judge. A mutation is a function of seed, area and number, so that a
failure can be repeated; adding a mutator to an area changes the area's numbers.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

# As the command line sets it. The environment is set before transformers is imported.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["RUST_BACKTRACE"] = "0"  # panics of native code would count as floods of output

import torch

from fuzzing.areas import AREAS
from fuzzing.bases import Base, make_bases
from fuzzing.change import Expect, Theirs
from fuzzing.guards import WALL_SECONDS, captured
from fuzzing.judge import KINDS, NUMBERS, Failure, Judge

QUANTIZE_EVERY = 10  # a run takes five times as long as the rest


@dataclass(frozen=True)
class Case:
    """One mutated model, which seed, area and number determine."""

    seed: int
    area: str
    number: int

    @property
    def name(self) -> str:
        """As ``--only`` takes it."""
        return f"{self.area}:{self.number}"


@dataclass(frozen=True)
class Mutated:
    """A mutated model: what it was, where it is, what was done, and what may come out."""

    base: Base
    path: Path
    text: str
    expect: Expect


@dataclass(frozen=True)
class Report:
    """A case that failed: what was done to which model, and every failure."""

    case: Case
    text: str
    failures: tuple[Failure, ...]

    @property
    def worst(self) -> Failure:
        return min(self.failures, key=lambda failure: KINDS.index(failure.kind))

    def __str__(self) -> str:
        lines = [f"{self.case.name} (seed {self.case.seed}) {self.text}"]
        for failure in self.failures:
            where = f" at {failure.frame}" if failure.frame else ""
            lines.append(f"    {failure.kind} in {failure.stage}: {failure.text}{where}")
        return "\n".join(lines)


def cases(seed: int, count: int, areas: Sequence[str] = ()) -> list[Case]:
    """``count`` cases, spread evenly over the areas, all by default."""
    names = list(areas or AREAS)
    return [Case(seed, names[i % len(names)], i // len(names)) for i in range(count)]


class Fuzzer:
    """The models in a folder, and what becomes of mutated copies."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "cache"
        os.environ["LOWBIT_CACHE"] = str(self.cache)
        self.bases: dict[str, Base] = make_bases(root)

    def mutate(self, case: Case, work: Path) -> Mutated:
        """A mutated copy of one of the models, in the empty folder ``work``."""
        area, rng = AREAS[case.area], random.Random(f"{case.seed} {case.name}")
        base = self.bases[rng.choice(area.bases)]
        path = base.copy(work)
        change = rng.choice(area.mutators)(path, rng)
        text, expect = f"{path.name}: {change.text}", change.expect
        if area.pairs and rng.random() < 0.25:
            # The first may have removed what the second would change.
            with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError):
                text = f"{text}; {rng.choice(area.mutators)(path, rng).text}"
                expect = Theirs(alone=False)
        return Mutated(base, path, text, expect)

    def run(self, case: Case) -> Report | None:
        """Mutate, try, judge; ``None`` if nothing is wrong."""
        with tempfile.TemporaryDirectory(dir=self.root, prefix=f"{case.area}-{case.number}-") as temporary:
            work = Path(temporary)
            model = self.mutate(case, work)
            judge = Judge(model.base, model.path, self.root / "text.txt", model.expect, work)
            quantizes = case.number % QUANTIZE_EVERY == 0
            failures = tuple(judge.failures(AREAS[case.area].generates, quantizes))
        return Report(case, model.text, failures) if failures else None


@contextmanager
def settings() -> Iterator[None]:
    """One thread, no network, no noise, a cache of its own; as they were afterwards."""
    from transformers.utils import logging

    threads, verbosity, cache = torch.get_num_threads(), logging.get_verbosity(), os.environ.get("LOWBIT_CACHE")
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        logging.set_verbosity(verbosity)
        os.environ.pop("LOWBIT_CACHE", None)
        if cache is not None:
            os.environ["LOWBIT_CACHE"] = cache


def summary(reports: Sequence[Report]) -> str:
    """Failures by kind and place, the worst first, each with the first case that shows it."""
    groups: dict[tuple[int, str], list[Report]] = defaultdict(list)
    for report in reports:
        groups[KINDS.index(report.worst.kind), _cause(report)].append(report)
    lines = []
    for (kind, cause), members in sorted(
        groups.items(), key=lambda group: (group[0][0], -len(group[1]), group[0][1])
    ):
        lines.append(f"{len(members)} x {KINDS[kind]}: {cause}; {members[0].case.name} {members[0].text}")
    return "\n".join(lines)


def _cause(report: Report) -> str:
    """What failures of one cause have in common: the place in the code, else mutation or message without numbers."""
    worst = report.worst
    if worst.frame:
        return f"{worst.text.partition(':')[0]} at {worst.frame}"
    text = report.text.partition(": ")[2] if worst.kind in NUMBERS else worst.text
    return f"{re.sub(r'/[^ ]+|[0-9]+', 'N', text)[:120]} ({report.case.area}, {worst.stage})"


def run_all(chosen: Sequence[Case], errors: TextIO) -> list[Report]:
    """Run cases and print what fails at once. ``errors`` is told where native code hangs or breaks the process."""
    reports, root = [], Path(tempfile.mkdtemp(prefix="fuzz-"))
    try:
        with settings():
            with captured():
                fuzzer = Fuzzer(root)
            for case in chosen:
                # Native code does not return to Python for the time limit's exception: then the process ends.
                faulthandler.dump_traceback_later(10 * WALL_SECONDS, exit=True, file=errors)
                report = fuzzer.run(case)
                if report is not None:
                    reports.append(report)
                    print(report, flush=True)
    finally:
        faulthandler.cancel_dump_traceback_later()
        shutil.rmtree(root, ignore_errors=True)
    return reports


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutations", type=int, default=1000, help="how many models are tried")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", action="append", choices=AREAS, help="only this area; repeatable")
    parser.add_argument("--only", help="one case, AREA:NUMBER")
    options = parser.parse_args()
    if options.only:
        area, _, number = options.only.partition(":")
        chosen = [Case(options.seed, area, int(number))]
    else:
        chosen = cases(options.seed, options.mutations, options.area or ())
    errors, began = os.fdopen(os.dup(2), "w"), time.monotonic()  # a copy, which the guards do not redirect
    faulthandler.enable(errors)
    reports = run_all(chosen, errors)
    if reports:
        print(f"\n{summary(reports)}\n")
    counts = Counter(report.worst.kind for report in reports)
    told = ", ".join(f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]) or "none failed"
    print(f"{len(chosen)} mutated models in {time.monotonic() - began:.0f} s: {told}")
    return 1 if reports else 0


if __name__ == "__main__":
    sys.exit(main())
