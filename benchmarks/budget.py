"""Do proposed overrides help? Perplexity of SmolLM2-135M-Instruct at equal bits, printed and written as JSON.

    python benchmarks/budget.py [--out build/budget.json] [--budgets 4.25 4.75]

Round to nearest, w4a16g64-sym as the base. For each budget three schemes of the same number of bits: proposed from
what the base run recorded, proposed from KL divergences (``--float``), and the formats of the latter dealt to other
blocks at random (each kind of linear keeps its formats, so bits are equal). At the base's own 4.25 bits the uniform
scheme is the fourth. Finished rows are kept in ``--out``, so that an interrupted command goes on.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

import lowbit

BASE, RECIPE, SAMPLES, LENGTH = "w4a16g64-sym", "rtn", 4, 256


def quantized(out: Path, scheme: str) -> Any:
    """A run of the demo model."""
    return lowbit.quantize("demo", out, scheme=scheme, recipe=RECIPE, data="builtin", samples=SAMPLES, length=LENGTH)


def measure(scheme: str) -> dict[str, Any]:
    """Bits and perplexity of a run that is forgotten again."""
    with tempfile.TemporaryDirectory() as folder:
        made = quantized(Path(folder) / "run", scheme)
        found = lowbit.evaluate(str(made.out), data="builtin", length=512, tokens=4096)
        (perplexity,) = found.perplexity.values()
    return {"bits_per_weight": made.bits_per_weight, "perplexity": perplexity}


def dealt(proposal: dict[str, Any], seed: int) -> dict[str, Any]:
    """The proposal's overrides with the blocks of each kind of group shuffled."""
    draw = random.Random(seed)
    by_kind: dict[tuple[str, ...], dict[int, str]] = {}
    for change in proposal["changes"]:
        parts = [name.split(".", 3) for name in change["linears"]]
        by_kind.setdefault(tuple(rest for *_, rest in parts), {})[int(parts[0][2])] = change["to"]
    blocks, overrides = range(30), dict[str, str]()
    for names, formats in by_kind.items():
        for block, text in zip(draw.sample(blocks, len(formats)), formats.values(), strict=True):
            overrides |= {f"model.layers.{block}.{name}": text for name in names}
    return {"scheme": proposal["scheme"]["scheme"], "overrides": overrides}


def main() -> None:
    parser = argparse.ArgumentParser(description="Perplexity of proposed overrides at equal bits.")
    parser.add_argument("--out", type=Path, default=Path("build/budget.json"))
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.25, 4.75])
    given = parser.parse_args()
    given.out.parent.mkdir(parents=True, exist_ok=True)
    kept: dict[str, Any] = json.loads(given.out.read_text()) if given.out.exists() else {}
    base = given.out.with_suffix("")
    quantized(base, BASE)

    def row(name: str, scheme: dict[str, Any]) -> None:
        if name not in kept:
            file = given.out.with_suffix(".yaml")
            file.write_text(yaml.safe_dump(scheme))
            kept[name] = measure(str(file))
            given.out.write_text(json.dumps(kept, indent=1))
        print(f"{name:28} {kept[name]['bits_per_weight']:7.3f} {kept[name]['perplexity']:9.2f}", flush=True)

    def proposed(basis: str, budget: float) -> dict[str, Any]:
        name = f"{basis} {budget:g}: proposal"
        if name not in kept:
            found = lowbit.diagnose(base, exact="demo" if basis == "measured" else None, budget=budget)
            assert found.proposal is not None
            kept[name] = {**asdict(found.proposal), "seconds": found.seconds}
            given.out.write_text(json.dumps(kept, indent=1))
        made: dict[str, Any] = kept[name]
        return made

    row("uniform", {"scheme": BASE})
    for budget in given.budgets:
        for basis in ("recorded", "measured"):
            row(f"{basis} {budget:g}", proposed(basis, budget)["scheme"])
        row(f"dealt at random {budget:g}", dealt(proposed("measured", budget), seed=0))


if __name__ == "__main__":
    main()
