"""Mutations of ``config.json`` by what its fields mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fuzzing.change import NUMBERS, WRONG, Change, Mutator, Random, short
from fuzzing.json_files import load, of_text, of_tree, store

CONFIG = "config.json"
# Fields of other architectures, of the base class of all configs, and of tools.
FOREIGN: dict[str, tuple[Any, ...]] = {
    "_attn_implementation": ("eager", "sdpa", "flash_attention_2", "x", 1),
    "attn_implementation": ("eager", "flash_attention_2", "flex_attention", "x", None, 3),
    "_attn_implementation_internal": ("flash_attention_2", "x"),
    "attn_logit_softcapping": (20.0, 0, None, "x"),
    "attention_bias": (True, "x", None),
    "attention_dropout": (0.5, -1, 2, "x"),
    "attention_multiplier": (0.5, 2.0),
    "auto_map": ({"AutoConfig": "evil.Config"}, {"AutoModelForCausalLM": "evil--x.Model"}, "x", ["x"]),
    "chunk_size_feed_forward": (4, -1),
    "cross_attention_hidden_size": (8, "x"),
    "dtype": ("float16", "bfloat16", "float64", "float8_e4m3fn", "int8", "x", 3, {}, ["float32"], "auto", None),
    "torch_dtype": ("float16", "bfloat16", "x", 3, None),
    "embedding_multiplier": (12.0,),
    "final_logit_softcapping": (5.0, 0, None, "x"),
    "gguf_file": ("x.gguf",),
    "head_dim": (4, 8, 16, 0, -8, None, "8", 8.0, 7),
    "hidden_act": ("gelu", "relu", "silu", "x", None, 3, [], {}),
    "hidden_activation": ("gelu", "relu", "x", None),
    "id2label": ({"0": "a"}, ["a"], "x", {"x": 1}, 5),
    "num_labels": (2, -1, "x", 2**40),
    "is_decoder": (False, True),
    "is_encoder_decoder": (True,),
    "logits_scaling": (8.0,),
    "mlp_bias": (True,),
    "output_attentions": (True, "x"),
    "output_hidden_states": (True, "x"),
    "partial_rotary_factor": (0.5, 0, 2.0, "x"),
    "pretraining_tp": (2, 0, -1, "x"),
    "pruned_heads": ({"0": [0]}, [0], "x"),
    "quantization_config": ({"quant_method": "gptq"}, {"quant_method": "compressed-tensors"}, {}, "x", None, [], 4),
    "residual_multiplier": (0.2,),
    "return_dict": (False,),
    "rope_theta": (1000.0, 0, -1, "x", None, float("nan"), 1e6, 10**30),
    "sliding_window": (4, 8, 0, -1, None, "x", 4.0, 2**40),
    "use_sliding_window": (True, False, "x"),
    "max_window_layers": (0, 1, -1, "x"),
    "text_config": ({"hidden_size": 8}, {}, "x", None, []),
    "vision_config": ({"hidden_size": 8}, "x"),
    "torchscript": (True,),
    "tie_encoder_decoder": (True,),
    "tie_word_embeddings": (True, False, None, "x", 1, 0),
    "transformers_version": ("99.0", "x", 4, None, []),
    "use_bidirectional_attention": (True, "x"),
    "use_cache": (False, "x"),
    "num_experts": (4, "x"),
    "num_local_experts": (4,),
    "initializer_range": (-1, "x", float("nan"), 0),
    "layer_norm_eps": (1.0,),
    "max_position_embeddings": (1, 4, 12, 0, -1, "x", None, 1.5, 2**40, 2**63),
    "original_max_position_embeddings": (64, -1, "x"),
    "query_pre_attn_scalar": (4, 0, -1, "x", None),
    "vocab_size": (95, 97, 1, 0, -1, 2**40, 2**31, "x", None, 96.0, True),
    "num_hidden_layers": (1, 3, 0, -1, 10**5, 10**9, 2**63, "2", 2.0, None, True, [2]),
    "hidden_size": (16, 33, 0, -32, 2**40, 2**31, "x", 32.0, None, True),
    "intermediate_size": (47, 0, -48, 2**40, 2**62, "x", None, [48, 48], 48.0),
    "num_attention_heads": (1, 2, 3, 8, 0, -4, 2**40, "4", 4.0, None, True),
    "num_key_value_heads": (1, 3, 4, 8, 0, -2, 2**40, "2", None, 2.0),
    "rms_norm_eps": (0, -1, 1.0, "1e-6", None, float("nan"), float("inf"), True, [1e-6]),
    "pad_token_id": (-1, 95, 96, 2**40, "x", None, 0.5, [0]),
    "bos_token_id": (-1, 96, "x", None, [1], 2**40),
    "eos_token_id": (-1, 96, "x", None, [1, 2], [], {}, 2**40),
    "no_rope_layers": ([1], [0, 1], "x"),
    "layer_types": (
        [],
        ["full_attention"],
        ["full_attention"] * 2,
        ["sliding_attention"] * 2,
        ["full_attention", "sliding_attention"],
        ["full_attention"] * 3,
        ["x", "y"],
        ["chunked_attention"] * 2,
        ["linear_attention"] * 2,
        "full_attention",
        [None, None],
        [0, 1],
        {"0": "full_attention"},
        None,
    ),
}
ARCHITECTURES = (
    [],
    ["LlamaForCausalLM"],
    ["MistralForCausalLM"],
    ["Qwen2ForCausalLM"],
    ["Qwen3ForCausalLM"],
    ["Gemma2ForCausalLM"],
    ["Phi3ForCausalLM"],
    ["OPTForCausalLM"],
    ["SmolLM3ForCausalLM"],
    ["LlamaForSequenceClassification"],
    ["LlamaModel"],
    ["LlamaForCausalLM", "x"],
    ["GPT2LMHeadModel"],
    ["x"],
    ["os.system"],
    [None],
    [["LlamaForCausalLM"]],
    [{}],
    "LlamaForCausalLM",
    None,
    3,
)
MODEL_TYPES = (
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gemma3",
        "phi3",
        "phi",
        "opt",
        "smollm3",
    ),
    *("gpt2", "bert", "t5", "mixtral", "mamba", "llava", "whisper", "clip", "granite", "cohere", "x", "", "Llama"),
    *(None, 3, [], ["llama"], {}, True),
)
ROPE: tuple[Any, ...] = (
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "default"},
    {"rope_theta": 500.0},
    {"type": "linear", "factor": 4.0},
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "linear", "rope_theta": 1e4},
    {"rope_type": "linear", "factor": 0, "rope_theta": 1e4},
    {"rope_type": "linear", "factor": "x", "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4},
    {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "beta_fast": 1, "beta_slow": 32},
    {"rope_type": "yarn", "factor": -1.0, "rope_theta": 1e4},
    {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4},
    {
        "rope_type": "longrope",
        "short_factor": [1.5] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 8,
        "rope_theta": 1e4,
    },
    {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [4.0], "rope_theta": 1e4},
    {"rope_type": "longrope", "short_factor": "x", "long_factor": None, "rope_theta": 1e4},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 1e4,
    },
    {"rope_type": "llama3", "factor": 8.0, "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.0},
    {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 3.0},
    {"rope_type": "default", "rope_theta": 0},
    {"rope_type": "default", "rope_theta": -1},
    {"rope_type": "default", "rope_theta": "x"},
    {"rope_type": "default", "rope_theta": float("nan")},
    {"rope_type": "x", "rope_theta": 1e4},
    {"rope_type": 3},
    {"mrope_section": [1, 1, 2], "rope_type": "default", "rope_theta": 1e4},
    {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    {
        "full_attention": {"rope_type": "default", "rope_theta": 500.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
    {},
    None,
    "x",
    3,
    [],
    ["default"],
)


def _set(folder: Path, key: str, value: Any) -> Change:
    store(folder / CONFIG, load(folder / CONFIG) | {key: value})
    return Change(f"config {key} = {short(value)}")


def set_known_field(folder: Path, rng: Random) -> Change:
    key = rng.choice(list(FOREIGN))
    return _set(folder, key, rng.choice(FOREIGN[key]))


def set_architecture(folder: Path, rng: Random) -> Change:
    return _set(folder, "architectures", rng.choice(ARCHITECTURES))


def set_model_type(folder: Path, rng: Random) -> Change:
    return _set(folder, "model_type", rng.choice(MODEL_TYPES))


def become_another_model(folder: Path, rng: Random) -> Change:
    """Model type and architecture of another family, over the same fields and tensors."""
    kind, architecture = rng.choice(
        [
            ("llama", "LlamaForCausalLM"),
            ("mistral", "MistralForCausalLM"),
            ("qwen2", "Qwen2ForCausalLM"),
            ("qwen3", "Qwen3ForCausalLM"),
            ("gemma2", "Gemma2ForCausalLM"),
            ("gemma3_text", "Gemma3ForCausalLM"),
            ("phi3", "Phi3ForCausalLM"),
            ("smollm3", "SmolLM3ForCausalLM"),
            ("opt", "OPTForCausalLM"),
        ]
    )
    _set(folder, "model_type", kind)
    _set(folder, "architectures", [architecture])
    return Change(f"config of a {architecture}")


def set_rope(folder: Path, rng: Random) -> Change:
    key = rng.choice(["rope_parameters", "rope_parameters", "rope_scaling"])
    return _set(folder, key, rng.choice(ROPE))


def set_old_rope(folder: Path, rng: Random) -> Change:
    """The rotary embedding as older versions of transformers wrote it: two fields at the top."""
    content = load(folder / CONFIG)
    content.pop("rope_parameters", None)
    content |= {"rope_theta": rng.choice([500.0, 1e4, 1e6]), "rope_scaling": rng.choice(ROPE)}
    store(folder / CONFIG, content)
    return Change(f"config rope_theta = {content['rope_theta']}, rope_scaling = {short(content['rope_scaling'])}")


def set_layer_types(folder: Path, rng: Random) -> Change:
    """Which layers see a window of 4 tokens, by a list of any length."""
    window, count = rng.choice([4, 4, None, 0]), rng.choice([2, 2, 2, 1, 3, 0])
    types = [rng.choice(["full_attention", "sliding_attention"]) for _ in range(count)]
    _set(folder, "sliding_window", window)
    _set(folder, "layer_types", types)
    return Change(f"config sliding_window = {window}, layer_types = {types}")


def add_field(folder: Path, rng: Random) -> Change:
    key = rng.choice(["zz", "_zz", "", "a b", "__class__", "__init__", "to_dict", "name_or_path", "get_text_config"])
    return _set(folder, key, rng.choice([*WRONG, *NUMBERS]))


def set_method_of_class(folder: Path, rng: Random) -> Change:
    """A field with the name of something that config objects have already."""
    names = [
        "attribute_map",
        "base_config_key",
        "sub_configs",
        "keys_to_ignore_at_inference",
        "has_no_defaults_at_init",
    ]
    return _set(folder, rng.choice([*names, "update", "from_dict", "__dict__"]), rng.choice(WRONG))


MUTATORS: tuple[Mutator, ...] = (
    *(set_known_field,) * 8,
    *of_tree(CONFIG),
    *of_text(CONFIG)[1:],
    set_architecture,
    set_model_type,
    become_another_model,
    set_rope,
    set_rope,
    set_old_rope,
    set_layer_types,
    add_field,
    set_method_of_class,
)
