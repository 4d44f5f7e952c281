"""``lowbit`` beside other tools on the same calibration tokens, written into ``docs/peers.md`` between its markers.

    python benchmarks/peers.py --make-environment
    python benchmarks/peers.py [--calibration FILE] [--evaluation TEXT ...] [--only NAME ...] [--scheme NAME ...]

AutoRound and llm-compressor's GPTQ and AWQ quantize SmolLM2-135M-Instruct on the very token ids that ``lowbit``
draws, each in a process of one thread; ``lowbit compare`` evaluates every result, four at once, the tools' as float32
checkpoints. ``--make-environment`` first installs what is missing of the tools into ``build/peers``.
``--calibration`` and ``--evaluation`` are texts as for ``lowbit quantize`` and ``lowbit compare``. The page is
written after each four. Rows are kept in ``docs/measured/peers``: those of ``lowbit`` by its sources, those of a tool
by its version, its driver and the figures of the float model, so that a change of ``lowbit`` does not repeat hours of
other tools' work.
Missing rows come first, then those that other sources have measured; ``--missing`` leaves the latter as they are, and
``--fresh`` measures the asked rows again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.data.text import SELF, calibration
from lowbit.data.windows import Tokens
from peers_page import FLOAT, Page
from peers_tools import BUILD, MADE, PEERS, TOOLS, Peer, one_thread, quantize
from rows import ROOT, apart, cpu_seconds, found, kept, lowbit, missing_first, put, sources, text_identity, together

ROWS, WORK = ROOT / "docs" / "measured" / "peers", BUILD / "work"
PAGE = ROOT / "docs" / "peers.md"
BEGIN, END = "<!-- measured: made by benchmarks/peers.py -->\n", "<!-- /measured -->"
MODEL = "demo"
WINDOW = 512
SCHEMES = ("w4a16g64-sym", "w3a16g64-asym", "w2a16g64-asym")
RECIPES = ("awq+gptq", "best")
# A recipe that is given as many windows again of the model's own text: beside the others, not in their comparison.
OWN_TEXT = {"best, own text": "best"}
ENTRIES = (*PEERS, *RECIPES, *OWN_TEXT)

Cell = tuple[str, str, int]  # scheme, entry, seed


def _work(made_by: object) -> Path:
    """The folder of a result, by what makes it."""
    return WORK / hashlib.sha256(repr(made_by).encode()).hexdigest()[:20]


@dataclass(frozen=True)
class Protocol:
    """What every row has in common.

    Attributes:
        calibration: a text, as for ``lowbit quantize --data``.
        evaluation: texts, as for ``lowbit compare --data``.
        samples, length: windows of calibration, and their tokens.
        window, tokens: of evaluation; tokens of each text at most.
        steps: of tools that learn; it is not in ``repr``, the key of rows, since no recipe's row depends on it.
    """

    calibration: str
    evaluation: tuple[str, ...]
    samples: int
    length: int
    window: int
    tokens: int
    steps: int = field(repr=False)

    def placed(self) -> Protocol:
        """The same with texts by what they hold, wherever they lie."""
        evaluation = tuple(text_identity(text) for text in self.evaluation)
        return replace(self, calibration=text_identity(self.calibration), evaluation=evaluation)

    def drawn(self, seed: int) -> Tokens:
        """The calibration tokens of a seed: those that ``lowbit quantize`` draws."""
        tokenizer = load_tokenizer(resolve(MODEL).folder)
        return calibration(self.calibration, tokenizer, self.samples, self.length, seed)

    def exact(self, fresh: bool) -> dict[str, Any]:
        """The float model on the texts, compared with itself; a divergence of 0 shows an exact comparison."""
        return kept(ROWS, (self.placed(), MODEL, FLOAT), lambda: self.compared([MODEL])[0], fresh)

    def key(self, cell: Cell, exact: Mapping[str, Any]) -> tuple[object, str | None]:
        """What identifies a row, and a digest of the code that made it."""
        entry = cell[1]
        if entry not in PEERS:
            return (self.placed(), MODEL, cell), None
        peer = PEERS[entry]
        tool = TOOLS[peer.tool]
        figures = [text["perplexity"] for text in exact["texts"].values()]
        return (self.placed(), MODEL, cell, peer, self._steps(peer), tool.package, tool.version, figures), tool.code

    def compared(self, targets: Sequence[str]) -> list[dict[str, Any]]:
        """``lowbit compare`` of models with the float model."""
        data = [part for text in self.evaluation for part in ("--data", text)]
        how = [*data, "--length", str(self.window), "--tokens", str(self.tokens)]
        return apart(lowbit("compare", MODEL, *targets, *how))

    def measure(self, cells: Sequence[Cell]) -> list[dict[str, Any]]:
        """Rows: quantize each, evaluate all at once, forget the weights."""
        made = [self._peer(cell) if cell[1] in PEERS else self._run(cell) for cell in cells]
        told = self.compared([str(out) for out, _ in made])
        for out, _ in made:
            shutil.rmtree(out)
        return [{**row, **figures} for (_, row), figures in zip(made, told, strict=True)]

    def _run(self, cell: Cell) -> tuple[Path, dict[str, Any]]:
        """A run of a recipe, and what it took; one that is there from an interrupted command stays as it is.

        Windows of the model's own text come on top: a test shows that those of the text are the same ones.
        """
        scheme, recipe, seed = cell
        given = self.drawn(seed).hash
        out = _work((*cell, self.samples, self.length, given, sources()))
        if not (out / MADE).exists():
            shutil.rmtree(out, ignore_errors=True)
            own = recipe in OWN_TEXT
            drawn = ["--samples", str(self.samples * (1 + own)), "--length", str(self.length), "--seed", str(seed)]
            data = [part for text in (self.calibration, *([SELF] * own)) for part in ("--data", text)]
            what = ["--scheme", scheme, "--recipe", OWN_TEXT.get(recipe, recipe), *data, *drawn]
            made, seconds = cpu_seconds(lambda: lowbit("quantize", MODEL, "--out", str(out), *what))
            identity = json.loads((out / "lowbit.json").read_text())["identity"]
            if (used := identity["data"]["hash"]) != given and not own:
                raise SystemExit(f"{recipe} was calibrated on tokens {used}, the other tools on {given}")
            row = {"cpu_seconds": seconds, "bits_per_weight": made["bits_per_weight"]}
            (out / MADE).write_text(json.dumps({**row, "versions": identity["versions"]}))
        return out, json.loads((out / MADE).read_text())

    def _peer(self, cell: Cell) -> tuple[Path, dict[str, Any]]:
        """What a tool made, and what it took."""
        scheme, entry, seed = cell
        peer, drawn = PEERS[entry], self.drawn(seed)
        tokens = BUILD / "tokens" / f"{drawn.hash[:20]}.safetensors"
        tokens.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": drawn.ids}, tokens)
        tool = TOOLS[peer.tool]
        out = _work((scheme, peer, seed, self._steps(peer), drawn.hash, tool.version, tool.code))
        return out, quantize(peer, scheme, seed, self._steps(peer), resolve(MODEL).folder, tokens, out)

    def _steps(self, peer: Peer) -> int:
        return self.steps if peer.learns else 0

    def rows(self, seeds: int, exact: Mapping[str, Any]) -> dict[Cell, dict[str, Any]]:
        """All rows that are measured, by scheme, entry and seed."""
        cells = [(scheme, entry, seed) for scheme in SCHEMES for entry in ENTRIES for seed in range(seeds)]
        rows = {cell: found(ROWS, self.key(cell, exact)[0], any_code=True) for cell in cells}
        return {cell: row for cell, row in rows.items() if row is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--make-environment", action="store_true", help="install the other tools into build/peers")
    parser.add_argument("--calibration", default="builtin:wiki", help="text file, or a name that quantize takes")
    parser.add_argument("--evaluation", action="append", help="text file, or a name that compare takes; repeatable")
    parser.add_argument("--only", action="append", choices=ENTRIES, help="measure only this tool or recipe")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="measure only this scheme; repeatable")
    parser.add_argument("--seeds", type=int, default=3, help="calibration seeds of each row, from 0")
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--length", type=int, default=256, help="tokens in a calibration window")
    parser.add_argument("--steps", type=int, default=200, help="of tools that learn")
    parser.add_argument("--tokens", type=int, default=16384, help="of each evaluation text at most")
    parser.add_argument("--page", type=Path, default=PAGE, help="with the two markers")
    parser.add_argument("--missing", action="store_true", help="leave rows of other sources as they are")
    parser.add_argument("--fresh", action="store_true", help="measure finished rows again")
    options = parser.parse_args()
    os.environ.update(one_thread())
    entries = options.only or ENTRIES
    for tool in {PEERS[entry].tool for entry in entries if entry in PEERS}:
        if options.make_environment:
            TOOLS[tool].make_environment()
        TOOLS[tool].check()
    evaluation = tuple(options.evaluation or ("builtin:wiki", "builtin:c4"))
    sizes = (options.samples, options.length, WINDOW, options.tokens, options.steps)
    protocol = Protocol(options.calibration, evaluation, *sizes)
    exact = protocol.exact(options.fresh)
    drawn = [protocol.drawn(seed) for seed in range(options.seeds)]
    asked: list[Cell] = [
        (scheme, entry, seed)
        for seed in range(options.seeds)
        for scheme in options.scheme or SCHEMES
        for entry in entries
    ]

    def wanted(cell: Cell) -> bool:
        what, code = protocol.key(cell, exact)
        return options.fresh or found(ROWS, what, code, any_code=options.missing) is None

    missing = missing_first(ROWS, list(filter(wanted, asked)), lambda cell: protocol.key(cell, exact)[0])
    for cells in together(missing):
        for cell, row in zip(cells, protocol.measure(cells), strict=True):
            what, code = protocol.key(cell, exact)
            kept(ROWS, what, partial(dict, row), fresh=True, code=code)
            told = {**dict(zip(("scheme", "entry", "seed"), cell, strict=True)), "cpu_seconds": row["cpu_seconds"]}
            told["perplexity"] = [text["runs"][0]["perplexity"] for text in row["texts"].values()]
            print(json.dumps(told), flush=True)
        rows = protocol.rows(options.seeds, exact)
        page = Page(drawn, protocol.steps, exact, rows, SCHEMES, tuple(PEERS), RECIPES, tuple(OWN_TEXT))
        before = options.page.read_text(encoding="utf-8")
        options.page.write_text(put(before, page.text(), BEGIN, END, options.page), encoding="utf-8")
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
