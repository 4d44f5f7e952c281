"""A run as a Hugging Face folder in the GPTQ layout, which vLLM, GPTQModel, ExLlama and onnxruntime-genai read.

For a linear ``(out, in)``, with values packed densely into int32 words, low bits first:

=========== ======================================= ===================================================
``qweight`` int32 ``(in * bits / 32, out)``         codes, packed along the input
``qzeros``  int32 ``(groups, out * bits / 32)``     zero points, packed along the output
``scales``  float16 ``(groups, out)``
``g_idx``   int32 ``(in,)``                         the group of each input channel: ``i // group_size``
=========== ======================================= ===================================================

With 3 bits, 32 values fill 3 words, and two of them cross a word boundary. There are two conventions for zero points,
named by ``checkpoint_format``: ``gptq`` (v1) stores ``zero - 1``, ``gptq_v2`` the zero point itself. Readers that
support only one (onnxruntime-genai, older vLLM) support v1; but v1 cannot represent a zero point of 0, which readers
take for 0 or for ``2**bits``. Hence ``auto``: v1 if every format is symmetric, v2 otherwise. Modules with a format of
their own are listed under ``dynamic``, as GPTQModel and vLLM read it, by the fused name too where vLLM fuses them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.exporters.fit import Misfit, no_activations, weight_misfit, wrong_scale
from lowbit.exporters.fused import fused
from lowbit.exporters.hf_folder import (
    embedding_of,
    other_files,
    owns,
    read_folder,
    requested_dtype,
    stored_config,
    write_folder,
)
from lowbit.exporters.rounded_scales import RoundedScales
from lowbit.exporters.run import Run, Subject
from lowbit.exporters.target import Exporter, Options
from lowbit.quant.format import QTensor
from lowbit.quant.integer import IntFormat, integer

BITS = (2, 3, 4, 8)
FORMATS = {"v1": "gptq", "v2": "gptq_v2"}


def limits(subject: Subject) -> Misfit | None:
    """2, 3, 4 or 8 bits, any group size, widths that fill words, activations in float, embeddings in float."""
    misfit = no_activations(subject, "runtimes of GPTQ folders take them in float")
    if misfit is not None:
        return misfit
    for module, format in subject.integers.items():
        if module == embedding_of(subject.config):
            return weight_misfit(subject, module, "the layout does not support quantized embeddings")
        if why := wrong_scale(format) or _why_not(format, subject.shapes[module]):
            return weight_misfit(subject, module, why)
    return None


def _why_not(format: IntFormat, shape: tuple[int, int]) -> str | None:
    if format.bits not in BITS:
        return f"{format.bits} bits; the layout has 2, 3, 4 and 8"
    if shape[1] % (format.group or shape[1]):
        return f"groups of {format.group} do not divide a width of {shape[1]}"
    whole = 32 if format.bits == 3 else 32 // format.bits
    if odd := next((size for size in shape if size % whole), None):
        return f"a size of {odd} does not fill words of {whole} values"
    return None


def pack_module(q: QTensor, checkpoint_format: str) -> dict[str, Tensor]:
    """A quantized weight ``(out, in)`` as the tensors of the layout, by name relative to the module.

    In v1 a zero point of 0 becomes ``2**bits - 1``.
    """
    columns, format = q.codes.shape[1], integer(q.format, "the GPTQ layout")
    zero = q.qparams.zero.int() - int(checkpoint_format == "gptq")
    return {
        "qweight": _packed(q.codes.T.int(), format.bits, 0),
        "qzeros": _packed(zero.T & format.levels, format.bits, 1),
        "scales": q.qparams.scale.T.to(torch.float16),
        "g_idx": torch.arange(columns, dtype=torch.int32) // (format.group or columns),
    }


def _packed(values: Tensor, bits: int, dim: int) -> Tensor:
    """Unsigned values as dense int32 words along a dimension; the library's function takes signed ones."""
    return pack_to_int32((values - 2 ** (bits - 1)).to(torch.int8), bits, 0 if dim == 0 else 1)


def quantization_config(subject: Subject, checkpoint_format: str) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``; the most common format is the default.

    vLLM and SGLang look a fused linear up by its own name, so that stands beside those of its members.
    """
    common, together = Counter(subject.integers.values()).most_common(1)[0][0], fused(subject).agree
    formats = {
        **subject.integers,
        **{n: integer(format, "the GPTQ layout") for n, format in together.items() if format},
    }
    dynamic: dict[str, Any] = {
        f"+:{_pattern(name)}": _format(format) for name, format in formats.items() if format != common
    }
    floats = (*subject.floats, *(name for name, format in together.items() if format is None))
    dynamic |= {f"-:{_pattern(name)}": {} for name in floats}
    config = {
        "quant_method": "gptq",
        **_format(common),
        "desc_act": False,
        "checkpoint_format": checkpoint_format,
        "pack_dtype": "int32",
        "lm_head": "lm_head" in subject.weights,
    }
    return config | ({"dynamic": dynamic} if dynamic else {})


def _format(format: IntFormat) -> dict[str, Any]:
    return {"bits": format.bits, "group_size": format.group or -1, "sym": format.symmetric}


def _pattern(module: str) -> str:
    """Matches a module or a tensor below it: readers match either one, both from the beginning."""
    return rf"{re.escape(module)}(\.|$)"


def checkpoint_format(subject: Subject, choice: str = "auto") -> str:
    """The convention for zero points, ``gptq`` or ``gptq_v2``, from ``auto``, ``v1`` or ``v2``."""
    if choice == "auto":
        return FORMATS["v1" if all(format.symmetric for format in subject.integers.values()) else "v2"]
    if choice not in FORMATS:
        raise LowbitError(f"--gptq-format {choice} given; allowed: auto, v1, v2")
    return FORMATS[choice]


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Write the folder."""
    convention = checkpoint_format(run.subject, options.gptq_format)
    odd, scales = list[str](), RoundedScales(requested_dtype(run))

    def store(module: str, q: QTensor) -> dict[str, Tensor]:
        scales.see(q)
        if convention == "gptq" and bool((q.qparams.zero == 0).any()):
            odd.append(module)
        return pack_module(q, convention)

    write_folder(run, path, quantization_config(run.subject, convention), store)
    warnings = [*scales.warnings(), *fused(run.subject).warnings()]
    if not odd:
        return warnings
    zeros = f"{len(odd)} modules have zero points of 0, which some v1 readers take for 2**bits: use --gptq-format v2"
    return [zeros, *warnings]


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """``count`` unsigned values of each row of int32 words ``(rows, n)``, low bits first; a value may cross words.

    >>> unpack_words(torch.tensor([[0x21, 0x43]], dtype=torch.int32), 4, 10).tolist()
    [[1, 2, 0, 0, 0, 0, 0, 0, 3, 4]]
    """
    start = torch.arange(count) * bits
    unsigned = torch.nn.functional.pad(words.long() & 0xFFFFFFFF, (0, 1))
    pairs = unsigned[:, start // 32] | unsigned[:, start // 32 + 1] << 32
    return pairs >> start % 32 & 2**bits - 1


def read(run: Run, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter, decoded as the folder's own config specifies."""
    config = stored_config(path)

    def value(module: str, stored: Mapping[str, Tensor]) -> Tensor:
        dynamic = config.get("dynamic", {}).items()
        bits = next((own["bits"] for p, own in dynamic if re.match(p.removeprefix("+:"), module)), config["bits"])
        scales, group = stored["scales"].float(), stored["g_idx"].long()
        codes = unpack_words(stored["qweight"].T, bits, len(group)).T
        zeros = unpack_words(stored["qzeros"], bits, scales.shape[1])
        if config["checkpoint_format"] == "gptq":
            zeros = zeros + 1 & 2**bits - 1
        return ((codes.float() - zeros[group].float()) * scales[group]).T.contiguous()

    return read_folder(path, "qweight", value)


def other(run: Run, path: Path) -> Iterator[str]:
    """Files that differ, whichever convention the folder was written in."""
    stored = str(stored_config(path).get("checkpoint_format"))
    convention = stored if stored in FORMATS.values() else checkpoint_format(run.subject)
    return other_files(run, path, quantization_config(run.subject, convention))


EXPORTER = Exporter("", limits, write, owns("gptq"), read, other, options=frozenset({"gptq_format"}))
