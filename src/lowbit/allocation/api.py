"""``lowbit.fit``: the best file of a given size, or the smallest of a given quality, for a target runtime.

    sensitivity (once)  ->  formats  ->  quantize  ->  export  ->  verify  ->  compare

Every step from ``quantize`` on is the ordinary command with arguments that are printed. What a step made stays in the
folder, so that the same call goes on after an interruption: the table of sensitivities, the scheme file, the run
folder (which resumes block by block), the export, the comparison.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit.allocation.goal import Goal
from lowbit.allocation.kv_memory import context_of, kv_bytes
from lowbit.allocation.losses import COLUMNS, TABLE
from lowbit.allocation.rounds import Settled, settle
from lowbit.allocation.sensitivity import Text, table_of
from lowbit.allocation.solution import Solution, uniform
from lowbit.allocation.steps import RUN, Made, Measured, Recipe, check, make
from lowbit.allocation.target import footprint_of, target_of
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.partial import is_partial
from lowbit.checkpoints.writing import write_json
from lowbit.data.text import Data
from lowbit.errors import LowbitError
from lowbit.exporters.target import Options
from lowbit.paths import user_path
from lowbit.pipeline.opened import open_model
from lowbit.pipeline.request import model_name
from lowbit.runs.streamed_model import StreamedModel
from lowbit.torch_state import own_torch_state

STATE, FORMAT = "fit.json", "lowbit-fit-1"


@dataclass(frozen=True)
class Fitted:
    """The result of ``fit``.

    Attributes:
        out: the folder of everything that was made.
        target: the target runtime.
        file: the export.
        size_bytes: its size; ``expected_bytes``: what was computed before it was made.
        expected: expected divergence in nats per token; ``measured``: that of the assignment rounded to nearest on
            the windows of the sensitivity.
        rounds: 2 where losses were estimated again around the first solution.
        perplexity, kl: by text, of the run; ``float_perplexity``: of the float model.
        verified: the export holds the run's values bit for bit.
        uniform: by format's name, ``size_bytes`` and ``expected`` divergence with that format everywhere.
        formats: how many modules have each format.
        commands: the commands that made it.
        memory_bytes: with ``memory``, the size with keys and values.
    """

    out: Path
    target: str
    file: Path
    size_bytes: int
    expected_bytes: int
    expected: float
    measured: float
    rounds: int
    perplexity: dict[str, float]
    kl: dict[str, float]
    float_perplexity: dict[str, float]
    verified: bool
    uniform: dict[str, dict[str, float]]
    formats: dict[str, int]
    commands: list[str]
    memory_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the format's name."""
        return {"format": FORMAT, **asdict(self), "out": str(self.out), "file": str(self.file)}


@own_torch_state
def fit(
    model: str | Path,
    out: str | Path,
    *,
    target: str,
    size: str | int | None = None,
    memory: str | int | None = None,
    context: int | None = None,
    bits: float | None = None,
    quality: float | None = None,
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
) -> Fitted:
    """Choose a format for every tensor of a model, make the file for a target, verify and measure it.

    Args:
        model: as for ``quantize``.
        out: a folder: new, empty, or left by an interrupted call with the same arguments; those of the comparison,
            ``text`` and ``tokens``, may be others.
        target: the target runtime.
        size: largest size of the file, such as ``90MB``, or bytes.
        memory: in place of a size, the largest memory of the weights and of keys and values, for targets that keep
            weights packed in memory.
        context: tokens that ``memory`` has keys and values for: by default 2048, or the model's positions.
        bits: in place of a size, bits per weight of everything that has a format.
        quality: in place of a size, the largest ratio of perplexity to the float model's, such as 1.05, for which
            the smallest file is made: expected divergence is at most its logarithm.
        recipe, effort, settings: of the run; the default ``gptq`` has ``gptq.search=true`` unless ``settings`` are
            given.
        data, samples, length, seed: calibration of the run, and text of the sensitivity.
        pre: llama.cpp's name of the pre-tokenizer, where it cannot be detected.
        text, tokens: of the comparison, as for ``compare``.
        revision, allow_pickle, trust_remote_code: as for ``quantize``.

    Raises:
        LowbitError: no format for some tensor in that size, with the smallest size that can be; and everything that
            the commands refuse.
    """
    target, out = target_of(target), user_path(out)
    goal = Goal.of(size, bits, quality, memory)
    if context is not None and goal.memory is None:
        raise LowbitError(f"--context {context} given without --memory: no size depends on it; leave it out")
    chosen = Recipe(recipe, effort, tuple(settings or ()), data, samples, length, seed)
    opened = open_model(str(model), revision, allow_pickle, trust_remote_code)
    footprint = footprint_of(target, str(model), opened, pre)
    if goal.memory is not None:
        context = context_of(opened.skeleton, context)
        goal = goal.behind(kv_bytes(opened.skeleton, target, context))
    goal.check(footprint, target)
    request = {"model": model_name(str(model)), "target": target, **asdict(goal), "pre": pre, "context": context}
    request |= {"recipe": chosen.to_dict(), "fingerprint": opened.source.identity}
    permits = {"revision": revision, "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    own, claimed = (out / STATE).is_file(), _claimed(out, request)
    check(str(model), opened, chosen, Measured(text, tokens), permits, target, footprint)
    out.mkdir(parents=True, exist_ok=True)
    streamed = StreamedModel(opened.source.folder, trust_remote_code=trust_remote_code)
    table = table_of(out, opened, streamed, footprint, Text(data, seed), target, trust_remote_code, own)
    if not claimed:  # behind the table, which may be another's
        write_json(out / STATE, {"format": FORMAT, "request": request})
    blocks_at = streamed.skeleton.architecture.blocks
    found = settle(footprint, table.losses, goal, streamed, table.columns, table.ids)
    exported = Options(pre=pre, context=context if target == "executorch" else None)
    made = make(
        str(model), out, target, found.solution, chosen, streamed.skeleton, exported, Measured(text, tokens), permits
    )
    result = _fitted(out, target, found, made, uniform(footprint, table.losses, blocks_at), goal)
    write_json(out / "result.json", result.to_dict())
    return result


def _claimed(out: Path, request: dict[str, Any]) -> bool:
    """Whether the folder has this request; one with another, or with other files, is refused.

    Another recipe takes the folder over as long as nothing was quantized with the first.
    """
    state = out / STATE
    if state.is_file():
        before = read_json(state).get("request", {})
        differs = sorted(key for key in request if before.get(key) != request[key])
        if differs == ["recipe"] and not (out / RUN).exists():
            return False
        if differs:
            raise LowbitError(
                f"--out {out} holds another fit, with another {differs[0]}: give the arguments that it was made "
                "with, or another folder"
            )
        return True
    if out.exists() and (not out.is_dir() or any(_is_other(entry) for entry in out.iterdir())):
        raise LowbitError(f"--out {out} exists and is no fit; give a folder that is new or empty")
    return False


def _is_other(entry: Path) -> bool:
    """Whether a file is none of those that a fit writes before it claims the folder."""
    return entry.name not in (TABLE, COLUMNS) and not is_partial(entry)


def _fitted(out: Path, target: str, found: Settled, made: Made, beside: dict[str, Solution], goal: Goal) -> Fitted:
    solution = found.solution
    counts: dict[str, int] = {}
    for format in solution.formats.values():
        name = "float" if format is None else format.name
        counts[name] = counts.get(name, 0) + 1
    return Fitted(
        out,
        target,
        made.file,
        made.size_bytes,
        solution.size,
        solution.expected,
        found.measured,
        found.rounds,
        made.perplexity,
        made.kl,
        made.float_perplexity,
        made.verified,
        {name: {"size_bytes": one.size, "expected": one.expected} for name, one in beside.items()},
        counts,
        [shlex.join(command) for command in made.commands],
        None if goal.memory is None else made.size_bytes + goal.beside,
    )
