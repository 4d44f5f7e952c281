"""``lowbit recipes`` and ``lowbit schemes``: list the available recipes, schemes and targets."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lowbit.cli.console import Json, print_json, table

if TYPE_CHECKING:
    from lowbit.pipeline.recipe import Recipe

PAPER = "paper/"
EXAMPLES = (
    *("w4a16g64-sym", "w3a16-asym", "w2a16g64-asym", "w8a8", "w4a8g64-sym-asym", "w4afp8g64", "w4a8kv4", "w4a4"),
    *("w8a8-static", "w4a16-static"),
)


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="A recipe, FILE.yaml, or paper/ for published results.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List recipes; with NAME, show one with every option.

    A single recipe is printed as a recipe file: redirect it into FILE.yaml and edit it.
    """
    from lowbit.pipeline.recipe import load_recipe, recipe_names

    if name is not None and name.rstrip("/") != PAPER.rstrip("/"):
        _show_recipe(load_recipe(name), as_json)
        return
    packaged = [load_recipe(known) for known in recipe_names()]
    papers = [recipe for recipe in packaged if recipe.name.startswith(PAPER)]
    shown = [recipe for recipe in packaged if recipe not in papers] if name is None else papers
    if as_json:
        print_json([{**_facts(recipe), "steps": [step for step, _ in recipe.steps]} for recipe in shown])
        return
    listed = [_facts(recipe) for recipe in shown]
    width = max(len(facts["name"]) for facts in listed) + 2
    for facts in listed:
        _print_entry(facts["name"], [facts["description"], f"for: {facts['schemes']}"], width)
    if name is None:
        _print_entry(PAPER, [f"{len(papers)} recipes of published results: lowbit recipes {PAPER}"], width)
        print("\nOne recipe with every option: lowbit recipes NAME")


def _print_entry(name: str, lines: Sequence[str], width: int) -> None:
    """Print a name in a column of ``width`` and lines about it to its right, wrapped to the terminal."""
    available = max(shutil.get_terminal_size().columns - width, 30)
    wrapped = [part for line in lines for part in textwrap.wrap(line, available, subsequent_indent="  ")]
    print(
        "\n".join(f"{head:{width}}{part}" for head, part in zip([name, *[""] * len(wrapped)], wrapped, strict=False))
    )


def _facts(recipe: Recipe) -> dict[str, str]:
    """Name, schemes and description; for a published result derived from its steps and its protocol."""
    steps = " -> ".join(step for step, _ in recipe.steps)
    return {
        "name": recipe.name,
        "schemes": recipe.schemes or recipe.run.get("scheme", ""),
        "description": recipe.description or steps,
    }


def _show_recipe(recipe: Recipe, as_json: bool) -> None:
    """Print one recipe as a recipe file."""
    import yaml

    from lowbit.pipeline.recipe import recipe_to_dict

    texts = {"description": recipe.description, "schemes": recipe.schemes}
    content: dict[str, Any] = {key: text for key, text in texts.items() if text} | recipe_to_dict(recipe)
    if recipe.run:
        content["run"] = dict(recipe.run)
    if as_json:
        print_json({"name": recipe.name, **content})
    else:
        print(f"# {recipe.name}: lowbit quantize MODEL --recipe {recipe.name} --out DIR")
        print(yaml.safe_dump(content, sort_keys=False, width=1000), end="")


def schemes(as_json: Json = False) -> None:
    """Explain scheme names and list what each target supports."""
    from lowbit.cli.formats import format_rows, scheme_rows
    from lowbit.cli.targets import installed, targets
    from lowbit.quant.runtimes import RUNTIMES
    from lowbit.quant.scheme_names import GRAMMAR, OVERRIDE_GRAMMAR

    facts = {
        "grammar": GRAMMAR,
        "parts": _parts(),
        "examples": [_example(name) for name in EXAMPLES],
        "named": [asdict(row) for row in scheme_rows(installed()[0])],
        "formats": [asdict(row) for row in format_rows()],
        "override_grammar": OVERRIDE_GRAMMAR,
        "targets": targets(),
        "runtimes": [
            {"name": name, "default_schemes": list(runtime.schemes), "inputs": runtime.rounds or "as the scheme says"}
            for name, runtime in RUNTIMES.items()
        ],
    }
    if as_json:
        print_json(facts)
    else:
        _show_schemes(facts)


def _show_schemes(facts: dict[str, Any]) -> None:
    _show(f"A scheme of integers is a name\n{facts['grammar']}:", ("part", "meaning"), list(facts["parts"].items()))
    heads = ("example", "weights", "inputs", "Q, K, V", "bits per weight")
    cells = [list(example.values()) for example in facts["examples"]]
    _show("\nExamples; bits count codes, scales and zero points:", heads, cells)
    _show(
        "\nOther schemes are names of formats. Stock transformers gives the simulated logits in the dtype shown;\n"
        "lowbit.load runs every scheme:",
        ("scheme", "weights", "inputs", "bits per weight", "transformers", "export --to"),
        [
            (
                *(row[key] for key in ("scheme", "weights", "inputs", "bits_per_weight")),
                row["transformers"] or "no",
                ", ".join(row["exports"]) or "-",
            )
            for row in facts["named"]
        ],
    )
    _show(
        "\nWeight formats that have names:",
        ("format", "codes", "scales", "widths in multiples of", "bits per weight"),
        [[str(value) for value in row.values()] for row in facts["formats"]],
    )
    print(_OVERRIDES.format(grammar=facts["override_grammar"]))
    _show(
        "\nWhat lowbit export --to TARGET supports, for a model with the widths of Llama 7B:",
        ("target", "schemes"),
        [(target["name"], "\n".join(target["schemes"]) or target["needs"]) for target in facts["targets"]],
    )
    _show(
        "\nlowbit quantize --target RUNTIME also simulates how the runtime quantizes inputs:",
        ("runtime", "default schemes", "inputs of linears"),
        [(row["name"], "\n".join(row["default_schemes"]), row["inputs"]) for row in facts["runtimes"]],
    )


def _show(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    print(title)
    rows = table(*heads)
    for row in lines:
        rows.add_row(*map(Text, row))
    Console().print(rows)


def _parts() -> dict[str, str]:
    """The meaning of each part of a scheme name."""
    from lowbit.quant.scheme_names import ACT_BITS, KV_BITS, WEIGHT_BITS

    acts = ", ".join(str(bits) for bits in ACT_BITS if bits != 16)
    return {
        "w4": f"weights of the blocks' linears at 4 bits ({WEIGHT_BITS[0]} to {WEIGHT_BITS[-1]})",
        "a8": f"their inputs at 8 bits ({acts}), one dynamic range per token; a16: floating point",
        "afp8": "their inputs in FP8 (E4M3), one dynamic scale per token",
        "kv4": f"queries, keys and values at 4 bits ({', '.join(map(str, KV_BITS))}), per token and head; optional",
        "kv4h": "the same behind a Hadamard rotation of each head, which costs less quality",
        "g64": "one scale for 64 consecutive input channels of a weight's row; without it, one per row",
        "-sym, -asym": "symmetric (zero point in the middle of the range) or asymmetric, weights and integer inputs "
        "alike; without it, integer inputs and weights behind them are asymmetric, other weights symmetric",
        "-sym-asym": "symmetric weights, asymmetric inputs",
        "-static": "one calibrated range for each linear's input, of 8 bits or, with a16, 16-bit integers; "
        "weights are symmetric and inputs asymmetric unless -sym or -asym sets both",
    }


def _example(name: str) -> dict[str, str]:
    """The formats of a scheme, in a few words each."""
    from lowbit.cli.formats import bits_text, inputs_text, weights_text
    from lowbit.quant.scheme_names import parse_scheme

    scheme = parse_scheme(name)
    return {
        "scheme": scheme.name,
        "weights": weights_text(scheme.weight),
        "activations": inputs_text(scheme.act),
        "kv": inputs_text(scheme.kv),
        "bits_per_weight": bits_text(scheme.weight),
    }


_OVERRIDES = """
Overrides give modules another weight format, {grammar}, one of the names above or float;
the first matching glob applies:
  --override '*.down_proj=w8' --override '*.layers.0.*=float' --override lm_head=w8g64
Embeddings and the output head stay in floating point unless an override names
them. The same in FILE.yaml, for --scheme:
  scheme: w4a16g64-sym
  overrides: {{"*.down_proj": w8, lm_head: w8g64}}"""
