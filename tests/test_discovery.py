"""Structures that no family declares, found from configs of other sizes, and proofs that refuse what is none."""

from __future__ import annotations

import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING

from lowbit.models.architecture import DeclaredEdge, Heads, Part, Ref
from lowbit.models.discovery import Discovery, discover
from lowbit.models.discovery.capture import Call
from lowbit.models.discovery.fold import draw
from lowbit.models.discovery.proof import LayerProof
from lowbit.models.discovery.real import checked
from lowbit.models.discovery.sites import owners_of

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "intermediate_size": 80, "num_key_value_heads": 2}
OLD = {"vocab_size": 128, "n_embd": 96, "n_layer": 2, "n_positions": 128, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {**OLD, "n_head": 6},
    "codegen": {**OLD, "n_head": 8, "rotary_dim": 6},
    "gpt_neox": {**SIZES, "intermediate_size": 80},
    "cohere": GROUPED,
    "olmo2": GROUPED,
    "nemotron": GROUPED,
    "glm": {**GROUPED, "head_dim": 32},
    "phi3": {**GROUPED, "num_key_value_heads": 3},
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "qwen3_moe": {**GROUPED, "head_dim": 24, "moe_intermediate_size": 40, "num_experts": 8},
    "gpt_oss": {**GROUPED, "head_dim": 32, "num_local_experts": 6, "layer_types": ["full_attention"] * 2},
    "deepseek_v3": {**GROUPED, "num_key_value_heads": 6, "n_routed_experts": 8, "num_experts_per_tok": 2,
                    "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 40,
                    "q_lora_rank": 48, "kv_lora_rank": 40,
                    "qk_nope_head_dim": 24, "qk_rope_head_dim": 16, "v_head_dim": 32},
    "gemma4_text": {**GROUPED, "num_hidden_layers": 4, "head_dim": 32,
                    "global_head_dim": 40,
                    "hidden_size_per_layer_input": 24, "vocab_size_per_layer_input": 128, "num_kv_shared_layers": 2,
                    "layer_types": ["sliding_attention", "full_attention"] * 2},
}  # fmt: skip

# By type and layer: the edges, as ``told`` writes them.
WANTED: dict[str, dict[int, list[str]]] = {
    "gpt2": {
        0: [
            "norm ln_1 > attn.c_attn: diagonal, gathers, shift",
            "norm ln_2 > mlp.c_fc: diagonal, gathers, shift",
            "heads attn.c_attn 192+96 > attn.c_proj: matrix, 6/6 x 16, shift",
            "qk attn.c_attn 0+96 > attn.c_attn 96+96: matrix, 6/6 x 16, 16 free",
        ]
    },
    "codegen": {  # four blocks of q, v, k, each of two heads of 12
        0: [
            "norm ln_1 > attn.qkv_proj, mlp.fc_in: diagonal, gathers, shift",
            "heads attn.qkv_proj 24+24 96+24 168+24 240+24 > attn.out_proj: matrix, 8/8 x 12, shift",
            "qk attn.qkv_proj 0+24 72+24 144+24 216+24 > attn.qkv_proj 48+24 120+24 192+24 264+24: "
            "matrix, 8/8 x 12, 3 pairs (0, 1), 6 free",
        ]
    },
    "gpt_neox": {
        0: [
            "norm input_layernorm > attention.query_key_value: diagonal, gathers, shift",
            "norm post_attention_layernorm > mlp.dense_h_to_4h: diagonal, gathers, shift",
            "heads attention.query_key_value 32+16 80+16 128+16 176+16 224+16 272+16 > attention.dense: "
            "matrix, 6/6 x 16, shift",
            "qk attention.query_key_value 0+16 48+16 96+16 144+16 192+16 240+16 > "
            "attention.query_key_value 16+16 64+16 112+16 160+16 208+16 256+16: "
            "matrix, 6/6 x 16, 2 pairs (0, 2), 12 free",
        ]
    },
    "cohere": {
        0: [
            "norm input_layernorm > self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, mlp.gate_proj, "
            "mlp.up_proj: diagonal, gathers, shift",
            "heads self_attn.v_proj > self_attn.o_proj: matrix, 6/2 x 16, shift",
            "channels mlp.up_proj > mlp.down_proj: diagonal, with mlp.gate_proj, gathers",
            "qk self_attn.q_proj > self_attn.k_proj: matrix, 6/2 x 16, 8 pairs (0, 1)",
        ]
    },
    "olmo2": {  # norms behind each half only
        0: [
            "heads self_attn.v_proj > self_attn.o_proj: matrix, 6/2 x 16, shift",
            "channels mlp.up_proj > mlp.down_proj: diagonal, with mlp.gate_proj, gathers",
            "qk self_attn.q_norm > self_attn.k_norm: diagonal, 6/2 x 16, 8 pairs (0, 8)",
        ]
    },
    "nemotron": {
        0: [
            "norm input_layernorm > self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: "
            "diagonal, 1 + w, gathers, shift",
            "norm post_attention_layernorm > mlp.up_proj: diagonal, 1 + w, gathers, shift",
            "heads self_attn.v_proj > self_attn.o_proj: matrix, 6/2 x 16, shift",
            "channels mlp.up_proj > mlp.down_proj: positive, power 2, gathers",
            "qk self_attn.q_proj > self_attn.k_proj: matrix, 6/2 x 16, 4 pairs (0, 4), 8 free",
        ]
    },
    "glm": {
        0: [
            "norm input_layernorm > self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: diagonal, gathers, shift",
            "norm post_attention_layernorm > mlp.gate_up_proj: diagonal, gathers, shift",
            "heads self_attn.v_proj > self_attn.o_proj: matrix, 6/2 x 32, shift",
            "channels mlp.gate_up_proj 80+80 > mlp.down_proj: diagonal, with mlp.gate_up_proj 0+80, gathers",
            "qk self_attn.q_proj > self_attn.k_proj: matrix, 6/2 x 32, 8 pairs (0, 1), 16 free",
        ]
    },
    "phi3": {
        0: [
            "norm input_layernorm > self_attn.qkv_proj: diagonal, gathers, shift",
            "norm post_attention_layernorm > mlp.gate_up_proj: diagonal, gathers, shift",
            "heads self_attn.qkv_proj 144+48 > self_attn.o_proj: matrix, 6/3 x 16, shift",
            "channels mlp.gate_up_proj 80+80 > mlp.down_proj: diagonal, with mlp.gate_up_proj 0+80, gathers",
            "qk self_attn.qkv_proj 0+96 > self_attn.qkv_proj 96+48: matrix, 6/3 x 16, 8 pairs (0, 8)",
        ]
    },
    "lfm2": {
        0: [
            "norm operator_norm > conv.in_proj: diagonal, gathers, shift",
            "norm ffn_norm > feed_forward.w1, feed_forward.w3: diagonal, gathers, shift",
            "channels conv.in_proj 0+96 > conv.out_proj: diagonal",
            "channels conv.in_proj 96+96 > conv.out_proj: diagonal",
            "channels conv.in_proj 192+96 > conv.out_proj: diagonal",
            "channels feed_forward.w3 > feed_forward.w2: diagonal, with feed_forward.w1, gathers",
        ],
        1: [
            "norm operator_norm > self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: diagonal, gathers, shift",
            "norm ffn_norm > feed_forward.w1, feed_forward.w3: diagonal, gathers, shift",
            "heads self_attn.v_proj > self_attn.out_proj: matrix, 6/2 x 16, shift",
            "channels feed_forward.w3 > feed_forward.w2: diagonal, with feed_forward.w1, gathers",
            "qk self_attn.q_layernorm > self_attn.k_layernorm: diagonal, 6/2 x 16, 8 pairs (0, 8)",
        ],
    },
    "qwen3_moe": {
        0: [
            "norm input_layernorm > self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: diagonal, gathers, shift",
            "norm post_attention_layernorm > mlp.gate, mlp.experts.*.gate_proj, mlp.experts.*.up_proj: diagonal",
            "heads self_attn.v_proj > self_attn.o_proj: matrix, 6/2 x 24, shift",
            "channels mlp.experts.*.up_proj > mlp.experts.*.down_proj: diagonal, with mlp.experts.*.gate_proj",
            "qk self_attn.q_norm > self_attn.k_norm: diagonal, 6/2 x 24, 12 pairs (0, 12)",
        ]
    },
    "gpt_oss": {  # sinks: attention's weights do not sum to 1; a clamp between up and down
        0: [
            "norm input_layernorm > self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: diagonal, gathers, shift",
            "norm post_attention_layernorm > mlp.router, mlp.experts.*.gate_proj, mlp.experts.*.up_proj: diagonal",
            "heads self_attn.v_proj > self_attn.o_proj: matrix, 6/2 x 32",
            "qk self_attn.q_proj > self_attn.k_proj: matrix, 6/2 x 32, 16 pairs (0, 16)",
        ]
    },
    "gemma4_text": {  # layers 2 and 3 read the keys and values of 0 and 1
        0: [
            "norm input_layernorm > self_attn.q_proj, self_attn.k_proj, self_attn.v_proj: diagonal, gathers, shift",
            "norm pre_feedforward_layernorm > mlp.gate_proj, mlp.up_proj: diagonal, gathers, shift",
            "channels mlp.up_proj > mlp.down_proj: diagonal, with mlp.gate_proj, gathers",
        ],
        2: [
            "norm input_layernorm > self_attn.q_proj: diagonal, gathers, shift",
            "norm pre_feedforward_layernorm > mlp.gate_proj, mlp.up_proj: diagonal, gathers, shift",
            "channels mlp.up_proj > mlp.down_proj: diagonal, with mlp.gate_proj, gathers",
        ],
    },
    "deepseek_v3": {  # values and the plain part of keys in kv_b, the rotary part in kv_a, shared by all heads
        1: [
            "norm input_layernorm > self_attn.q_a_proj, self_attn.kv_a_proj_with_mqa: diagonal, gathers, shift",
            "norm self_attn.q_a_layernorm > self_attn.q_b_proj: diagonal, gathers, shift",
            "norm self_attn.kv_a_layernorm > self_attn.kv_b_proj: diagonal, gathers, shift",
            "norm post_attention_layernorm > mlp.gate, mlp.shared_experts.gate_proj, mlp.shared_experts.up_proj, "
            "mlp.experts.*.gate_proj, mlp.experts.*.up_proj: diagonal",
            "heads self_attn.kv_b_proj 24+32 80+32 136+32 192+32 248+32 304+32 > self_attn.o_proj: "
            "matrix, 6/6 x 32, shift",
            "channels mlp.experts.*.up_proj > mlp.experts.*.down_proj: diagonal, with mlp.experts.*.gate_proj",
            "channels mlp.shared_experts.up_proj > mlp.shared_experts.down_proj: "
            "diagonal, with mlp.shared_experts.gate_proj, gathers",
            "qk self_attn.q_b_proj 0+24 40+24 80+24 120+24 160+24 200+24 > "
            "self_attn.kv_b_proj 0+24 56+24 112+24 168+24 224+24 280+24: matrix, 6/6 x 24, 24 free",
            "qk self_attn.q_b_proj 24+16 64+16 104+16 144+16 184+16 224+16 > self_attn.kv_a_proj_with_mqa 40+16: "
            "matrix, 6/1 x 16, 8 pairs (0, 1)",
        ]
    },
}  # fmt: skip


def told(edge: DeclaredEdge) -> str:
    """All fields of an edge that say something."""
    heads = edge.heads and f"{edge.heads.query}/{edge.heads.kv} x {edge.heads.dim}"
    facts = [
        edge.limit,
        heads,
        edge.offset and f"{edge.offset:g} + w",
        edge.power != 1 and f"power {edge.power}",
        edge.pairs and f"{len(edge.pairs)} pairs {edge.pairs[0]}",
        edge.free and f"{len(edge.free)} free",
        edge.partner and f"with {end(edge.partner)}",
        edge.gathers and "gathers",
        edge.shift and "shift",
    ]
    return (
        f"{edge.kind} {end(edge.src)} > {', '.join(dict.fromkeys(map(end, edge.dst)))}: "
        f"{', '.join(fact for fact in facts if fact)}"
    )


def end(ref: Ref) -> str:
    """A module, ``*`` for an expert's number, with ``first+count`` of each stretch of its rows or columns."""
    if isinstance(ref, str):
        return re.sub(r"\.experts\.[0-9]+\.", ".experts.*.", ref)
    numbers = list(ref.rows if ref.rows is not None else ref.columns or ())
    starts = [i for i, number in enumerate(numbers) if not i or number != numbers[i - 1] + 1]
    counts = [after - at for at, after in zip(starts, [*starts[1:], len(numbers)], strict=True)]
    return " ".join([ref.module, *(f"{numbers[at]}+{count}" for at, count in zip(starts, counts, strict=True))])


@cache
def found(type: str) -> Discovery:
    return discover(CONFIG_MAPPING[type](**CONFIGS[type]))


@pytest.mark.parametrize("type", WANTED)
def test_structure(type):
    for layer, wanted in WANTED[type].items():
        assert list(dict.fromkeys(map(told, found(type).architecture.layers[layer].edges))) == wanted


def test_what_is_no_edge_has_its_reason():
    said = {(one.layer, one.edge): one.reason for one in found("gemma4_text").record.findings if not one.limit}
    assert "the model's logits change" in said[0, "heads self_attn.v_proj > self_attn.o_proj"]
    assert "the model's logits change" in said[0, "qk self_attn.q_norm > self_attn.k_norm"]
    said = {(one.layer, one.edge): one.reason for one in found("olmo2").record.findings if not one.limit}
    assert "does not come back" in said[0, "norm post_attention_layernorm"]


def test_a_layer_that_does_not_run_alone_is_said():
    record = found("gemma4_text").record
    assert record.checked == (0, 1)
    assert sum("does not run alone" in note for note in record.notes) == 2
    assert all(found(type).record.checked for type in WANTED)


def test_groups_experts_and_storage():
    layer = found("deepseek_v3").architecture.layers[1]
    assert layer.groups[0] == ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")
    assert [group for group in layer.groups if any("_proj" not in name for name in group)] == [("mlp.gate",)]
    assert layer.routers == {"mlp.gate"}
    assert found("deepseek_v3").record.experts == ((), ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"))
    assert found("gpt2").architecture.layers[0].transposed == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert found("lfm2").architecture.layers[0].attention is None
    assert found("lfm2").architecture.layers[1].attention == "self_attn"


REVERSED = tuple(reversed(range(16)))


class Gated(nn.Module):
    """Values through a fixed mixing of tokens, an output gate of each channel, and an MLP under gelu."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("v", "gate", "o", "fc1", "fc2"):
            setattr(self, name, nn.Linear(16, 16, dtype=torch.float64))
        self.mix = torch.rand(18, 18, dtype=torch.float64).tril()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = hidden_states + self.o(self.mix @ self.v(hidden_states) * self.gate(hidden_states).sigmoid())
        return hidden + self.fc2(nn.functional.gelu(self.fc1(hidden)))


@pytest.mark.parametrize(
    ("edge", "passes"),
    [
        (DeclaredEdge("heads", "v", ("o",), "matrix", Heads(2, 2, 8)), False),
        (DeclaredEdge("heads", "v", ("o",), "diagonal", Heads(2, 2, 8)), True),
        (DeclaredEdge("heads", "v", (Part("o", columns=REVERSED),), "diagonal", Heads(2, 2, 8)), False),
        (DeclaredEdge("channels", "gate", ("o",)), False),
        (DeclaredEdge("channels", "fc1", ("fc2",)), False),
        (DeclaredEdge("channels", "fc1", ("fc2",), "positive"), False),
        (DeclaredEdge("channels", "v", ("o",), power=2), False),
    ],
)  # fmt: skip
def test_the_proof_refuses_what_is_no_edge(edge, passes):
    torch.manual_seed(0)
    layer = Gated()
    x = torch.randn(1, 18, 16, dtype=torch.float64)
    call = Call((x,), {}, ((torch.cat([x, x]),), {}))
    proof = LayerProof(layer, call, owners_of(layer))
    map = draw(edge, proof.owners, edge.limit, torch.Generator().manual_seed(0))
    reason = proof.refutation(edge, map)
    assert (not reason) == passes
    assert passes or reason.startswith("the layer's output changes by")


def test_an_edge_whose_source_does_nothing_is_refused():
    layer = Gated()
    with torch.no_grad():
        layer.fc2.weight.zero_()
    x = torch.randn(1, 18, 16, dtype=torch.float64)
    proof = LayerProof(layer, Call((x,), {}, ((torch.cat([x, x]),), {})), owners_of(layer))
    edge = DeclaredEdge("channels", "fc1", ("fc2",), "positive")
    map = draw(edge, proof.owners, "positive", torch.Generator().manual_seed(0))
    assert proof.refutation(edge, map) == "the source alone does not change the layer's output"


@pytest.mark.parametrize(
    ("edge", "passes"),
    [
        (DeclaredEdge("heads", "v", ("o",), "matrix", Heads(2, 2, 8)), False),
        (DeclaredEdge("heads", "v", ("o",), "diagonal", Heads(2, 2, 8)), True),
        (DeclaredEdge("channels", "gate", ("o",)), False),
    ],
)
@pytest.mark.parametrize("share", [1e-3, 1e-5, 1e-8])
def test_a_half_that_contributes_little_passes_no_false_edge_and_loses_no_true_one(edge, passes, share):
    """The smallest share is below what an absolute tolerance of 1e-9 sees, the others are near one of 1e-4."""
    torch.manual_seed(0)
    layer = Gated()
    with torch.no_grad():
        layer.o.weight.mul_(share)
    x = torch.randn(1, 18, 16, dtype=torch.float64)
    proof = LayerProof(layer, Call((x,), {}, ((torch.cat([x, x]),), {})), owners_of(layer))
    map = draw(edge, proof.owners, edge.limit, torch.Generator().manual_seed(0))
    left, alone = proof.effects(edge, map)
    assert share / 100 < alone < 10 * share
    assert (not proof.refutation(edge, map)) == passes
    assert (left < 1e-5 * alone) == passes


class OneLargeToken(nn.Module):
    """A layer whose last token is far larger than all others, as a recurrent state at random parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.own = Gated()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        large = torch.ones(18, 1, dtype=torch.float64)
        large[-1] = 1e30
        return self.own(hidden_states) + large * hidden_states


@pytest.mark.parametrize(
    ("edge", "passes"),
    [
        (DeclaredEdge("heads", "own.v", ("own.o",), "diagonal", Heads(2, 2, 8)), True),
        (DeclaredEdge("heads", "own.v", ("own.o",), "matrix", Heads(2, 2, 8)), False),
    ],
)
def test_a_token_that_outweighs_all_others_hides_nothing(edge, passes):
    torch.manual_seed(0)
    layer = OneLargeToken()
    x = torch.randn(1, 18, 16, dtype=torch.float64)
    proof = LayerProof(layer, Call((x,), {}, ((torch.cat([x, x]),), {})), owners_of(layer))
    map = draw(edge, proof.owners, edge.limit, torch.Generator().manual_seed(0))
    assert (not proof.refutation(edge, map)) == passes


class WithBuffer(Gated):
    """A layer that computes with a buffer that a checkpoint does not have."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.full((16,), 2.0), persistent=False)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        assert torch.equal(self.factor, torch.full_like(self.factor, 2.0))
        return super().forward(hidden_states * self.factor)


def test_a_layer_at_real_shape_has_the_values_of_its_buffers():
    layer = WithBuffer()
    for module in (layer.v, layer.gate, layer.o, layer.fc1, layer.fc2):
        module.to("meta")
    x = torch.randn(1, 18, 16, dtype=torch.float64)
    call = Call((x,), {}, ((torch.cat([x, x]),), {}))
    real: Any = SimpleNamespace(layers=[layer], calls=[call])
    edge = DeclaredEdge("heads", "v", ("o",), "diagonal", Heads(2, 2, 8))
    for _ in range(2):  # the layer stays as it is
        ((_, why),) = checked(real, layer, [edge])
        assert not why
    assert layer.v.weight.is_meta


@pytest.mark.parametrize(
    ("type", "given", "pairs", "free"),
    [
        # Phi-2: of heads of 80 dimensions 32 rotate; of 8, as in the second small model, 0.4 are no even number.
        ("phi", {"hidden_size": 320, "num_attention_heads": 4, "partial_rotary_factor": 0.4}, 16, 48),
        ("stablelm", {**GROUPED, "hidden_size": 240, "partial_rotary_factor": 0.3}, 6, 28),
        # GLM's layers know no such number, its config does.
        *[("glm", {**GROUPED, "head_dim": 40, "partial_rotary_factor": part}, int(20 * part), 40 - 2 * int(20 * part))
          for part in (0.1, 0.2, 0.25, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9)],
    ],
)  # fmt: skip
def test_a_part_of_a_head_that_is_odd_at_a_small_size(type, given, pairs, free):
    config = CONFIG_MAPPING[type](**{**SIZES, "intermediate_size": 80, **given})
    found = discover(config)
    edges = {edge.kind: edge for edge in found.architecture.layers[0].edges}
    assert edges.keys() >= {"norm", "heads", "qk"}
    assert (len(edges["qk"].pairs), len(edges["qk"].free)) == (pairs, free)
    assert found.record.checked == (0,)
    assert not found.record.notes
