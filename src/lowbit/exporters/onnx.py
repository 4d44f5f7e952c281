"""A run as a folder for ONNX Runtime: a decoder with a cache, its linears as MatMulNBits that hold the run's codes.

``model.onnx`` and ``model.onnx.data`` run in onnxruntime, and with ``genai_config.json`` and the tokenizer beside
them in onnxruntime-genai, whose own builder makes the graph, see ``onnx_build``. The codes are taken out of the
finished file again (``onnx_read``), since that builder passes them through float16 on their way.

Embeddings, head, norms and everything between the linears are float32. ``--accuracy-level 0`` multiplies in float32;
with 4, MatMulNBits first rounds its inputs to 8 bits, a block at a time, as runs with ``--target onnxruntime`` do.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.safetensors_folder import read_json, write_json
from lowbit.errors import LowbitError
from lowbit.exporters.fit import Misfit, no_activations, weight_misfit, wrong_scale
from lowbit.exporters.hf_folder import embedding_of
from lowbit.exporters.onnx_build import build, needed
from lowbit.exporters.onnx_grid import block_of, stored_bits
from lowbit.exporters.onnx_read import GRAPH, accuracy_level, read
from lowbit.exporters.run import Run, Subject
from lowbit.exporters.target import Executed, Exporter, Options, value_of
from lowbit.models.families import family_of

GENAI, SUMS = "genai_config.json", "lowbit-export.json"
# What the builder makes a graph of that computes the same; tests compare logits for each.
ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
    "Phi3ForCausalLM",
)  # fmt: skip
ROPES = ("default", "linear", "llama3")
# By accuracy level: the inputs that the simulation takes, and the relative error of logits that sums in another order
# explain. At level 4 such a difference can move an input to the next of 255 codes.
LEVELS = {0: ("float", 1e-4), 4: ("onnxruntime", 0.05)}


def limits(subject: Subject) -> Misfit | None:
    """Any bits, sym and asym, groups and widths in multiples of 16, activations and embeddings in float."""
    if (why := _unlike_builder(subject.config)) is not None:
        return Misfit("architecture", why)
    found = no_activations(subject, "MatMulNBits takes floats (--accuracy-level 4 rounds them)")
    if found is not None:
        return found
    if subject.floats:
        return weight_misfit(
            subject, subject.floats[0], "stays float; the builder takes a block's linears all rounded"
        )
    for module, format in subject.integers.items():
        if module == embedding_of(subject.config):
            return weight_misfit(subject, module, "the builder has no place for rounded embeddings")
        if why := wrong_scale(format):
            return weight_misfit(subject, module, why)
        rows, columns = subject.shapes[module]
        if columns % (format.group or columns) or block_of(format.group or columns) is None:
            return weight_misfit(subject, module, f"groups of {format.group or columns}, no multiple of 16")
        if rows % (whole := 32 // stored_bits(format.bits)):
            return weight_misfit(subject, module, f"{rows} rows, no multiple of {whole}")
    return None


def _unlike_builder(config: Any) -> str | None:
    """Why the builder would make another model of an architecture, or no model."""
    name = str((config.architectures or ["none"])[0])
    if name not in ARCHITECTURES:
        return f"{name}; the graph is made for {', '.join(ARCHITECTURES)}"
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if (kind := rope.get("rope_type", "default")) not in ROPES:
        return f"rotary embedding of type {kind}; the graph is made for {', '.join(ROPES)}"
    rotary = family_of(config).heads(config).rotary
    if rotary % 16:
        return f"{rotary} rotary dimensions a head; ONNX Runtime's attention takes multiples of 16"
    return None


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Build the folder; raises ``LowbitError`` if the builder fails or an integer does not arrive unchanged."""
    level = options.accuracy_level
    if level is None:
        level = 4 if run.subject.scheme.target == "onnxruntime" else 0
    if level not in LEVELS:
        raise LowbitError(f"--accuracy-level {level} given; allowed: {', '.join(map(str, LEVELS))}")
    build(run, path, level)
    for name, value in read(run, path):
        if not torch.equal(value, expect(run, name)):
            raise LowbitError(f"the installed onnxruntime-genai changes '{name}' on the way: use version 0.18")
    write_json(path / SUMS, {"target": "onnx", "sha256": _sums(path)})
    return []


def expect(run: Run, name: str) -> Tensor:
    """A parameter as the graph must have it: Gemma's norms multiply by ``1 + weight``, and that sum is stored."""
    if name == "lm_head.weight" and name not in run.floats and "lm_head" not in run.subject.weights:
        name = f"{embedding_of(run.subject.config)}.weight"
    value = value_of(run, name)
    offset = family_of(run.subject.config).norm_offset
    return value + offset if offset and name.endswith("norm.weight") else value


def other(run: Run, path: Path) -> Iterator[str]:
    """Files that are not as they were written: graph, rotary tables, settings and tokenizer have no other witness."""
    listed = read_json(path / SUMS).get("sha256") if (path / SUMS).is_file() else None
    if not isinstance(listed, dict):
        yield SUMS
        return
    found = _sums(path)
    yield from sorted(name for name in listed.keys() | found.keys() if listed.get(name) != found.get(name))


def _sums(path: Path) -> dict[str, str]:
    out = {}
    for file in sorted(path.iterdir()):
        if file.is_file() and file.name != SUMS:
            with file.open("rb") as content:
                out[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return out


def owns(path: Path) -> bool:
    """Whether a path is such a folder; raises ``MissingExtra`` where it is one that cannot be read."""
    if not (path.is_dir() and (path / GRAPH).is_file() and (path / GENAI).is_file()):
        return False
    needed("onnx")
    return True


def execute(path: Path, ids: Tensor) -> Executed | None:
    """What onnxruntime makes of token ids ``(tokens,)``; ``None`` where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    runtime, explained = LEVELS[accuracy_level(path)]
    return Executed(logits_of(path, ids), explained, runtime)


def logits_of(path: Path, ids: Tensor) -> Tensor:
    """Logits ``(tokens, vocabulary)`` of one forward from an empty cache, in onnxruntime on the CPU."""
    import numpy as np
    import onnxruntime

    session = onnxruntime.InferenceSession(path / GRAPH, providers=["CPUExecutionProvider"])
    decoder = json.loads((path / GENAI).read_text())["model"]["decoder"]
    empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    whole = ids[None].numpy()
    known = {
        "input_ids": whole,
        "attention_mask": np.ones_like(whole),
        "position_ids": np.arange(whole.shape[1])[None],
    }
    feeds = {value.name: known.get(value.name, empty) for value in session.get_inputs()}
    (logits,) = session.run(["logits"], feeds)
    return torch.from_numpy(logits[0])


EXPORTER = Exporter("", limits, write, owns, read, other, expect, execute)
