"""Builds the graph with onnxruntime-genai's model builder, from the run's codes in the GPTQ layout or from floats.

The builder runs as a separate process, offline, on a temporary folder. For MatMulNBits it reads codes; embedding and
head, which it would quantize by itself, are excluded beforehand, and zero points that equal MatMulNBits' default are
removed afterwards. For standard operators it reads dequantized weights, and codes replace them in its graph. Runtime
ops are put into what it built, see ``onnx_ops``.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.companions import CONFIG
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError, MissingExtra
from lowbit.exporters.gptq import pack_module, quantization_config
from lowbit.exporters.hf_folder import write_folder
from lowbit.exporters.onnx_grid import block_of, in_blocks, stored_bits
from lowbit.exporters.onnx_names import FUSED
from lowbit.exporters.onnx_ops import put_ops_in, splits_heads
from lowbit.exporters.onnx_qdq import SESSION, put_in
from lowbit.exporters.onnx_read import GRAPH, SETTINGS, unpack
from lowbit.exporters.run import Run, Subject
from lowbit.progress import say
from lowbit.quant.format import QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme import ModelFormats, ModuleFormats

SOURCE, CACHE = "source", "cache"
# Nodes that the builder would quantize with its own quantizer.
FLOAT_NODES = ("/lm_head/MatMul", "/model/embed_tokens/Gather")


def require_packages(*packages: str) -> None:
    """Raise ``MissingExtra`` for the first package that is not installed."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtra(package, "onnx", "the onnx format")


def build(run: Run, path: Path, level: int) -> None:
    """Create the folder that onnxruntime-genai loads, with MatMulNBits.

    Args:
        run: the run.
        path: a folder that does not exist yet.
        level: MatMulNBits' ``accuracy_level``.
    """

    def store(module: str, q: QTensor) -> dict[str, Tensor]:
        return pack_module(in_blocks(q), "gptq")

    _start(path)
    write_folder(run, path / SOURCE, quantization_config(_stored(run.subject), "gptq"), store, torch.float32)
    _complete_config(path / SOURCE, run.subject.config)
    options = {"accuracy_level": str(level), "nodes_to_exclude": ",".join(FLOAT_NODES)}
    if splits_heads(run) or _unlike(run.subject):
        options["disable_qkv_fusion"] = "true"
    _run_builder(run, path, "int4", options)

    def change(model: Any) -> None:
        _drop_default_zeros(model)
        put_ops_in(model, run)

    _change(path, change)


def _unlike(subject: Subject) -> bool:
    """Whether q, k and v of some layer have different formats.

    The builder does not pack these. In the layers behind, which it packs, attention then reads the keys and values of
    the last layer that it did not pack: so it must pack none.
    """
    formats: dict[str, set[IntFormat]] = {}
    for name, format in subject.integers.items():
        parent, _, own = name.rpartition(".")
        if own in FUSED["qkv_proj"]:
            formats.setdefault(parent, set()).add(format)
    return any(len(own) > 1 for own in formats.values())


def build_with_standard_operators(run: Run, path: Path) -> None:
    """Create the folder that onnxruntime-genai loads, with QuantizeLinear and DequantizeLinear: see ``onnx_qdq``."""

    def store(module: str, q: QTensor) -> dict[str, Tensor]:
        return {"weight": q.dequantize().float()}

    _start(path)
    write_folder(run, path / SOURCE, {}, store, torch.float32)
    _complete_config(path / SOURCE, run.subject.config)
    config = read_json(path / SOURCE / CONFIG)
    del config["quantization_config"]
    dtype = "torch_dtype" if "torch_dtype" in config else "dtype"
    write_json(path / SOURCE / CONFIG, {**config, dtype: "float32", "tie_word_embeddings": _tied(run)})
    _run_builder(run, path, "fp32", {"disable_qkv_fusion": "true"})

    def change(model: Any) -> None:
        put_ops_in(model, run)
        put_in(model, run)

    _change(path, change)
    settings = read_json(path / SETTINGS)
    settings["model"]["decoder"]["session_options"].update(SESSION)
    write_json(path / SETTINGS, settings)


def _start(path: Path) -> None:
    require_packages("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
    path.mkdir()


def _tied(run: Run) -> bool:
    return bool(run.subject.config.tie_word_embeddings) and "lm_head" not in run.subject.weights


def _complete_config(folder: Path, known: Any) -> None:
    """Write keys out that the builder takes for something else where they are missing."""
    config = read_json(folder / CONFIG)
    # Where these keys are missing, the builder assumes a scaled rotary embedding or full attention.
    if config["model_type"] == "phi3":
        config["original_max_position_embeddings"] = config["max_position_embeddings"]
    if config.get("sliding_window") and "layer_types" not in config:
        # Configs of models in which layers differ derive them; in the others every layer has the window.
        derived = getattr(known, "layer_types", None)
        config["layer_types"] = list(derived or []) or ["sliding_attention"] * config["num_hidden_layers"]
    write_json(folder / CONFIG, config)


def _stored(subject: Subject) -> Subject:
    """The subject with the formats that ``in_blocks`` gives."""
    modules = {
        name: ModuleFormats(
            replace(
                format,
                bits=stored_bits(format.bits),
                group=block_of(format.group or subject.shapes[name][1]),
            )
        )
        for name, format in subject.integers.items()
    }
    return replace(subject, formats=ModelFormats(modules))


def _run_builder(run: Run, path: Path, precision: str, own: Mapping[str, str]) -> None:
    """Run it on the source folder, which holds the run in float32 but for codes (it adds to floats)."""
    options = {
        **own,
        "shared_embeddings": str(_tied(run)).lower(),
        "windowed_kv_cache": "false",  # plain onnxruntime starts from an empty cache, which a windowed one refuses
        "hf_token": "false",
    }
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", precision, "-e", "cpu"]
    command += ["-i", str(path / SOURCE), "-o", str(path), "-c", str(path / CACHE), "--extra_options"]
    command += [f"{key}={value}" for key, value in options.items()]
    say("building the graph with onnxruntime-genai's model builder")
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline})
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise LowbitError(f"onnxruntime-genai's model builder failed on {run.folder}: {reason[:300]}")
    shutil.rmtree(path / SOURCE)
    shutil.rmtree(path / CACHE, ignore_errors=True)


def _change(path: Path, change: Callable[[Any], None]) -> None:
    """Change the graph's ``onnx.ModelProto`` in place; ``change`` is given it with its data."""
    import onnx

    model: Any = onnx.load(path / GRAPH)
    change(model)
    for file in (path / GRAPH, path / f"{GRAPH}.data"):
        file.unlink()
    onnx.save(model, path / GRAPH, save_as_external_data=True, location=f"{GRAPH}.data", size_threshold=0)
    shutil.copymode(path / GRAPH, path / f"{GRAPH}.data")  # onnx makes it readable by its owner only


def _drop_default_zeros(model: Any) -> None:
    """Remove the zero points of symmetric linears; MatMulNBits' default is the middle of the range."""
    import onnx
    from onnx.numpy_helper import to_array

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and len(node.input) > 3:
            zeros = to_array(stored[node.input[3]])
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if _is_default(torch.tensor(zeros), attributes):
                model.graph.initializer.remove(stored[node.input[3]])
                del node.input[3:]


def _is_default(packed: Tensor, attributes: dict[str, Any]) -> bool:
    zeros = unpack(packed.reshape(attributes["N"], -1), attributes["bits"])
    return bool((zeros[:, : -(-attributes["K"] // attributes["block_size"])] == 2 ** (attributes["bits"] - 1)).all())
