"""A run as the graph that ExecuTorch lowers: the library's own model, a KV cache of fixed length, XNNPACK's linears.

Linears hold torchao's ``IntxUnpackedToInt8Tensor``, built from the run's own codes and scales, so nothing is rounded.
The attention is ExecuTorch's operator, registered as one of the library's attention functions: it writes keys and
values at a position into buffers and reads the positions up to it. One graph serves prompts of any length and single
tokens. Rejected: the static cache of ``transformers.integrations.executorch``, which attends to its whole length at
every token and takes longer to lower.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lowbit.exporters.run import Run
from lowbit.exporters.xnnpack import signed_codes, stored_bits
from lowbit.models.families import architecture_of
from lowbit.quant.format import QTensor
from lowbit.quant.integer import integer

ATTENTION = "lowbit_executorch"


class Decoder(nn.Module):
    """``(tokens (1, n), position (1,)) -> (1, 1, vocabulary)``: the logits after the last token.

    ``position`` is that of the first token. Earlier keys and values are in the buffers ``keys`` and ``values``
    ``(1, context, heads, width)`` of each attention.
    """

    def __init__(self, model: Any, context: int) -> None:
        super().__init__()
        self.model = model
        for layer in model.model.layers:
            attention = layer.self_attn
            shape = (1, context, model.config.num_key_value_heads, attention.head_dim)
            for name in ("keys", "values"):
                attention.register_buffer(name, torch.zeros(shape), persistent=False)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Logits after the last token."""
        start = position[0].item()
        torch._check(start >= 0)
        positions = (torch.arange(tokens.shape[1]) + start)[None]
        out = self.model(input_ids=tokens, position_ids=positions, use_cache=False, start=start, logits_to_keep=1)
        logits: Tensor = out.logits
        return logits


class ByteEmbedding(nn.Module):
    """A quantized embedding: rows of int8 codes, looked up and scaled by ExecuTorch's operator."""

    def __init__(self, q: QTensor) -> None:
        super().__init__()
        self.register_buffer("codes", signed_codes(q))
        self.register_buffer("scales", q.qparams.scale.to(torch.float32))

    def forward(self, tokens: Tensor) -> Tensor:
        """``(1, n)`` tokens as ``(1, n, width)``."""
        lookup = torch.ops.quantized_decomposed.embedding_byte.dtype
        rows: Tensor = lookup(self.codes, self.scales, None, -128, 127, tokens, dtype=torch.float32)
        return rows


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, start: Any, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention over the cache; ``query`` is ``(1, heads, n, width)``, the result ``(1, n, heads, width)``."""
    operators = torch.ops.llama
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    operators.update_cache(key, module.keys, start)
    operators.update_cache(value, module.values, start)
    return operators.custom_sdpa(query, module.keys, module.values, start, None, 0.0, True, scaling), None


def lower(run: Run, path: Path, context: int, methods: Mapping[str, Any]) -> None:
    """Write the program to ``path``.

    Args:
        run: the run.
        path: the file.
        context: capacity of its cache in tokens.
        methods: constant methods by name.
    """
    example = (torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64))
    length = torch.export.Dim("length", min=1, max=context)
    constants = {**methods, "get_max_seq_len": context, "get_max_context_len": context}
    with path.open("wb") as file:
        program_of(decoder_of(run, context), example, ({1: length}, None), constants).write_to_file(file)


def program_of(module: nn.Module, example: tuple[Tensor, ...], shapes: Any, methods: Mapping[str, Any]) -> Any:
    """ExecuTorch's program of a module, with everything that XNNPACK supports delegated to it.

    Args:
        module: what to compile.
        example: its inputs.
        shapes: their dynamic dimensions, as ``torch.export`` takes them.
        methods: constant methods of the program by name.
    """
    with _quiet(), torch.no_grad():
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

        lowered = to_edge_transform_and_lower(
            torch.export.export(module, example, dynamic_shapes=shapes, strict=False),
            partitioner=[_partitioner()],
            # The validity check does not know the attention's operators, which are ExecuTorch's own.
            compile_config=EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True),
            constant_methods=dict(methods),
        )
        return lowered.to_executorch()


def _partitioner() -> Any:
    """The partitioner that delegates operators to XNNPACK.

    Under the key of its older partitioner of linears, XNNPACK runs one pass over each partition; otherwise 17, which
    look for convolutions, batch norms and images, find none here, and take about half of the time.
    """
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
    from executorch.exir.backend.compile_spec_schema import CompileSpec
    from executorch.exir.backend.partitioner import DelegationSpec

    partitioner = XnnpackPartitioner()
    partitioner.delegation_spec = DelegationSpec(XnnpackBackend.__name__, [CompileSpec("dqlinear_partitioner", b"")])
    return partitioner


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the libraries' messages about GPU builds and deprecations."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def decoder_of(run: Run, context: int) -> Decoder:
    """The module to export; its linears hold the run's codes."""
    with _quiet():
        # Imported for the operators that they register: the attention, and the lookup in a quantized embedding.
        import executorch.exir.passes.quant_fusion_pass
        import executorch.extension.llm.custom_ops.custom_ops
        import executorch.kernels.quantized  # noqa: F401

    model, config = _empty(run), run.subject.config
    for name in run.floats:
        _set(model, name, run.tensor(name).to(torch.float32))
    architecture = architecture_of(config)
    for module in run.quantized:
        q = run.qtensor(module)
        if module == architecture.embed:
            model.set_submodule(module, ByteEmbedding(q))
        else:
            _set(model, f"{module}.weight", int_tensor(q))
    if config.tie_word_embeddings:
        _set(model, f"{architecture.head}.weight", run.tensor(f"{architecture.embed}.weight").float())
    return Decoder(model.eval(), context)


def _empty(run: Run) -> Any:
    """The model with its buffers and without parameters."""
    config = copy.deepcopy(run.subject.config)
    config.__dict__.pop("quantization_config", None)
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, lambda *args, **kwargs: None)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION, dtype=torch.float32)


def frequencies(run: Run) -> Tensor:
    """Frequencies of the rotary embedding ``(rotary / 2,)``, which the program holds besides parameters."""
    out: Tensor = _empty(run).model.rotary_emb.inv_freq
    return out


def _set(model: Any, name: str, value: Tensor) -> None:
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(value, requires_grad=False))


def int_tensor(q: QTensor) -> Tensor:
    """A quantized weight ``(out, in)`` as torchao's tensor: signed int8 codes and the run's scales."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    tensor: Tensor = IntxUnpackedToInt8Tensor(
        qdata=signed_codes(q),
        scale=q.qparams.scale.to(torch.float32),
        zero_point=torch.zeros_like(q.qparams.scale, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{stored_bits(integer(q.format, 'XNNPACK'))}"),  # torch's stubs have no int4
        block_size=(1, q.format.group or q.codes.shape[1]),
        dtype=torch.float32,
        activation_quantization="int8_asym_per_token",
    )
    return tensor
