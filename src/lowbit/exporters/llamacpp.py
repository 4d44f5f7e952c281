"""Runs a ``.gguf`` file in llama.cpp through ``llama-cpp-python``: logits, greedy text, tokenization.

The package's low-level functions are used, not its ``Llama`` class, which samples and stores more than is needed
here. llama.cpp quantizes the inputs of quantized matrices, see ``quant/runtimes.py``; with ``exact`` it keeps keys
and values in float32, so that little else separates its logits from the run's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lowbit.checkpoints.resolve import resolve
from lowbit.errors import LowbitError, MissingExtra
from lowbit.exporters.verify import relative_error

try:
    import llama_cpp.llama_cpp as native
except ModuleNotFoundError as error:
    raise MissingExtra("llama-cpp-python", "llamacpp", "running a .gguf file") from error

F32 = 0  # ggml.h, GGML_TYPE_F32
ERROR = 4  # ggml.h, GGML_LOG_LEVEL_ERROR


@dataclass(frozen=True)
class Session:
    """A loaded model with its own context; see ``open_session``.

    Attributes:
        model, context: the library's handles.
        vocabulary: columns of the logits.
        length: capacity of the context in tokens.
    """

    model: Any
    context: Any
    vocabulary: int
    length: int

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Logits after each token of an independent text, float32 ``(len(ids), vocabulary)``."""
        self.forget()
        return self.decode(ids, 0, every=True)

    def greedy(self, ids: Sequence[int], tokens: int) -> list[int]:
        """The next ``tokens`` ids, each the most likely one after those before it."""
        self.forget()
        scores, out = self.decode(ids, 0), list[int]()
        for i in range(tokens):
            out.append(int(scores[-1].argmax()))
            if i + 1 < tokens:
                scores = self.decode(out[-1:], len(ids) + i)
        return out

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text by llama.cpp's tokenizer, without the tokens that it adds around a text."""
        vocabulary = native.llama_model_get_vocab(self.model)
        content = text.encode()
        capacity = len(content) + 8
        ids = (native.llama_token * capacity)()
        count = native.llama_tokenize(vocabulary, content, len(content), ids, capacity, False, True)
        return list(ids[:count])

    def forget(self) -> None:
        """Empty the KV cache."""
        native.llama_memory_clear(native.llama_get_memory(self.context), True)

    def decode(self, ids: Sequence[int], start: int, every: bool = False) -> Tensor:
        """Logits after the last token of ``ids``, or after ``every`` token; positions begin at ``start``."""
        if start + len(ids) > self.length:
            raise LowbitError(f"{start + len(ids)} tokens given to a context of {self.length}")
        batch = native.llama_batch_init(len(ids), 0, 1)
        try:
            batch.n_tokens = len(ids)
            for i, token in enumerate(ids):
                batch.token[i], batch.pos[i] = int(token), start + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = every or i == len(ids) - 1
            if code := native.llama_decode(self.context, batch):
                raise LowbitError(f"llama.cpp cannot compute {len(ids)} tokens (llama_decode gives {code})")
            shape = (len(ids) if every else 1, self.vocabulary)
            return torch.from_numpy(np.ctypeslib.as_array(native.llama_get_logits(self.context), shape).copy())
        finally:
            native.llama_batch_free(batch)


_ERRORS: list[str] = []


def _record_error(level: int, text: bytes, _: Any) -> None:
    if level == ERROR:
        _ERRORS.append(" ".join(text.decode(errors="replace").split()))


# The library keeps the address of its log callback, which must therefore live as long as the process.
_LOG = native.llama_log_callback(_record_error)


def quiet() -> None:
    """Silence the library's log; errors that it reports from now on go into error messages."""
    _ERRORS.clear()
    native.llama_log_set(_LOG, ctypes.c_void_p(0))


def errors_said() -> str:
    """What the library has reported since ``quiet``, cut to one line."""
    return "; ".join(_ERRORS)[:300] or "no reason given"


@contextmanager
def open_session(path: Path, length: int = 512, threads: int = 1, exact: bool = False) -> Iterator[Session]:
    """The model in a file, for texts of up to ``length`` tokens.

    Args:
        path: the file.
        length: tokens of prompt and continuation together.
        threads: used for prompts and for single tokens.
        exact: keys and values in float32 and plain attention; llama.cpp's default is float16.

    Raises:
        LowbitError: llama.cpp does not load the file; the message has its reason.
    """
    quiet()
    native.llama_backend_init()
    model = native.llama_model_load_from_file(str(path).encode(), native.llama_model_default_params())
    if not model:
        raise LowbitError(f"llama.cpp does not load {path}: {errors_said()}")
    options = native.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = length
    options.n_threads = options.n_threads_batch = threads
    if exact:
        options.type_k = options.type_v = F32
        options.flash_attn_type = native.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = native.llama_init_from_model(model, options)
    try:
        if not context:
            raise LowbitError(f"llama.cpp cannot create a context of {length} tokens for {path}: {errors_said()}")
        vocabulary = native.llama_vocab_n_tokens(native.llama_model_get_vocab(model))
        yield Session(model, context, vocabulary, length)
    finally:
        if context:
            native.llama_free(context)
        native.llama_model_free(model)


def source_distance(path: Path, ids: Sequence[int]) -> float:
    """How far llama.cpp's logits of a ``.gguf`` file are from those of the model that lowbit reads from it.

    Args:
        path: the file, as it would be given as a model.
        ids: token ids of one text.

    Returns:
        The distance in units of the logits' spread, see ``exporters.verify.relative_error``.

    Raises:
        LowbitError: the file cannot be read here, or not by llama.cpp.
    """
    model = AutoModelForCausalLM.from_pretrained(resolve(str(path)).folder, local_files_only=True).eval()
    with torch.no_grad(), open_session(path, len(ids), exact=True) as session:
        ours = model(torch.tensor([list(ids)])).logits[0].float()
        return relative_error(session.logits(ids), ours)
