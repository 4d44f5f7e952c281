"""Hashes of finished runs: what a change that is meant to leave every code and scale alone is compared with.

``python tests/golden.py`` makes the runs and compares their hashes with ``golden.json``; ``--record`` writes it.
Two hashes a run: of all stored parameters, codes and scales, and of the logits of ``lowbit.load``, which see runtime
ops too. Logits and whatever is fitted depend on the machine's linear algebra, so the table holds for one machine. The
stored tensors of runs that round to nearest follow from the float weights alone, on every machine: ``test_golden.py``
holds them wherever torch draws the same random weights, whose hashes stand in the rows ``FAMILY float``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

TABLE = Path(__file__).parent / "golden.json"
FAMILIES = ("llama", "qwen3", "gemma2", "opt")
SCHEMES = ("w4a4", "w4a8kv4", "w3a16g32-asym", "w8a8")
RECIPES = (
    "rtn",
    "gptq",
    "awq+gptq",
    "affinequant",
    "omniquant",
    "qllm",
    "qllm-fold",
    "affinequant+qllm",
    "smoothquant",
)
FEW = ("affinequant.epochs=2", "lowrank.epochs=2", "tune.epochs=1", "reassemble.tries=2")
Run = dict[str, Any]


def steps(*entries: Any, window: int = 1) -> dict[str, Any]:
    return {"steps": list(entries), "window": window}


# What the recipes above leave out: options, overrides, what stays online, the whole model's step.
EXTRA: dict[str, Run] = {
    "llama refit": {"family": "llama", "scheme": "w4a8", "recipe": steps("refit", "gptq")},
    "llama signs": {"family": "llama", "scheme": "w4a4", "recipe": steps("signs", {"gptq": {"target": "output"}})},
    "llama online": {
        "family": "llama",
        "scheme": "w4a4",
        "recipe": steps({"affinequant": {"qkv": "matrix", "mlp": "matrix", "act_clip": True, "epochs": 2}}, "rtn"),
    },
    "llama gather": {
        "family": "llama",
        "scheme": "w4a8",
        "recipe": steps(
            {"reassemble": {"sites": "all", "assembly": "one-to-one", "theta": "most", "tries": 2, "most": 0.2}},
            "gptq",
        ),
    },
    "llama offsets": {
        "family": "llama",
        "scheme": "w4a4",
        "recipe": steps({"reassemble": {"sites": "all", "theta": "most", "offsets": "both", "most": 0.2}}, "rtn"),
    },
    "opt shift": {
        "family": "opt",
        "scheme": "w4a4",
        "recipe": steps({"affinequant": {"precision": "float-double", "dominance": "enforce", "epochs": 2}}, "rtn"),
    },
    "phi3 tune": {
        "family": "phi3",
        "scheme": "w3a8",
        "recipe": steps("smoothquant", "gptq", {"tune": {"epochs": 1, "rank": 4}}),
    },
    "gemma3 ends": {
        "family": "gemma3",
        "scheme": "w3a16g32-sym",
        "recipe": steps("awq", {"lowrank": {"epochs": 2, "ranks": "adaptive", "norms": True}}, "rtn", window=2),
    },
    "qwen2 overrides": {
        "family": "qwen2",
        "scheme": "w4a16g32-sym",
        "recipe": steps("rtn"),
        "overrides": {"*.down_proj": "w8", "lm_head": "w8g32-asym", "*embed_tokens": "w8", "*.1.*q_proj": "float"},
    },
    "llama executorch": {"family": "llama", "scheme": None, "recipe": steps("gptq"), "target": "executorch"},
    "llama onnxruntime": {"family": "llama", "scheme": None, "recipe": steps("gptq"), "target": "onnxruntime"},
    "llama llama.cpp": {"family": "llama", "scheme": None, "recipe": steps("gptq"), "target": "llama.cpp"},
}


def tiny_runs() -> dict[str, Run]:
    """Every recipe on every family; a recipe's schemes change from family to family."""
    runs: dict[str, Run] = {}
    for at, recipe in enumerate(RECIPES):
        for family in FAMILIES:
            scheme = SCHEMES[(at + FAMILIES.index(family)) % len(SCHEMES)]
            if scheme.endswith("-asym") and recipe == "smoothquant":
                scheme = "w8a8"
            runs[f"{family} {recipe} {scheme}"] = {"family": family, "scheme": scheme, "recipe": recipe}
    return runs | EXTRA


def real_runs() -> dict[str, Run]:
    """SmolLM2, few tokens."""
    return {
        f"SmolLM2 {recipe} w4a16g64-sym": {"family": None, "scheme": "w4a16g64-sym", "recipe": recipe}
        for recipe in ("rtn", "gptq")
    }


def float_row(family: str) -> str:
    """The row with the hash of a family's float weights."""
    return f"{family} float"


def stored(files: Iterable[Path]) -> str:
    """The hash of all tensors in safetensors files, but for those of runtime ops."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    tensors = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if ".runtime." not in name]  # noqa: SIM118
            tensors |= {name: opened.get_tensor(name) for name in names}
    for name in sorted(tensors):
        value = tensors[name].contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def hashes(folder: Path) -> dict[str, str]:
    """Of a run folder: its stored tensors and its logits."""
    import lowbit

    weights = stored([*folder.glob("block-*.safetensors"), folder / "model-rest.safetensors"])
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = lowbit.load(folder)(ids).logits
    return {"weights": weights, "logits": hashlib.sha256(logits.numpy().tobytes()).hexdigest()[:16]}


def make(name: str, run: Run, place: Path) -> dict[str, str]:
    """One run's hashes."""
    import lowbit
    from lowbit.pipeline.recipe import recipe_from_dict
    from tiny import save_tiny

    family, recipe = run["family"], run["recipe"]
    more: dict[str, Any] = {"data": "builtin", "samples": 4, "length": 64}
    if family is not None:
        if not (place / family).exists():
            save_tiny(place / family, family)
        more = {"data": str(place / family / "calib.txt"), "samples": 4, "length": 24}
    if isinstance(recipe, str):
        stems = [step for step in ("affinequant", "lowrank", "tune", "reassemble") if step in _steps(recipe)]
        more["settings"] = [setting for setting in FEW if setting.split(".")[0] in stems]
    else:
        recipe = recipe_from_dict(recipe, name)
    if run.get("target"):
        more["target"] = run["target"]
    out = place / "runs" / name.replace(" ", "-").replace("/", "-")
    model = "demo" if family is None else str(place / family)
    lowbit.quantize(model, out, scheme=run["scheme"], recipe=recipe, overrides=run.get("overrides"), **more)
    return hashes(out)


def _steps(recipe: str) -> list[str]:
    from lowbit.pipeline.recipe import load_recipe

    return [name for name, _ in load_recipe(recipe).steps]


def main() -> int:
    """Compare, or record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write golden.json")
    parser.add_argument("--only", default="", help="names that contain this")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = {name: run for name, run in (tiny_runs() | real_runs()).items() if arguments.only in name}
    table: dict[str, dict[str, str]] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    different = 0
    with tempfile.TemporaryDirectory() as place:
        for name, run in runs.items():
            found = make(name, run, Path(place))
            known = table.get(name)
            if arguments.record:
                table[name] = found
                if (family := run["family"]) is not None:
                    table[float_row(family)] = {"weights": stored([Path(place) / family / "model.safetensors"])}
            same = "recorded" if arguments.record else "equal" if found == known else f"DIFFERS from {known}"
            different += not arguments.record and found != known
            print(f"{name:40} {found['weights']} {found['logits']} {same}", flush=True)
    if arguments.record:
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{len(runs)} runs, {different} differ")
    return int(different > 0)


if __name__ == "__main__":
    raise SystemExit(main())
