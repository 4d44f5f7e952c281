"""Every architecture of the table is written with the tensors and keys that llama.cpp's loader asks for."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind

import gguf_models
import lowbit
from gguf_models import MODELS, YARN, config_of
from lowbit.errors import LowbitError
from lowbit.exporters.gguf_architectures import ARCHITECTURES
from lowbit.exporters.gguf_architectures.gpt_oss import GPT_OSS
from lowbit.exporters.gguf_architectures.parallel import GPT_NEOX
from lowbit.exporters.gguf_model import architecture, unlike_llamacpp

DOCS = Path(__file__).parents[2] / "docs"
QKV, DENSE = "attn_q attn_k attn_v attn_output", "ffn_gate ffn_up ffn_down"
EXPERTS, SHARED = "ffn_gate_exps ffn_up_exps ffn_down_exps", "ffn_gate_shexp ffn_up_shexp ffn_down_shexp"
PRE, QK_NORMS = "attn_norm ffn_norm", "attn_q_norm attn_k_norm"
POST = "post_attention_norm post_ffw_norm"
# By case: weights of the first layer, biases of it, tensors outside of the layers. As the loader's code lists them.
TENSORS: dict[str, tuple[str, str, str]] = {
    "qwen3-moe": (f"{QKV} {PRE} {QK_NORMS} ffn_gate_inp {EXPERTS}", "", ""),
    "mixtral": (f"{QKV} {PRE} ffn_gate_inp {EXPERTS}", "", ""),
    "olmo2": (f"{QKV} {DENSE} {POST} {QK_NORMS}", "", ""),
    "olmo3": (f"{QKV} {DENSE} {POST} {QK_NORMS}", "", ""),
    "granite": (f"{QKV} {DENSE} {PRE}", f"{QKV} {DENSE}", ""),
    "glm4": (f"{QKV} {PRE} {POST} ffn_up ffn_down", "attn_q attn_k attn_v", ""),
    "lfm2": (f"{DENSE} {PRE} shortconv.conv shortconv.in_proj shortconv.out_proj", "", "token_embd_norm -output"),
    "cohere2": (f"{QKV} {DENSE} attn_norm", "", "-output"),
    "ministral3": (f"{QKV} {DENSE} {PRE}", "", ""),
    "phi3": (f"attn_qkv attn_output {PRE} ffn_up ffn_down", "", ""),
    "phi3-long": (f"attn_qkv attn_output {PRE} ffn_up ffn_down", "", "rope_factors_short rope_factors_long"),
    "phi4-mini": (f"attn_qkv attn_output {PRE} ffn_up ffn_down", "", ""),
    "qwen2-moe": (
        f"{QKV} {PRE} ffn_gate_inp {EXPERTS} ffn_gate_inp_shexp {SHARED}",
        "attn_q attn_k attn_v",
        "",
    ),
    "olmoe": (f"{QKV} {PRE} {QK_NORMS} ffn_gate_inp {EXPERTS}", "", ""),
    "stablelm": (f"{QKV} {DENSE} {PRE}", f"attn_q attn_k attn_v {PRE}", ""),
    "stablelm-12b": (f"{QKV} {DENSE} attn_norm {QK_NORMS}", "attn_norm", ""),
    "gpt-neox": (
        f"attn_qkv attn_output ffn_up ffn_down {PRE}",
        f"attn_qkv attn_output ffn_up ffn_down {PRE}",
        "",
    ),
    "smollm3": (f"{QKV} {DENSE} {PRE}", "", "-output"),
    "gpt-oss": (
        f"{QKV} attn_norm post_attention_norm attn_sinks ffn_gate_inp {EXPERTS}",
        f"{QKV} ffn_gate_inp {EXPERTS}",
        "",
    ),
    "qwen3.5": (
        f"{DENSE} attn_norm post_attention_norm attn_qkv attn_gate ssm_conv1d ssm_beta ssm_alpha ssm_norm ssm_out",
        "ssm_dt",
        "",
    ),
}
TENSORS["qwen3.5-grouped"] = TENSORS["qwen3.5"]
LINEAR_ATTENTION = ("qwen3.5", "qwen3.5-grouped", "qwen3.5-moe", "qwen3-next")
LINEAR = "attn_norm post_attention_norm attn_qkv attn_gate ssm_conv1d ssm_norm ssm_out"
GEMMA4 = f"{QKV} {DENSE} {PRE} {POST} {QK_NORMS} layer_output_scale"
TENSORS |= {
    "qwen3.5-moe": (
        f"{LINEAR} ssm_beta ssm_alpha ffn_gate_inp {EXPERTS} ffn_gate_inp_shexp {SHARED}",
        "ssm_dt",
        "",
    ),
    "qwen3-next": (f"{LINEAR} ssm_ba ffn_gate_inp {EXPERTS} ffn_gate_inp_shexp {SHARED}", "ssm_dt", ""),
    "gemma4": (
        f"{GEMMA4} inp_gate proj post_norm",
        "",
        "-output rope_freqs per_layer_token_embd per_layer_model_proj per_layer_proj_norm",
    ),
    "gemma4-large": (GEMMA4, "", "-output rope_freqs"),
    "gemma4-moe": (
        f"{GEMMA4} ffn_gate_inp {EXPERTS} pre_ffw_norm_2 post_ffw_norm_1 post_ffw_norm_2",
        "",
        "-output rope_freqs",
    ),
    "glm4-moe": (f"{QKV} {DENSE} attn_norm post_attention_norm {QK_NORMS}", "attn_q attn_k attn_v", ""),
    "granite-moe": (f"{QKV} {PRE} ffn_gate_inp {EXPERTS}", QKV, ""),
    "granite-moe-shared": (f"{QKV} {PRE} ffn_gate_inp {EXPERTS} {SHARED}", "", ""),
    "hunyuan": (f"{QKV} {DENSE} {PRE} {QK_NORMS}", "", ""),
    "hunyuan-moe": (f"{QKV} {PRE} {QK_NORMS} ffn_gate_inp {EXPERTS} {SHARED}", "", ""),
    "granite4": (f"{QKV} {DENSE} {PRE}", "", ""),
    "granite4-hybrid": (f"{DENSE} {PRE} ssm_in ssm_conv1d ssm_norm ssm_out", "ssm_conv1d ssm_dt", ""),
    "seed-oss": (f"{QKV} {DENSE} attn_norm post_attention_norm", "attn_q attn_k attn_v", ""),
    "ernie4.5": (f"{QKV} {DENSE} {PRE}", "", "-output"),
    "exaone4": (f"{QKV} {DENSE} {POST} {QK_NORMS}", "", ""),
    "falcon-h1": (f"{QKV} {DENSE} attn_norm ssm_in ssm_conv1d ssm_out", "ssm_conv1d ssm_dt", ""),
    "arcee": (f"{QKV} {PRE} ffn_up ffn_down", "", ""),
    "nemotron": (f"{QKV} {PRE} ffn_up ffn_down", f"{QKV} {PRE} ffn_up ffn_down", ""),
    "starcoder2": (f"{QKV} {PRE} ffn_up ffn_down", f"{QKV} {PRE} ffn_up ffn_down", "-output"),
}
# By case: keys beyond the sizes that all have, as the loader reads them.
KEYS: dict[str, dict[str, Any]] = {
    "qwen3-moe": {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    "mixtral": {"expert_count": 4, "expert_used_count": 2, "feed_forward_length": 96},
    "olmo3": {
        "attention.sliding_window": 8,
        "attention.sliding_window_pattern": [True, False, True],
        "rope.scaling.type": "yarn",
    },
    "granite": {"logit_scale": 2.0, "embedding_scale": 3.0},
    "granite4": {"feed_forward_length": 96, "rope.scaling.finetuned": True},
    "granite4-hybrid": {"attention.head_count_kv": [0, 2, 0], "ssm.inner_size": 128, "rope.scaling.finetuned": False},
    "glm4": {"rope.dimension_count": 8},
    "lfm2": {"attention.head_count_kv": [0, 2, 0], "shortconv.l_cache": 3},
    "cohere2": {"logit_scale": 0.5, "attention.layer_norm_epsilon": pytest.approx(1e-5)},
    "ministral3": {
        "attention.temperature_scale": pytest.approx(0.1),
        "rope.scaling.yarn_beta_fast": 16.0,
        "rope.scaling.original_context_length": 32,
    },
    "phi4-mini": {"rope.dimension_count": 12},
    "qwen2-moe": {"expert_shared_feed_forward_length": 64},
    "stablelm-12b": {"use_parallel_residual": True, "rope.dimension_count": 4},
    "gpt-neox": {"use_parallel_residual": True},
    "gpt-oss": {"attention.sliding_window_pattern": [True, False, True]},
    "qwen3.5": {
        "rope.dimension_sections": [1, 1, 0, 0],
        "attention.recurrent_layers": [True, True, True, False],
        "ssm.inner_size": 32,
        "ssm.time_step_rank": 2,
    },
    "qwen3.5-moe": {"expert_feed_forward_length": 32, "expert_shared_feed_forward_length": 64},
    "qwen3-next": {"expert_count": 4, "ssm.group_count": 2, "ssm.time_step_rank": 4},
    "gemma4": {
        "attention.key_length": 32,
        "attention.key_length_swa": 16,
        "attention.shared_kv_layers": 2,
        "attention.head_count_kv": 2,
        "attention.sliding_window_pattern": [True, False, True, False],
        "embedding_length_per_layer_input": 32,
        "feed_forward_length": [96, 96, 192, 192],
        "final_logit_softcapping": 3.0,
        "rope.dimension_count": 32,
        "rope.dimension_count_swa": 16,
    },
    "gemma4-large": {"attention.head_count_kv": [2, 2, 1], "final_logit_softcapping": 0.0},
    "falcon-h1": {"ssm.inner_size": 128, "ssm.group_count": 2, "ssm.time_step_rank": 4},
    "gemma4-moe": {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32},
    "glm4-moe": {
        "leading_dense_block_count": 1,
        "expert_shared_count": 1,
        "expert_gating_func": 2,
        "expert_weights_scale": 1.5,
        "expert_weights_norm": True,
    },
    "granite-moe": {"expert_count": 4, "feed_forward_length": 96},
    "granite-moe-shared": {"expert_shared_feed_forward_length": 64},
    # 10000 * 50 ** (16 / 14)
    "hunyuan": {"rope.freq_base": pytest.approx(874339.31, rel=1e-6)},
    "hunyuan-moe": {"expert_shared_feed_forward_length": 96, "rope.freq_base": pytest.approx(874339.31, rel=1e-6)},
}


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixtures that no family declares are known."""
    gguf_models.declare(monkeypatch)


def run_of(folder: Path, case: str, scheme: str = "w4a16g32-sym", changes: Any = None, **more: Any) -> Path:
    """A run of a tiny model."""
    model = gguf_models.saved(folder / "model", case, **changes or {})
    text = str(model / "calib.txt")
    given = {"scheme": scheme, "recipe": "rtn", "data": text, "samples": 1, "length": 16, **more}
    lowbit.quantize(str(model), folder / "run", **given)
    return folder / "run"


def expected_names(case: str) -> set[str]:
    weights, biases, other = (text.split() for text in TENSORS[case])
    names = {f"blk.0.{name}.weight" for name in weights} | {f"blk.0.{name}.bias" for name in biases}
    names |= {f"{name}.weight" for name in other if not name.startswith("-")}
    shared = {"token_embd", "output", "output_norm"} - {name[1:] for name in other}
    if "token_embd_norm" in other:
        shared.remove("output_norm")
    names |= {f"{name}.weight" for name in shared}
    if case in ("stablelm", "stablelm-12b", "gpt-neox", "nemotron", "starcoder2"):
        names.add("output_norm.bias")
    bare = {
        "granite4-hybrid": ["ssm_a", "ssm_d"],
        "falcon-h1": ["ssm_a", "ssm_d", "ffn_norm"],
        "gemma4-moe": ["ffn_gate_inp.scale", "ffn_down_exps.scale"],
        **{key: ["ssm_a"] for key in LINEAR_ATTENTION},
    }
    return names | {f"blk.0.{name}" for name in bare.get(case, ())}


def test_every_architecture_has_a_model_here() -> None:
    elsewhere = {  # in test_gguf.py and test_llamacpp.py
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "Gemma2ForCausalLM",
        "Gemma3ForCausalLM",
    }
    assert {config_of(case).architectures[0] for case in MODELS} == set(ARCHITECTURES) - elsewhere
    assert set(TENSORS) == set(MODELS)


@pytest.mark.heavy  # makes a run of each
@pytest.mark.parametrize("case", MODELS)
def test_a_file_has_what_the_loader_asks_for(tmp_path: Path, case: str) -> None:
    run = run_of(tmp_path, case)
    made = lowbit.export(run, "gguf")
    # Some classes of tokenizers bring a normalizer of their own.
    assert [line for line in made.warnings if "normalizer" not in line] == []
    (found,) = lowbit.verify(run, [made.out], logits=False)
    assert found.ok
    reader = gguf.GGUFReader(made.out)
    first = {t.name for t in reader.tensors if not re.match(r"blk\.[1-9]", t.name)}
    assert first == expected_names(case)
    arch = architecture(config_of(case)).name
    assert reader.fields["general.architecture"].contents() == arch
    stored = {key: reader.fields[f"{arch}.{key}"].contents() for key in KEYS.get(case, {})}
    assert stored == KEYS.get(case, {})
    kinds = {t.name: t.tensor_type for t in reader.tensors}
    quantized = [name for name in kinds if re.search(r"(ffn_down|ffn_down_exps)\.weight$", name)]
    assert {kinds[name] for name in quantized} == {Kind.Q4_0}
    floats = [name for name in kinds if re.search(r"(gate_inp|conv|conv1d|norm)\.weight$|bias$", name)]
    assert floats
    assert {kinds[name] for name in floats} == {Kind.F32}


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("qwen3-moe", {"norm_topk_prob": False}, "norm_topk_prob False; llama.cpp's qwen3moe computes with True"),
    ("qwen3-moe", {"mlp_only_layers": [1]}, "mlp_only_layers [1]; llama.cpp's qwen3moe has experts in every layer"),
    ("qwen3-moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    ("qwen3-moe", {"attention_bias": True}, "attention_bias; llama.cpp's qwen3moe has no such biases"),
    ("mixtral", {"sliding_window": 8}, "sliding_window 8; llama.cpp's llama has none"),
    ("olmo2", {"tie_word_embeddings": True}, "llama.cpp's olmo2 needs one of its own"),
    ("olmo2", {"attention_bias": True}, "attention_bias; llama.cpp's olmo2 has no such biases"),
    ("olmo2", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "rope_type 'llama3'"),
    (
        "olmo3",
        {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 500.0}}},
        "rope_parameters.rope_theta differs between kinds of layers",
    ),
    ("granite", {"residual_multiplier": 0.0}, "residual_multiplier 0; llama.cpp's granite"),
    ("granite4", {"num_local_experts": 4}, "num_local_experts 4; llama.cpp's granite computes with 0"),
    ("granite4-hybrid", {"mamba_n_groups": 2}, "mamba_n_groups 2; llama.cpp's granitehybrid computes with 1"),
    ("granite4-hybrid", {"mamba_d_head": 16}, "takes them to be twice as wide as hidden_size"),
    ("glm4", {"hidden_act": "gelu"}, "hidden_act 'gelu'; llama.cpp computes silu for glm4"),
    ("lfm2", {"conv_bias": True}, "conv_bias; llama.cpp's lfm2 has no such biases"),
    ("cohere2", {"tie_word_embeddings": False}, "llama.cpp's cohere2 uses the embedding"),
    ("cohere2", {"attention_bias": True}, "attention_bias; llama.cpp's cohere2"),
    ("cohere2", {"head_dim": 24}, "head_dim 24; llama.cpp's cohere2 takes hidden_size / num_attention_heads"),
    ("ministral3", {"sliding_window": 8}, "sliding_window 8; llama.cpp's mistral3 has none"),
    (
        "ministral3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "llama_4_scaling_beta": 0.1}},
        "rope_parameters.llama_4_scaling_beta without original_max_position_embeddings",
    ),
    ("phi3", {"sliding_window": 64}, "sliding_window 64; llama.cpp's phi3 has none"),
    ("phi3", {"rope_parameters": YARN}, "rope_parameters.rope_type 'yarn'"),
    ("qwen2-moe", {"norm_topk_prob": True}, "norm_topk_prob True; llama.cpp's qwen2moe computes with False"),
    ("qwen2-moe", {"use_sliding_window": True, "sliding_window": 8}, "sliding_window 8; llama.cpp's qwen2moe"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv 8.0; llama.cpp's olmoe computes with None"),
    ("olmoe", {"num_key_value_heads": 2}, "num_key_value_heads 2; llama.cpp's olmoe takes num_attention_heads"),
    ("stablelm", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ("gpt-neox", {"hidden_act": "relu"}, "hidden_act 'relu'; llama.cpp computes gelu_pytorch_tanh for gptneox"),
    ("gpt-neox", {"attention_bias": False}, "attention_bias False; llama.cpp's gptneox computes with True"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers differ from llama.cpp's for smollm3"),
    ("smollm3", {"mlp_bias": True}, "mlp_bias; llama.cpp's smollm3 has no such biases"),
    ("gpt-oss", {"swiglu_limit": 5.0}, "swiglu_limit 5.0; llama.cpp's gpt-oss computes with 7.0"),
    ("gpt-oss", {"sliding_window": None}, "sliding_window None; llama.cpp's gpt-oss needs one"),
    ("qwen3.5", {"linear_num_value_heads": 3}, "linear_num_value_heads 3 are no multiple of linear_num_key_heads 2"),
    ("seed-oss", {"attention_out_bias": True}, "attention_out_bias; llama.cpp's seed_oss has no such biases"),
    ("ernie4.5", {"use_bias": True}, "use_bias; llama.cpp's ernie4_5 has no such biases"),
    ("exaone4", {"sliding_window": 8}, "sliding_window 8 with num_hidden_layers 3"),
    ("exaone4", {"num_hidden_layers": 64}, "sliding_window None with num_hidden_layers 64"),
    ("falcon-h1", {"key_multiplier": 0.5}, "key_multiplier 0.5; llama.cpp's falcon-h1 has no factors"),
    ("falcon-h1", {"mlp_multipliers": [1.0, 0.5]}, "mlp_multipliers [1.0, 0.5]; llama.cpp's falcon-h1"),
    ("falcon-h1", {"mamba_conv_bias": False}, "mamba_conv_bias False; llama.cpp's falcon-h1 computes with True"),
    ("falcon-h1", {"mamba_rms_norm": True}, "mamba_norm_before_gate True; llama.cpp's falcon-h1 computes with False"),
    ("arcee", {"hidden_act": "silu"}, "hidden_act 'silu'; llama.cpp computes relu2 for arcee"),
    ("nemotron", {"tie_word_embeddings": True}, "llama.cpp's nemotron needs one of its own"),
    ("starcoder2", {"use_bias": False}, "use_bias False; llama.cpp's starcoder2 computes with True"),
    ("starcoder2", {"sliding_window": 8}, "sliding_window 8; llama.cpp's starcoder2 computes with None"),
    ("qwen3-next", {"norm_topk_prob": False}, "norm_topk_prob False; llama.cpp's qwen3next computes with True"),
    ("qwen3-next", {"linear_value_head_dim": 16}, "linear_value_head_dim 16; llama.cpp's qwen3next takes"),
    ("gemma4", {"vocab_size_per_layer_input": 64}, "vocab_size_per_layer_input 64; llama.cpp's gemma4 takes"),
    ("gemma4", {"num_kv_shared_layers": 1}, "num_kv_shared_layers 1 behind layers of full_attention, sliding_att"),
    ("gemma4", {"per_layer_config": {1: {"head_dim": 64}}}, "per_layer_config of layer 3 has head_dim 16"),
    ("gemma4", {"use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
    ("gemma4", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_type 'default'"),
    ("glm4-moe", {"n_group": 2}, "n_group 2; llama.cpp's glm4moe computes with 1"),
    ("glm4-moe", {"n_shared_experts": 0}, "n_shared_experts 0; llama.cpp's glm4moe"),
    ("granite-moe", {"residual_multiplier": 0.0}, "residual_multiplier 0"),
    ("hunyuan", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}}, "'dynamic' without alpha"),
    ("hunyuan", {"attention_bias": True}, "attention_bias; llama.cpp's hunyuan-dense has no such biases"),
    ("hunyuan-moe", {"moe_topk": [2, 2, 1]}, "moe_topk [2, 2, 1]; llama.cpp's hunyuan-moe has one number"),
    ("qwen3.5", {"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-05; llama.cpp's qwen35 computes with 1e-06"),
]


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED)
def test_what_the_graph_does_not_compute_is_named(case: str, changes: dict[str, Any], message: str) -> None:
    config = config_of(case)
    assert unlike_llamacpp(config) is None
    for key, value in changes.items():
        setattr(config, key, value)
    said = unlike_llamacpp(config)
    assert said is not None
    assert message in said
    assert "\n" not in said


def test_one_stack_holds_one_format(tmp_path: Path) -> None:
    run = run_of(tmp_path, "mixtral", overrides={"*.experts.3.w2": "w8"})
    with pytest.raises(
        LowbitError, match=r"experts\.3\.w2: llama.cpp has one tensor for it and for .*experts\.0\.w2"
    ):
        lowbit.export(run, "gguf")


def test_groups_wider_than_the_heads_that_move_are_refused(tmp_path: Path) -> None:
    run = run_of(tmp_path, "qwen3.5-grouped", "w4a16g64-sym", {"intermediate_size": 128})
    with pytest.raises(
        LowbitError, match=r"pieces of 32 columns in another order, and groups of 64.*: w4a16g32-sym$"
    ):
        lowbit.export(run, "gguf")


def test_scales_of_nvfp4_tensors_need_a_graph_that_applies_them(tmp_path: Path) -> None:
    run = run_of(tmp_path, "olmo2", "nvfp4a16")
    with pytest.raises(LowbitError, match=r"llama.cpp's olmo2 does not apply the scale of an NVFP4 tensor"):
        lowbit.export(run, "gguf")


def test_each_expert_has_its_own_scale_of_nvfp4(tmp_path: Path) -> None:
    run = run_of(tmp_path, "qwen3-moe", "nvfp4a16", {"moe_intermediate_size": 64})
    made = lowbit.export(run, "gguf")
    assert lowbit.verify(run, [made.out], logits=False)[0].ok
    tensors = {t.name: t for t in gguf.GGUFReader(made.out).tensors}
    assert tensors["blk.0.ffn_up_exps.weight"].tensor_type == Kind.NVFP4
    assert tensors["blk.0.ffn_up_exps.scale"].data.shape == (4,)


def test_a_wrong_expert_is_named(tmp_path: Path) -> None:
    run = run_of(tmp_path, "mixtral")
    made = lowbit.export(run, "gguf")
    (tensor,) = (t for t in gguf.GGUFReader(made.out).tensors if t.name == "blk.1.ffn_up_exps.weight")
    content = bytearray(made.out.read_bytes())
    content[int(tensor.data_offset) + tensor.n_bytes // 4 * 2 + 7] ^= 0x10  # at the start of the third expert of four
    made.out.write_bytes(content)
    (found,) = lowbit.verify(run, [made.out], logits=False)
    assert found.differs == ["model.layers.1.mlp.experts.2.w3.weight"]


def test_what_is_computed_a_little_differently_is_said() -> None:
    assert GPT_NEOX.warnings(config_of("gpt-neox")) == []
    assert "0.0005" in GPT_NEOX.warnings(config_of("gpt-neox", hidden_act="gelu"))[0]
    assert GPT_OSS.warnings(config_of("gpt-oss")) == []
    published = {  # of gpt-oss-20b: the ramp is from pair 8.09 to 17.4
        "rope_type": "yarn",
        "rope_theta": 150000.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    }
    config = config_of("gpt-oss", head_dim=64, rope_parameters=published)
    assert unlike_llamacpp(config) is None
    (said,) = GPT_OSS.warnings(config)
    assert said.startswith("rope_parameters.truncate False")
    assert 0 < float(re.search(r"up to ([\d.]+)%", said)[1]) < 100  # type: ignore[index]


def documented() -> Iterator[tuple[str, str]]:
    """Rows of the documentation's table: the class and llama.cpp's name."""
    for line in (DOCS / "exports.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| `(\w+ForCausalLM)` \| `([\w-]+)` \|", line):
            yield match[1], match[2]


def test_the_documentation_lists_the_table() -> None:
    assert list(documented()) == [(name, arch.name) for name, arch in ARCHITECTURES.items()]
