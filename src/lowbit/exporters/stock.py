"""A run folder in stock ``transformers``: loaded in a fresh process, its logits compared with the simulation's.

A scheme that a library's version ignores or misreads gives other logits without an error, so the folder is run, not
looked at. The process imports ``transformers`` alone; nothing of this package can help it. Faults that are known are
named without running them, those of other installed libraries too (``known_faults.py``).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lowbit.checkpoints.resolve import load_config
from lowbit.errors import LowbitError
from lowbit.exporters.known_faults import installed_faults
from lowbit.exporters.run import Run
from lowbit.exporters.verify import Verified, relative_error
from lowbit.models.build import auto_class
from lowbit.runs.load import load
from lowbit.runs.versions import versions

TARGET = "transformers"
# Both sides take the same operations in the same order; a runtime's threads may split sums otherwise.
EXPLAINED = {"float32": 1e-5, "bfloat16": 1e-2}
_PROGRAM = """
import sys
import torch
from safetensors.torch import load_file, save_file
import transformers

folder, exchange, dtype, trusted, auto = sys.argv[1:]
ids = load_file(f"{exchange}/ids.safetensors")["ids"]
model = getattr(transformers, auto).from_pretrained(
    folder, dtype=getattr(torch, dtype), trust_remote_code=trusted == "yes", local_files_only=True
)
with torch.no_grad():
    logits = model.eval()(ids[None]).logits[0].float()
save_file({"logits": logits.contiguous()}, f"{exchange}/logits.safetensors")
"""


def verify_stock(run: Run, ids: Tensor, trust_remote_code: bool = False) -> Verified:
    """Compare stock ``transformers``' logits of a run folder with the simulation's, in the dtype that it states.

    Args:
        run: the run.
        ids: token ids ``(tokens,)``.
        trust_remote_code: permit code of the model's own.

    Raises:
        LowbitError: stock ``transformers`` does not run this folder, as its manifest says, and reports an error.
    """
    stock = run.manifest.transformers
    result = Verified(
        str(run.folder), f"{TARGET} {version(TARGET)}, {stock.dtype}", faults=installed_faults(run.subject)
    )
    if installed_faults(run.subject, [TARGET]):
        return result
    if not stock.loads:
        raise LowbitError(
            f"stock transformers does not run {run.folder} ({stock.why_not}): it is for lowbit.load; name an export"
        )
    logits = stock_logits(run.folder, ids, stock.dtype, trust_remote_code)
    if isinstance(logits, str):
        return replace(result, unreadable=logits)
    # Stock transformers has no runtime's quantization of inputs; the manifest says what it computes with instead.
    target = None if stock.inputs is None else "float"
    dtype = getattr(torch, stock.dtype)
    with torch.no_grad():
        model = load(run.folder, dtype=dtype, target=target, trust_remote_code=trust_remote_code)
        ours = model(ids[None]).logits[0].float()
    gap = relative_error(logits, ours)
    result = replace(result, logits=gap, explained=EXPLAINED[stock.dtype])
    return result if result.computes_the_same else replace(result, faults=[*result.faults, _unknown_fault(run)])


def _unknown_fault(run: Run) -> str:
    """What to do about logits that differ for no reason that is known."""
    now, then = (
        " and ".join(f"{name} {found[name]}" for name in (TARGET, "compressed-tensors") if name in found)
        for found in (versions(), run.manifest.versions)
    )
    advice = f"install {then}, with which it was made" if now != then else "copy the folder from where it was made"
    return f"{now} compute something else from this folder: {advice}, or load it with lowbit.load"


def stock_logits(folder: Path, ids: Tensor, dtype: str, trust_remote_code: bool) -> Tensor | str:
    """The logits ``(tokens, vocabulary)`` of a folder in a fresh process, or why there are none.

    Args:
        folder: a checkpoint that stock ``transformers`` reads.
        ids: token ids ``(tokens,)``.
        dtype: of the model, ``float32``.
        trust_remote_code: permit code of the model's own.
    """
    with tempfile.TemporaryDirectory() as exchange:
        save_file({"ids": ids}, f"{exchange}/ids.safetensors")
        auto = auto_class(load_config(folder, trust_remote_code)).__name__
        arguments = [str(folder.resolve()), exchange, dtype, "yes" if trust_remote_code else "no", auto]
        done = subprocess.run(
            [sys.executable, "-c", _PROGRAM, *arguments], capture_output=True, text=True, check=False, cwd=exchange
        )
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            return f"{TARGET} {version(TARGET)} fails: {' '.join(lines[-1].split())[:200]}"
        return load_file(f"{exchange}/logits.safetensors")["logits"]
