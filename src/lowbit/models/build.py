"""The library's model of a config: which class it is, and the model without memory for its parameters.

A config may be composite: a text model's config within that of a model that also sees or hears. ``transformers`` has
such classes under other automatic ones than causal language models, and sometimes two for a config, of which the
config's ``architectures`` names the one that its checkpoint is of.
"""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM

from lowbit.errors import LowbitError, one_line, shown

MOST_LAYERS = 4096  # of a part of a model, an object each: a config may say anything
AUTO = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)
_COUNTS = ("num_hidden_layers", "num_layers", "depth", "encoder_layers", "decoder_layers")


def text_config(config: Any) -> Any:
    """The part of a config that describes the text model: the config itself, unless it is composite.

    Raises ``LowbitError`` for a config with several text models.
    """
    try:
        return config.get_text_config()
    except ValueError as error:
        raise LowbitError(
            f"a {config.model_type} has several text models ({one_line(error)}): choose another model"
        ) from error


def is_composite(config: Any) -> bool:
    """Whether a config has parts, of which one describes the text model.

    >>> from transformers import Gemma3Config, Gemma3TextConfig
    >>> is_composite(Gemma3Config()), is_composite(Gemma3TextConfig())
    (True, False)
    """
    return text_config(config) is not config


def auto_class(config: Any) -> Any:
    """The automatic class that builds what ``config.architectures`` names; if nothing is named, the first that does.

    >>> from transformers import LlamaConfig, Qwen3VLConfig
    >>> auto_class(LlamaConfig(architectures=["LlamaForCausalLM"])).__name__
    'AutoModelForCausalLM'
    >>> auto_class(Qwen3VLConfig(architectures=["Qwen3VLForConditionalGeneration"])).__name__
    'AutoModelForImageTextToText'
    """
    names = getattr(config, "architectures", None)
    name = names[0] if isinstance(names, list) and names else None
    built = ((auto, _built(auto, config)) for auto in AUTO)
    found = (auto for auto, own in built if own is not None and name in (None, own))
    return next(found, AutoModelForCausalLM)


def built_class(config: Any) -> str | None:
    """Name of the class that ``transformers`` builds of a config; ``None`` for one that only its own code knows."""
    return _built(auto_class(config), config)


def _built(auto: Any, config: Any) -> str | None:
    mapping = auto._model_mapping
    if not type(config).__module__.startswith("transformers.") or type(config) not in mapping:
        return None
    found = mapping[type(config)]
    if isinstance(found, tuple) or not found.__module__.startswith("transformers."):
        return None
    return str(found.__name__)


def from_config(config: Any, trust_remote_code: bool = False, **more: Any) -> Any:
    """A model with random parameters of the class that the config names; ``more`` goes to ``from_config`` there."""
    return auto_class(config).from_config(config, trust_remote_code=trust_remote_code, **more)


def empty_model(config: Any, trust_remote_code: bool = False) -> Any:
    """The same on ``meta``, where a tensor has a shape and no storage; it is shared between calls, for looking only.

    Raises:
        LowbitError: a part of the config says that it has more layers than any model has.
    """
    for part in (config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", ()))):
        for field in _COUNTS:
            count = getattr(part, field, None)
            if isinstance(count, int) and count > MOST_LAYERS:
                raise LowbitError(f"config.json is invalid: {field} is {shown(count)}; allowed: 1 to {MOST_LAYERS}")
    return _empty(_Key(config, trust_remote_code))


def is_tied(config: Any) -> bool:
    """Whether a config ties head and embedding; some do not say."""
    return bool(getattr(config, "tie_word_embeddings", False))


def untied_config(config: Any) -> Any:
    """A copy of a config in which head and embedding are two tensors; some classes read that from the text's part."""
    copy = deepcopy(config)
    for part in (copy, *vars(copy).values()):
        if hasattr(part, "tie_word_embeddings"):
            part.tie_word_embeddings = False
    return copy


def tied_tensors(model: Any, config: Any, head: str) -> dict[str, str]:
    """Tensors of a model that are other ones of it by a second name, and these; files have one of the two.

    Args:
        model: the library's model of ``config``.
        config: its config, which says whether tensors are tied.
        head: module path of the output head, whose weight is then the embedding's; ``""`` stands for that.
    """
    if not is_tied(config):
        return {}
    listed: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {f"{head}.weight": "", **listed}


class _Key:
    """A config by its content, for the cache: configs are mutable and have no hash."""

    def __init__(self, config: Any, trust_remote_code: bool) -> None:
        self.config, self.trusted = config, trust_remote_code
        self.content = (type(config), trust_remote_code, config.name_or_path, config.to_json_string(use_diff=False))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.content == other.content

    def __hash__(self) -> int:
        return hash(self.content)


@functools.lru_cache(maxsize=2)
def _empty(key: _Key) -> Any:
    with torch.device("meta"):
        return from_config(key.config, key.trusted)
