"""The model without its blocks: embeddings, final norm and head, and the arguments that it passes to its layers.

Of a model with other parts, such as a vision encoder, it is the text model: the others are taken out.

The library's own model class is built without memory for its parameters; embeddings, norms and head are then
filled in. Recorders (``recorder.py``) replace the decoder layers: one pass of the model's own ``forward`` yields the
input of block 0 and the keyword arguments of each layer (masks and rotary embeddings differ between layers in some
families). When the last recorder returns given hidden states, the same ``forward`` computes their logits, including
the final norm and logit capping. Rejected: an exception that stops the forward at the first layer, which sees one
layer's arguments only, and per-family code for embedding and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers.cache_utils import Cache

from lowbit.data.sampling import cache_name
from lowbit.errors import LowbitError, one_line
from lowbit.models.block import Block
from lowbit.models.build import from_config, is_tied, text_config, tied_tensors, untied_config
from lowbit.models.experts import parameter_shapes, taken_apart
from lowbit.models.families import architecture_of
from lowbit.models.prefix import counted
from lowbit.models.recorder import Recorders, hidden_of
from lowbit.models.stream import State, Stream, digits_of
from lowbit.models.text_part import remove_outside
from lowbit.quant.activations import ActFormat
from lowbit.quant.scheme import ModelFormats


class Skeleton:
    """A causal language model without the parameters of its blocks.

    Attributes:
        config: the Hugging Face config.
        architecture: where its layers are, and the structure of each.
        trusted: whether code of the model's own is permitted.
        layers: the library's decoder layers, on ``meta``; they define how a block computes.
        cache: what the model is called with, see ``behind``; ``None``: no cache.
    """

    def __init__(self, config: Any, trust_remote_code: bool = False) -> None:
        """Build the model from a config; ``fill`` loads its parameters."""
        self.config, self.trusted = config, trust_remote_code
        self.architecture = architecture_of(config)
        with init_empty_weights(include_buffers=False):
            self.model: Any = from_config(config, trust_remote_code)
        self.model.eval()
        if self.architecture.text_model:
            remove_outside(self.model, (self.architecture.text_model, self.architecture.head))
        parent, _, attribute = self.architecture.blocks.rpartition(".")
        self.layers: list[nn.Module] = list(self.model.get_submodule(self.architecture.blocks))
        self._recorders = Recorders.of(self.layers)
        self._length = 0  # of the sequences in the last call of ``embed``
        self.cache: Cache | None = None
        setattr(self.model.get_submodule(parent), attribute, nn.ModuleList(self._recorders.modules))

    def empty(self, untied: bool = False) -> Skeleton:
        """Another skeleton of the same model, behind as many tokens, without parameters.

        With ``untied``, its head and its embedding are two tensors.
        """
        other = Skeleton(untied_config(self.config) if untied else self.config, self.trusted)
        other.cache = self.cache
        return other

    def behind(self, tokens: int) -> None:
        """From now on texts come behind a prefix of so many tokens; 0: behind none.

        Blocks then need the prefix's keys and values among their parameters, see ``prefix.py``.
        """
        self.cache = counted(tokens, len(self.layers)) if tokens else None

    @property
    def prefix(self) -> int:
        """Tokens that come before each text."""
        return 0 if self.cache is None else self.cache.get_seq_length()

    @property
    def text_config(self) -> Any:
        """The part of the config that describes the text model."""
        return text_config(self.config)

    @property
    def tied(self) -> bool:
        """Whether head and embedding share one weight."""
        return is_tied(self.config)

    @property
    def reads_text(self) -> bool:
        """Whether layers are given what depends on the text, which ``embed`` finds out the first time."""
        return self._recorders.streams[0].ids

    @property
    def leaves(self) -> Stream:
        """What comes out of the last layer, once ``embed`` has run."""
        return self._recorders.streams[-1]

    @property
    def width(self) -> int:
        """Most channels of what goes from layer to layer, once ``embed`` has run."""
        return max(stream.width(int(self.text_config.hidden_size)) for stream in self._recorders.streams)

    @property
    def shared_names(self) -> list[str]:
        """Names of the shared (non-block) parameters and stored buffers, without those tied to others."""
        tied = tied_tensors(self.model, self.config, self.architecture.head)
        return [name for name in self.model.state_dict() if name not in tied]

    def fill(self, shared: Mapping[str, Tensor]) -> None:
        """Load parameters for some or all of ``shared_names``; afterwards none may be missing."""
        self.model.load_state_dict(dict(shared), strict=False, assign=True)
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise LowbitError(f"the model's tensor '{name}' is missing, and so is any tensor tied to it")
            parameter.requires_grad_(False)

    def quantize_head_input(self, format: ActFormat) -> None:
        """Quantize the head's input from now on, as for a quantized linear."""
        head = self.model.get_submodule(self.architecture.head)
        head.register_forward_pre_hook(lambda module, args: (format.fake_quant(args[0]), *args[1:]))

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """The input of block 0, ``(sequences, length, width)``, for token ids ``(sequences, length)``.

        Raises:
            LowbitError: the model has fewer positions.
        """
        try:
            return self._embed(ids)
        except (IndexError, RuntimeError) as error:
            # A table may have fewer rows than the config says positions, as RoBERTa's.
            if not isinstance(error, IndexError) and "out of bounds" not in str(error):
                raise
            raise LowbitError(
                f"{type(self.model).__name__} computes no texts of {ids.shape[1]} tokens ({one_line(error)}): give "
                "a smaller --length"
            ) from error

    def _embed(self, ids: Tensor) -> Tensor:
        first, last = self._recorders.modules[0], self._recorders.modules[-1]
        last.answer = None
        self._length = ids.shape[1]
        if not self._recorders.learned:
            self._learn(ids[:1])
        # One sequence suffices for the keyword arguments: all have the same length and no padding.
        self._last_logits(ids[:1])
        inputs: list[Tensor] = []
        handle = first.register_forward_hook(lambda module, args, out: inputs.append(hidden_of(out)))
        try:
            for part in ids.split(64):
                self._last_logits(part)
        finally:
            handle.remove()
        parts = zip(inputs, ids.split(64), strict=True)
        stream = self._recorders.streams[0]
        return torch.cat([stream.pack(State(hidden, digits_of(part))) for hidden, part in parts])

    def _learn(self, ids: Tensor) -> None:
        """Find out how the model calls its layers, on a sequence ``(1, length)`` with nothing before it."""
        rows = self.model.get_input_embeddings().weight.shape[0]
        cache, self.cache = self.cache, None
        try:
            self._recorders.learn(self._last_logits, ids, rows)
        finally:
            self.cache = cache

    def _last_logits(self, ids: Tensor) -> Tensor:
        """Logits of the last position alone ``(sequences, 1, vocabulary)``."""
        return self._logits(ids, slice(-1, None))

    def logits(self, ids: Tensor, hidden: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits ``(sequences, length, vocabulary)`` from the last block's output for the same ``ids``.

        ``keep`` restricts them to these positions: logits over a large vocabulary take much memory per token.
        Differentiable in ``hidden``.
        """
        self._recorders.modules[-1].answer = self.leaves.unpack(hidden).hidden
        try:
            return self._logits(ids, slice(None) if keep is None else keep)
        finally:
            self._recorders.modules[-1].answer = None

    def _logits(self, ids: Tensor, keep: slice | Tensor) -> Tensor:
        """The model's logits at some positions: its head sees no others.

        The option ``logits_to_keep`` of most models is not used, as some of them shorten their layers' inputs by it.
        """
        head = self.model.get_submodule(self.architecture.head)
        handle = head.register_forward_pre_hook(lambda module, args: (args[0][..., keep, :], *args[1:]), prepend=True)
        try:
            given = {} if self.cache is None else {cache_name(self.model): self.cache}
            logits: Tensor = self.model(ids, use_cache=False, **given).logits
        finally:
            handle.remove()
        return logits

    def block(
        self, start: int, params: Mapping[str, Tensor], count: int = 1, formats: ModelFormats | None = None
    ) -> Block:
        """A block of ``count`` layers with ``params`` (named ``7.mlp.up_proj.weight``) and the plan's formats.

        ``params`` are as the library or a checkpoint stores them; in the block every matrix is ``(out, in)``, and
        each expert has its own.

        The block runs on sequences of the length in the last call of ``embed``; before ``embed`` it holds parameters
        but cannot run. Without ``formats`` none of its linears is to be quantized.
        """
        formats = formats or ModelFormats()
        blocks, kinds = self.architecture.blocks, self.architecture.layers[start : start + count]
        names = [f"{index}.{name}" for index, kind in enumerate(kinds, start) for name in kind.linears]
        modules = {name: formats.modules.get(f"{blocks}.{name}") for name in names}
        own = dict(params)
        for index, kind in enumerate(kinds, start):
            own = taken_apart(kind, own, f"{index}.")
        block = Block(
            layers=tuple(self.layers[start : start + count]),
            start=start,
            kwargs=self._kwargs(start, count, self._length),
            kinds=kinds,
            blocks=blocks,
            params=own,
            streams=tuple(self._recorders.streams[start : start + count + 1]),
            formats={name: module for name, module in modules.items() if module is not None},
            kv=formats.kv,
            prefix=self.prefix,
        )
        return replace(block, params=block.as_stored(own)) if any(kind.transposed for kind in kinds) else block

    def parameter_shapes(self, index: int) -> dict[str, torch.Size]:
        """Shapes of layer ``index``'s parameters, as checkpoints have them, by name within the layer."""
        return parameter_shapes(self.architecture.layers[index], self.layers[index])

    def for_length(self, block: Block, length: int) -> Block:
        """The block with masks and rotary embeddings for another ``length`` to which ``embed`` was applied."""
        return replace(block, kwargs=self._kwargs(block.start, len(block.layers), length))

    def forget(self) -> None:
        """Drop what ``embed`` recorded, as before its first call."""
        self._length = 0
        self._recorders.forget()

    def arguments(self) -> tuple[Mapping[str, Any], ...]:
        """What each layer was called with in the last call of ``embed``, in the form of ``Block.kwargs``."""
        return self._kwargs(0, len(self.layers), self._length)

    def _kwargs(self, start: int, count: int, length: int) -> tuple[Mapping[str, Any], ...]:
        layers = range(start, start + count)
        return tuple(self._recorders.arguments(index, length) if length else {} for index in layers)
