"""Builds the graph with onnxruntime-genai's model builder, from the run's codes in the GPTQ layout.

The builder runs as a separate process, offline, on a temporary folder. Embedding and head, which it would quantize by
itself, are excluded beforehand; zero points that equal MatMulNBits' default are removed afterwards.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.companions import CONFIG
from lowbit.checkpoints.safetensors_folder import read_json, write_json
from lowbit.errors import LowbitError, MissingExtra
from lowbit.exporters.gptq import pack_module, quantization_config
from lowbit.exporters.hf_folder import write_folder
from lowbit.exporters.onnx_grid import block_of, in_blocks, stored_bits
from lowbit.exporters.onnx_read import GRAPH, unpack
from lowbit.exporters.run import Run, Subject
from lowbit.progress import say
from lowbit.quant.format import QTensor
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
    """Create the folder that onnxruntime-genai loads.

    Args:
        run: the run.
        path: a folder that does not exist yet.
        level: MatMulNBits' ``accuracy_level``.
    """
    require_packages("onnx", "onnx_ir", "onnxruntime", "onnxruntime_genai")
    path.mkdir()
    _write_source(run, path / SOURCE)
    say("building the graph with onnxruntime-genai's model builder")
    _run_builder(run, path, level)
    shutil.rmtree(path / SOURCE)
    shutil.rmtree(path / CACHE, ignore_errors=True)
    _drop_default_zeros(path)


def _write_source(run: Run, folder: Path) -> None:
    """The run in the layout that the builder reads: GPTQ v1, floats as float32 (it adds to them)."""

    def store(module: str, q: QTensor) -> dict[str, Tensor]:
        return pack_module(in_blocks(q), "gptq")

    write_folder(run, folder, quantization_config(_stored(run.subject), "gptq"), store, torch.float32)
    config = read_json(folder / CONFIG)
    # Where these keys are missing, the builder assumes a scaled rotary embedding or full attention.
    if config["model_type"] == "phi3":
        config["original_max_position_embeddings"] = config["max_position_embeddings"]
    if config.get("sliding_window") and "layer_types" not in config:
        config["layer_types"] = ["sliding_attention"] * config["num_hidden_layers"]
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


def _run_builder(run: Run, path: Path, level: int) -> None:
    tied = run.subject.config.tie_word_embeddings and "lm_head" not in run.subject.weights
    options = {
        "accuracy_level": str(level),
        "nodes_to_exclude": ",".join(FLOAT_NODES),
        "shared_embeddings": str(bool(tied)).lower(),
        "windowed_kv_cache": "false",  # plain onnxruntime starts from an empty cache, which a windowed one refuses
        "hf_token": "false",
    }
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-p", "int4", "-e", "cpu"]
    command += ["-i", str(path / SOURCE), "-o", str(path), "-c", str(path / CACHE), "--extra_options"]
    command += [f"{key}={value}" for key, value in options.items()]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **offline})
    if result.returncode:
        reason = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise LowbitError(f"onnxruntime-genai's model builder failed on {run.folder}: {reason[:300]}")


def _drop_default_zeros(path: Path) -> None:
    """Remove the zero points of symmetric linears; MatMulNBits' default is the middle of the range."""
    import onnx
    from onnx.numpy_helper import to_array

    model: Any = onnx.load(path / GRAPH)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "MatMulNBits" and len(node.input) > 3:
            zeros = to_array(stored[node.input[3]])
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            if _is_default(torch.tensor(zeros), attributes):
                model.graph.initializer.remove(stored[node.input[3]])
                del node.input[3:]
    for file in (path / GRAPH, path / f"{GRAPH}.data"):
        file.unlink()
    onnx.save(model, path / GRAPH, save_as_external_data=True, location=f"{GRAPH}.data", size_threshold=0)
    shutil.copymode(path / GRAPH, path / f"{GRAPH}.data")  # onnx makes it readable by its owner only


def _is_default(packed: Tensor, attributes: dict[str, Any]) -> bool:
    zeros = unpack(packed.reshape(attributes["N"], -1), attributes["bits"])
    return bool((zeros[:, : -(-attributes["K"] // attributes["block_size"])] == 2 ** (attributes["bits"] - 1)).all())
