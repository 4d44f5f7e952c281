"""Tiny random models of every architecture that is exported as ``.gguf``, with what is special of each switched on.

Embeddings, norm gains, biases and everything else that a model has are random: a tensor that is left out, or put in
another's place, shows in the logits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import mixtures
from lowbit.models import families
from lowbit.models.architecture import LayerKind
from lowbit.models.experts import gated_experts
from lowbit.models.families.family import Family
from lowbit.models.families.llama import K, O, Q, V
from tiny import tiny_ids, tiny_tokenizer

VOCAB = 128
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}
GRANITE_FACTORS: dict[str, Any] = {
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.2,
    "logits_scaling": 2.0,
}
LINEAR_GROUPED: dict[str, Any] = {
    "head_dim": 16,
    "num_hidden_layers": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "tie_word_embeddings": False,
}
FOUR_EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
GRANITE4 = GRANITE_FACTORS | {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": 96}
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
# Name of a case: model type and what differs from SIZES.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": (
        "qwen3_moe",
        {
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo2": ("olmo2", {}),
    "olmo3": (
        "olmo3",
        {
            "sliding_window": 8,
            "layer_types": ALTERNATING,
            "rope_parameters": {
                "full_attention": YARN,
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "granite": ("granite", GRANITE_FACTORS | {"attention_bias": True, "mlp_bias": True}),
    "granite-moe": (
        "granitemoe",
        GRANITE_FACTORS | {"num_local_experts": 4, "num_experts_per_tok": 2, "attention_bias": True},
    ),
    "granite-moe-shared": (
        "granitemoeshared",
        GRANITE_FACTORS | {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    ),
    "glm4": ("glm4", {"head_dim": 16, "attention_bias": True}),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention", "conv"], "block_auto_adjust_ff_dim": False}),
    "cohere2": ("cohere2", {"sliding_window": 8, "layer_types": ALTERNATING, "logit_scale": 0.5}),
    "ministral3": (
        "ministral3",
        {
            "head_dim": 24,
            "rope_parameters": YARN
            | {
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "mscale": 1.0,
                "mscale_all_dim": 0.5,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "phi3": ("phi3", {}),
    "phi3-long": (
        "phi3",
        {
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0, 1.1, 1.5, 2.0, 3.0, 4.5, 5.0, 6.0],
            },
        },
    ),
    "phi4-mini": (
        "phi3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}},
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 64,
        },
    ),
    "olmoe": ("olmoe", {"num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 2}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-12b": ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
    "gpt-neox": ("gpt_neox", {"hidden_act": "gelu_pytorch_tanh"}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1]}),
    "gpt-oss": (
        "gpt_oss",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ALTERNATING,
            "rope_parameters": YARN | {"truncate": True},
        },
    ),
    "qwen3.5": (
        "qwen3_5_text",
        {
            "head_dim": 16,
            "num_hidden_layers": 4,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3.5-grouped": ("qwen3_5_text", LINEAR_GROUPED),
    "qwen3.5-moe": ("qwen3_5_moe_text", LINEAR_GROUPED | FOUR_EXPERTS | {"shared_expert_intermediate_size": 64}),
    "qwen3-next": ("qwen3_next", LINEAR_GROUPED | FOUR_EXPERTS | {"shared_expert_intermediate_size": 64}),
    # inputs for each layer, wide MLPs where keys are shared, a cap
    "gemma4": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "sliding_window": 8,
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 32,
            "final_logit_softcapping": 3.0,
        },
    ),
    # keys that are values, fewer of them in layers with full attention
    "gemma4-large": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "sliding_window": 8,
            "hidden_size_per_layer_input": 0,
        },
    ),
    # experts beside the dense MLP
    "gemma4-moe": (
        "gemma4_text",
        {
            "head_dim": 16,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 8,
            "hidden_size_per_layer_input": 0,
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
    ),
    "glm4-moe": (
        "glm4_moe",
        {
            "head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "first_k_dense_replace": 1,
            "routed_scaling_factor": 1.5,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16, "rope_parameters": DYNAMIC}),
    "hunyuan-moe": (
        "hunyuan_v1_moe",
        {"head_dim": 16, "num_experts": 4, "moe_topk": 2, "rope_parameters": DYNAMIC},
    ),
    "granite4": (
        "granitemoehybrid",
        GRANITE4 | {"layer_types": ["full_attention"] * 3, "position_embedding_type": "rope"},
    ),
    "granite4-hybrid": (
        "granitemoehybrid",
        GRANITE4
        | {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "position_embedding_type": "nope",
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 1,
            "mamba_d_state": 16,
        },
    ),
    "seed-oss": ("seed_oss", {"head_dim": 16}),
    "ernie4.5": ("ernie4_5", {"head_dim": 16}),
    "exaone4": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 3}),
    "falcon-h1": (
        "falcon_h1",
        {
            "head_dim": 16,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 4,
            "mamba_d_head": 32,
            "mamba_n_groups": 2,
            "mamba_d_state": 16,
        },
    ),
    "arcee": ("arcee", {}),
    "nemotron": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "starcoder2": ("starcoder2", {}),
}


def olmoe_layer(config: Any, index: int) -> LayerKind:
    """A layer of OLMoE, whose edges are left out."""
    experts = gated_experts("mlp.experts", config.num_experts, config.intermediate_size, config.hidden_size)
    return LayerKind(
        ((Q, K, V), (O,), ("mlp.gate",), *experts.groups), (), experts=experts, routers=frozenset({"mlp.gate"})
    )


OLMOE = Family("olmoe", ("OlmoeForCausalLM",), "model.layers", olmoe_layer)


def declare(monkeypatch: Any) -> None:
    """Make the mixtures known to the package that it does not declare."""
    mixtures.declare(monkeypatch)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, OLMOE))


def config_of(case: str, **changes: Any) -> Any:
    """The config of a case; ``changes`` replace its arguments."""
    model_type, own = MODELS[case]
    config = CONFIG_MAPPING[model_type](**SIZES | own | changes)
    config.architectures = [AutoModelForCausalLM._model_mapping[type(config)].__name__]
    return config


def random_model(case: str, **changes: Any) -> Any:
    """A random float32 model in eval mode, whose attention depends on positions and whose routers disagree."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(case, **changes)).eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            if p.ndim < 2:
                p.add_(0.2 * noise)
            else:
                p.copy_(noise * (0.7 if "embed" in name else 1.2 / p.shape[-1] ** 0.5))
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            if name in saved:  # such as a factor on what a layer returns
                buffer.add_(0.2 * torch.randn(buffer.shape, generator=draw))
    return model


def saved(folder: Path, case: str, **changes: Any) -> Path:
    """A checkpoint folder of a random model, with a tokenizer that llama.cpp loads and a text."""
    model = random_model(case, **changes)
    model.save_pretrained(folder)
    tiny_tokenizer(merge=True).save_pretrained(folder)
    (folder / "calib.txt").write_text("".join(chr(30 + i) for i in tiny_ids(1, 3000, seed=5)[0].tolist()))
    return folder
