"""A run as an ExecuTorch program for phones: XNNPACK's int4 linears (8da4w) with the run's own codes.

The export is a folder: ``model.pte``, a program with a KV cache, and the tokenizer's files. XNNPACK quantizes the
linears' inputs to int8 per token on the fly, with a zero point, as schemes such as ``w4a8g32-sym-asym`` state, and
where a scheme leaves inputs in float too. It stores the scales of 4-bit weights as bfloat16: a run with
``--target executorch`` has such scales and is stored exactly; in any other run the codes are exact and each scale
changes by at most one part in 256, which the export reports and ``expect`` accounts for.

``forward(tokens, position)`` returns the logits after the last token; the program also has the constant methods that
ExecuTorch's text runners call (``get_max_context_len``, ``get_eos_ids`` and so on).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.companions import copy_companion
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.token_ids import token_ids
from lowbit.errors import LowbitError, MissingExtra
from lowbit.exporters.fit import Misfit, no_kv, weight_misfit
from lowbit.exporters.hf_folder import files_to_copy
from lowbit.exporters.pte_model import frequencies, lower
from lowbit.exporters.pte_reader import EMBEDDING, GAIN, LINEAR, constants
from lowbit.exporters.pte_runtime import Session, methods_of
from lowbit.exporters.run import Run, Subject
from lowbit.exporters.target import Executed, Exporter, Options, value_of
from lowbit.exporters.xnnpack import stored, why_not
from lowbit.models.families import architecture_of
from lowbit.quant.activations import IntTokens
from lowbit.quant.format import QTensor

PROGRAM, CONTEXT = "model.pte", 2048
MODELS = ("llama", "mistral", "qwen2", "qwen3", "phi3")
ROTARY = "model.rotary_emb.inv_freq"
INPUTS = IntTokens(8, symmetric=False)  # XNNPACK's own, but for values on the boundary between two codes
NORMS = ("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm")
# Tolerance in units of the logits' spread, against a simulation with XNNPACK's inputs: a different order of sums
# occasionally changes an int8 code, and so do scales that became bfloat16.
EXPLAINED = 0.1


def limits(subject: Subject) -> Misfit | None:
    """Formats that XNNPACK stores, its own inputs or float ones, attention that ExecuTorch's operator supports."""
    if (why := _unsupported(subject.config)) is not None:
        return Misfit("architecture", why)
    if subject.act is not None and subject.act != INPUTS:
        return Misfit(
            "act", f"inputs are quantized to {subject.act.name}; XNNPACK's are {INPUTS.name}, one range per token"
        )
    if (misfit := no_kv(subject)) is not None:
        return misfit
    embed = architecture_of(subject.config).embed
    for module, format in subject.integers.items():
        if why := why_not(format, None if module == embed else subject.shapes[module][1]):
            return weight_misfit(subject, module, why)
    return None


def _unsupported(config: Any) -> str | None:
    """What a config requires that the program cannot compute; ``None`` if nothing."""
    if config.model_type not in MODELS:
        return f"model_type {config.model_type}; supported: {', '.join(MODELS)}"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or (config.model_type in ("mistral", "phi3") and config.sliding_window):
        return "sliding-window attention, which the cache does not support"
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in ("dynamic", "longrope"):
        return f"rope_type {rope}, whose frequencies change with the length of the text"
    return None


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Write the folder."""
    positions = run.subject.config.max_position_embeddings
    context = min(CONTEXT, positions) if options.context is None else options.context
    if not 2 <= context <= positions:
        raise LowbitError(f"--context {context} given; allowed: 2 to {positions}, this model's positions")
    _need("--to executorch")
    path.mkdir()
    lower(run, path / PROGRAM, context, _methods(run))
    for name in files_to_copy(run):
        copy_companion(run.folder, path, name)
    return _warnings(run)


def _missing() -> str | None:
    """The first package of the extra that is not installed."""
    for package in ("executorch", "torchao"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError:
            return package
    return None


def _need(what: str) -> None:
    if package := _missing():
        raise MissingExtra(package, "executorch", what)


def _methods(run: Run) -> dict[str, Any]:
    """The constant methods that ExecuTorch's text runners call, by name."""
    config, generation = run.subject.config, run.folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    eos = config.eos_token_id if eos is None else eos
    bos = {} if config.bos_token_id is None else {"get_bos_id": config.bos_token_id}
    return {
        **bos,
        "get_eos_ids": token_ids(eos, "eos_token_id"),
        "get_vocab_size": config.vocab_size,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _warnings(run: Run) -> list[str]:
    """By how much the scales change, if they do."""
    worst, count = 0.0, 0
    for module in run.quantized:
        q = run.qtensor(module)
        change = (_stored(run, module).qparams.scale - q.qparams.scale).abs() / q.qparams.scale
        count += bool(change.any())
        worst = max(worst, float(change.max()))
    if not count:
        return []
    return [
        f"XNNPACK stores scales as bfloat16: those of {count} of {len(run.quantized)} linears are rounded, by "
        f"{worst:.2%} at most; codes are unchanged. 'lowbit quantize --target executorch' avoids it"
    ]


def _stored(run: Run, module: str) -> QTensor:
    """A weight as the file holds it; the embedding's scales stay as they are."""
    q = run.qtensor(module)
    return q if module == architecture_of(run.subject.config).embed else stored(q)


def expect(run: Run, name: str) -> Tensor:
    """The value that the file must hold for a parameter: the run's, with scales as XNNPACK stores them."""
    module = name.removesuffix(".weight")
    if name == ROTARY:
        return frequencies(run)
    if module in run.subject.weights and name.endswith(".weight"):
        return _stored(run, module).dequantize()
    return value_of(run, name)


def read(run: Run, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Parameters, identified by their position in the program."""
    _need("verifying a .pte file")
    names = {kind: iter(order) for kind, order in _order(run).items()}
    rotary = frequencies(run).shape
    for constant in constants(_program(path)):
        if constant.kind == GAIN and constant.weight.shape == rotary:
            yield ROTARY, constant.weight
            continue
        name = next(names[constant.kind], f"one {constant.kind} too many")
        if constant.kind == LINEAR and name == _head(run) and run.subject.config.tie_word_embeddings:
            yield from _tied(run, name, constant.weight)
            continue
        yield f"{name}.weight", constant.weight
        if constant.bias is not None:
            yield f"{name}.bias", constant.bias


def _tied(run: Run, name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tied head is not a parameter of its own, but stored a second time here; yielded only if it differs."""
    embedding = run.tensor(f"{architecture_of(run.subject.config).embed}.weight").float()
    if not torch.equal(weight.view(torch.int32), embedding.view(torch.int32)):
        yield f"{name}.weight", weight


def _head(run: Run) -> str:
    return architecture_of(run.subject.config).head


def _order(run: Run) -> dict[str, list[str]]:
    """Modules by kind, in the order in which the model runs them."""
    architecture = architecture_of(run.subject.config)
    present = {name.removesuffix(".weight") for name in run.floats}
    norms = [f"{architecture.blocks}.{i}.{name}" for i in range(len(architecture.layers)) for name in NORMS]
    return {
        EMBEDDING: [architecture.embed],
        LINEAR: [*architecture.linears(), architecture.head],
        GAIN: [name for name in [*norms, "model.norm"] if name in present],
    }


def other(run: Run, path: Path) -> Iterator[str]:
    """Names of files next to the program, and of its constant methods, that differ from what ``write`` produced."""
    stored_methods = methods_of(_program(path))
    for name, value in _methods(run).items():
        if stored_methods.get(name) != (value if isinstance(value, list) else [value]):
            yield name
    for name in files_to_copy(run) if path.is_dir() else ():
        if not (path / name).is_file() or (path / name).read_bytes() != (run.folder / name).read_bytes():
            yield name


def _program(path: Path) -> Path:
    return path / PROGRAM if path.is_dir() else path


def owns(path: Path) -> bool:
    """A ``.pte`` file, or a folder with one."""
    return (path / PROGRAM).is_file() if path.is_dir() else path.suffix == ".pte"


def execute(path: Path, ids: Tensor) -> Executed | None:
    """Logits of the program: each token's from a step of its own, the last one's from the whole text as a prompt."""
    if _missing():
        return None
    session = Session(_program(path))
    tokens = ids[: session.context].tolist()
    logits = session.logits(tokens, 1)
    logits[-1] = session.step(tokens, 0)
    return Executed(logits, EXPLAINED, "executorch")


EXPORTER = Exporter("", limits, write, owns, read, other, expect, execute, options=frozenset({"context"}))
