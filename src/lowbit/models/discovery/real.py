"""Layers at their real size: the model without memory, and the proof of carried edges on one layer of each kind.

The proof runs a dozen and a half tokens through one layer with random parameters in float64. What the model passes to
its layers comes from the same config with a small vocabulary and as few layers as show every kind.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from lowbit.errors import LowbitError, one_line
from lowbit.models.architecture import DeclaredEdge
from lowbit.models.discovery.capture import Call, first_calls
from lowbit.models.discovery.empty import empty_model
from lowbit.models.discovery.fold import draw
from lowbit.models.discovery.kinds import signature
from lowbit.models.discovery.proof import LayerProof
from lowbit.models.discovery.properties import properties
from lowbit.models.discovery.sites import InFloat64, owners_of
from lowbit.models.discovery.small_model import materialize, run_eager_experts, token_ids
from lowbit.models.recorder import as_returned

_COPIES = 4  # of a layer's parameters: its own, and those that a map changes on both sides


class _PassesOn(nn.Module):
    """Takes a layer's place: returns its input, in a tuple of as many values if the layer does."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return as_returned(hidden, self.outputs)


class RealLayers:
    """What a model of real widths calls its layers with.

    Attributes:
        layers: its layers, without memory; fewer than the model has.
        calls: by index in ``layers``.
    """

    def __init__(self, config: Any, blocks: str, outputs: int, trust_remote_code: bool = False) -> None:
        """Build everything but the layers.

        Args:
            config: of the model's widths, with a small vocabulary and few layers.
            blocks: module path of the layers.
            outputs: how many values a layer returns in a tuple; 0: the hidden states as they are.
            trust_remote_code: run the model's own code.

        Raises:
            LowbitError: the model does not run without its layers.
        """
        try:
            model = empty_model(config, trust_remote_code)
            parent, _, attribute = blocks.rpartition(".")
            self.layers: list[nn.Module] = list(model.get_submodule(blocks))
            stand_ins = nn.ModuleList(_PassesOn(outputs) for _ in self.layers)
            setattr(model.get_submodule(parent), attribute, stand_ins)
            materialize(model, seed=2)
            with InFloat64():
                self.calls: list[Call] = first_calls(model, list(stand_ins), token_ids)
        except LowbitError:
            raise
        except Exception as error:  # a model's own code
            raise LowbitError(f"the model does not run without its layers: {one_line(error)}") from error


def bytes_needed(layer: nn.Module) -> int:
    """Memory for the proof on a layer, in bytes."""
    return _COPIES * 8 * sum(parameter.numel() for parameter in layer.parameters())


def checked(
    real: RealLayers, layer: nn.Module, edges: Sequence[DeclaredEdge], transposed: Collection[str] = ()
) -> list[tuple[DeclaredEdge, str]] | str:
    """Each edge with why it is refuted at real shape (empty: it is not), or why none was checked.

    Args:
        real: the layers of real widths.
        layer: one of the model, without memory.
        edges: carried to its size.
        transposed: parameters of experts that code of the model's own reads as ``(in, out)``.
    """
    wanted = signature(layer)
    at = next((i for i, one in enumerate(real.layers) if signature(one) == wanted), None)
    if at is None:
        return "no layer of the short model is like it"
    own = copy.deepcopy(real.layers[at])  # whose buffers have their values: code multiplies by some
    try:
        materialize(own, seed=3)
        run_eager_experts(own)
        proof = LayerProof(own, real.calls[at].redrawn(4), owners_of(own, transposed))
        generator = torch.Generator().manual_seed(6)
        return [
            (properties(edge, proof), proof.refutation(edge, draw(edge, proof.owners, edge.limit, generator)))
            for edge in edges
        ]
    except Exception as error:  # a model's own code
        return f"the layer does not run alone: {one_line(error)}"
