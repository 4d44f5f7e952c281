"""The command that repeats a run, from what its manifest says: the same command, the same bytes."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from lowbit.data.text import HUB, NAMES
from lowbit.pipeline.recipe import EFFORTS, load_recipe, recipe_names, recipe_to_dict, with_effort


def command(identity: Mapping[str, Any]) -> tuple[str, str | None]:
    """A run's ``lowbit quantize`` command, and its recipe as YAML where the command needs that as a file.

    The model, and a calibration text that was a file, go by name: where they lie is not in a manifest.
    """
    recipe, name = identity["recipe"], identity["recipe_name"]
    options, file = _by_name(name, recipe), None
    if options is None:
        # A file is scaled by the effort as well; "paper" leaves its epochs as they are.
        options = ["--recipe", f"{name}.yaml", "--effort", "paper"]
        file = yaml.safe_dump(dict(recipe), sort_keys=False)
    data, scheme = identity["data"], identity["scheme"]
    words = ["lowbit", "quantize", identity["model"], "--out", "DIR", "--scheme", scheme["scheme"], *options]
    words += ["--target", scheme["target"]] if scheme.get("target") else []
    for override in scheme["overrides"]:
        words += [f"--override={glob}={text}" for glob, text in override.items()]
    for key, value in (("data", corpus_of(data["corpus"])), ("samples", data["samples"]), ("length", data["length"])):
        words += [f"--{key}", str(value)]
    words += ["--seed", str(identity["seed"])]
    for key, default in (("device", "cpu"), ("dtype", "float32")):
        words += [f"--{key}", identity[key]] if identity[key] != default else []
    words += ["--compile"] if identity.get("compiled") else []
    return shlex.join(words), file


def corpus_of(label: str) -> str:
    """What ``--data`` must say for the calibration text that a manifest has a label of.

    >>> corpus_of("builtin:wiki+c4 (first 80 %)"), corpus_of("wikitext2/train"), corpus_of("mine.txt")
    ('builtin', 'wikitext2', 'mine.txt')
    """
    if label.startswith("builtin:") and label.endswith("%)"):
        name = label.partition(" ")[0]
        return name if name in NAMES else "builtin"
    name = label.partition("/")[0]
    return name if name in HUB else label


def _by_name(name: str, wanted: Mapping[str, Any]) -> list[str] | None:
    """Options for a recipe of the package, with the effort that leaves the fewest settings to be given."""
    if name not in recipe_names():
        return None
    found = []
    for effort in EFFORTS:
        settings = _settings(recipe_to_dict(with_effort(load_recipe(name), effort)), wanted)
        if settings is not None:
            found.append(["--recipe", name, "--effort", effort, *(f"--set={one}" for one in settings)])
    return min(found, key=len, default=None)


def _settings(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str] | None:
    """What ``--set`` must say to make the one recipe the other; ``None`` where it cannot.

    >>> made, wanted = ({"steps": [{"gptq": {"damping": damping}}], "window": 1} for damping in (0.1, 0.2))
    >>> _settings(made, wanted)
    ['gptq.damping=0.2']
    """
    steps = [[next(iter(step.items())) for step in one["steps"]] for one in (made, wanted)]
    names = [[name for name, _ in some] for some in steps]
    if made["window"] != wanted["window"] or names[0] != names[1] or len(set(names[0])) < len(names[0]):
        return None
    out = []
    for (name, ours), (_, theirs) in zip(*steps, strict=True):
        if set(ours) != set(theirs):
            return None
        changed = {key: value for key, value in theirs.items() if ours[key] != value}
        out += [f"{name}.{key}={v if isinstance(v, str) else json.dumps(v)}" for key, v in changed.items()]
    return out
