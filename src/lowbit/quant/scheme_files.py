"""Schemes as plain data: in YAML files and in manifests."""

from __future__ import annotations

from typing import Any

import torch

from lowbit.errors import LowbitError, unknown
from lowbit.paths import user_path
from lowbit.quant.scheme import Scheme, for_runtime, stored_as
from lowbit.quant.scheme_names import override_text, parse_scheme, with_overrides
from lowbit.yaml_text import parse_yaml


def load_scheme(name: str) -> Scheme:
    """A scheme from its name, or from a YAML file with ``scheme: NAME`` and ``overrides: {glob: format}``."""
    if not name.lower().endswith((".yaml", ".yml")):
        return parse_scheme(name)
    try:
        text = user_path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LowbitError(f"cannot read the scheme file {name}: {' '.join(str(error).split())}") from error
    return scheme_from_dict(parse_yaml(text, f"scheme file {name}"), name)


def scheme_from_dict(content: Any, where: str = "scheme") -> Scheme:
    """The inverse of ``scheme_to_dict``; unknown keys are refused."""
    if not isinstance(content, dict) or "scheme" not in content:
        raise LowbitError(f"{where}: expected the keys 'scheme' (a name) and 'overrides' (glob: format)")
    for key in content:
        if key not in (known := ("scheme", "overrides", "target")):
            raise unknown(f"key in {where}", str(key), known)
    overrides = content.get("overrides") or {}
    if isinstance(overrides, list) and all(isinstance(entry, dict) for entry in overrides):
        overrides = {glob: text for entry in overrides for glob, text in entry.items()}
    if not isinstance(overrides, dict):
        raise LowbitError(f"{where}: 'overrides' must map a glob to a format such as w8g64 or float")
    return for_runtime(with_overrides(parse_scheme(str(content["scheme"])), overrides), content.get("target"))


def scheme_to_dict(scheme: Scheme) -> dict[str, Any]:
    """Plain data for a manifest or a YAML file; overrides as a list, since their order matters."""
    target = {} if scheme.target is None else {"target": scheme.target}
    specs = (
        (glob, spec and stored_as(spec, torch.float16)) if target else (glob, spec) for glob, spec in scheme.overrides
    )
    overrides = [{glob: override_text(spec)} for glob, spec in specs]
    return {"scheme": scheme.name, "overrides": overrides, **target}


def check_recorded(scheme: Scheme) -> None:
    """Refuse a scheme that its name and overrides, which are what a run records, do not describe.

    Raises:
        LowbitError: fields were set beside the name.
    """
    if scheme_from_dict(scheme_to_dict(scheme)) != scheme:
        raise LowbitError(
            f"the scheme '{scheme.name}' has other formats than its name says, and a run records the name: make it "
            "with parse_scheme, and other formats with overrides"
        )
