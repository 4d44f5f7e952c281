"""``lowbit`` beside other tools on the same calibration tokens, written into ``docs/peers.md`` between its markers.

    python benchmarks/peers.py --make-environment
    python benchmarks/peers.py [--calibration FILE] [--evaluation TEXT ...] [--only NAME ...] [--scheme NAME ...]

AutoRound and llm-compressor's GPTQ and AWQ quantize SmolLM2-135M-Instruct on the very token ids that ``lowbit``
draws, each in a process of one thread; ``lowbit compare`` evaluates every result, the tools' as float32 checkpoints.
``--make-environment`` installs what is missing of the tools into ``build/peers`` first; ``--calibration`` and
``--evaluation`` are texts as for ``lowbit quantize`` and ``lowbit compare``. The page is written after every row.
Rows are kept in ``docs/measured/peers``: those of ``lowbit`` by its sources, those of a tool by its version, its
driver and the figures of the float model, so that a change of ``lowbit`` does not repeat hours of other tools' work.
Missing rows come first, then those that other sources have measured; ``--missing`` leaves the latter as they are, and
``--fresh`` measures the asked rows again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from lowbit.checkpoints.resolve import load_tokenizer, resolve
from lowbit.data.text import calibration
from lowbit.data.windows import Tokens
from lowbit.pipeline.recipe import recipe_names
from peers_page import FLOAT, Page
from peers_tools import BUILD, PEERS, TOOLS, Peer, one_thread, quantize
from rows import ROOT, cpu_seconds, found, kept, lowbit, missing_first, put, text_identity

ROWS, WORK = ROOT / "docs" / "measured" / "peers", BUILD / "work"
PAGE = ROOT / "docs" / "peers.md"
BEGIN, END = "<!-- measured: made by benchmarks/peers.py -->\n", "<!-- /measured -->"
MODEL = "demo"
WINDOW = 512
SCHEMES = ("w4a16g64-sym", "w3a16g64-asym", "w2a16g64-asym")
# ``best`` is named here before it is packaged: what is packaged is measured.
RECIPES = tuple(name for name in ("awq+gptq", "awq+rounding", "gptq+rounding", "best") if name in recipe_names())
ENTRIES = (*PEERS, *RECIPES)

Cell = tuple[str, str, int]  # scheme, entry, seed


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
        return kept(ROWS, (self.placed(), MODEL, FLOAT), lambda: self.compared(MODEL), fresh)

    def key(self, cell: Cell, exact: Mapping[str, Any]) -> tuple[object, str | None]:
        """What identifies a row, and a digest of the code that made it."""
        entry = cell[1]
        if entry not in PEERS:
            return (self.placed(), MODEL, cell), None
        peer = PEERS[entry]
        tool = TOOLS[peer.tool]
        figures = [text["perplexity"] for text in exact["texts"].values()]
        return (self.placed(), MODEL, cell, peer, self._steps(peer), tool.package, tool.version, figures), tool.code

    def compared(self, target: str) -> dict[str, Any]:
        """``lowbit compare`` of a model with the float model."""
        data = [part for text in self.evaluation for part in ("--data", text)]
        return lowbit("compare", MODEL, target, *data, "--length", str(self.window), "--tokens", str(self.tokens))

    def measure(self, cell: Cell) -> dict[str, Any]:
        """One row: quantize, evaluate, forget the weights."""
        if cell[1] in PEERS:
            return self._peer(cell)
        scheme, recipe, seed = cell
        with tempfile.TemporaryDirectory() as scratch:
            out = str(Path(scratch) / "run")
            drawn = ["--samples", str(self.samples), "--length", str(self.length), "--seed", str(seed)]
            what = ["--scheme", scheme, "--recipe", recipe, "--data", self.calibration, *drawn]
            made, seconds = cpu_seconds(lambda: lowbit("quantize", MODEL, "--out", out, *what))
            manifest = json.loads((Path(out) / "lowbit.json").read_text())
            if (used := manifest["identity"]["data"]["hash"]) != (given := self.drawn(seed).hash):
                raise SystemExit(f"{recipe} was calibrated on tokens {used}, the other tools on {given}")
            row = {"cpu_seconds": seconds, "bits_per_weight": made["bits_per_weight"]}
            return {**row, "versions": manifest["versions"], **self.compared(out)}

    def _peer(self, cell: Cell) -> dict[str, Any]:
        scheme, entry, seed = cell
        peer, drawn = PEERS[entry], self.drawn(seed)
        tokens = BUILD / "tokens" / f"{drawn.hash[:20]}.safetensors"
        tokens.parent.mkdir(parents=True, exist_ok=True)
        save_file({"ids": drawn.ids}, tokens)
        made_by = (scheme, peer, seed, self._steps(peer), drawn.hash, TOOLS[peer.tool].version, TOOLS[peer.tool].code)
        out = WORK / hashlib.sha256(repr(made_by).encode()).hexdigest()[:20]
        made = quantize(peer, scheme, seed, self._steps(peer), resolve(MODEL).folder, tokens, out)
        row = {**made, **self.compared(str(out))}
        shutil.rmtree(out)
        return row

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
    for cell in missing_first(ROWS, asked, lambda cell: protocol.key(cell, exact)[0]):
        what, code = protocol.key(cell, exact)
        if options.missing and found(ROWS, what, any_code=True) is not None:
            continue

        def measure(cell: Cell = cell) -> dict[str, Any]:
            return protocol.measure(cell)

        row = kept(ROWS, what, measure, options.fresh, code)
        told = {**dict(zip(("scheme", "entry", "seed"), cell, strict=True)), "cpu_seconds": row["cpu_seconds"]}
        told["perplexity"] = [text["runs"][0]["perplexity"] for text in row["texts"].values()]
        print(json.dumps(told), flush=True)
        page = Page(drawn, protocol.steps, exact, protocol.rows(options.seeds, exact), SCHEMES, tuple(PEERS), RECIPES)
        before = options.page.read_text(encoding="utf-8")
        options.page.write_text(put(before, page.text(), BEGIN, END, options.page), encoding="utf-8")
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
