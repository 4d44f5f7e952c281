"""A run as a folder for ONNX Runtime: a decoder with a KV cache, its linears with the run's codes.

``model.onnx`` and ``model.onnx.data`` run in onnxruntime, and with ``genai_config.json`` and the tokenizer also in
onnxruntime-genai, whose own builder creates the graph, see ``onnx_build``. That builder converts codes to float16 and
back, so ``write`` reads every parameter of the finished file back (``onnx_read``) and compares.

Embeddings, head, norms and everything between the linears are float32. Linears are MatMulNBits for integer weights
with float inputs: ``--accuracy-level 0`` multiplies in float32; with 4, MatMulNBits first quantizes its inputs to 8
bits, block by block, as runs with ``--target onnxruntime`` do. Static inputs and weights in other formats are
standard operators, see ``onnx_qdq``; so are runtime ops, see ``onnx_ops``.
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

from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError
from lowbit.exporters import onnx_ops, onnx_qdq
from lowbit.exporters.fit import Misfit, no_activations, weight_misfit, wrong_scale
from lowbit.exporters.hf_folder import embedding_of
from lowbit.exporters.onnx_build import build, build_with_standard_operators, require_packages
from lowbit.exporters.onnx_grid import block_of, stored_bits
from lowbit.exporters.onnx_read import GRAPH, SETTINGS, accuracy_level, load_graph, read
from lowbit.exporters.run import Run, Subject
from lowbit.exporters.target import Executed, Exporter, Options, value_of
from lowbit.models.families import architecture_of
from lowbit.quant.floating import FloatFormat
from lowbit.quant.integer import IntFormat
from lowbit.quant.kquants import KQuant
from lowbit.quant.tables import TableFormat

SUMS = "lowbit-export.json"
# Architectures for which the builder's graph computes the same; tests compare logits for each.
ARCHITECTURES = (
    "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Gemma2ForCausalLM",
    "Phi3ForCausalLM",
)  # fmt: skip
ROPES = ("default", "linear", "llama3")
# By accuracy level: the inputs of the simulation, and the relative error of logits that a different order of sums
# explains. At level 4 such a difference can move an input to the next of 255 codes.
LEVELS = {0: ("float", 1e-4), 4: ("onnxruntime", 0.05)}
# The same by the bits of static inputs. onnxruntime adds the zero point after it rounds: another code near some ties.
STATIC = {8: 0.05, 16: 1e-3, None: 1e-4}


def limits(subject: Subject) -> Misfit | None:
    """Integers in MatMulNBits, or what standard operators compute; see ``onnx_qdq.limits``."""
    if (why := _unsupported(subject.config)) is not None:
        return Misfit("architecture", why)
    if onnx_qdq.in_standard_operators(subject):
        return onnx_qdq.limits(subject)
    return _nbits_limits(subject)


def _nbits_limits(subject: Subject) -> Misfit | None:
    """Any bits, sym and asym, groups and widths in multiples of 16, activations and embeddings in float."""
    misfit = no_activations(subject, "MatMulNBits takes floats (--accuracy-level 4 quantizes them)")
    if misfit is not None:
        return misfit
    if subject.floats:
        return weight_misfit(
            subject, subject.floats[0], "stays float; the builder requires all linears of a block to be quantized"
        )
    for module, format in subject.integers.items():
        if module == embedding_of(subject.config):
            return weight_misfit(subject, module, "the builder does not support quantized embeddings")
        if why := wrong_scale(format):
            return weight_misfit(subject, module, why)
        rows, columns = subject.shapes[module]
        if columns % (format.group or columns) or block_of(format.group or columns) is None:
            return weight_misfit(subject, module, f"groups of {format.group or columns}, not a multiple of 16")
        if rows % (whole := 32 // stored_bits(format.bits)):
            return weight_misfit(subject, module, f"{rows} rows, not a multiple of {whole}")
    return None


def _unsupported(config: Any) -> str | None:
    """What a config requires that the builder's graph does not compute; ``None`` if nothing."""
    name = str((config.architectures or ["none"])[0])
    if name not in ARCHITECTURES:
        return f"{name}; supported: {', '.join(ARCHITECTURES)}"
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if (kind := rope.get("rope_type", "default")) not in ROPES:
        return f"rotary embedding of type {kind}; supported: {', '.join(ROPES)}"
    rotary = max(2 * len(edge.pairs) for kind in architecture_of(config).layers for edge in kind.edges)
    if rotary % 16:
        return f"{rotary} rotary dimensions per head; ONNX Runtime's attention takes multiples of 16"
    return None


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Build the folder; raises ``LowbitError`` if the builder fails or changes a value."""
    level = options.accuracy_level
    if level is not None and level not in LEVELS:
        raise LowbitError(f"--accuracy-level {level} given; allowed: {', '.join(map(str, LEVELS))}")
    if onnx_qdq.in_standard_operators(run.subject):
        if level:
            raise LowbitError(
                f"--accuracy-level {level} given; with static inputs, or weights that are no integers, inputs are "
                "as the scheme says: leave the option out"
            )
        build_with_standard_operators(run, path)
    else:
        build(run, path, (4 if run.subject.scheme.target == "onnxruntime" else 0) if level is None else level)
    for name, value in read(run, path):
        if not torch.equal(value, expect(run, name)):
            raise LowbitError(f"the installed onnxruntime-genai changes '{name}': use version 0.18")
    write_json(path / SUMS, {"target": "onnx", "sha256": _sums(path)})
    return []


def expect(run: Run, name: str) -> Tensor:
    """The value that the graph must hold; Gemma's norms multiply by ``1 + weight``, and that sum is stored."""
    if (factor := onnx_ops.expected_factor(run, name)) is not None:
        return factor
    if name == "lm_head.weight" and name not in run.floats and "lm_head" not in run.subject.weights:
        name = f"{embedding_of(run.subject.config)}.weight"
    value = value_of(run, name)
    offset = architecture_of(run.subject.config).layers[0].edges[0].offset
    return value + offset if offset and name.endswith("norm.weight") else value


def other(run: Run, path: Path) -> Iterator[str]:
    """Names of files whose digest changed: the only check of graph, rotary tables, settings and tokenizer."""
    listed = read_json(path / SUMS).get("sha256") if (path / SUMS).is_file() else None
    if not isinstance(listed, dict):
        yield SUMS
        return
    actual = _sums(path)
    yield from sorted(name for name in listed.keys() | actual.keys() if listed.get(name) != actual.get(name))


def _sums(path: Path) -> dict[str, str]:
    out = {}
    for file in sorted(path.iterdir()):
        if file.is_file() and file.name != SUMS:
            with file.open("rb") as content:
                out[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return out


def owns(path: Path) -> bool:
    """Whether a path is such a folder; raises ``MissingExtra`` if it is and cannot be read."""
    if not (path.is_dir() and (path / GRAPH).is_file() and (path / SETTINGS).is_file()):
        return False
    require_packages("onnx")
    return True


def execute(path: Path, ids: Tensor) -> Executed | None:
    """onnxruntime's logits for token ids ``(tokens,)``; ``None`` where it is not installed."""
    if importlib.util.find_spec("onnxruntime") is None:
        return None
    model = load_graph(path)
    level = accuracy_level(model)
    runtime, explained = (None, STATIC[onnx_qdq.input_bits(model)]) if level is None else LEVELS[level]
    return Executed(logits_of(path, ids), explained, runtime)


def logits_of(path: Path, ids: Tensor) -> Tensor:
    """Logits ``(tokens, vocabulary)`` of one forward pass from an empty cache, in onnxruntime on the CPU.

    The session has the settings that onnxruntime-genai gives it.
    """
    import numpy as np
    import onnxruntime

    decoder = json.loads((path / SETTINGS).read_text(encoding="utf-8"))["model"]["decoder"]
    options = onnxruntime.SessionOptions()
    for key in onnx_qdq.SESSION.keys() & decoder["session_options"].keys():
        options.add_session_config_entry(key, decoder["session_options"][key])
    session = onnxruntime.InferenceSession(path / GRAPH, options, providers=["CPUExecutionProvider"])
    empty = np.zeros((1, decoder["num_key_value_heads"], 0, decoder["head_size"]), np.float32)
    tokens = ids[None].numpy()
    inputs = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(tokens.shape[1])[None],
    }
    feeds = {value.name: inputs.get(value.name, empty) for value in session.get_inputs()}
    (logits,) = session.run(["logits"], feeds)
    return torch.from_numpy(logits[0])


EXPORTER = Exporter(
    "",
    limits,
    write,
    owns,
    read,
    other,
    expect,
    execute,
    formats=(IntFormat, FloatFormat, TableFormat, KQuant),
    ops=onnx_ops.OPS,
    options=frozenset({"accuracy_level"}),
)
