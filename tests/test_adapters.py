"""LoRA adapters: merged into their base by the published formula, or refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.cli.main import call
from tiny import save_tiny, tiny_ids

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
        {f"base_model.model.{name}": value for name, value in tensors.items()}, folder / "adapter_model.safetensors"
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
