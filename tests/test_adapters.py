"""LoRA adapters: merged into their base by the published formula, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

import lowbit
from lowbit.cli.main import call
from tiny import save_tiny, tiny_ids
from wrapped import save_wrapped

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.2.mlp.down_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    save_tiny(tmp_path / "base", "llama")
    return tmp_path / "base"


def save_adapter(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    """An adapter as peft saves it; names are those of the base model."""
    folder.mkdir(exist_ok=True)
    content = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "/nowhere/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(content))
    save_file(
        {f"base_model.model.{name}": value.clone() for name, value in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


def pair(module: str, out: int, inner: int, rank: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"{module}.lora_A.weight": torch.randn(rank, inner, generator=generator),
        f"{module}.lora_B.weight": torch.randn(out, rank, generator=generator),
    }


def test_a_merged_linear_computes_what_base_and_adapter_compute(base: Path, tmp_path: Path):
    tensors = {**pair(Q, 64, 64), **pair(DOWN, 64, 96, seed=1)}
    adapter = save_adapter(tmp_path / "adapter", tensors)
    merged = lowbit.merge(adapter, base=base, out=tmp_path / "merged")
    assert (merged.changed, merged.replaced) == (2, 0)
    model, other = lowbit.load(base), lowbit.load(merged.out)
    for module in (Q, DOWN):
        a, b = (tensors[f"{module}.lora_{side}.weight"] for side in "AB")

        def beside(linear, args, out, a=a, b=b):
            return out + 8 / 4 * (args[0] @ a.T) @ b.T

        model.get_submodule(module).register_forward_hook(beside)
    with torch.no_grad():
        assert torch.allclose(other(tiny_ids()).logits, model(tiny_ids()).logits, atol=1e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged.out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{Q}.weight", f"{DOWN}.weight"}
    assert (merged.out / "tokenizer.json").is_file()
    text = str(base / "calib.txt")
    lowbit.quantize(merged.out, tmp_path / "run", scheme="w8a16", recipe="rtn", data=text, samples=2, length=16)


@pytest.mark.parametrize(
    ("config", "rank", "scale"),
    [
        ({"use_rslora": True}, 4, 8 / math.sqrt(4)),
        ({"rank_pattern": {"q_proj": 2}}, 2, 8 / 2),
        ({"alpha_pattern": {r".*\.0\.self_attn\.q_proj": 3}}, 4, 3 / 4),
        ({"alpha_pattern": {"k_proj": 3}}, 4, 8 / 4),
    ],
)
def test_scales(config: dict[str, Any], rank: int, scale: float, base: Path, tmp_path: Path):
    tensors = pair(Q, 64, 64, rank)
    adapter = save_adapter(tmp_path / "adapter", tensors, **config)
    out = lowbit.merge(adapter, base=base, out=tmp_path / "merged").out
    before, after = (load_file(folder / "model.safetensors")[f"{Q}.weight"] for folder in (base, out))
    a, b = tensors.values()
    assert torch.allclose(after - before, scale * b @ a, atol=1e-5)


def test_embeddings_transposed_weights_and_whole_tensors(base: Path, tmp_path: Path):
    generator = torch.Generator().manual_seed(3)
    a, b = torch.randn(4, 96, generator=generator), torch.randn(64, 4, generator=generator)
    head = torch.randn(96, 64, generator=generator)
    embed = "model.embed_tokens"
    tensors = {
        f"{embed}.lora_embedding_A": a,
        f"{embed}.lora_embedding_B": b,
        "lm_head.modules_to_save.weight": head,
    }
    adapter = save_adapter(tmp_path / "adapter", tensors)
    result = lowbit.merge(adapter, base=base, out=tmp_path / "merged")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, result.out))
    assert torch.allclose(after[f"{embed}.weight"] - before[f"{embed}.weight"], 2 * (b @ a).T, atol=1e-5)
    assert torch.equal(after["lm_head.weight"], head)
    turned = save_adapter(tmp_path / "turned", pair(Q, 64, 64), fan_in_fan_out=True)
    out = lowbit.merge(turned, base=base, out=tmp_path / "turned-merged").out
    after, (a, b) = load_file(out / "model.safetensors"), pair(Q, 64, 64).values()
    assert torch.allclose(after[f"{Q}.weight"] - before[f"{Q}.weight"], 2 * (b @ a).T, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "LOHA"}, "an adapter of the kind 'LOHA'; LORA is merged here"),
        ({"peft_type": None}, "an adapter of the kind None"),
        ({"use_dora": True}, "an adapter with DoRA; plain LoRA is merged here"),
        ({"target_parameters": ["experts.up_proj"]}, "parameters that are no linear's"),
        ({"init_lora_weights": "pissa_niter_16"}, "trained from weights that 'pissa_niter_16' had changed"),
        ({"init_lora_weights": "LoftQ"}, "does not fit the model's own"),
        ({"r": 8}, "rank 8: they do not match"),
        ({"r": "four"}, "has r = 'four'"),
        ({"lora_alpha": 0}, "has lora_alpha = 0"),
        ({"rank_pattern": [1]}, "rank_pattern = "),
    ],
)
def test_other_adapters_are_refused_by_name(config: dict[str, Any], message: str, base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "adapter", pair(Q, 64, 64), **config)
    with pytest.raises(lowbit.LowbitError, match=message) as error:
        lowbit.merge(adapter, base=base, out=tmp_path / "merged")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("model.layers.7.self_attn.q_proj", 64, 64), "changes 'model.layers.7.self_attn.q_proj.weight', which"),
        (pair(Q, 32, 64), r"of shape \(32, 64\), .* has \(64, 64\): give its own base model"),
        ({f"{Q}.lora_A.weight": torch.zeros(4, 64)}, "lacks '.*lora_B.weight': fetch it again"),
        ({**pair(Q, 64, 64), f"{Q}.lora_magnitude_vector": torch.ones(64)}, "which plain LoRA does not have"),
        ({k: v * torch.nan for k, v in pair(Q, 64, 64).items()}, "holds no finite floats"),
    ],
    ids=["another base", "another shape", "half", "magnitudes", "nan"],
)
def test_adapters_that_do_not_fit(tensors: dict[str, torch.Tensor], message: str, base: Path, tmp_path: Path):
    adapter = save_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(lowbit.LowbitError, match=message):
        lowbit.merge(adapter, base=base, out=tmp_path / "merged")


def test_the_command_line(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    adapter = save_adapter(tmp_path / "adapter", pair(Q, 64, 64))
    assert call(["quantize", str(adapter), "--out", str(tmp_path / "run")]) == 2
    assert f"'lowbit merge {adapter} --base MODEL --out DIR'" in capsys.readouterr().err
    command = ["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "merged"), "--json"]
    assert call(command) == 0
    assert json.loads(capsys.readouterr().out)["changed"] == 1
    assert call(command) == 2
    assert "exists: name another, or delete it" in capsys.readouterr().err
    assert call(["merge", str(base), "--base", str(base), "--out", str(tmp_path / "x")]) == 2
    assert "so it is not an adapter" in capsys.readouterr().err
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    assert call(["merge", str(adapter), "--base", str(base), "--out", str(tmp_path / "x")]) == 2
    assert "pickled weights" in capsys.readouterr().err


EMBED, HEAD = "model.embed_tokens", "lm_head"


def on_embedding(seed: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 96, generator=generator), torch.randn(64, 4, generator=generator)
    return {f"{EMBED}.lora_embedding_A": a, f"{EMBED}.lora_embedding_B": b}


WHOLE = torch.randn(96, 64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(
    ("tensors", "config", "tied"),
    [
        (on_embedding(), {}, False),
        (pair(HEAD, 96, 64), {}, False),
        ({f"{EMBED}.modules_to_save.weight": WHOLE}, {}, False),
        ({f"{HEAD}.modules_to_save.weight": WHOLE}, {}, False),
        ({f"{EMBED}.modules_to_save.weight": WHOLE, f"{HEAD}.modules_to_save.weight": -WHOLE}, {}, False),
        ({f"{EMBED}.modules_to_save.weight": WHOLE, f"{HEAD}.modules_to_save.weight": WHOLE}, {}, True),
        ({**on_embedding(), **pair(HEAD, 96, 64)}, {}, False),
        (on_embedding(), {"ensure_weight_tying": True}, True),
        (pair(Q, 64, 64), {}, True),
    ],
)
@pytest.mark.parametrize("stored", ["embedding", "head", "both"])
def test_a_tied_embedding_of_which_one_side_changes_is_two_tensors(tensors, config, tied, stored, tmp_path: Path):
    """PEFT wraps the embedding or the head, and the other one computes with the base's weight."""
    save_tiny(tmp_path / "base", "llama", tie_word_embeddings=True)
    file = tmp_path / "base" / "model.safetensors"
    before = load_file(file)
    assert f"{HEAD}.weight" not in before
    weight = before.pop(f"{EMBED}.weight")
    names = {"embedding": [EMBED], "head": [HEAD], "both": [EMBED, HEAD]}[stored]
    save_file({**before, **{f"{name}.weight": weight.clone() for name in names}}, file)
    out = lowbit.merge(
        save_adapter(tmp_path / "a", tensors, **config), base=tmp_path / "base", out=tmp_path / "m"
    ).out

    def wanted(module: str) -> torch.Tensor:
        if f"{module}.modules_to_save.weight" in tensors:
            return tensors[f"{module}.modules_to_save.weight"]
        if f"{module}.lora_A.weight" in tensors:
            return weight + 2 * tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]
        if f"{EMBED}.lora_embedding_A" in tensors and (module == EMBED or config):
            return weight + 2 * (tensors[f"{EMBED}.lora_embedding_B"] @ tensors[f"{EMBED}.lora_embedding_A"]).T
        return weight

    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is tied
    for model in (lowbit.load(out), AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)):
        assert torch.allclose(model.get_input_embeddings().weight, wanted(EMBED), atol=1e-5)
        assert torch.allclose(model.get_output_embeddings().weight, wanted(HEAD), atol=1e-5)
    after = load_file(out / "model.safetensors")
    assert len({EMBED, HEAD} & {name.removesuffix(".weight") for name in after}) == (len(names) if tied else 2)


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_a_model_that_sees_has_the_names_in_memory(tied: bool, tmp_path: Path):
    """Files of Gemma 3 have ``language_model.model.layers``, the model has ``model.language_model.layers``."""
    model = save_wrapped(tmp_path / "base", "gemma3", tie_word_embeddings=tied)
    inner = model.get_submodule("model.language_model.layers.0.self_attn.q_proj").weight
    place = "language_model.layers.0.self_attn.q_proj"
    before = load_file(tmp_path / "base" / "model.safetensors")
    (name,) = (name for name in before if name.endswith("layers.0.self_attn.q_proj.weight") and "vision" not in name)
    assert name == "language_model.model.layers.0.self_attn.q_proj.weight"
    tensors = pair(f"model.{place}", *inner.shape)
    a, b = tensors.values()
    embed = {"model.language_model.embed_tokens.modules_to_save.weight": WHOLE} if tied else {}
    out = lowbit.merge(
        save_adapter(tmp_path / "a", {**tensors, **embed}), base=tmp_path / "base", out=tmp_path / "m"
    ).out
    after = load_file(out / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name, *(["language_model.model.embed_tokens.weight"] if tied else [])}
    assert after.keys() - before.keys() == ({"lm_head.weight"} if tied else set())
    loaded = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32)
    assert torch.allclose(loaded.get_submodule(f"model.{place}").weight, inner + 2 * b @ a, atol=1e-5)
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert not torch.equal(loaded.lm_head.weight, loaded.get_input_embeddings().weight)
    # The names of files, which older releases of the library had in memory, are taken too.
    older = {key.replace("model.language_model.", "language_model.model."): value for key, value in tensors.items()}
    again = lowbit.merge(save_adapter(tmp_path / "b", older), base=tmp_path / "base", out=tmp_path / "n").out
    assert torch.equal(load_file(again / "model.safetensors")[name], after[name])
    both = save_adapter(tmp_path / "c", {**older, **tensors})
    with pytest.raises(lowbit.LowbitError, match="two names of one tensor of"):
        lowbit.merge(both, base=tmp_path / "base", out=tmp_path / "x")


def test_a_base_that_names_its_weights_is_merged_under_the_library_s_names(base: Path, tmp_path: Path):
    (base / "model.safetensors").rename(base / "weights.safetensors")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "transformers_weights": "weights.safetensors"}))
    out = lowbit.merge(save_adapter(tmp_path / "a", pair(Q, 64, 64)), base=base, out=tmp_path / "m").out
    assert "transformers_weights" not in json.loads((out / "config.json").read_text())
    before, after = lowbit.load(base), lowbit.load(out)
    assert not torch.equal(before.get_submodule(Q).weight, after.get_submodule(Q).weight)
    assert torch.equal(before.lm_head.weight, after.lm_head.weight)
