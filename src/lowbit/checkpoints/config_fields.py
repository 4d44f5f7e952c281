"""Fields of ``config.json`` that say how somebody ran a model, and not what it computes.

A config may name an attention kernel of another machine, ask for outputs as tuples, or carry a classifier's labels.
None of that changes a causal language model's logits, and each can end in an error on a machine without that kernel.
They are dropped before the config is built, so every machine computes the same with its own defaults.

``attn_implementation: eager`` stays: it exists everywhere, and some models are specified with it.
"""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from typing import Any

_KERNELS = ("attn_implementation", "experts_implementation")
# By what they decide: the form of outputs, the heads of other tasks, training, where and how a graph is traced, the
# dtype of parameters that nobody filled yet (``device`` and ``--dtype`` decide), how it is spread over devices.
_NEUTRAL = frozenset(
    (
        *("return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "output_scores"),
        *("return_dict_in_generate", "use_cache"),
        *("problem_type", "num_labels", "id2label", "label2id", "finetuning_task", "task_specific_params"),
        *("gradient_checkpointing", "use_gradient_checkpointing", "chunk_size_feed_forward", "pruned_heads"),
        *("torchscript", "use_bfloat16", "tf_legacy_loss", "torch_dtype", "dtype"),
        *("base_model_tp_plan", "base_model_pp_plan", "base_model_ep_plan", "base_model_fsdp_plan"),
        *("keys_to_ignore_at_inference", "_auto_class", "name_or_path", "_name_or_path"),
        *(f"_{name}{suffix}" for name in _KERNELS for suffix in ("", "_internal", "_autoset")),
        *_KERNELS,
    )
)
_EMPTY_MEANS_NONE = ("quantization_config", "compression_config")


def is_kernel_choice(key: str) -> bool:
    """Whether a field chooses an implementation of attention or experts, which belongs to a machine.

    >>> is_kernel_choice("_attn_implementation"), is_kernel_choice("attention_bias")
    (True, False)
    """
    return key.lstrip("_").startswith(_KERNELS)


def without_neutral(content: dict[str, Any]) -> dict[str, Any]:
    """A config without the fields that leave a causal language model's logits alone.

    >>> without_neutral({"hidden_size": 64, "return_dict": False, "_attn_implementation": "flash_attention_2"})
    {'hidden_size': 64}
    >>> without_neutral({"_attn_implementation": "eager"})
    {'attn_implementation': 'eager'}
    >>> without_neutral({"text_config": {"hidden_size": 64, "torch_dtype": "bfloat16"}})
    {'text_config': {'hidden_size': 64}}
    """
    out = {key: _part(key, value) for key, value in content.items() if key not in _NEUTRAL}
    if "eager" in (content.get("attn_implementation"), content.get("_attn_implementation")):
        out["attn_implementation"] = "eager"
    for key in _EMPTY_MEANS_NONE:
        if not out.get(key, True):
            del out[key]
    return out


def _part(key: str, value: Any) -> Any:
    """The config of a part of the model without such fields; any other value as it is."""
    is_part = isinstance(value, dict) and key.endswith("_config") and key not in _EMPTY_MEANS_NONE
    return without_neutral(value) if is_part else value


def taken_names(kind: type) -> frozenset[str]:
    """Names that a config class uses itself, for methods and facts about the class: a field would replace them.

    >>> from transformers import LlamaConfig
    >>> sorted(taken_names(LlamaConfig) & {"to_dict", "sub_configs", "hidden_size", "model_type", "__class__"})
    ['__class__', 'sub_configs', 'to_dict']
    """
    own = {name for name in dir(kind) if _is_own(inspect.getattr_static(kind, name))}
    declared = {field.name for field in fields(kind)} if is_dataclass(kind) else set()
    return frozenset(own - declared)


def _is_own(attribute: object) -> bool:
    """Whether an attribute of a class is a method, a property that nobody sets, or a table; not a field's default."""
    if isinstance(attribute, property):
        return attribute.fset is None
    return hasattr(attribute, "__get__") or isinstance(attribute, dict | list | set | tuple)


def neutralize(config: Any) -> None:
    """Do the same to a config that is built already, as code of the model's own does it."""
    if config._attn_implementation != "eager":
        config._attn_implementation = None
    config._experts_implementation = None
    config._output_attentions = config.output_hidden_states = False
    config.return_dict = True
    config.dtype = None
