"""A run in the compressed-tensors layout that vLLM reads, where it differs from the run folder's own.

A run folder is written for stock ``transformers``. vLLM's integer kernels (Humming: weights of 2 to 8 bits,
activations of 4 or 8) read 16-bit scales beside zero points, and int8 codes for its int8 kernels. Codes, scales and
zero points are unchanged; only how they are stored differs:

=========================================== ================= ===============================================
scheme                                      run folder        here
=========================================== ================= ===============================================
weights only, symmetric                     pack-quantized    the same
weights only, asymmetric (4 or 8 bits)      pack-quantized    the same, scales as float16, no ``dequantize``
activations, symmetric, per token           pack-quantized    the same
``w8a8-sym``, one scale per row             pack-quantized    int-quantized
=========================================== ================= ===============================================

Hadamard transforms without signs are stated in ``transform_config``, see ``vllm_transforms``.

vLLM's limits are taken from its source of 2026 (``compressed_tensors.py``, ``schemes/``), not from running it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from lowbit.errors import LowbitError
from lowbit.exporters import vllm_transforms
from lowbit.exporters.fit import Misfit, no_kv, weight_misfit
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
from lowbit.models.families import architecture_of
from lowbit.quant.activations import ActFormat, IntTokens
from lowbit.quant.compressed_tensors import quantization_config as stock_config
from lowbit.quant.float_activations import FloatActs
from lowbit.quant.floating import FloatFormat
from lowbit.quant.format import Format, QTensor
from lowbit.quant.integer import IntFormat, integer
from lowbit.quant.layouts import LAYOUTS
from lowbit.quant.static_activations import Nvfp4Acts, StaticInt
from lowbit.quant.static_clusters import StaticClusters
from lowbit.runs.manifest import MANIFEST

ACT_BITS = (4, 8)
FREE_ZEROS = (4, 8)  # widths for which its kernels support asymmetric weights
# Weights and inputs with floating-point elements that vLLM runs from the run folder as it is.
READ_AS_THEY_ARE = frozenset(
    {
        ("fp8", "fp8"),
        ("fp8", "float"),
        ("fp8-tensor", "fp8"),
        ("fp8-tensor", "float"),
        ("fp8-block", "fp8-group"),
        ("fp8-block", "float"),
        ("nvfp4", "nvfp4"),
        ("nvfp4", "float"),
        ("mxfp4", "mxfp4"),
        ("mxfp4", "float"),
        ("mxfp8", "mxfp8"),
        ("w4g128-sym", "fp8"),  # its kernel takes groups of 128 alone
    }
)


def limits(subject: Subject) -> Misfit | None:
    """Symmetric activations at 4 or 8 bits, asymmetric weights at 4 or 8 bits, one format per fused linear."""
    misfit = no_kv(subject) or vllm_transforms.limits(subject)
    if misfit is not None:
        return misfit
    act = subject.act
    if isinstance(act, StaticInt | StaticClusters):
        return Misfit("act", f"inputs are quantized to {act.name}; this target writes dynamic ranges only")
    if isinstance(act, FloatActs | Nvfp4Acts):
        return _own_folder(subject, subject.weights, act)
    if act is not None and not isinstance(act, IntTokens):
        return Misfit("act", f"vLLM reads no inputs in {act.name}")
    if floats := {module: format for module, format in subject.weights.items() if isinstance(format, FloatFormat)}:
        return _own_folder(subject, floats, act)
    if act is not None and not act.symmetric:
        return Misfit("act", "inputs are asymmetric; vLLM's kernels quantize them symmetrically")
    if act is not None and act.bits not in ACT_BITS:
        return Misfit("act", f"inputs at {act.bits} bits; vLLM supports 4 and 8")
    for module, format in subject.integers.items():
        if module in (embedding_of(subject.config), architecture_of(subject.config).head):
            return weight_misfit(subject, module, "vLLM keeps embeddings and head in float")
        if not format.symmetric and format.bits not in FREE_ZEROS:
            return weight_misfit(subject, module, f"asymmetric at {format.bits} bits; vLLM supports that at 4 and 8")
        if subject.shapes[module][1] % (format.group or 1):
            return weight_misfit(subject, module, f"groups of {format.group} do not divide its width")
    return _fused(subject)


def _own_folder(subject: Subject, weights: Mapping[str, Format], act: ActFormat | None) -> Misfit:
    """Floating-point elements: no other layout is written, since vLLM reads the run folder's or has no kernel."""
    inputs = "float" if act is None else act.name
    for module, format in weights.items():
        if (format.name, inputs) not in READ_AS_THEY_ARE:
            allowed = ", ".join(f"{weight} with {own}" for weight, own in sorted(READ_AS_THEY_ARE))
            why = f"vLLM has no kernel for {format.name} with inputs in {inputs}; it has {allowed}"
            return weight_misfit(subject, module, why)
    names = ", ".join(sorted({format.name for format in weights.values()}))
    return Misfit("layout", f"{names} with inputs in {inputs} needs no export: vLLM reads the run folder itself")


def _fused(subject: Subject) -> Misfit | None:
    """Linears that read one tensor, which vLLM fuses, need one format."""
    architecture = architecture_of(subject.config)
    for index, kind in enumerate(architecture.layers):
        for group in kind.groups:
            names = [f"{architecture.blocks}.{index}.{name}" for name in group]
            if len({subject.weights.get(name) for name in names}) > 1:
                odd = next(name for name in names if subject.scheme.override(name))
                other_name = next(name for name in names if subject.weights.get(name) != subject.weights.get(odd))
                return weight_misfit(subject, odd, f"vLLM fuses it with {other_name}, whose format differs")
    return None


def layout_for(subject: Subject) -> str:
    """The layout for which vLLM has a kernel."""
    act, weights = subject.act, set(subject.integers.values())
    plain = all(format.bits == 8 and format.symmetric and format.group is None for format in weights)
    return "int-quantized" if isinstance(act, IntTokens) and act.bits == 8 and plain else "pack-quantized"


def store(q: QTensor, layout: str) -> dict[str, Tensor]:
    """A quantized weight as the tensors of the layout, by name relative to the module."""
    return {**LAYOUTS[layout].pack(q), "weight_scale": q.qparams.scale.to(integer(q.format, layout).scale_dtype)}


def quantization_config(run: Run) -> dict[str, Any]:
    """The run's own ``quantization_config`` with vLLM's layout."""
    layout, config = layout_for(run.subject), stored_config(run.folder)
    if (transforms := vllm_transforms.transform_config(run)) is not None:
        # The run folder's own groups stop stock loaders, which do not run its ops.
        stated = stock_config(run.subject.formats, config["ignore"], embedding_of(run.subject.config))
        config = {**config, "config_groups": stated["config_groups"], vllm_transforms.KEY: transforms}
    groups = {name: {**group, "format": layout} for name, group in config["config_groups"].items()}
    config = {**config, "format": layout, "config_groups": groups}
    config.pop("dequantize", None)
    return config


def write(run: Run, path: Path, options: Options) -> list[str]:
    """Write the folder; warns where the dtype that it requests changes scales, such as float32 ones."""
    layout, scales = layout_for(run.subject), RoundedScales(requested_dtype(run))

    def stored(module: str, q: QTensor) -> dict[str, Tensor]:
        scales.see(q)
        return store(q, layout)

    write_folder(run, path, quantization_config(run), stored)
    return scales.warnings()


def read(run: Run, path: Path) -> Iterator[tuple[str, Tensor]]:
    """Every parameter through the library's own ``decompress``, scales in float32 so that products are exact."""
    config = stored_config(path)
    groups = {name: QuantizationScheme.model_validate(group) for name, group in config["config_groups"].items()}
    library: Any = BaseCompressor.get_value_from_registry(config["format"])

    def value(module: str, stored: Mapping[str, Tensor]) -> Tensor:
        own = next((g for g in groups.values() if any(_names(t, module) for t in g.targets)), None)
        scheme = own or next(group for group in groups.values() if "Linear" in group.targets)
        scales = {"weight_scale": stored["weight_scale"].float()}
        weight: Tensor = library.decompress({**stored, **scales}, scheme)["weight"].float()
        if "weight_shape" in stored and stored["weight_shape"].tolist() != list(weight.shape):
            raise LowbitError(
                f"weight_shape is {stored['weight_shape'].tolist()}, the codes are {list(weight.shape)}"
            )
        return weight

    key = "weight_packed" if config["format"] == "pack-quantized" else "weight_scale"
    yield from read_folder(path, key, value)
    yield from vllm_transforms.read(run, config)


def _names(target: str, module: str) -> bool:
    return target.startswith("re:") and re.match(target.removeprefix("re:"), module) is not None


def other(run: Run, path: Path) -> Iterator[str]:
    """Files that differ."""
    return other_files(run, path, quantization_config(run))


def _owns(path: Path) -> bool:
    return owns("compressed-tensors")(path) and not (path / MANIFEST).exists()


EXPORTER = Exporter("", limits, write, _owns, read, other, formats=(IntFormat, FloatFormat), ops=vllm_transforms.OPS)
