"""What ``architectures.py`` found, as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import transformers

from architectures_edges import sentence
from architectures_steps import EQUAL, NO_EDGES, OK, RECIPES, ran, went
from lowbit.models.architecture import DeclaredEdge, LayerKind
from lowbit.models.discovery import Discovery

Row = dict[str, Any]


def summary(found: Discovery) -> Row:
    """What a row keeps: the edges of each kind of layers, and the candidates that the proofs refuted."""
    own = found.architecture
    return {
        "kinds": [
            {"layers": own.layers.count(kind), "linears": sum(map(len, kind.groups)), "edges": edges_of(kind)}
            for kind in own.kinds()
        ],
        "refuted": [[one.edge, one.reason] for one in found.record.findings if one.offered and one.limit is None],
        "notes": list(found.record.notes),
    }


def edges_of(kind: LayerKind) -> list[str]:
    """The edges in short, equal ones counted: ``norm 3``, ``heads matrix``, ``channels diagonal x 2``."""
    counted = Counter(map(short, kind.edges))
    return [text if count == 1 else f"{text} x {count}" for text, count in counted.items()]


def short(edge: DeclaredEdge) -> str:
    """An edge in two or three words."""
    if edge.kind == "norm":
        return f"norm {len({ref if isinstance(ref, str) else ref.module for ref in edge.dst})}"
    dims = [f"{len(edge.pairs)} pairs"][: bool(edge.pairs)] + [f"{len(edge.free)} free"][: bool(edge.free)]
    power = [f"power {edge.power}"] if edge.power != 1 else []
    return " ".join([edge.kind, edge.limit, *dims, *power])


def page(
    rows: Mapping[str, Row],
    known: Iterable[str],
    overrides: Mapping[str, Mapping[str, Any]],
    experts: Mapping[str, int],
) -> str:
    """The tables in Markdown.

    Args:
        rows: by model type.
        known: every type; those without a row are named.
        overrides: what is set in the config of a type, beside its defaults.
        experts: how many a layer with experts of a type has; 0, or no entry: none.
    """
    good = {type: row for type, row in sorted(rows.items()) if row["ok"]}
    bad = {type: row for type, row in sorted(rows.items()) if not row["ok"]}
    without = sum(not any(kind["edges"] for kind in row["kinds"]) for row in good.values())
    counts = {
        "good": len(good),
        "all": len(rows),
        "without": without,
        "plain_ran": sum(ran(row, "rtn", "gptq") for row in good.values()),
        "plain": sum(went(row, "rtn", "gptq") for row in good.values()),
        "affine_ran": sum(ran(row, "affinequant") for row in good.values()),
        "affine": sum(went(row, "affinequant") for row in good.values()),
        "version": transformers.__version__,
    }
    columns = " | ".join(RECIPES)
    lines = [
        "# Architectures",
        "",
        *_INTRODUCTION.format(**counts).splitlines(),
        "",
        f"| type | class | layers | edges | {columns} | stock |",
        f"|---|---|---:|---|{'---|' * len(RECIPES)}---|",
        *(line for type, row in good.items() for line in _rows(type, row, experts.get(type, 0))),
        *_reasons(good),
        *_table(
            "Not discovered", "type | class | reason", ((f"`{t}`", r["class"], r["why"]) for t, r in bad.items())
        ),
        *_configs(overrides),
    ]
    if missing := sorted(set(known) - set(rows)):
        names = ", ".join(f"`{type}`" for type in missing)
        lines += ["", "## Without a row", "", f"`make architectures` goes on with {names}."]
    return "\n".join(lines) + "\n"


def _rows(type: str, row: Row, experts: int) -> list[str]:
    """A type's lines: one for each kind of its layers; the first has the steps."""
    steps = row.get("steps", {})
    cells = [_word(steps.get(recipe, {}).get("run"), OK) for recipe in RECIPES]
    end = " | ".join([*cells, _stock(steps)])
    lines = []
    for at, kind in enumerate(row["kinds"]):
        name = f"`{type}` | {row['class']}" if not at else " |"
        last = end if not at else " | " * len(RECIPES)
        lines.append(f"| {name} | {kind['layers']} | {sentence(kind['edges'], experts)} | {last} |")
    return lines


def _word(said: str | None, good: str) -> str:
    return {None: "", good: good, NO_EDGES: NO_EDGES}.get(said, "no")


def _stock(steps: Mapping[str, Mapping[str, str]]) -> str:
    """``equal`` if the logits of every recipe that ran are, ``no`` if any are not."""
    said = [step["stock"] for step in steps.values() if "stock" in step]
    return "" if not said else EQUAL if all(one == EQUAL for one in said) else "no"


def _reasons(good: Mapping[str, Row]) -> list[str]:
    """The steps that failed, those with one reason together."""
    found: dict[tuple[str, str], list[str]] = {}
    for type, row in good.items():
        for recipe, step in row.get("steps", {}).items():
            if step["run"] not in (OK, NO_EDGES):
                found.setdefault((type, step["run"]), []).append(recipe)
            elif step.get("stock", EQUAL) != EQUAL:
                found.setdefault((type, step["stock"]), []).append(f"stock after {recipe}")
    cells = ((f"`{type}`", ", ".join(steps), why) for (type, why), steps in found.items())
    return _table("Steps that fail", "type | step | reason", cells)


def _configs(overrides: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is set in configs."""
    cells = ((f"`{t}`", ", ".join(f"`{key}={value!r}`" for key, value in o.items())) for t, o in overrides.items())
    text = "The default config of these types builds no decoder, so these values are set."
    return _table("Configs", "type | set", cells, text)


def _table(title: str, head: str, rows: Iterable[tuple[str, ...]], text: str = "") -> list[str]:
    """A section with a table; nothing without rows."""
    lines = ["| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows]
    above = [text, ""] if text else []
    rule = "---|" * (head.count("|") + 1)
    return ["", f"## {title}", "", *above, f"| {head} |", f"|{rule}", *lines] if lines else []


_INTRODUCTION = """\
Written by `make architectures`: every causal language model that transformers {version} names, with the default
config of its type.

* {good} of {all} are discovered and proven; {without} of them have no edge.
* {plain_ran} are quantized by `rtn` and by `gptq`; {plain} go the whole way with both.
* {affine_ran} are quantized by `affinequant`; {affine} go the whole way with it.

Each config is shrunk, a random model of it is built, its structure is read off its responses, and every edge is
proven by a random map in the layer and in the model. Layers that differ have a row each; *layers* counts them in the
default config. Edges:

* `norm -> 3 linears`: a norm's gain and its three readers, routers among them
* `v -> o (matrix)`: any matrix per key/value head (`rotation`: orthogonal ones, `diagonal`: scales)
* `channels (diagonal)`: scales from a linear's rows to the columns that read them, as up to down (`positive`: above
  0; `power 2`: squared on the way)
* `q -> k (matrix, 8 pairs, 4 free)`: a scaled rotation of each pair of a head's dimensions that the rotary embedding
  rotates together, and any matrix over those that it leaves alone; `diagonal`: scales of the gains of the norms on
  queries and keys. Widths are those of the default config.
* `per expert`: every expert of the layer has the edge; `2 of each expert`: its gate and up

Steps run on the small model in float32, with every parameter random. The scheme is `w4a16g16-sym`, or the same with
the largest smaller group that divides all widths; calibration has 8 windows of 32 tokens, and `affinequant` 2 epochs.
`ok`: the run folder is written, and `lowbit.load` computes finite logits from it that differ from the float model's.
*stock*: `equal` where `transformers` alone loads each recipe's folder and gives the same logits. A model goes the
whole way with a recipe if both hold."""
