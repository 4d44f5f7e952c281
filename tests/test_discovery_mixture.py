"""What discovery says of a layer's experts: which module runs, what stays float, edges of each expert, plain data."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers.integrations.moe import use_experts_implementation

from lowbit.models.architecture import Architecture, DeclaredEdge, ExpertLinear, Experts, LayerKind, Part
from lowbit.models.description import described, from_dict, to_dict
from lowbit.models.discovery.capture import Call
from lowbit.models.discovery.kinds import signature
from lowbit.models.discovery.layout import Mismatch
from lowbit.models.discovery.listed import expert_lists, listed_in
from lowbit.models.discovery.mixture import mixture_in, of_each_expert, stacks_of
from lowbit.models.discovery.own_code import OwnCode
from lowbit.models.discovery.shrink import fewer_experts
from lowbit.models.experts import gated_experts
from lowbit.models.listed_experts import ListedExperts
from tiny import tiny_model

EXPERTS = gated_experts("mlp.experts", 2, 3, 8)
LISTED = ListedExperts("mlp.experts", 3, (("w1", "w3"), ("w2",)))


@use_experts_implementation
class RegisteredExperts(nn.Module):
    """Experts of the registry, whose own code adds ``extra`` to what the registry's functions compute."""

    def __init__(self, config, extra):
        super().__init__()
        self.num_experts, self.extra, self.act_fn = 3, extra, nn.SiLU()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6, dtype=torch.float64))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4, dtype=torch.float64))

    def forward(self, hidden_states, top_k_index, top_k_weights):
        out = torch.zeros_like(hidden_states)
        for number in range(3):
            token, at = torch.where(top_k_index == number)
            gate, up = (hidden_states[token] @ self.gate_up_proj[number].T).chunk(2, -1)
            y = (self.act_fn(gate) * up) @ self.down_proj[number].T
            out.index_add_(0, token, y * top_k_weights[token, at, None])
        return out + self.extra


class RegisteredLayer(nn.Module):
    def __init__(self, extra=0.0, modules=1):
        super().__init__()
        config = SimpleNamespace(_experts_implementation="eager")
        self.several = nn.ModuleList(RegisteredExperts(config, extra) for _ in range(modules))
        self.short = nn.Conv1d(6, 6, 3, groups=1)

    def forward(self, x):
        chosen = torch.arange(len(x))[:, None] % 3
        for experts in self.several:
            x = x + experts(x, chosen, torch.ones(len(x), 1, dtype=x.dtype))
        return x


def call_of(width=6):
    one, two = torch.randn(7, width, dtype=torch.float64), torch.randn(14, width, dtype=torch.float64)
    return Call((one,), {}, ((two,), {}))


def test_a_module_that_computes_what_the_registry_says_is_run_expert_by_expert():
    found = mixture_in(RegisteredLayer(), call_of())
    assert (found.module, found.kept, dict(found.why)) == ("several.0", (), {})


def test_a_module_that_computes_something_else_stays_float_and_says_why():
    found = mixture_in(RegisteredLayer(extra=1e-3), call_of())
    assert found.module is None
    assert found.kept == ("several.0.gate_up_proj", "several.0.down_proj")
    assert all("computes something else than expert after expert" in found.why[name] for name in found.kept)


class OwnExperts(nn.Module):
    """Experts outside the registry, with something that discovery has to refuse."""

    def __init__(self, fault):
        super().__init__()
        self.fault = fault
        self.up = nn.Parameter(torch.randn(4 if fault == "numbers" else 3, 6, 5, dtype=torch.float64))
        self.down = nn.Parameter(torch.randn(*((3, 6, 5) if fault == "turned" else (3, 5, 6)), dtype=torch.float64))
        if fault == "biases":
            self.up_bias = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))

    def forward(self, x):
        out = torch.zeros_like(x)
        for number in range(3):
            inner = nn.functional.relu(x[number::3] @ self.up[number])
            if self.fault == "other use":
                inner = inner * self.up[number].abs().max()
            down = self.down[number]
            out[number::3] = inner @ (down.T if self.fault == "turned" else down)
        return out


class OwnLayer(nn.Module):
    def __init__(self, fault=""):
        super().__init__()
        self.experts = OwnExperts(fault)

    def forward(self, x):
        return x + self.experts(x)


def test_a_module_outside_the_registry_is_run_by_its_own_code():
    found = mixture_in(OwnLayer(), call_of())
    assert (found.module, found.kept, dict(found.why)) == ("experts", (), {})
    assert found.own_code == OwnCode("experts", ("experts.up",), "experts.down", transposed=True, routed=True)


@pytest.mark.parametrize(
    ("fault", "why"),
    [
        ("numbers", r"hold different numbers of experts \(3, 4\)"),
        ("turned", r"hold matrices as \(in, out\) and some as \(out, in\)"),
        ("biases", "have biases"),
        ("other use", "do not run one after the other|computes something else"),
    ],
)
def test_what_cannot_be_proven_of_own_code_stays_float_and_says_why(fault, why):
    found = mixture_in(OwnLayer(fault), call_of())
    assert (found.module, found.kept[:2]) == (None, ("experts.up", "experts.down"))
    assert all(re.search(why, found.why[name]) for name in found.kept), found.why


def test_of_two_mixtures_in_a_layer_one_is_run():
    found = mixture_in(RegisteredLayer(modules=2), call_of())
    assert found.module == "several.0"
    assert found.kept == ("several.1.gate_up_proj", "several.1.down_proj")
    assert found.why["several.1.down_proj"] == "a layer has one mixture"


def test_several_matrices_in_a_parameter_are_found_and_convolutions_are_none():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(12, 4))
            self.scale = nn.Parameter(torch.zeros(4))

    layer = nn.ModuleDict(
        {
            "experts": Own(),
            "other": Own(),
            "conv": nn.Conv1d(4, 4, 3),
            "router": nn.Linear(4, 3),
            "norm": nn.RMSNorm(4),
        }
    )
    layer.stack = nn.Parameter(torch.zeros(3, 4, 4))
    layer.thin = nn.Parameter(torch.zeros(1, 1, 4))
    assert stacks_of(layer) == ["stack", "experts.w1"]


def test_an_edge_between_experts_is_one_for_each_of_them():
    up, gate = (Part("mlp.experts.gate_up_proj", rows=rows) for rows in (range(3, 6), range(3)))
    edge = DeclaredEdge("channels", up, ("mlp.experts.down_proj",), partner=gate, gathers=True, shift=True)
    assert of_each_expert(edge, EXPERTS) == tuple(
        DeclaredEdge(
            "channels",
            f"mlp.experts.{n}.up_proj",
            (f"mlp.experts.{n}.down_proj",),
            partner=f"mlp.experts.{n}.gate_proj",
        )
        for n in range(2)
    )
    some = replace(edge, src=Part("mlp.experts.gate_up_proj", rows=(5, 3)), partner=None)
    assert of_each_expert(some, EXPERTS)[1].src == Part("mlp.experts.1.up_proj", rows=(2, 0))


def test_an_edge_of_a_norm_ends_in_every_expert():
    edge = DeclaredEdge("norm", "norm", ("mlp.gate", "mlp.experts.gate_up_proj", "mlp.up"), gathers=True, shift=True)
    names = tuple(f"mlp.experts.{n}.{one}_proj" for n in range(2) for one in ("gate", "up"))
    assert of_each_expert(edge, EXPERTS) == (DeclaredEdge("norm", "norm", ("mlp.gate", *names, "mlp.up")),)
    other = DeclaredEdge("norm", "norm", ("q", "k"), gathers=True)
    assert of_each_expert(other, EXPERTS) == (other,)


@pytest.mark.parametrize(
    "edge",
    [
        DeclaredEdge("channels", "mlp.experts.gate_up_proj", ("mlp.experts.down_proj",)),
        DeclaredEdge("channels", "mlp.experts.down_proj", ("other",)),
        DeclaredEdge("norm", "norm", ("mlp.experts.down_proj",)),
        DeclaredEdge("norm", "norm", ("mlp.experts.gate_up_proj",)),
    ],
)
def test_an_edge_that_is_not_of_one_linear_of_an_expert_is_none(edge):
    with pytest.raises(Mismatch, match=r"experts|several linears"):
        of_each_expert(edge, EXPERTS)


class Member(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(8, width), nn.Linear(width, 8), nn.Linear(8, width)


def list_layer(count, width=4):
    return nn.ModuleDict({"mlp": nn.ModuleDict({"experts": nn.ModuleList(Member(width) for _ in range(count))})})


def reads_of(tokens):
    """What the linears of experts read, with the tokens that reach each expert."""
    inputs = {}
    for number, count in enumerate(tokens):
        if count is not None:
            x, y = torch.randn(count, 8), torch.randn(count, 4)
            inputs |= {f"mlp.experts.{number}.{name}": own for name, own in (("w1", x), ("w3", x), ("w2", y))}
    return inputs


def test_a_list_is_of_experts_if_its_members_see_some_of_the_tokens():
    layer = list_layer(3)
    assert list(expert_lists(layer)) == ["mlp.experts"]
    for tokens in ([7, 5, 6], [9, None, 9]):
        assert listed_in(layer, reads_of(tokens), 9) == LISTED
    assert listed_in(layer, reads_of([9, 9, 9]), 9) is None
    assert listed_in(layer, {}, 9) is None
    uneven = list_layer(2)
    uneven["mlp"]["experts"][1] = Member(5)
    assert not expert_lists(uneven)


def test_a_list_of_more_equal_modules_has_the_same_form():
    assert signature(list_layer(3), sizes=False) == signature(list_layer(8), sizes=False)
    assert signature(list_layer(3)) != signature(list_layer(8))
    other = list_layer(3)
    other["mlp"]["experts"][2].clipped = True
    assert signature(list_layer(3), sizes=False) != signature(other, sizes=False)


def test_mixtures_are_stored_as_plain_data_each_expert_once():
    edges = (
        DeclaredEdge("norm", "norm", ("mlp.gate", *(name for group in EXPERTS.groups[:2] for name in group), "up")),
        DeclaredEdge("channels", "up", ("down",)),
        *(
            DeclaredEdge(
                "channels",
                Part(f"mlp.experts.{n}.up_proj", rows=(2, 0)),
                (f"mlp.experts.{n}.down_proj",),
                partner=f"mlp.experts.{n}.gate_proj",
            )
            for n in range(2)
        ),
    )
    stacked = LayerKind(
        (("q",), ("mlp.gate",), *EXPERTS.groups, ("up",)), edges, experts=EXPERTS, routers=frozenset({"mlp.gate"})
    )
    listed = LayerKind((("q",), *LISTED.groups), (), listed=LISTED, routers=frozenset({"mlp.gate"}))
    turns = Experts(
        "mlp.experts",
        2,
        (ExpertLinear("gate", "both", (0, 2, 4), "bias"), ExpertLinear("up", "both", (1, 3, 5), "bias")),
        ExpertLinear("down", "down", range(8), "down_bias"),
        transposed=True,
        apart=False,
    )
    own = Architecture(
        "any",
        "layers",
        "head",
        "embed",
        (stacked, listed, LayerKind((("q",),), (), kept=("w",)), LayerKind(turns.groups, (), experts=turns)),
    )
    stored = json.loads(json.dumps(to_dict(own)))
    assert from_dict(stored) == own
    assert "mlp.experts.0" not in json.dumps(stored)
    told = described(own)
    assert told[1]["linears"] == ["q", "mlp.experts.*.w1 + mlp.experts.*.w3", "mlp.experts.*.w2"]
    assert told[1]["mixer"].endswith("3 experts in mlp.experts")
    assert told[2]["kept"] == ["w"]


def test_a_config_with_few_experts_is_the_models_own_otherwise():
    config = tiny_model("qwen3-moe", num_experts=16, num_experts_per_tok=8).config
    few = fewer_experts(config)
    assert (few.num_experts, few.num_experts_per_tok) == (4, 2)
    assert (config.num_experts, config.num_experts_per_tok) == (16, 8)
    changed = {"num_experts", "num_experts_per_tok", "num_local_experts"}
    one, other = ({k: v for k, v in own.to_dict().items() if k not in changed} for own in (few, config))
    skipped = ("architectures", "dtype", "_name_or_path", "transformers_version")
    assert {k: v for k, v in one.items() if k not in skipped} == {k: v for k, v in other.items() if k not in skipped}
