"""What the benchmarks of runtimes share: our runs, perplexity, speed in turns, text beside the simulation's."""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from lowbit.checkpoints.resolve import Source, load_tokenizer, resolve
from lowbit.data.text import calibration, evaluation
from lowbit.data.windows import Tokens
from lowbit.errors import LowbitError
from lowbit.exporters.run import Run, open_run
from lowbit.metrics.perplexity import perplexity
from lowbit.reports.command import command
from rows import ROOT

BUILD = ROOT / "build" / "runtimes"
RECIPE, SAMPLES, LENGTH, SEED = "affinequant+gptq", 16, 256, 0
WINDOW, ROUNDS, DECODED, ANSWER = 512, 5, 32, 32
PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "In the beginning",
    "A good way to learn a language is",
]
Start = Callable[[], tuple[Callable[[], object], Callable[[int], object]]]


def options(told: str | None, out: str) -> argparse.Namespace:
    """The command line of a benchmark that writes the page ``docs/<out>``."""
    parser = argparse.ArgumentParser(description=(told or "").splitlines()[0])
    parser.add_argument("--calibration", default="builtin", help="a text file, or builtin")
    parser.add_argument("--evaluation", default="builtin", help="another one, or builtin")
    parser.add_argument(
        "--run", type=Path, action="append", help="a finished run of ours; repeatable; without it they are made"
    )
    parser.add_argument("--recipe", default=RECIPE, help="of runs that are made")
    parser.add_argument("--tokens", type=int, default=8192, help="of the evaluation text")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / out)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


@dataclass(frozen=True)
class Texts:
    """What all models of a page have in common.

    Attributes:
        source: the float model.
        drawn: what quantizers calibrate on.
        scored: what perplexity is measured on, in windows of ``WINDOW``.
    """

    source: Source
    drawn: Tokens
    scored: Tokens

    @property
    def told(self) -> dict[str, str]:
        """Both texts in words."""
        return {
            "calibration": f"{SAMPLES} x {LENGTH} tokens of {self.drawn.corpus}, seed {SEED}",
            "evaluation": f"{self.scored.ids.numel()} tokens of {self.scored.corpus}, in windows of {WINDOW}",
        }


def texts_of(chosen: argparse.Namespace) -> Texts:
    """The demo model, and the tokens that the command line names."""
    source = resolve("demo")
    tokenizer = load_tokenizer(source.folder)
    drawn = calibration(chosen.calibration, tokenizer, SAMPLES, LENGTH, SEED)
    return Texts(source, drawn, evaluation(chosen.evaluation, tokenizer, WINDOW, chosen.tokens))


def runs_of(chosen: argparse.Namespace, texts: Texts, *schemes: str) -> list[Run]:
    """The runs that were named, or one of each scheme, made in ``build`` where it is not there yet.

    Raises:
        LowbitError: a run is of another model, or calibrated on other tokens.
    """
    folders: list[Path] = chosen.run or []
    if not folders:
        drawn: dict[str, Any] = {"data": chosen.calibration, "samples": SAMPLES, "length": LENGTH, "seed": SEED}
        for scheme in schemes:
            folders.append(BUILD / scheme)
            lowbit.quantize("demo", folders[-1], scheme=scheme, recipe=chosen.recipe, effort="quick", **drawn)
    found = [open_run(folder) for folder in folders]
    for run in found:
        made = run.manifest.identity
        if made.fingerprint != texts.source.identity:
            raise LowbitError(f"{run.folder} is no run of the demo model")
        if made.data.hash != texts.drawn.hash:
            raise LowbitError(f"{run.folder} calibrated on other tokens than {texts.told['calibration']}")
    return found


def commands(found: Sequence[Run]) -> list[str]:
    """The commands that repeat runs."""
    return [command(run.manifest.request)[0] for run in found]


def scored(logits: Callable[[Tensor], Tensor], ids: Tensor) -> float:
    """Perplexity over windows, each of which ``logits`` takes on its own."""
    with torch.no_grad():
        return perplexity((window[None], logits(window)[None]) for window in ids)


def simulated(run: Run, ids: Tensor, target: str | None) -> float:
    """The simulation's perplexity in a runtime's arithmetic, or in ``float``; ``None``: of a float model."""
    model = lowbit.load(run.folder, target=target)
    return scored(lambda window: model(window[None]).logits[0], ids)


def speeds(starts: Mapping[str, Start], prompt: int, threads: int) -> dict[str, dict[str, list[float]]]:
    """Tokens a second of a prompt and of single tokens after it, ``ROUNDS`` times each: in a round each has its turn.

    With one thread the process's own CPU time is taken, so that other work on the machine does not count.

    Args:
        starts: by name; begins a text, and gives what reads the prompt and what takes single token ``i``.
        prompt: tokens of the prompt.
        threads: what the runtimes compute with.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    out: dict[str, dict[str, list[float]]] = {name: {"prefill": [], "decode": []} for name in starts}
    for turn in range(ROUNDS + 1):
        for name, start in starts.items():
            read, step = start()
            began = clock()
            read()
            middle = clock()
            for i in range(DECODED):
                step(i)
            ended = clock()
            if turn:  # the first one warms up
                out[name]["prefill"].append(prompt / (middle - began))
                out[name]["decode"].append(DECODED / (ended - middle))
    return out


def medians(
    timed: Mapping[str, Mapping[str, Sequence[float]]], base: Callable[[str], str]
) -> dict[str, dict[str, float]]:
    """By name the median speeds, and the median of each round's ratio to the one that ``base`` names."""
    out: dict[str, dict[str, float]] = {}
    for name, speeds in timed.items():
        out[name] = {}
        for what, values in speeds.items():
            out[name][what] = statistics.median(values)
            pairs = zip(values, timed[base(name)][what], strict=True)
            out[name][f"{what}_ratio"] = statistics.median(ours / theirs for ours, theirs in pairs)
    return out


def timing(prompt: int, threads: int) -> str:
    """How speeds are measured."""
    return f"{threads} thread, a prompt of {prompt} tokens and {DECODED} single ones, {ROUNDS} rounds"


def machine(threads: int) -> str:
    """How busy the machine is, as of the last minute."""
    load = os.getloadavg()[0]
    shared = "; other work shared the machine" if load > threads + 0.5 else ""
    return f"{os.cpu_count()} cores, load {load:.1f} when speeds had been measured{shared}"


def beside(model: Any, tokenizer: Any, prompt: str, greedy: Callable[[list[int], int], list[int]]) -> dict[str, Any]:
    """A runtime's ``greedy`` continuation of a prompt, and how much of it is the simulation's.

    Where they part, ``gap`` is how close the two tokens are for the simulation, in units of its logits' spread.
    """
    given = tokenizer(prompt, return_tensors="pt").input_ids
    theirs = greedy(given[0].tolist(), ANSWER)
    with torch.no_grad():
        answer = model.generate(given, max_new_tokens=ANSWER, do_sample=False, eos_token_id=None)
        ours = answer[0, given.shape[1] :].tolist()
        same = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), ANSWER)
        out = {"prompt": prompt, "text": tokenizer.decode(theirs), "same": same, "of": ANSWER, "gap": None}
        if same < ANSWER:
            scores = model(answer[:, : given.shape[1] + same]).logits[0, -1]
            out["gap"] = float(scores[ours[same]] - scores[theirs[same]]) / float(scores.std())
    return out
