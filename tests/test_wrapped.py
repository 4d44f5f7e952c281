"""Models with other parts than a text model: the text model is quantized, the rest comes along byte for byte."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText

import lowbit
from lowbit.checkpoints.resolve import load_config
from lowbit.evaluation.generate import generate_text
from lowbit.models.description import from_dict, to_dict
from lowbit.models.discovery import known
from lowbit.models.families import architecture_of
from lowbit.pipeline.inspect import inspect_model
from runs import folder_bytes, quantize_tiny, streamed_logits
from tiny import tiny_ids
from wrapped import BLOCKS, CONFIGS, DISCOVERED, NAMES, TEXT, image_inputs, save_wrapped

pytestmark = pytest.mark.heavy  # makes whole runs


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a folder by its name in the file, of which no two are alike."""
    out: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name.startswith("lowbit-"):
            continue
        with safe_open(file, framework="pt") as shard:
            for name in shard.keys():  # noqa: SIM118
                assert name not in out, name
                out[name] = shard.get_tensor(name)
    return out


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def stock(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """By family: the folder and the float model."""
    root = tmp_path_factory.mktemp("wrapped")
    return {name: (root / name, save_wrapped(root / name, name)) for name in NAMES}


@pytest.fixture(scope="module")
def runs(saved, tmp_path_factory):
    """By family: a run of 8 bits."""
    root = tmp_path_factory.mktemp("runs")
    return {name: quantize_tiny(saved[name][0], root / name, "w8a16g32-sym", "gptq").out for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_the_text_model_is_found(name):
    config = CONFIGS[name]()
    config.architectures = [type(AutoModelForImageTextToText.from_config(config)).__name__]
    found = architecture_of(config)
    assert (found.blocks, found.text_model, found.head) == (BLOCKS, BLOCKS.removesuffix(".layers"), "lm_head")
    assert len(found.layers) == 3


@pytest.mark.parametrize("name", NAMES)
def test_texts_give_the_logits_of_the_float_model(name, saved):
    folder, model = saved[name]
    ids = tiny_ids(2, 12)
    right = logits(model, {"input_ids": ids})
    assert torch.equal(streamed_logits(folder, ids), right)
    assert torch.equal(logits(lowbit.load(folder), {"input_ids": ids}), right)


@pytest.mark.parametrize("name", NAMES)
def test_stock_transformers_loads_the_run_as_the_same_class(name, saved, runs):
    ids = {"input_ids": tiny_ids(2, 12)}
    model, ours = stock(runs[name]), lowbit.load(runs[name])
    assert type(model) is type(ours) is type(saved[name][1])
    assert torch.allclose(logits(model, ids), logits(ours, ids), atol=1e-5)
    assert torch.allclose(streamed_logits(runs[name], ids["input_ids"]), logits(ours, ids), atol=1e-5)
    assert lowbit.verify(runs[name])[0].ok


@pytest.mark.parametrize("name", NAMES)
def test_an_image_gives_the_float_model_s_logits_within_what_8_bits_explain(name, saved, runs):
    inputs, model, loaded = image_inputs(name), copy.deepcopy(saved[name][1]), lowbit.load(runs[name])
    right, ours = logits(model, inputs), logits(stock(runs[name]), inputs)
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert float((logits(model, other) - right).std()) > 0.05 * float(right.std())  # the image matters
    assert 0 < float((ours - right).std()) < 0.05 * float(right.std())
    # The linears' 8 bits explain all of it: the float model computes the same once it has them.
    for key, module in model.named_modules():
        if key.startswith(BLOCKS) and isinstance(module, torch.nn.Linear):
            weight = loaded.get_submodule(key).weight
            assert float((weight - module.weight).std()) < 0.02 * float(module.weight.std())
            module.weight = weight
    assert torch.allclose(ours, logits(model, inputs), atol=1e-4)
    assert torch.allclose(ours, logits(loaded, inputs), atol=1e-4)


@pytest.mark.parametrize(("name", "encoder"), [("gemma3", "model.vision_tower"), ("qwen3-vl", "model.visual")])
@pytest.mark.parametrize("scheme", ["w8a16kv4", "w8a16kv4h"])
def test_keys_and_values_are_quantized_in_the_text_model_alone(name, encoder, scheme, saved, tmp_path):
    folder, model = saved[name]
    run = quantize_tiny(folder, tmp_path / "run", scheme, "rtn").out
    loaded, ids = lowbit.load(run), {"input_ids": tiny_ids(2, 12)}
    seen = []
    for one in (model, loaded, copy.deepcopy(loaded)):
        with one.get_submodule(encoder).register_forward_hook(lambda module, args, out: seen.append(out[0])):
            logits(one, image_inputs(name))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    assert float((logits(loaded, ids) - logits(model, ids)).std()) > 0.01 * float(logits(model, ids).std())
    assert torch.allclose(streamed_logits(run, ids["input_ids"]), logits(loaded, ids), atol=1e-5)


@pytest.mark.parametrize("name", ["gemma3", "glm4v"])
def test_an_architecture_that_is_kept_knows_which_part_it_is_of(name):
    config = CONFIGS[name]()
    config.architectures = [AutoModelForImageTextToText._model_mapping[type(config)].__name__]
    own = architecture_of(config)
    assert own.text_model == "model.language_model"
    assert from_dict(json.loads(json.dumps(to_dict(own)))) == own


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_the_other_parts_is_byte_identical(name, saved, runs):
    before, after = stored(saved[name][0]), stored(runs[name])
    others = [key for key in before if not key.startswith(TEXT[name])]
    assert any("vis" in key for key in others)
    for key in others:
        assert before[key].dtype == after[key].dtype, key
        assert torch.equal(before[key].view(torch.uint8), after[key].view(torch.uint8)), key
    linears = [key for key in after if key.endswith("weight_packed")]
    assert len(linears) == 3 * 7
    assert all(key.startswith(TEXT[name]) for key in linears)  # under the source's names


@pytest.mark.parametrize("name", NAMES)
def test_config_manifest_and_inspect_say_what_is_quantized(name, saved, runs):
    source, config = (json.loads((folder / "config.json").read_text()) for folder in (saved[name][0], runs[name]))
    ignored = config["quantization_config"]["ignore"]
    linears = {key for key, module in saved[name][1].named_modules() if isinstance(module, torch.nn.Linear)}
    assert {key for key in linears if "vision" in key or "visual" in key} <= {*ignored}
    assert not any(key.startswith(BLOCKS) for key in ignored)
    assert config["architectures"] == source["architectures"]
    assert (runs[name] / "preprocessor_config.json").is_file()
    note = json.loads((runs[name] / "lowbit.json").read_text())["carried"]
    assert len(note) == 1
    assert "byte for byte" in note[0]
    assert inspect_model(str(runs[name]), "w4a16", "rtn")["carried_over"] == note[0]
    assert inspect_model(str(saved[name][0]), "w8a16g32-sym", "rtn")["carried_over"] == note[0]


def test_a_killed_run_ends_with_the_same_bytes(saved, runs, tmp_path, monkeypatch):
    from lowbit.pipeline import finalize

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finalize, "write_folder_index", killed)
        with pytest.raises(KeyboardInterrupt):
            quantize_tiny(saved["gemma3"][0], tmp_path / "run", "w8a16g32-sym", "gptq")
    (tmp_path / "run/block-00002.safetensors").unlink()
    (tmp_path / "run/model-carried.safetensors").unlink()
    quantize_tiny(saved["gemma3"][0], tmp_path / "run", "w8a16g32-sym", "gptq")
    assert folder_bytes(tmp_path / "run") == folder_bytes(runs["gemma3"])


@pytest.mark.parametrize("target", ["onnx", "executorch", "gptq", "vllm"])
def test_exports_are_refused(target, runs, tmp_path):
    with pytest.raises(lowbit.LowbitError, match="hold a text model alone"):
        lowbit.export(runs["gemma3"], target, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_manifest_is_a_quantized_source(saved, runs, tmp_path):
    shutil.copytree(runs["gemma3"], tmp_path / "m")
    (tmp_path / "m/lowbit.json").unlink()
    ids = {"input_ids": tiny_ids(2, 12)}
    assert torch.allclose(
        logits(lowbit.load(tmp_path / "m"), ids), logits(lowbit.load(runs["gemma3"]), ids), atol=1e-5
    )
    text = str(saved["gemma3"][0] / "calib.txt")
    kept = lowbit.quantize(tmp_path / "m", tmp_path / "kept", keep=True).out
    assert torch.allclose(logits(stock(kept), ids), logits(lowbit.load(runs["gemma3"]), ids), atol=1e-5)
    again = lowbit.quantize(
        tmp_path / "m", tmp_path / "again", scheme="w4a16", recipe="rtn", data=text, length=16
    ).out
    before, after = stored(saved["gemma3"][0]), stored(again)
    others = [key for key in before if "vision" in key]
    assert others
    assert all(torch.equal(before[key], after[key]) for key in others)


def test_texts_are_continued(runs):
    text = generate_text(runs["qwen3-vl"], "ab", tokens=3)
    assert text == generate_text(runs["qwen3-vl"], "ab", tokens=3)
    assert len(text) > 2


def test_a_class_that_holds_a_llama(tmp_path):
    save_wrapped(tmp_path / "m", "llava")
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", "w8a16g32-sym", overrides={"lm_head": "w8"}).out
    ids = {"input_ids": tiny_ids(2, 12)}
    ours, model = lowbit.load(run), stock(run)
    assert type(model) is type(ours)
    assert torch.allclose(logits(model, ids), logits(ours, ids), atol=1e-5)


@pytest.mark.parametrize("name", DISCOVERED)
def test_a_text_model_that_no_family_declares_is_discovered_where_it_is(name, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "_FOUND", {})
    model = save_wrapped(tmp_path / "m", name)
    found = architecture_of(load_config(tmp_path / "m"))
    assert (found.origin, found.blocks, found.text_model) == ("discovered", BLOCKS, BLOCKS.removesuffix(".layers"))
    assert all(kind.edges for kind in found.layers)
    ids = tiny_ids(2, 12)
    right = logits(model, {"input_ids": ids})
    assert torch.equal(streamed_logits(tmp_path / "m", ids), right)
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", "w8a16g16-sym", "awq+gptq").out
    ours = logits(lowbit.load(run), {"input_ids": ids})
    assert type(stock(run)) is type(model)
    assert torch.allclose(logits(stock(run), {"input_ids": ids}), ours, atol=1e-5)
    assert 0 < float((ours - right).std()) < 0.05 * float(right.std())
    before, after = stored(tmp_path / "m"), stored(run)
    others = [key for key in before if "vis" in key]
    assert others
    assert all(torch.equal(before[key], after[key]) for key in others)


def test_evaluation_and_comparison_are_by_text(saved, runs):
    text = str(saved["gemma3"][0] / "calib.txt")
    scores = [lowbit.evaluate(f, text, length=24, tokens=96).perplexity for f in (saved["gemma3"][0], runs["gemma3"])]
    assert scores[1] == pytest.approx(scores[0], rel=0.05)
