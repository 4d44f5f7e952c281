"""The model without its blocks: embeddings, final norm and head, and how the model calls its layers.

The library's own model class is built without memory for its parameters; embeddings, norms and head are then
filled in. In place of the decoder layers stand recorders: the model's own ``forward`` runs over them once to
give what block 0 is called with, and the keyword arguments that it passes to each layer (masks and rotary
embeddings differ from layer to layer in some families). Run again with the last recorder returning given hidden
states, the same ``forward`` turns these into logits, with whatever the model does on the way (final norm,
capped logits). Rejected: an exception that stops the forward at the first layer, which sees one layer's
arguments only, and per-family code for embedding and head.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lowbit.errors import LowbitError
from lowbit.models.block import Block
from lowbit.models.families import family_of
from lowbit.quant.activations import ActFormat
from lowbit.quant.scheme import ModelFormats


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what it was called with, returns its input or what it was told to."""

    def __init__(self) -> None:
        super().__init__()
        self.kwargs: dict[int, Mapping[str, Any]] = {}  # by the sequence's length, on which alone they depend
        self.answer: Tensor | None = None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        # Masks made for one sequence broadcast over any number of them; those of a batch fit that batch only.
        if hidden_states.shape[0] == 1:
            self.kwargs[hidden_states.shape[1]] = kwargs
        return hidden_states if self.answer is None else self.answer


class Skeleton:
    """A causal language model whose blocks live elsewhere.

    Attributes:
        config: the Hugging Face config.
        family: the architecture's facts.
        layers: the library's decoder layers, on ``meta``; they only say how a block computes.
    """

    def __init__(self, config: Any, trust_remote_code: bool = False) -> None:
        """Build it from a config; ``fill`` gives it its parameters."""
        self.config, self._trusted = config, trust_remote_code
        self.family = family_of(config)
        self.heads = self.family.heads(config)
        with init_empty_weights(include_buffers=False):
            self.model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        self.model.eval()
        parent, _, attribute = self.family.blocks.rpartition(".")
        self.layers: list[nn.Module] = list(self.model.get_submodule(self.family.blocks))
        self._recorders = [_Recorder() for _ in self.layers]
        self._length = 0  # of the sequences that ``embed`` saw last
        setattr(self.model.get_submodule(parent), attribute, nn.ModuleList(self._recorders))

    def empty(self) -> Skeleton:
        """Another one of the same model, not filled."""
        return Skeleton(self.config, self._trusted)

    @property
    def tied(self) -> bool:
        """The head is the transposed embedding."""
        return bool(self.config.tie_word_embeddings)

    @property
    def shared_names(self) -> list[str]:
        """Names of the parameters and stored buffers that belong to no block, a tied head left out."""
        tied = f"{self.family.head}.weight" if self.tied else ""
        return [name for name in self.model.state_dict() if name != tied]

    def fill(self, rest: Mapping[str, Tensor]) -> None:
        """Take parameters for some or all of ``shared_names``; afterwards none may be missing."""
        self.model.load_state_dict(dict(rest), strict=False, assign=True)
        self.model.tie_weights()
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta:
                raise LowbitError(f"no tensor '{name}' (nor anything that it is tied to) was given for the model")
            parameter.requires_grad_(False)

    def quantize_head_input(self, format: ActFormat) -> None:
        """From now on the head sees its input quantized, as a quantized linear does."""
        head = self.model.get_submodule(self.family.head)
        head.register_forward_pre_hook(lambda module, args: (format.fake_quant(args[0]), *args[1:]))

    @torch.no_grad()
    def embed(self, ids: Tensor) -> Tensor:
        """What block 0 is called with for token ids ``(sequences, length)``: ``(sequences, length, hidden)``."""
        first, last = self._recorders[0], self._recorders[-1]
        last.answer = None
        self._length = ids.shape[1]
        # One sequence suffices for the keyword arguments: all have the same length and no padding.
        self.model(ids[:1], use_cache=False, logits_to_keep=1)
        seen: list[Tensor] = []
        handle = first.register_forward_hook(lambda module, args, out: seen.append(out))
        try:
            for part in ids.split(64):
                self.model(part, use_cache=False, logits_to_keep=1)
        finally:
            handle.remove()
        return torch.cat(seen)

    def logits(self, ids: Tensor, hidden: Tensor, keep: Tensor | None = None) -> Tensor:
        """Logits ``(sequences, length, vocabulary)`` from the last block's output for the same ``ids``.

        Of the positions ``keep`` only, where they are given: a head over a large vocabulary makes much of few tokens.
        Differentiable in ``hidden``.
        """
        self._recorders[-1].answer = hidden
        try:
            return self.model(ids, use_cache=False, logits_to_keep=0 if keep is None else keep).logits
        finally:
            self._recorders[-1].answer = None

    def block(
        self, start: int, params: Mapping[str, Tensor], count: int = 1, formats: ModelFormats | None = None
    ) -> Block:
        """A block of ``count`` layers with ``params`` (named ``7.mlp.up_proj.weight``) and the plan's formats.

        It is for sequences of the length that ``embed`` saw last; before ``embed`` it holds parameters and cannot
        run. Without ``formats`` nothing of it is to be quantized.
        """
        formats = formats or ModelFormats()
        linears = [name for group in self.family.linears for name in group]
        names = [f"{index}.{name}" for index in range(start, start + count) for name in linears]
        own = {name: formats.modules.get(f"{self.family.blocks}.{name}") for name in names}
        return Block(
            layers=tuple(self.layers[start : start + count]),
            start=start,
            kwargs=self._kwargs(start, count, self._length),
            family=self.family,
            heads=self.heads,
            params=dict(params),
            formats={name: found for name, found in own.items() if found is not None},
            kv=formats.kv,
        )

    def for_length(self, block: Block, length: int) -> Block:
        """The block for sequences of another ``length`` that ``embed`` has seen: masks and rotary embeddings."""
        return replace(block, kwargs=self._kwargs(block.start, len(block.layers), length))

    def forget(self) -> None:
        """Drop what ``embed`` kept of the lengths that it saw."""
        for recorder in self._recorders:
            recorder.kwargs.clear()

    def _kwargs(self, start: int, count: int, length: int) -> tuple[Mapping[str, Any], ...]:
        chosen = self._recorders[start : start + count]
        return tuple(recorder.kwargs[length] if length else {} for recorder in chosen)
