"""Rows of measured tables: the command line in processes of its own, figures kept by what made them."""

from __future__ import annotations

import functools
import hashlib
import json
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Cell = TypeVar("Cell")

TOGETHER = (
    4  # models that are compared with the float model at once: more save little time, and lose more when stopped
)
ROOT = Path(__file__).resolve().parent.parent


def lowbit(*arguments: str) -> dict[str, Any]:
    """One ``lowbit`` command in a process of its own, so that its peak memory is its own; its JSON."""
    done = subprocess.run([sys.executable, "-m", "lowbit", *arguments, "--json"], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"lowbit {' '.join(arguments)}: {done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cpu_seconds(command: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], float]:
    """What a command that starts processes returns, and the CPU seconds that these took."""

    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    return command(), spent() - before


def spread(values: Sequence[float], digits: int) -> str:
    """The mean, with the standard deviation over seeds if there are several.

    >>> spread([1.0, 2.0, 3.0], 2), spread([1.0], 2)
    ('2.00 ± 1.00', '1.00')
    """
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def filled(words: str, bullet: str = "") -> str:
    """A paragraph of Markdown, or an item of a list, in lines of at most 118 characters."""
    below = " " * len(bullet)
    return textwrap.fill(words, 118, initial_indent=bullet, subsequent_indent=below, break_on_hyphens=False)


def line(cells: Sequence[str]) -> str:
    """A line of a table in Markdown.

    >>> line(["gptq", "4.25"])
    '| gptq | 4.25 |'
    """
    return f"| {' | '.join(cells)} |"


def put(page: str, content: str, begin: str, end: str, where: Path) -> str:
    """``page`` with ``content`` between two markers; ends the program where ``where`` has lost them."""
    before, _, rest = page.partition(begin)
    if not rest or end not in rest:
        raise SystemExit(f"{where}: the lines {begin.strip()} and {end} are gone; put them where the table belongs")
    return before + begin + content + end + rest.partition(end)[2]


def digest(paths: Iterable[Path]) -> str:
    """A digest of what is in some files."""
    code = hashlib.sha256()
    for path in sorted(paths):
        code.update(path.read_bytes())
    return code.hexdigest()


@functools.cache
def sources() -> str:
    """A digest of the package's code and recipes."""
    return digest(path for path in (ROOT / "src").rglob("*") if path.suffix in (".py", ".yaml"))


@functools.cache
def text_identity(text: str) -> str:
    """What identifies a text, wherever it lies: a file's name and digest, or the name of a built-in one."""
    path = Path(text)
    return f"{path.name} {digest([path])[:16]}" if path.is_file() else text


def found(folder: Path, what: object, code: str | None = None, *, any_code: bool = False) -> dict[str, Any] | None:
    """Figures from ``folder`` if the same code has measured ``what`` (by its ``repr``).

    Args:
        folder: of rows.
        what: what is measured; its ``repr`` says it all.
        code: a digest of the code, by default ``sources``.
        any_code: figures of another state of the code will do.
    """
    path = _path(folder, what)
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    if not any_code and content["made_by"] != _made_by(code):
        return None
    row: dict[str, Any] = content["row"]
    return row


def kept(
    folder: Path, what: object, measure: Callable[[], dict[str, Any]], fresh: bool, code: str | None = None
) -> dict[str, Any]:
    """Figures that are ``found``, else measured now."""
    if not fresh and (row := found(folder, what, code)) is not None:
        return row
    row = json.loads(_without_folders(json.dumps(measure())))
    folder.mkdir(parents=True, exist_ok=True)
    path = _path(folder, what)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"what": repr(what), "made_by": _made_by(code), "row": row}, indent=1) + "\n")
    partial.replace(path)
    return dict(row)


def apart(told: dict[str, Any]) -> list[dict[str, Any]]:
    """What one ``lowbit compare`` of several models tells, as if each had been compared alone.

    >>> both = {"runs": [{"run": "a"}, {"run": "b"}], "ratios": [1, 2], "calibrated": [{}, {}], "exact": "m"}
    >>> both["texts"] = {"text": {"perplexity": 9.0, "runs": [{"perplexity": 10.0}, {"perplexity": 11.0}]}}
    >>> apart(both)[1]["texts"]["text"], apart(both)[1]["runs"]
    ({'perplexity': 9.0, 'runs': [{'perplexity': 11.0}]}, [{'run': 'b'}])
    """
    return [
        {
            **told,
            "texts": {name: {**text, "runs": [text["runs"][at]]} for name, text in told["texts"].items()},
            **{key: [told[key][at]] for key in ("runs", "ratios", "calibrated")},
        }
        for at in range(len(told["runs"]))
    ]


def together(cells: Sequence[Cell], count: int = TOGETHER) -> list[list[Cell]]:
    """Cells in parts that are compared with the float model at once, which runs once for all of them.

    >>> together([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4], [5]]
    """
    return [list(cells[at : at + count]) for at in range(0, len(cells), count)]


def missing_first(folder: Path, cells: Sequence[Cell], key: Callable[[Cell], object]) -> list[Cell]:
    """Cells without figures, then those that another state of the code may have measured, each in their order."""
    return sorted(cells, key=lambda cell: _path(folder, key(cell)).exists())


def outdated(folder: Path, keys: Iterable[object]) -> str:
    """How many of some figures another state of the sources has measured, in words; nothing if there are none."""
    pairs = [(found(folder, key, any_code=True), found(folder, key)) for key in keys]
    earlier = sum(kept is not None and new is None for kept, new in pairs)
    there = sum(kept is not None for kept, _ in pairs)
    return f"{earlier} of {there} rows are of an earlier state of the sources." if earlier else ""


def _path(folder: Path, what: object) -> Path:
    return folder / f"{hashlib.sha256(repr(what).encode()).hexdigest()[:16]}.json"


def _made_by(code: str | None) -> str:
    return (sources() if code is None else code)[:16]


def _without_folders(content: str) -> str:
    """Paths of this machine without their folders: rows are kept for others too.

    >>> _without_folders('{"texts": {"/nowhere/wiki.test.raw": 1}, "unit": "tokens/s"}')
    '{"texts": {"wiki.test.raw": 1}, "unit": "tokens/s"}'
    """
    return re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+(?=[\w.])", "", content)


@dataclass(frozen=True)
class Row:
    """One quantization and evaluation on the built-in text.

    Attributes:
        model, scheme: as for ``lowbit quantize``.
        recipe: a name, a recipe as YAML (one that starts with ``{``), or ``float``: the model as it is.
        settings: ``step.field=value``.
        effort: share of the recipe's epochs; ``paper`` is all that it says.
        layers: how many decoder layers the model has.
        blocks: how many of the first ones are quantized; all, where ``None``.
        samples, length, seed: calibration.
        window, tokens: evaluation.
    """

    model: str
    scheme: str
    recipe: str
    layers: int
    blocks: int | None = None
    settings: tuple[str, ...] = ()
    samples: int = 16
    length: int = 256
    seed: int = 0
    window: int = 512
    tokens: int = 8192
    effort: str = "paper"

    def measure(self) -> dict[str, Any]:
        """Perplexity; of a quantized model also seconds, peak memory and the quantized blocks' records."""
        with tempfile.TemporaryDirectory() as name:
            if self.recipe == "float":
                return {"perplexity": self._perplexity(self.model)}
            folder, recipe = Path(name) / "run", self.recipe
            if recipe.startswith("{"):
                recipe = str(Path(name) / "recipe.yaml")
                Path(recipe).write_text(self.recipe)
            what = ["--out", str(folder), "--scheme", self.scheme, "--recipe", recipe, "--effort", self.effort]
            drawn = ["--samples", str(self.samples), "--length", str(self.length), "--seed", str(self.seed)]
            options = [part for setting in self.settings for part in ("--set", setting)]
            for index in range(self.blocks or self.layers, self.layers):
                options += ["--override", f"*.layers.{index}.*=float"]
            made = lowbit("quantize", self.model, *what, *drawn, *options)
            result = {key: made[key] for key in ("bits_per_weight", "seconds", "peak_memory_bytes", "warnings")}
            result["blocks"] = json.loads((folder / "lowbit.json").read_text())["blocks"][: self.blocks]
            return {**result, "perplexity": self._perplexity(str(folder))}

    def _perplexity(self, target: str) -> float:
        how = ["--data", "builtin", "--length", str(self.window), "--tokens", str(self.tokens)]
        return float(lowbit("evaluate", target, *how)["perplexity"]["builtin"])


def pyplot() -> Any:
    """``matplotlib.pyplot`` that draws into files."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("plots need matplotlib: pip install 'lowbit[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
