"""Tiny mixtures of experts that no family declares, two or three layers each, by the library's name of the type."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

import tiny
from tiny import COMMON

SIZES = {**COMMON, "num_hidden_layers": 2, "tie_word_embeddings": False}
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16, "mamba_expand": 2}
MAMBA_H = {
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "chunk_size": 16,
    "n_groups": 1,
    "use_mamba_kernels": False,
}
FIELDS: dict[str, dict[str, Any]] = {
    # a shared expert with a gate of its own, layers of another kind before it
    "qwen2_moe": {
        **SIZES,
        **EXPERTS,
        "num_experts": 4,
        "shared_expert_intermediate_size": 48,
        "mlp_only_layers": [],
        "decoder_sparse_step": 1,
    },
    "qwen3_5_moe_text": {
        **SIZES,
        **EXPERTS,
        **DELTA_NET,
        "head_dim": 16,
        "num_experts": 8,
        "shared_expert_intermediate_size": 48,
    },
    "qwen3_next": {
        **SIZES,
        **EXPERTS,
        **DELTA_NET,
        "head_dim": 16,
        "num_experts": 8,
        "shared_expert_intermediate_size": 48,
    },
    # experts stored as (in, out), gate and up interleaved, biases, a clamp between up and down
    "gpt_oss": {
        **SIZES,
        "intermediate_size": 32,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 32,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    # latent attention; a dense layer, then experts beside a shared one, and a router with a correction
    "deepseek_v3": {
        **SIZES,
        **EXPERTS,
        **LATENT,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    "glm4_moe": {
        **SIZES,
        **EXPERTS,
        "head_dim": 16,
        "n_routed_experts": 4,
        "first_k_dense_replace": 1,
        "use_qk_norm": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    "hunyuan_v1_moe": {**SIZES, "intermediate_size": 32, "head_dim": 16, "num_experts": 4, "moe_topk": [2, 2]},
    "ernie4_5_moe": {
        **SIZES,
        "moe_intermediate_size": 32,
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    # names of its own in files, norms over all heads
    "minimax_m2": {
        **SIZES,
        "intermediate_size": 32,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    },
    # mamba beside attention without a rotary embedding, factors on the residual, experts stored together
    "granitemoehybrid": {
        **SIZES,
        **MAMBA,
        "intermediate_size": 32,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 48,
        "layer_types": ["mamba", "attention"],
        "residual_multiplier": 0.5,
    },
    "olmoe": {**SIZES, "intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    # one mixer a layer; experts without a gate, whose relu is squared
    "nemotron_h": {
        **SIZES,
        **EXPERTS,
        **MAMBA_H,
        "num_hidden_layers": 3,
        "head_dim": 16,
        "n_routed_experts": 4,
        "moe_shared_expert_intermediate_size": 48,
        "layers_block_type": ["mamba", "moe", "attention"],
    },
    # code of its own multiplies all experts with all tokens, those of other experts times 0
    "llama4_text": {
        **SIZES,
        "intermediate_size": 32,
        "intermediate_size_mlp": 96,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "moe_layers": [1],
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
    # code of its own sorts the tokens by expert; experts of attention beside those of the MLP
    "jetmoe": {
        **SIZES,
        "intermediate_size": 32,
        "num_key_value_heads": 2,
        "kv_channels": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}
TOGETHER = ("gpt_oss", "granitemoehybrid", "jetmoe", "looped")  # checkpoints hold the library's own parameters
OWN_CODE = ("llama4_text", "jetmoe", "looped")  # the library's registry of experts functions does not serve them


def declare(monkeypatch: Any) -> None:
    """Make the types known to ``tiny_model``."""
    for name, fields in FIELDS.items():
        monkeypatch.setitem(tiny.CONFIGS, name, lambda name=name, fields=fields: CONFIG_MAPPING[name](**fields))
    monkeypatch.setitem(tiny.CONFIGS, "listed", lambda: ListedConfig(**LISTED))
    monkeypatch.setitem(tiny.CONFIGS, "looped", lambda: LoopedConfig(**LISTED))
    monkeypatch.setitem(tiny.CONFIGS, "summed", lambda: SummedConfig(**LISTED))


def tiny_mixture(name: str) -> Any:
    """A tiny model of the type that runs one expert after the other, as lowbit does."""
    model = tiny.tiny_model(name)
    model.set_experts_implementation("eager")
    return model


class ListedConfig(MixtralConfig):
    """Of a mixture with code of its own."""

    model_type = "listed_mixture"


class ListedExpert(nn.Module):
    """An expert with linears."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class ListedMixture(nn.Module):
    """Experts in a list, of which each token is sent to two."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_local_experts, bias=False)
        self.experts = nn.ModuleList(ListedExpert(config) for _ in range(config.num_local_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            at, rank = torch.where(chosen == number)
            if len(at):
                out.index_add_(0, at, expert(tokens[at]) * weights[at, rank, None])
        return out.view_as(x)


class ListedForCausalLM(MixtralForCausalLM):
    """Mixtral's layers with such a mixture."""

    config_class = ListedConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListedMixture(config)


AutoConfig.register("listed_mixture", ListedConfig)
AutoModelForCausalLM.register(ListedConfig, ListedForCausalLM)
LISTED = {**SIZES, "intermediate_size": 32, "num_local_experts": 5, "num_experts_per_tok": 2}
NAMES = (*FIELDS, "looped")


class LoopedConfig(MixtralConfig):
    """Of a mixture that multiplies with experts one by one."""

    model_type = "looped_mixture"


class LoopedMixture(nn.Module):
    """Experts in three parameters ``(experts, in, out)``, of which a loop reads one expert's matrices."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        experts, hidden, width = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.router = nn.Linear(hidden, experts, bias=False)
        self.gate = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)
        self.up = nn.Parameter(torch.randn(experts, hidden, width) / hidden**0.5)
        self.down = nn.Parameter(torch.randn(experts, width, hidden) / width**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.router(tokens).softmax(-1).topk(2)
        out = torch.zeros_like(tokens)
        for number in chosen.unique():
            at, rank = torch.where(chosen == number)
            inner = functional.silu(tokens[at] @ self.gate[number]) * (tokens[at] @ self.up[number])
            out.index_add_(0, at, (inner @ self.down[number]) * weights[at, rank, None])
        return out.view_as(x)


class LoopedForCausalLM(MixtralForCausalLM):
    """Mixtral's layers with such a mixture."""

    config_class = LoopedConfig
    mixture = LoopedMixture

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = self.mixture(config)


class SummedConfig(MixtralConfig):
    """Of a mixture that no product of one expert is seen of."""

    model_type = "summed_mixture"


class SummedMixture(LoopedMixture):
    """The same experts, all at once in a sum over indices."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2)
        weights = torch.zeros_like(self.router(x)).scatter(-1, chosen, weights)
        gate, up = (torch.einsum("bti,eio->bteo", x, own) for own in (self.gate, self.up))
        return torch.einsum("bteo,eoi,bte->bti", functional.silu(gate) * up, self.down, weights)


class SummedForCausalLM(LoopedForCausalLM):
    """Mixtral's layers with such a mixture."""

    config_class = SummedConfig
    mixture = SummedMixture


AutoConfig.register("looped_mixture", LoopedConfig)
AutoModelForCausalLM.register(LoopedConfig, LoopedForCausalLM)
AutoConfig.register("summed_mixture", SummedConfig)
AutoModelForCausalLM.register(SummedConfig, SummedForCausalLM)
