"""Tiny random models, one or more for each family, with something for a method to do.

Norm gains and biases are not trivial and a few channels of the residual stream are outliers, as in real models.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCAB = 96
COMMON: dict[str, Any] = {
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

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**COMMON, tie_word_embeddings=False),
    # head_dim * heads != hidden, biases everywhere, tied embeddings
    "llama-odd": lambda: LlamaConfig(
        **COMMON, head_dim=24, attention_bias=True, mlp_bias=True, tie_word_embeddings=True
    ),
    "mistral": lambda: MistralConfig(**COMMON, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**COMMON),
    "qwen3": lambda: Qwen3Config(**COMMON, head_dim=16),
    "gemma2": lambda: Gemma2Config(**COMMON, head_dim=16, sliding_window=8, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(
        **COMMON,
        head_dim=16,
        sliding_window=8,
        query_pre_attn_scalar=16,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**COMMON),
    "phi3-partial": lambda: Phi3Config(
        **COMMON, rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    ),
    "mixtral": lambda: MixtralConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2),
    # a dense layer between two with experts, whose width is another
    "qwen3-moe": lambda: Qwen3MoeConfig(
        **COMMON,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    "smollm3": lambda: SmolLM3Config(**COMMON, no_rope_layers=[1, 0, 1], attention_bias=True),
    "opt": lambda: OPTConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        word_embed_proj_dim=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        dropout=0.0,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    ),
}
MIXTURES = ("mixtral", "qwen3-moe")  # of experts
NAMES = [name for name in CONFIGS if name not in MIXTURES]


def tiny_model(name: str, seed: int = 0, **changes: Any) -> Any:
    """A random float32 model of the family, in eval mode; ``changes`` are set on its config."""
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    model.config.architectures = [type(model).__name__]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key and key.endswith("weight"):
                parameter.add_(0.3 * noise)
            elif key.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * (0.7 if "embed" in key else 1.2 / parameter.shape[-1] ** 0.5))
            if "embed_tokens" in key:
                parameter[:, [3, 17]] *= 12.0
    return model.eval()


def tiny_ids(n: int = 4, length: int = 24, seed: int = 1) -> torch.Tensor:
    """Random token ids ``(n, length)``, without the special ones."""
    return torch.randint(3, VOCAB, (n, length), generator=torch.Generator().manual_seed(seed))


def skeleton_of(model: Any) -> Any:
    """The model's skeleton, filled from its own parameters."""
    from lowbit.models.skeleton import Skeleton

    skeleton = Skeleton(model.config)
    state = model.state_dict()
    skeleton.fill({name: state[name] for name in skeleton.shared_names})
    return skeleton


def params_of(model: Any, skeleton: Any, start: int, count: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """A block's parameters by the names that blocks use."""
    prefix = skeleton.architecture.blocks + "."
    wanted = tuple(f"{i}." for i in range(start, start + count))
    return {
        key.removeprefix(prefix): value.detach().to(dtype)
        for key, value in model.state_dict().items()
        if key.startswith(prefix) and key.removeprefix(prefix).startswith(wanted)
    }


def block_of(model: Any, start: int = 0, count: int = 1, dtype: torch.dtype = torch.float32) -> Any:
    """A block of the model, its float input ``(4, 24, hidden)`` and the skeleton."""
    skeleton = skeleton_of(model)
    x = skeleton.embed(tiny_ids())
    for i in range(start):
        from lowbit.models.forward import run_all

        x = run_all(skeleton.block(i, params_of(model, skeleton, i)), x)
    return skeleton.block(start, params_of(model, skeleton, start, count, dtype), count), x.to(dtype)


def tiny_tokenizer(merge: bool = False) -> Any:
    """A byte-level tokenizer over printable ASCII: three special tokens, then one token a character.

    Byte-level, because some families' tokenizer classes bring their own byte-level splitting. With ``merge`` the last
    token is "ab", merged of two: llama.cpp loads no tokenizer without merges.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2} | {chr(33 + i): 3 + i for i in range(VOCAB - 3)}
    merges = [("a", "b")] if merge else []
    if merge:
        del vocab[chr(33 + VOCAB - 4)]
        vocab["ab"] = VOCAB - 1
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def save_tiny(folder: Any, name: str, seed: int = 0, shards: bool = False, **changes: Any) -> Any:
    """A tiny model, its tokenizer and a text ``calib.txt`` as a checkpoint folder; returns the model."""
    from pathlib import Path

    folder = Path(folder)
    model = tiny_model(name, seed, **changes)
    model.save_pretrained(folder, max_shard_size="100KB" if shards else "1GB")
    tiny_tokenizer().save_pretrained(folder)
    ids = tiny_ids(1, 3000, seed=5)[0].tolist()
    (folder / "calib.txt").write_text("".join(chr(30 + i) for i in ids))
    return model


def quantized(folder: Any, scheme: str | None, family: str = "llama", recipe: str = "rtn", **more: Any) -> Any:
    """The folder ``run`` of a tiny model's run in ``folder``."""
    import lowbit

    save_tiny(folder / "model", family)
    text = str(folder / "model" / "calib.txt")
    more = {"data": text, "samples": 2, "length": 16, "effort": "quick", **more}
    lowbit.quantize(str(folder / "model"), folder / "run", scheme=scheme, recipe=recipe, **more)
    return folder / "run"


def spoil(file: Any, name: str, offset: int = 9) -> None:
    """Flip a bit of one byte of a tensor in a safetensors file."""
    import json

    content = bytearray(file.read_bytes())
    size = int.from_bytes(content[:8], "little")
    start = json.loads(content[8 : 8 + size])[name]["data_offsets"][0]
    content[8 + size + start + offset] ^= 0x10
    file.write_bytes(content)


def planned(block: Any, scheme: Any) -> Any:
    """The block with the formats that a scheme, or its name, gives its linears: what the plan does in a run."""
    from dataclasses import replace

    from lowbit.quant.scheme_names import parse_scheme

    scheme = parse_scheme(scheme) if isinstance(scheme, str) else scheme
    asked = [n for n in block.linears() if scheme.override(block.full_name(n)) or not block.is_router(n)]
    found = {name: scheme.module(block.full_name(name)) for name in asked}
    return replace(block, formats={name: own for name, own in found.items() if own is not None}, kv=scheme.kv)
