"""Experts behind transformers' registry of experts functions, run densely: every expert sees every token.

Routing hides most channels of most experts from a short sequence. Here all of them are computed, so that a response
is seen in each; proofs run the library's own function.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from lowbit.models.discovery.sites import current

_NAME = "lowbit_dense"
_LEAST = 0.1  # of an expert's weight, for tokens that are not routed to it


def input_parameter(module: nn.Module) -> str:
    """The parameter of an experts module that reads hidden states."""
    return "gate_up_proj" if module.has_gate else "up_proj"


def _linear(module: Any, x: Tensor, name: str) -> Tensor:
    """``x`` ``(tokens, experts, in)`` through each expert's own matrix."""
    weight = getattr(module, name)
    out = torch.einsum("nei,eio->neo" if module.is_transposed else "nei,eoi->neo", x, weight)
    return out + getattr(module, f"{name}_bias") if module.has_bias else out


def dense_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All experts for all tokens ``(tokens, hidden)``, mixed with the routing weights and ``_LEAST``."""
    listener, prefix = current(module)
    first, last = input_parameter(module), "down_proj"
    experts = len(getattr(module, first))
    x = listener.read(f"{prefix}.{first}", hidden_states)
    up = _linear(module, x.unsqueeze(1).expand(-1, experts, -1), first)
    up = listener.write(f"{prefix}.{first}", up.flatten(1)).unflatten(1, (experts, -1))
    flat = up.flatten(0, 1)
    inner = (module._apply_gate(flat) if module.has_gate else module.act_fn(flat)).unflatten(0, (-1, experts))
    inner = listener.read(f"{prefix}.{last}", inner.flatten(1)).unflatten(1, (experts, -1))
    out = _linear(module, inner, last)
    if module.has_post_expert_norm:
        out = module.post_expert_norm(out)
    chosen = top_k_index.clamp(max=experts)
    weights = out.new_zeros(len(out), experts + 1).scatter_add(1, chosen, top_k_weights.to(out.dtype))
    return torch.einsum("neh,ne->nh", out, weights[:, :experts] + _LEAST)


ALL_EXPERTS_FUNCTIONS.register(_NAME, dense_experts)


@contextmanager
def all_experts(layer: nn.Module) -> Iterator[None]:
    """Within the context, the layer's experts see every token."""
    configs: dict[int, Any] = {
        id(m.config): m.config for m in layer.modules() if hasattr(m, "is_transposed") and hasattr(m, "config")
    }
    before = {key: config._experts_implementation for key, config in configs.items()}
    for config in configs.values():
        config._experts_implementation = _NAME
    try:
        yield
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
