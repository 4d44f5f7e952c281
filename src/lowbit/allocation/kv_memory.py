"""Memory that keys and values take at run time, beside the weights, in each target's runtime.

One key and one value for each layer with attention, key-value head, position and channel. A layer with a sliding
window is counted with the whole context, which is what a runtime without windowed caches allocates. A layer that
takes keys and values of an earlier one (``num_kv_shared_layers``) has none, as in llama.cpp and vLLM.
"""

from __future__ import annotations

from typing import Any

from lowbit.checkpoints.positions import positions_of
from lowbit.errors import LowbitError
from lowbit.models.skeleton import Skeleton

# Bytes of a key's or value's number in the runtimes' default caches: float16 in llama.cpp and vLLM, float32 in the
# graphs that lowbit exports. Stock transformers makes some packed weights dense when it loads them.
BYTES = {"llama.cpp": 2, "vllm": 2, "onnxruntime": 4, "executorch": 4}
CONTEXT = 2048  # tokens, or the model's positions, where none are asked for


def context_of(skeleton: Skeleton, asked: int | None) -> int:
    """Tokens of the context.

    Raises:
        LowbitError: fewer than two, or more than the model has positions.
    """
    limit = positions_of(skeleton.text_config)
    if asked is None:
        return CONTEXT if limit is None else min(CONTEXT, limit)
    if asked < 2 or (limit is not None and asked > limit):
        raise LowbitError(f"--context {asked} given; allowed: 2 to {limit or 'any number'}, this model's positions")
    return asked


def kv_bytes(skeleton: Skeleton, target: str, context: int) -> int:
    """Bytes of keys and values of ``context`` tokens.

    SmolLM2-135M in llama.cpp: 30 layers, 3 heads of 64 channels, 2048 tokens: ``2 * 30 * 3 * 64 * 2048 * 2`` bytes,
    47 MB.

    Raises:
        LowbitError: the target does not keep weights packed in memory, or the config does not state its heads.
    """
    if target not in BYTES:
        raise LowbitError(
            f"--memory given with --target {target}, which does not keep every weight packed in memory: give --size, "
            f"or one of {', '.join(BYTES)}"
        )
    config, layers = skeleton.text_config, skeleton.architecture.layers
    own = len(layers) - (getattr(config, "num_kv_shared_layers", None) or 0)
    sizes = _sizes(config, len(layers))
    numbers = sum(size for size, kind in zip(sizes[:own], layers, strict=False) if kind.attention is not None)
    return 2 * numbers * context * BYTES[target]


def _sizes(config: Any, layers: int) -> list[int]:
    """Numbers of a key in each layer: heads times channels.

    Gemma 4's layers may differ; here the second of two has one head of 512 channels in place of four of 256:

    >>> from transformers import Gemma4TextConfig
    >>> kinds = ["sliding_attention", "full_attention"]
    >>> one_head = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 512}
    >>> _sizes(Gemma4TextConfig(num_hidden_layers=2, layer_types=kinds, num_key_value_heads=4, **one_head), 2)
    [1024, 512]

    Raises:
        LowbitError: the config does not state heads.
    """
    differ = bool(getattr(config, "is_heterogeneous", False))
    found = [_size(config.per_layer_config[index]) for index in range(layers)] if differ else [_size(config)] * layers
    sizes = [size for size in found if size is not None]
    if len(sizes) < layers:
        raise LowbitError("--memory given, and the model's config states no heads of keys and values: give --size")
    return sizes


def _size(config: Any) -> int | None:
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    width = getattr(config, "head_dim", None)
    if width is None and isinstance(heads, int):
        width = config.hidden_size // config.num_attention_heads
    return heads * width if isinstance(heads, int) and isinstance(width, int) else None
