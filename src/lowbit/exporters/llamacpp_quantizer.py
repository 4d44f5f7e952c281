"""llama.cpp's own quantizer through ``llama-cpp-python``: a float ``.gguf`` file in another type."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoints.partial import commit, partial_of, remove
from lowbit.errors import LowbitError, MissingExtra
from lowbit.exporters.llamacpp import F32, errors_said, quiet

try:
    import llama_cpp.llama_cpp as native
except ModuleNotFoundError as error:
    raise MissingExtra("llama-cpp-python", "llamacpp", "llama.cpp's own quantizer") from error

# llama.h, LLAMA_FTYPE_MOSTLY_*; names are those of ``llama-quantize``
FILE_TYPES = {
    "Q2_K": 10, "Q3_K_M": 12, "Q4_0": 2, "IQ4_NL": 25, "Q4_K_M": 15, "Q5_0": 8, "Q5_K_M": 17, "Q6_K": 18, "Q8_0": 7,
    "MXFP4": 38,
}  # fmt: skip


def quantize_file(
    source: Path, target: Path, kind: str, matrix: Mapping[str, Tensor] | None = None, pure: bool = False
) -> None:
    """What ``llama-quantize --imatrix MATRIX SOURCE TARGET KIND`` does.

    Args:
        source: a ``.gguf`` file of floats.
        target: the file, which is whole or not there.
        kind: a name of ``FILE_TYPES``.
        matrix: mean squares of inputs by the file's names of tensors, see ``imatrix.tensor_means``.
        pure: this type for every linear, and float32 for embedding and head; else llama.cpp's mixture of types.

    Raises:
        LowbitError: llama.cpp refuses the file; the message has its reason.
    """
    options = native.llama_model_quantize_default_params()
    options.nthread, options.ftype = torch.get_num_threads(), FILE_TYPES[kind]
    if pure:
        options.pure, options.token_embedding_type, options.output_tensor_type = True, F32, F32
    values = {name: value.float().contiguous().numpy() for name, value in (matrix or {}).items()}
    entries = (native.llama_model_imatrix_data * (len(values) + 1))()  # the last one stays empty: the end
    for entry, (name, value) in zip(entries, values.items(), strict=False):
        entry.name, entry.size = name.encode(), value.size
        entry.data = value.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if values:
        options.imatrix = ctypes.cast(entries, ctypes.POINTER(native.llama_model_imatrix_data))
    quiet()
    partial = partial_of(target)
    try:
        if native.llama_model_quantize(str(source).encode(), str(partial).encode(), ctypes.byref(options)):
            raise LowbitError(f"llama.cpp does not quantize {source} to {kind}: {errors_said()}")
        commit(partial, target)
    except OSError as error:
        raise LowbitError(f"cannot write {target}: {error.strerror or error}; free some space there") from error
    finally:
        remove(partial)
