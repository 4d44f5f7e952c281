"""What came out of one mutated model, and whether that may be.

Right is a refusal (a ``LowbitError`` of one line), or the logits that the mutation's ``Expect`` allows. All else is a
``Failure``: another exception, other numbers, a hang, memory taken, a flood of output, a change in the user's files.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lowbit
from fuzzing.bases import IDS, Base, theirs
from fuzzing.change import Anything, Expect, Patched, Refusal, Theirs
from fuzzing.guards import MIB, RESIDENT, Hang, Printed, guarded
from lowbit.checkpoints.resolve import resolve
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from runs import streamed_logits

# From the worst to the least. "refusal due": numbers of a model that is not the one that the file holds.
KINDS = (
    "other numbers",
    "refusal due",
    "not a number",
    "hang",
    "memory",
    "traceback",
    "bad message",
    "flood",
    "writes",
)
NUMBERS = KINDS[:3]  # a wrong model, which no exception tells
TOLERANCE = 1e-4  # of the largest logit; both sides compute in float32, in different orders
MESSAGE, LINES = 500, 20  # longest message, most lines printed


@dataclass(frozen=True)
class Failure:
    """What went wrong: its kind, the stage in which, in words, and where (the last frame in ``lowbit``)."""

    kind: str
    stage: str
    text: str
    frame: str = ""


class Judge:
    """Runs a mutated model through ``lowbit`` and collects failures."""

    def __init__(self, base: Base, path: Path, text: Path, expect: Expect, work: Path) -> None:
        self.base, self.path, self.text, self.expect, self.work = base, path, text, expect, work
        self._reference: tuple[Tensor | None, str] | None = None

    def failures(self, generates: bool, quantizes: bool) -> Iterator[Failure]:
        """Try the stages: perplexity, both ways to logits, and, if asked, text and a quantized run."""
        before = _listing(self.path)
        stages = [
            self._stage("evaluate", self._perplexity, self._number),
            self._stage("load", self._loaded, self._as_expected),
            self._stage("stream", self._streamed, self._as_expected),
        ]
        if generates:
            stages.append(self._stage("generate", self._generated, self._ended))
        if quantizes:
            stages.append(self._stage("quantize", self._quantized, self._runs))
        for failures in map(list, stages):
            yield from failures
            if any(failure.kind == "hang" for failure in failures):
                break  # the others would take as long
        if _listing(self.path) != before:
            yield Failure("writes", "all", "files of the model were changed")

    def _stage(
        self,
        name: str,
        function: Callable[[], Any],
        check: Callable[[Any], Iterator[Failure]],
        must: bool = False,
    ) -> Iterator[Failure]:
        """Failures of one stage; its result goes to ``check``. It may refuse, unless it ``must`` not."""
        result, error, printed, taken = guarded(function)
        if error is not None and (must or not isinstance(error, LowbitError)):
            yield _raised(name, error)
        elif error is not None:
            yield from _message(name, str(error))
        if taken > RESIDENT:
            yield Failure("memory", name, f"{taken // MIB} MiB more than before")
        if printed.lines > LINES:
            yield Failure("flood", name, f"{printed.lines} lines, such as {printed.text.splitlines()[-1][:100]!r}")
        if error is None:
            yield from (_of_stage(failure, name) for failure in check(self._with_output(result, printed)))

    @staticmethod
    def _with_output(result: Any, printed: Printed) -> Any:
        """The exit code of a command comes with what it printed."""
        return (result, printed.text) if isinstance(result, int) else result

    def _perplexity(self) -> float:
        evaluated = lowbit.evaluate(str(self.path), data=str(self.text), length=12, tokens=24)
        return next(iter(evaluated.perplexity.values()))

    @torch.no_grad()
    def _loaded(self) -> Tensor:
        model = lowbit.load(resolve(str(self.path)).folder)
        return model(IDS, use_cache=False, return_dict=True).logits

    def _streamed(self) -> Tensor:
        return streamed_logits(resolve(str(self.path)).folder, IDS)

    def _generated(self) -> int:
        return call(["generate", str(self.path), "--prompt", "ab", "--tokens", "2", "--json"])

    def _quantized(self) -> Callable[[], float]:
        """A run of the model, and what evaluates it."""
        out = self.work / "run"
        options = {"scheme": "w8a16g16-sym", "recipe": "rtn", "samples": 1, "length": 12}
        lowbit.quantize(str(self.path), out, data=str(self.text), **options)
        return lambda: float(streamed_logits(out, IDS).abs().max())

    def _runs(self, run: Callable[[], float]) -> Iterator[Failure]:
        """A run that was finished must be readable, without an error."""
        return self._stage("run", run, self._number, must=True)

    def _number(self, value: float) -> Iterator[Failure]:
        """Perplexity may be infinite, where finite logits are large enough."""
        if math.isnan(value):
            yield Failure("not a number", "", f"{value} given as a result")

    def _ended(self, ended: tuple[int, str]) -> Iterator[Failure]:
        code, printed = ended
        if code == 2:
            lines = [line for line in printed.splitlines() if line.startswith("lowbit: error: ")]
            yield from _message("generate", lines[0] if len(lines) == 1 else f"{len(lines)} error lines")
        elif code != 0:
            yield Failure("traceback", "generate", f"exit code {code}")

    def _as_expected(self, logits: Tensor) -> Iterator[Failure]:
        if isinstance(self.expect, Anything):
            return
        if isinstance(self.expect, Refusal):
            yield Failure("refusal due", "", "read without an error")
            return
        reference, whose = self.reference()
        if reference is None:
            if self.expect != Theirs(alone=False):
                yield Failure("other numbers", "", f"read, and {whose}")
        elif (difference := distance(logits, reference)) > TOLERANCE:
            yield Failure("other numbers", "", f"logits differ from {whose} by {difference:.1e} of the largest")

    def reference(self) -> tuple[Tensor | None, str]:
        """The logits that are right if there are any, and whose they are."""
        if self._reference is None:
            self._reference = self._find_reference()
        return self._reference

    def _find_reference(self) -> tuple[Tensor | None, str]:
        if isinstance(self.expect, Theirs):
            logits, error, _, _ = guarded(lambda: theirs(self.path))
            if error is None:
                return logits, "those of transformers"
            reason = f"transformers: {type(error).__name__}: {' '.join(str(error).split())[:100]}"
            return (self.base.logits({}) if self.expect.alone else None), f"the unmutated model's ({reason})"
        assert isinstance(self.expect, Patched)
        logits, error, _, _ = guarded(lambda: self.base.logits(self.expect.config))
        return logits, "those of the model with that config" if error is None else f"no such model exists: {error}"


def distance(logits: Tensor, reference: Tensor) -> float:
    """The largest difference, relative to the largest logit; infinite for other shapes or other places of NaN.

    >>> distance(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0]))
    0.25
    """
    if logits.shape != reference.shape or not torch.equal(logits.isfinite(), reference.isfinite()):
        return math.inf
    finite = reference.isfinite()
    if not bool(finite.any()):
        return 0.0
    difference = (logits - reference)[finite].abs().max()
    return float(difference / reference[finite].abs().max().clamp(min=1e-30))


def _raised(stage: str, error: BaseException) -> Failure:
    kind = "hang" if isinstance(error, Hang) else "memory" if isinstance(error, MemoryError) else "traceback"
    name = type(error).__name__
    return Failure(kind, stage, f"{name}: {' '.join(str(error).split())[:200]}", _frame(error))


def _frame(error: BaseException) -> str:
    """The last frame in ``lowbit``, and the last of all."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/lowbit/" in f.filename]
    places = [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in (*own[-1:], *frames[-1:])]
    return " <- ".join(dict.fromkeys(places))


def _message(stage: str, message: str) -> Iterator[Failure]:
    shown = ascii(message[:200])
    if not message.strip() or not message.isprintable():
        yield Failure("bad message", stage, f"not one printable line: {shown}")
    elif "Traceback" in message or len(message) > MESSAGE:
        yield Failure("bad message", stage, f"{len(message)} characters: {shown}")
    elif "allocate memory" in message or "not enough memory" in message:
        yield Failure("memory", stage, f"refused only after memory was asked for: {shown}")


def _of_stage(failure: Failure, stage: str) -> Failure:
    return failure if failure.stage else Failure(failure.kind, stage, failure.text, failure.frame)


def _listing(path: Path) -> list[tuple[str, int, int]]:
    """Names, sizes and times of a model's files."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [(str(file), file.lstat().st_size, file.lstat().st_mtime_ns) for file in files]
