"""Functions with a bound: a map across one is refuted although no activation of the small model reaches the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import CONFIG_MAPPING

from lowbit.models.architecture import DeclaredEdge
from lowbit.models.discovery import discover
from lowbit.models.discovery.capture import Call
from lowbit.models.discovery.fold import draw, fold
from lowbit.models.discovery.proof import LayerProof
from lowbit.models.discovery.sites import owners_of

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 128,
}
MPT: dict[str, Any] = {"vocab_size": 128, "d_model": 96, "n_heads": 6, "n_layers": 2, "max_seq_len": 128}


@pytest.mark.parametrize(
    ("type", "given", "edges"),
    [
        ("olmo", {**SIZES, "clip_qkv": None}, {"heads", "channels", "qk"}),
        ("olmo", {**SIZES, "clip_qkv": 8.0}, {"channels"}),
        ("olmo", {**SIZES, "clip_qkv": 1e6}, {"channels"}),
        ("mpt", {**MPT, "attn_config": {"clip_qkv": None}}, {"norm", "heads", "qk"}),
        ("mpt", {**MPT, "attn_config": {"clip_qkv": 8.0}}, {"norm"}),
    ],
)
def test_a_model_that_clips_its_queries_keys_and_values_has_no_edge_across(type, given, edges):
    found = discover(CONFIG_MAPPING[type](**given))
    assert {edge.kind for layer in found.architecture.layers for edge in layer.edges} == edges
    reasons = [one.reason for one in found.record.findings if one.edge.startswith("heads ")]
    assert ("clamp, which has a bound, lies across it" in reasons) == ("heads" not in edges)


class Bounded(nn.Module):
    """``down(act(up(x)))`` on inputs so small that no bound of 1 or more is reached."""

    def __init__(self, act: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(16, 8).double(), nn.Linear(8, 16).double()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


def refutation(act: Callable[[Tensor], Tensor]) -> tuple[str, float]:
    """Why up to down is no edge of positive scales, and what such a map changes of the output."""
    layer = Bounded(act)
    x = 0.1 * torch.randn(1, 18, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    proof = LayerProof(layer, Call((x,), {}, ((torch.cat([x, x]),), {})), owners_of(layer))
    edge = DeclaredEdge("channels", "up", ("down",), "positive")
    map = draw(edge, proof.owners, "positive", torch.Generator().manual_seed(0))
    moved = proof.output(fold(edge, proof.owners, proof.params, map))
    return proof.refutation(edge, map), float((moved - proof.wanted).abs().max())


TEN = torch.tensor(10.0, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("clamp", lambda x: x.clamp(-10, 10)),
        ("clamp", lambda x: x.clamp(max=TEN)),
        ("clamp_", lambda x: x.clone().clamp_(min=-10, max=10)),
        ("clip", lambda x: torch.clip(x, max=10)),
        ("clamp_max", lambda x: torch.clamp_max(x, 10)),
        ("minimum", lambda x: torch.minimum(x, TEN)),
        ("minimum", lambda x: torch.minimum(torch.full_like(x, 10), x)),
        ("min", lambda x: torch.min(x, TEN)),
        ("hardtanh", lambda x: F.hardtanh(x, -10, 10)),
        ("relu6", lambda x: F.relu6(x)),
        ("gt", lambda x: torch.where(x > 10, TEN, x)),
        ("le", lambda x: torch.where(x <= 10, x, TEN)),
    ],
)
def test_a_bound_that_is_not_reached_refutes(name, act):
    reason, change = refutation(act)
    assert change < 1e-12  # the output does not show it
    assert reason == f"{name.rstrip('_')}, which has a bound, lies across it"


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.clamp(min=0),
        lambda x: torch.maximum(x, torch.zeros_like(x)),
        lambda x: x.clamp(torch.finfo(torch.float32).min, torch.finfo(torch.float32).max),
        lambda x: torch.where(x > 0, x, 0.1 * x),
        lambda x: x / x.detach().new_full((), 2.0).clamp(min=1e-6),  # a constant
        lambda x: x * torch.arange(18.0).double().clamp(max=10)[:, None],  # positions
        lambda x: x.max(-1, keepdim=True).values.mul(0) + x,
    ],
)
def test_a_bound_without_a_size_or_of_something_else_refutes_nothing(act):
    assert refutation(act)[0] == ""


def test_a_bound_on_what_a_map_leaves_refutes_nothing():
    """As of normalized probabilities: what is clamped stays as it is under the map."""
    layer = Bounded(lambda x: x)
    layer.forward = lambda x: layer.down(layer.up(x)).clamp(-100, 100)  # type: ignore[method-assign]
    x = torch.randn(1, 18, 16, dtype=torch.float64)
    proof = LayerProof(layer, Call((x,), {}, ((torch.cat([x, x]),), {})), owners_of(layer))
    edge = DeclaredEdge("channels", "up", ("down",))
    assert proof.refutation(edge, draw(edge, proof.owners, "diagonal", torch.Generator().manual_seed(0))) == ""
