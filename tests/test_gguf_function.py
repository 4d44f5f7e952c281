"""A ``.gguf`` file computes what the model does that it was written from, or it is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

from gguf_files import architecture_of, keys_of, logits, random_model, save, tensors_of
from lowbit.checkpoints.gguf_check import check_values, transformers_rows
from lowbit.checkpoints.gguf_config import config_of
from lowbit.checkpoints.gguf_content import Content
from lowbit.checkpoints.gguf_file import WithoutParts
from lowbit.checkpoints.gguf_reader import convert
from lowbit.checkpoints.gguf_rope import fraction, llama3_divisors, recover_llama3
from lowbit.checkpoints.gguf_sources import ARCHITECTURES
from lowbit.errors import LowbitError

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

WIDTH = 16
CHANGES: dict[str, dict[str, Any]] = {
    "gemma3": {"layer_types": ["sliding_attention"] * 3},
    "smollm3": {"no_rope_layers": [1, 1, 1]},
}
MODELS: dict[tuple[str, str], Any] = {}


def model_of(family: str, **changes: Any) -> Any:
    """The model, made once for all tests with the same changes."""
    key = family, repr(sorted(changes.items()))
    if key not in MODELS:
        MODELS[key] = random_model(family, **CHANGES.get(family, {}) | changes)
    return MODELS[key]


def read(file: Path) -> Any:
    folder = file.with_suffix("")
    folder.mkdir()
    convert(file, folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def off(got: torch.Tensor, right: torch.Tensor) -> float:
    return float((got - right).norm() / right.norm())


def refusal(file: Path) -> str:
    (folder := file.with_suffix("")).mkdir()
    with pytest.raises(LowbitError) as caught:
        convert(file, folder)
    assert "\n" not in str(caught.value)
    assert list(folder.iterdir()) == [] or "config.json" not in [f.name for f in folder.iterdir()]
    return str(caught.value)


def rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 1e4, **more}}


FACTORS = [1.0, 1.1, 1.5, 2.0, 3.0, 4.5, 5.0, 6.0]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": FACTORS, "long_factor": [2 * f for f in FACTORS], "original_max_position_embeddings": 64}
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}
YARN_HF = {"factor": 4.0, "original_max_position_embeddings": 32}
LONG_TENSORS = {"rope_factors_short.weight": LONG["short_factor"], "rope_factors_long.weight": LONG["long_factor"]}
ATTENTION = 1.1902380714238083
PHI3 = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 1.0,
    **LONG,
    "attention_factor": ATTENTION,
}
LONG_KEYS = {"rope.scaling.original_context_length": 64, "rope.scaling.attn_factor": ATTENTION}
HONOURED: list[tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    # id, family, changes of the model's config, keys of the file, tensors of the file
    ("plain", "llama", {}, {}, {}),
    ("mistral", "mistral", {}, {}, {}),
    ("biases and head widths", "llama-odd", {}, {}, {}),
    ("untied", "qwen2", {"tie_word_embeddings": False}, {}, {}),
    ("tied", "qwen2", {"tie_word_embeddings": True}, {}, {}),
    ("norms of q and k", "qwen3", {}, {}, {}),
    ("biases of attention", "qwen3", {"attention_bias": True}, {}, {}),
    ("layers without rope", "smollm3", {"num_hidden_layers": 5, "no_rope_layers": [1, 1, 1, 0, 1],
     "layer_types": ["full_attention"] * 5}, {}, {}),
    ("base", "llama", rope("default") | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}, {}),
    ("factor 1", "llama", {}, {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0}, {}),
    ("no scaling", "llama", {}, {"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, {}),
    ("linear", "llama", rope("linear", factor=4.0), LINEAR, {}),
    ("linear, old name", "llama", rope("linear", factor=4.0), {"rope.scale_linear": 4.0}, {}),
    ("linear qwen3", "qwen3", rope("linear", factor=4.0), LINEAR, {}),
    ("plain phi3", "phi3", {}, {}, {}),
    ("yarn", "llama", rope("yarn", **YARN_HF), YARN, {}),
    ("yarn qwen2", "qwen2", rope("yarn", **YARN_HF), YARN | {"rope.scaling.finetuned": True}, {}),
    ("yarn smollm3", "smollm3", rope("yarn", **YARN_HF), YARN, {}),
    ("yarn betas", "llama", rope("yarn", **YARN_HF, beta_fast=16.0, beta_slow=2.0),
     YARN | {"rope.scaling.yarn_beta_fast": 16.0, "rope.scaling.yarn_beta_slow": 2.0}, {}),
    ("yarn attention", "llama", rope("yarn", **YARN_HF, attention_factor=1.5),
     YARN | {"rope.scaling.yarn_attn_factor": 1.5, "rope.scaling.yarn_ext_factor": 1.0}, {}),
    # llama.cpp multiplies its own 0.1 ln(factor) + 1 by this key.
    ("yarn times", "llama", rope("yarn", **YARN_HF, attention_factor=0.5 * (0.1 * math.log(4.0) + 1)),
     YARN | {"rope.scaling.attn_factor": 0.5}, {}),
    ("llama3", "llama", rope("llama3", **LLAMA3), {},
     {"rope_freqs.weight": llama3_divisors(1e4, WIDTH, 8.0, 1.0, 4.0, 64.0)}),
    ("divisors", "llama", rope("longrope", short_factor=FACTORS, long_factor=FACTORS, attention_factor=1.0,
                               original_max_position_embeddings=128), {}, {"rope_freqs.weight": FACTORS}),
    ("ones", "llama", {}, {}, {"rope_freqs.weight": [1.0] * 8}),
    ("longrope", "llama", rope("longrope", **LONG, attention_factor=ATTENTION),
     LONG_KEYS | {"rope.scaling.type": "longrope"}, LONG_TENSORS),
    ("phi3", "phi3", {"original_max_position_embeddings": 64, "rope_parameters": PHI3}, LONG_KEYS, LONG_TENSORS),
    ("phi3 window", "phi3", {"sliding_window": 9}, {}, {}),
    ("phi3 partial", "phi3-partial", {}, {}, {}),
    ("gemma2", "gemma2", {}, {}, {}),
    ("gemma2 caps", "gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}, {}, {}),
    ("gemma2 window", "gemma2", {"layer_types": ["full_attention"] * 2 + ["sliding_attention"], "sliding_window": 5},
     {"attention.sliding_window_pattern": [False, False, True]}, {}),
    ("gemma3", "gemma3", {}, {}, {}),
    ("gemma3 scaled", "gemma3", {"layer_types": ["sliding_attention", "full_attention", "full_attention"],
     "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                         "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}},
     LINEAR | {"rope.scaling.factor": 8.0, "attention.sliding_window_pattern": [True, False, False]}, {}),
    ("gemma3 without window", "gemma3", {"layer_types": ["full_attention"] * 3}, {"attention.sliding_window": 0}, {}),
    ("gemma3 cap", "gemma3", {"final_logit_softcapping": 3.0}, {"attention.sliding_window_pattern": 6}, {}),
    ("same scale", "llama", {}, {"attention.scale": WIDTH**-0.5}, {}),
    ("arrays of equals", "llama", {}, {"attention.head_count_kv": [2, 2, 2], "feed_forward_length": [96] * 3}, {}),
    ("off", "llama", {}, {"expert_count": 0, "attention.causal": True, "logit_scale": 1.0, ".tool.note": "x"}, {}),
    ("copied frequencies", "llama", {}, {}, {"blk.0.attn_rot_embd.weight": [0.5] * 8}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "changes", "keys", "tensors"), [case[1:] for case in HONOURED], ids=[case[0] for case in HONOURED]
)
def test_the_read_model_computes_what_the_written_one_does(
    tmp_path: Path, family: str, changes: dict[str, Any], keys: dict[str, Any], tensors: dict[str, Any]
) -> None:
    model = model_of(family, **changes)
    right = logits(model)
    assert family != "llama" or not changes or off(right, logits(model_of("llama"))) > 1e-2, "the change is no test"
    assert off(logits(read(save(tmp_path / "m.gguf", model, keys, tensors))), right) < 1e-5


def test_linear_scaling_of_a_phi3_is_a_longrope(tmp_path: Path) -> None:
    divisors = {"short_factor": [4.0] * 8, "long_factor": [4.0] * 8, "attention_factor": 1.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **divisors}
    model = random_model("phi3", rope_parameters=rope | {"original_max_position_embeddings": 128})
    got = read(save(tmp_path / "m.gguf", model, LINEAR))
    assert off(logits(got), logits(model)) < 1e-5
    assert off(logits(got), logits(model_of("phi3"))) > 1e-2


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("llama", {"attention.scale": 0.5}, {}, r"llama\.attention\.scale = 0\.5"),
    ("gemma2", {"attention.scale": 0.5}, {}, r"gemma2\.attention\.scale = 0\.5"),
    ("llama", {"attention.clamp_kqv": 8.0}, {}, r"llama\.attention\.clamp_kqv = 8\.0"),
    ("llama", {"attention.causal": False}, {}, r"llama\.attention\.causal = False"),
    ("llama", {"attention.sliding_window": 8}, {}, r"llama\.attention\.sliding_window = 8"),
    ("llama", {"logit_scale": 0.5}, {}, r"llama\.logit_scale = 0\.5"),
    ("llama", {"expert_count": 8}, {}, r"llama\.expert_count = 8"),
    ("llama", {"rope.dimension_count": 8}, {}, r"llama\.rope\.dimension_count = 8"),
    ("llama", {"rope.dimension_count": 8, "attention.key_length": 16}, {}, r"llama\.rope\.dimension_count = 8"),
    ("llama", {"embedding_length": 32}, {}, r"llama\.embedding_length = 32: token_embd\.weight is \(96, 64\)"),
    ("llama", {"attention.value_length": 8}, {}, r"llama\.attention\.value_length = 8"),
    ("llama", {"attention.head_count_kv": [2, 1, 2]}, {}, r"llama\.attention\.head_count_kv = \[2, 1, 2\]"),
    ("llama", {"of_tomorrow": 3}, {}, r"llama\.of_tomorrow = 3"),
    ("llama", {".adapter.type": "lora"}, {}, r"adapter\.type = 'lora'"),
    ("llama", {".general.type": "adapter"}, {}, r"general\.type = 'adapter'"),
    ("llama", {"rope.scaling.type": "ntk"}, {}, r"llama\.rope\.scaling\.type = 'ntk'.*linear, yarn"),
    ("llama", {"rope.scaling.type": "longrope"}, {}, r"no tensors rope_factors_short\.weight"),
    ("llama", {"rope.scaling.factor": 4.0}, {}, r"lacks the metadata key llama\.rope\.scaling\.type"),
    ("llama", {"rope.scaling.type": "linear"}, {}, r"lacks the metadata key llama\.rope\.scaling\.factor"),
    ("llama", YARN | {"rope.scaling.original_context_length": None}, {}, r"lacks .*scaling\.original_context_length"),
    ("llama", YARN | {"rope.scaling.yarn_ext_factor": 0.5}, {}, r"yarn_ext_factor = 0\.5"),
    ("llama", YARN | {"rope.scaling.yarn_log_multiplier": 0.1}, {}, r"yarn_log_multiplier = 0\.1"),
    ("llama", YARN | {"rope.scaling.yarn_attn_factor": 2.0, "rope.scaling.attn_factor": 2.0}, {}, "yarn_attn_factor"),
    ("llama", YARN | {"rope.scaling.yarn_beta_slow": 64.0}, {}, r"lacks .*yarn_beta_fast"),
    ("llama", LINEAR | {"rope.scaling.yarn_beta_slow": 2.0}, {}, r"yarn_beta_slow = 2\.0"),
    ("llama", LINEAR | {"rope.scale_linear": 2.0}, {}, r"rope\.scale_linear = 2\.0.*contradicts"),
    ("llama", YARN, {"rope_freqs.weight": FACTORS}, r"rope\.scaling\.type = 'yarn'.*rope_freqs\.weight"),
    ("llama", {}, {"rope_freqs.weight": FACTORS[:4]}, r"rope_freqs\.weight .*does not hold 8 positive"),
    ("llama", {}, {"rope_freqs.weight": [-1.0] * 8}, r"rope_freqs\.weight .*does not hold 8 positive"),
    ("qwen2", {}, {"rope_freqs.weight": FACTORS}, r"rope_freqs\.weight, which a 'qwen2' does not use"),
    ("llama", LONG_KEYS, {"rope_factors_long.weight": FACTORS}, r"go together"),
    (
        "phi3",
        LONG_KEYS | {"rope.scaling.attn_factor": None},
        LONG_TENSORS,
        r"lacks .*phi3\.rope\.scaling\.attn_factor",
    ),
    ("phi3", YARN, {}, r"phi3\.rope\.scaling\.type = 'yarn'"),
    ("gemma3", YARN, {}, r"gemma3\.rope\.scaling\.type = 'yarn'"),
    ("gemma3", LINEAR | {"rope.scaling.attn_factor": 2.0}, {}, r"gemma3\.rope\.scaling\.attn_factor = 2\.0"),
    ("gemma2", {"rope.freq_base_swa": 500.0}, {}, r"gemma2\.rope\.freq_base_swa = 500\.0"),
    ("gemma2", {"final_logit_softcapping": None}, {}, r"lacks .*gemma2\.final_logit_softcapping"),
    ("gemma3", {"attn_logit_softcapping": 50.0}, {}, r"gemma3\.attn_logit_softcapping = 50\.0"),
    ("gemma3", {"attention.sliding_window_pattern": [True]}, {}, r"gemma3\.attention\.sliding_window_pattern"),
    ("llama", {}, {"blk.0.attn_q.bias": np.ones(64)}, r"attn_q\.bias, but not blk\.0\.attn_k\.bias"),
    ("llama-odd", {}, {"blk.1.ffn_up.bias": None}, r"has the tensor .*ffn_.*\.bias, but not blk\.1\.ffn_up\.bias"),
    ("gemma2", {}, {"blk.0.ffn_up.bias": np.ones(96)}, r"blk\.0\.ffn_up\.bias' .*no place for"),
    ("qwen2", {}, {"blk.0.attn_output.bias": np.ones(64)}, r"blk\.0\.attn_output\.bias' .*no place for"),
    ("qwen3", {}, {"output.bias": np.ones(96)}, r"output\.bias' .*no place for"),
    ("llama", {".tokenizer.ggml.bos_token_id": 96}, {}, r"tokenizer\.ggml\.bos_token_id = 96"),
]


@pytest.mark.parametrize(("family", "keys", "tensors", "message"), REFUSED)
def test_what_no_config_expresses_is_refused_by_name(
    tmp_path: Path, family: str, keys: dict[str, Any], tensors: dict[str, Any], message: str
) -> None:
    assert re.search(message, refusal(save(tmp_path / "m.gguf", model_of(family), keys, tensors)))


def all_keys(group: Any = gguf.constants.Keys) -> Iterator[str]:
    """Every key that the gguf package knows, for the architecture ``llama``."""
    for name, value in vars(group).items():
        if isinstance(value, str) and not name.startswith("_"):
            yield value.format(arch="llama", id=0, name="x", dense="d")
        elif isinstance(value, type):
            yield from all_keys(value)


# They describe the file, the tokenizer, sampling, or how tensors are stored; or they matter with another key only.
WITHOUT_EFFECT = ("general.", "tokenizer.", "imatrix.", "split.no", "split.tensors", "llama.tensor_data_layout",
                  "llama.pooling_type", "llama.rope.scaling.finetuned", "llama.context_length",
                  "llama.rope.scaling.original_context_length")  # fmt: skip
# Honoured on their own; what they do is tested above.
CHANGES_LOGITS = ("llama.rope.freq_base", "llama.rope.scaling.attn_factor", "llama.attention.layer_norm_rms_epsilon")
KEYS = sorted({*all_keys()} - {"general.architecture", "general.alignment", "general.type"})


def unlikely(key: str) -> Any:
    """A value for a key that no test model has."""
    return 77 if key.endswith("token_id") else 5 if "count" in key or "length" in key else 0.37


def unprefixed(key: str) -> str:
    """A full key as ``save`` takes it."""
    own = key.removeprefix("llama.")
    return own if own != key else f".{key}"


def test_keys_without_effect_leave_the_logits_alone(tmp_path: Path) -> None:
    keys = {unprefixed(key): unlikely(key) for key in KEYS if key.startswith(WITHOUT_EFFECT)}
    assert len(keys) > 80
    model = model_of("llama")
    assert off(logits(read(save(tmp_path / "m.gguf", model, keys))), logits(model)) == 0


def content_of(model: Any, keys: dict[str, Any]) -> Content:
    """A Llama's file with other keys, as the reader gives it, without tensors' values."""
    shapes = {name: tensor.shape for name, tensor in tensors_of(model).items()}
    right = {f"llama.{key}": value for key, value in keys_of(model.config).items()}
    return Content(Path("m.gguf"), {"general.architecture": "llama"} | right | keys, shapes)


def test_every_other_key_changes_the_logits_or_is_refused(tmp_path: Path) -> None:
    model = model_of("llama")
    refused = [key for key in KEYS if not key.startswith((*WITHOUT_EFFECT, *CHANGES_LOGITS))]
    assert len(refused) > 150
    for i, key in enumerate(refused):
        try:
            config_of(content_of(model, {key: unlikely(key)}))
        except LowbitError as error:
            message = str(error)
        else:
            message = refusal(save(tmp_path / f"{i}.gguf", model, {unprefixed(key): unlikely(key)}))
        # Where two keys contradict each other, the message has the other one.
        assert re.search(
            rf"{re.escape(key)}\b|its metadata implies|lacks|one of 5 parts|head_count_kv|rope", message
        ), key


@pytest.mark.parametrize("key", CHANGES_LOGITS)
def test_a_key_that_is_honoured_changes_the_logits(tmp_path: Path, key: str) -> None:
    model = model_of("llama")
    assert off(logits(read(save(tmp_path / "m.gguf", model, {unprefixed(key): unlikely(key)}))), logits(model)) > 1e-3


@pytest.mark.parametrize("value", ["text", True, -1, 2**33, 1e30, math.nan, [1, 2], [], 0])
def test_a_wrong_value_is_one_line(value: Any) -> None:
    model = model_of("llama")
    for key in (*keys_of(model.config), "attention.key_length", "attention.scale", "rope.scaling.factor"):
        content = content_of(model, {f"llama.{key}": value})
        if (key, repr(value)) in ACCEPTED:
            config_of(content)
            continue
        with pytest.raises(LowbitError, match=rf"llama\.({key}|attention\.head_count_kv|rope)") as caught:
            config_of(content)
        assert "\n" not in str(caught.value)


# Zero stands for "not set" there; a base may be that large.
ACCEPTED = {
    ("attention.scale", "0"),
    ("rope.scaling.factor", "0"),
    ("rope.freq_base", "1e+30"),
    ("rope.freq_base", "8589934592"),
}


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma2", "gemma3"])
def test_a_missing_key_is_one_line_or_has_no_effect(tmp_path: Path, family: str) -> None:
    model = model_of(family, **({"rms_norm_eps": 1e-3} | rope_of(family)))
    right = logits(model)
    for i, key in enumerate(keys_of(model.config)):
        file = save(tmp_path / f"{i}.gguf", model, {key: None})
        message, got = outcome(file)
        if got is None:
            assert key in message or "its metadata implies" in message
        else:
            assert off(got, right) < 1e-5, key


def outcome(file: Path) -> tuple[str, torch.Tensor | None]:
    """The refusal, or the logits."""
    try:
        return "", logits(read(file))
    except LowbitError as error:
        return str(error), None


def rope_of(family: str) -> dict[str, Any]:
    """Rotary bases as published models of the family have them."""
    if family == "gemma3":
        ropes = {"full_attention": 1e6, "sliding_attention": 1e4}
        return {"rope_parameters": {key: {"rope_type": "default", "rope_theta": base} for key, base in ropes.items()}}
    base = 1e4 if family in ("llama", "gemma2") else 1e6
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base, "partial_rotary_factor": 1.0}}


@pytest.mark.parametrize("high", [2.0, 4.0, 9.5])
@pytest.mark.parametrize(("dims", "base", "factor", "length"), [(64, 5e5, 32.0, 8192), (128, 5e5, 8.0, 8192),
                                                               (16, 1e4, 8.0, 64)])  # fmt: skip
def test_llama3_parameters_are_recovered(dims: int, base: float, factor: float, length: int, high: float) -> None:
    divisors = np.float32(llama3_divisors(base, dims, factor, 1.0, high, length)).tolist()
    found = recover_llama3(base, divisors)
    if high == 4.0:
        assert found is not None
        assert (found["factor"], found["low_freq_factor"], found["high_freq_factor"]) == (factor, 1.0, 4.0)
        assert found["original_max_position_embeddings"] == length
    if found is not None:
        values = [found[key] for key in ("factor", "low_freq_factor", "high_freq_factor")]
        back = llama3_divisors(base, dims, *values, found["original_max_position_embeddings"])
        assert np.allclose(back, divisors, rtol=2e-6)


def test_other_divisors_are_not_taken_for_llama3() -> None:
    assert recover_llama3(1e4, FACTORS) is None
    assert recover_llama3(1e4, [1.0] * 8) is None
    assert recover_llama3(1e4, [0.5] * 8) is None


@pytest.mark.parametrize("width", range(2, 130))
def test_the_rotated_fraction_truncates_to_the_rotated_dimensions(width: int) -> None:
    assert all(int(width * fraction(dims, width)) == dims for dims in range(2, width + 1, 2))


@pytest.mark.parametrize(("family", "largest"), [("gemma2", 46), ("gemma3", 62)])
def test_the_largest_gemma_scales_attention_by_its_hidden_size(family: str, largest: int) -> None:
    for layers, scalar in ((largest - 1, 24), (largest, 64 // 4)):
        keys = keys_of(model_of(family).config) | {"block_count": layers, "rope.dimension_count": 24}
        keys |= {"attention.key_length": 24, "attention.value_length": 24, "attention.scale": scalar**-0.5}
        values = {f"{family}.{key}": value for key, value in keys.items()} | {"general.architecture": family}
        shapes = {"token_embd.weight": (96, 64)} | {f"blk.{i}.attn_norm.weight": (64,) for i in range(layers)}
        assert config_of(Content(Path("m"), values, shapes)).query_pre_attn_scalar == scalar
        with pytest.raises(LowbitError, match=r"attention\.scale = 0\.9"):
            config_of(Content(Path("m"), values | {f"{family}.attention.scale": 0.9}, shapes))


def test_a_row_in_the_wrong_place_is_seen(tmp_path: Path) -> None:
    config = model_of("llama").config
    source = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
    right = source[transformers_rows(16, 2)]
    check_values(tmp_path, "llama", "blk.0.attn_k.weight", source, right, config)
    for wrong in (source, right[::-1], np.nextafter(right, 9)):
        with pytest.raises(LowbitError, match=r"attn_k\.weight.*changed while it was converted"):
            check_values(tmp_path, "llama", "blk.0.attn_k.weight", source, wrong, config)
    with pytest.raises(LowbitError, match="changed"):
        check_values(tmp_path, "gemma2", "blk.0.attn_norm.weight", source[0], source[0], config)


@pytest.mark.parametrize("family", ["llama-odd", "smollm3", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"])
def test_names_are_those_of_transformers_own_map(family: str) -> None:
    """Of the model without its submodules, for each of which the library would make the whole map again."""
    model = model_of(family)
    processor = ARCHITECTURES[architecture_of(model.config)].processor(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(WithoutParts(model), processor)
    assert names == get_gguf_hf_weights_map(model, processor)
    assert len(names) > 20
