"""The command that reproduces a run bit for bit, from the request in its manifest."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from lowbit.models.block import LEAST_TOKENS


def command(request: Mapping[str, Any]) -> tuple[str, str | None]:
    """A run's ``lowbit quantize`` command, and its recipe as YAML if the command needs it as a file.

    The model and a calibration file appear by name only: a manifest holds no paths.

    >>> request = {"model": "demo", "recipe": "rtn", "effort": "quick", "settings": [], "scheme": "w8a8"}
    >>> request |= {"overrides": [], "data": ["c4"], "samples": 8, "length": 8, "seed": 0, "bos": "auto"}
    >>> command(request)[0].partition(" --scheme ")[2]
    'w8a8 --recipe rtn --effort quick --data c4 --samples 8 --length 8 --seed 0'
    >>> command({"model": "a.gguf", "keep": True})[0]
    'lowbit quantize a.gguf --out DIR --keep'
    """
    if request.get("keep"):
        words = ["lowbit", "quantize", request["model"], "--out", "DIR", "--keep"]
        return shlex.join([*words, *_option("revision", request.get("revision")), *_flags(request)]), None
    recipe, file = request["recipe"], None
    if isinstance(recipe, Mapping):
        file = yaml.safe_dump({key: value for key, value in recipe.items() if key != "name"}, sort_keys=False)
        recipe = f"{recipe['name']}.yaml"
    words = ["lowbit", "quantize", request["model"], "--out", "DIR", *_option("scheme", request.get("scheme"))]
    words += ["--recipe", recipe, "--effort", request["effort"]]
    words += [f"--set={setting}" for setting in request["settings"]]
    words += _option("target", request.get("target")) + _option("input-range", request.get("input_range"), "mse")
    words += _option("imatrix", request.get("imatrix"))
    words += [f"--override={glob}={text}" for pair in request["overrides"] for glob, text in pair.items()]
    words += [word for corpus in request["data"] for word in ("--data", corpus)]
    for name in ("samples", "length", "seed"):
        words += ["--" + name, str(request[name])]
    for name, default in (("bos", "auto"), ("device", "cpu"), ("dtype", "float32"), ("revision", None)):
        words += _option(name, request.get(name), default)
    if (prefix := request.get("prefix", "none")) != "none":
        words.append(f"--prefix={prefix}")  # text that may start with a dash
    words += _option("expert-tokens", str(request.get("expert_tokens", LEAST_TOKENS)), str(LEAST_TOKENS))
    return shlex.join([*words, *_flags(request)]), file


def _flags(request: Mapping[str, Any]) -> list[str]:
    flags = {
        "merge_only": "--merge-only",
        "all_experts": "--all-experts",
        "compiled": "--compile",
        "allow_pickle": "--allow-pickle",
        "trust_remote_code": "--trust-remote-code",
    }
    return [flag for name, flag in flags.items() if request.get(name)]


def _option(name: str, value: str | None, default: str | None = None) -> list[str]:
    return [] if value is None or value == default else [f"--{name}", value]
