"""A run as a Hugging Face folder in the layout ``gemma`` of ``transformers``, which loads it for every architecture.

It is that of Google's quantized Gemma checkpoints: symmetric integers of 2, 4 and 8 bits with one scale per row, in
linears, head and embedding, and static int8 inputs. Relative to a module ``(rows, columns)``:

=========================== ======================================= ===========================================
``weight``                  int8 ``(rows, columns)``                8 bits: signed codes
``weight``                  uint8 ``(rows, columns * bits / 8)``    2 and 4 bits: unsigned codes, low bits first
``weight_scale``            float32 ``(rows, 1)``
``input_activation_scale``  float32 ``()``                          of static int8 inputs; 0: in floating point
``output_activation_scale`` float32 ``()``                          always 0 here: outputs in floating point
=========================== ======================================= ===========================================

An embedding's two tensors are ``embedding_quantized`` and ``embedding_scale``. ``transformers`` multiplies codes by
scales in the dtype of the model: products are exact in float32. An input is divided by its scale, rounded to the
nearest integer (ties to even), clamped to -128 and 127 and multiplied again, which is what ``StaticInt`` computes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.exporters.fit import Misfit, no_kv, weight_misfit
from lowbit.exporters.hf_folder import (
    embedding_of,
    other_carried,
    other_files,
    owns,
    read_folder,
    stored_config,
    write_folder,
)
from lowbit.exporters.run import Run, Subject
from lowbit.exporters.stock import EXPLAINED, stock_logits
from lowbit.exporters.target import Executed, Exporter, Options
from lowbit.models.families import architecture_of
from lowbit.quant.format import QTensor
from lowbit.quant.static_activations import StaticInt
from lowbit.runs.static_inputs import input_names

METHOD = "gemma"
BITS = (2, 4, 8)
BYTE = 8
INPUT = StaticInt(BYTE, symmetric=True)
SCALE, OUTPUT_SCALE = "input_activation_scale", "output_activation_scale"


def limits(subject: Subject) -> Misfit | None:
    """Symmetric integers of 2, 4 or 8 bits with one scale per row; inputs in float, or symmetric static int8."""
    if subject.act not in (None, INPUT):
        assert subject.act is not None
        why = "the layout has 8 bits, symmetric, with one range for all tokens (-sym-static), or floats"
        return Misfit("act", f"inputs are quantized to {subject.act.name}; {why}")
    if (misfit := no_kv(subject)) is not None:
        return misfit
    for module, format in subject.integers.items():
        columns = subject.shapes[module][1]
        if format.bits not in BITS:
            why = f"{format.bits} bits; the layout has 2, 4 and 8"
        elif not format.symmetric:
            why = "asymmetric; the layout has no zero points"
        elif format.group not in (None, columns):
            why = f"groups of {format.group}; the layout has one scale per row"
        elif columns * format.bits % BYTE:
            why = f"a row of {columns} codes of {format.bits} bits does not fill bytes"
        else:
            continue
        return weight_misfit(subject, module, why)
    return None


def pack(q: QTensor) -> Tensor:
    """Codes as the layout stores them: int8 ``(rows, columns)``, or uint8 ``(rows, columns * bits / 8)``.

    >>> from lowbit.quant.integer import IntFormat
    >>> format = IntFormat(4)
    >>> weight = torch.tensor([[-0.8, 0.7, 0.1, -0.3]])
    >>> q = format.quantize(weight, format.qparams(weight))
    >>> q.codes.tolist(), [hex(byte) for byte in pack(q)[0].tolist()]
    ([[1, 15, 9, 5]], ['0xf1', '0x59'])
    """
    bits = q.format.elements.bits
    if bits == BYTE:
        return (q.codes.to(torch.int16) - 128).to(torch.int8)
    shifts = bits * torch.arange(BYTE // bits)
    return (q.codes.int().unflatten(1, (-1, len(shifts))) << shifts).sum(-1).to(torch.uint8)


def store(q: QTensor, embedding: bool, input_scale: Tensor | None = None) -> dict[str, Tensor]:
    """A quantized module's tensors, by name relative to it.

    Args:
        q: the weight.
        embedding: whether the module is one.
        input_scale: of its static input, ``(1,)``; ``None``: the input is in floating point.
    """
    scale = q.qparams.scale.to(torch.float32)
    if embedding:
        return {"embedding_quantized": pack(q), "embedding_scale": scale}
    ends = {SCALE: torch.zeros(()) if input_scale is None else input_scale.float().reshape(())}
    return {"weight": pack(q), "weight_scale": scale, **ends, OUTPUT_SCALE: torch.zeros(())}


def quantization_config(run: Run) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``: the most frequent width, and the modules that have another."""
    bits = {module: format.bits for module, format in run.subject.integers.items()}
    most = Counter(bits.values()).most_common(1)[0][0]
    architecture = architecture_of(run.subject.config)
    floats = [n.removesuffix(".weight") for n in run.floats if n.endswith(".weight") and _is_matrix(run, n)]
    return {
        "quant_method": METHOD,
        "num_bits": most,
        "quantize_embeddings": architecture.embed in bits,
        "module_quant_configs": {_pattern(m): {"num_bits": own} for m, own in bits.items() if own != most},
        "modules_to_not_convert": sorted({*floats, architecture.embed, architecture.head} - set(bits)),
    }


def _is_matrix(run: Run, name: str) -> bool:
    return len(run.checkpoint.shape(name)) == 2


def _pattern(module: str) -> str:
    return f"^{re.escape(module)}$"


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Write the folder."""
    embedding = embedding_of(run.subject.config)

    def stored(module: str, q: QTensor) -> dict[str, Tensor]:
        names = input_names(module, run.subject.formats.modules[module])
        return store(q, module == embedding, run.tensor(names[0]) if names else None)

    write_folder(run, path, quantization_config(run), stored, carries=True)
    return []


def read(run: Run, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter in float32, by the classes with which ``transformers`` runs the folder, and inputs' scales."""
    config = stored_config(path)

    def value(module: str, stored: Mapping[str, Tensor]) -> Tensor:
        own = config["module_quant_configs"].get(_pattern(module), config)
        return decode(stored, own["num_bits"])

    yield from read_folder(path, ("embedding_scale", "weight_scale"), value)
    checkpoint = Checkpoint(path)
    for name in checkpoint.names:
        if name.endswith(f".{SCALE}") and bool(scale := checkpoint.read([name])[name].reshape(1)):
            yield f"{name.removesuffix(SCALE)}input_scale", scale


def decode(stored: Mapping[str, Tensor], bits: int) -> Tensor:
    """The float32 weight of one module, by ``transformers``' own arithmetic.

    Args:
        stored: its tensors, by name relative to it.
        bits: of a code.

    Raises:
        LowbitError: the installed version does not have this layout, or tensors do not fit together.
    """
    if not loads():
        raise LowbitError("the installed transformers has no quant_method gemma: pip install 'transformers>=5.24'")
    from transformers.integrations.gemma_quant import QuantizedEmbedding, QuantizedLinear

    packed = stored["embedding_quantized" if "embedding_scale" in stored else "weight"]
    rows, columns = packed.shape[0], packed.shape[1] * BYTE // bits
    with torch.device("meta"):  # parameters are replaced, not initialised
        module: Any = (
            QuantizedEmbedding(rows, columns, torch.float32, num_bits=bits)
            if "embedding_scale" in stored
            else QuantizedLinear(columns, rows, num_bits=bits)
        )
    for name, own in module.named_parameters():
        if own.shape != stored[name].shape or own.dtype != stored[name].dtype:
            found = f"{stored[name].dtype} of {list(stored[name].shape)}"
            raise LowbitError(f"{name} is {found}, not {own.dtype} of {list(own.shape)}")
    module.load_state_dict(dict(stored), assign=True)
    if OUTPUT_SCALE in stored and float(stored[OUTPUT_SCALE]) != 0:
        raise LowbitError(f"{OUTPUT_SCALE} is not 0, so that outputs are quantized")
    value: Tensor = module.weight if "embedding_scale" in stored else module._dequantize_weights()
    return value.detach().float()


def loads() -> bool:
    """Whether the installed ``transformers`` has the layout."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return METHOD in AUTO_QUANTIZER_MAPPING


def other(run: Run, path: Path) -> Iterator[str]:
    """Files that differ."""
    yield from other_files(run, path, quantization_config(run))
    yield from other_carried(run, path)


def execute(path: Path, ids: Tensor) -> Executed | None:
    """Logits of stock ``transformers`` in float32, in a process of its own; ``None`` if it lacks the layout."""
    if not loads():
        return None
    logits = stock_logits(path, ids, "float32", trust_remote_code=False)
    if isinstance(logits, str):
        raise LowbitError(logits)
    return Executed(logits, EXPLAINED["float32"], "float")


EXPORTER = Exporter("", limits, write, owns(METHOD), read, other, execute=execute, carries=True)
