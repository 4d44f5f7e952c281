"""A prefix: its keys and values stand for its tokens, move with every map, and come before every text."""

from __future__ import annotations

import copy
import math
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import processors
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lowbit
from lowbit.analysis.diagnose import diagnose
from lowbit.errors import LowbitError
from lowbit.evaluation.generate import generate_text
from lowbit.exporters import EXPORTERS
from lowbit.methods import METHODS
from lowbit.methods.options import with_options
from lowbit.models.block import Calib
from lowbit.models.equivalence import move
from lowbit.models.forward import relative_error, run_all
from lowbit.models.prefix import KEYS, VALUES, Prefix
from lowbit.pipeline.inspect import inspect_model
from lowbit.reports.command import command
from runs import folder_bytes, quantize_tiny, streamed_logits
from tiny import params_of, planned, save_tiny, skeleton_of, tiny_ids, tiny_model, tiny_tokenizer

GIVEN = (5, 9)
FAMILIES = ["llama", "llama-odd", "opt", "gemma2", "gemma3", "qwen3", "phi3-partial", "smollm3"]
IDS = tiny_ids(2, 20)


def prefix_by_the_library(model: Any, ids: tuple[int, ...] = GIVEN) -> Prefix:
    with torch.no_grad():
        cache = DynamicCache()
        model(torch.tensor([ids]), cache=cache)
    keys, values = ([getattr(layer, name)[0] for layer in cache.layers] for name in ("keys", "values"))
    return Prefix(ids, tuple(keys), tuple(values))


def behind_tokens(model: Any, ids: torch.Tensor, prefix: tuple[int, ...] = GIVEN) -> torch.Tensor:
    with torch.no_grad():
        front = torch.tensor([prefix], dtype=torch.int64).expand(len(ids), len(prefix))
        return model(torch.cat([front, ids], 1)).logits[:, len(prefix) :]


# The value.


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_and_values_stand_for_the_tokens(name: str) -> None:
    model = tiny_model(name)
    prefix, skeleton = prefix_by_the_library(model), skeleton_of(model)
    skeleton.behind(len(GIVEN))
    x = skeleton.embed(IDS)
    for index in range(len(skeleton.layers)):
        params = params_of(model, skeleton, index) | prefix.params(index)
        x = run_all(skeleton.block(index, params), x)
    got, exact = skeleton.logits(IDS, x), behind_tokens(model, IDS)
    assert relative_error(got, exact) < 1e-9
    with torch.no_grad():
        assert relative_error(model(IDS).logits, exact) > 1e-5  # without it the function is another


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_move_keys_and_values(name: str) -> None:
    model = tiny_model(name).double()
    prefix, skeleton = prefix_by_the_library(model), skeleton_of(model)
    skeleton.behind(len(GIVEN))
    x = skeleton.embed(IDS)
    block = skeleton.block(0, params_of(model, skeleton, 0, dtype=torch.float64) | prefix.params(0))
    y, generator = run_all(block, x), torch.Generator().manual_seed(3)
    edges = [edge for edge in block.edges() if edge.kind in ("heads", "qk")]
    assert {edge.kind for edge in edges} == {"heads", "qk"}
    for edge in edges:
        map = 0.5 + torch.rand(edge.diagonal_shape, generator=generator, dtype=torch.float64)
        if edge.kind == "heads":
            map = torch.diag_embed(map) + 0.1 * torch.randn(*map.shape, map.shape[-1], generator=generator).double()
        moved = move(block, edge, map)
        assert relative_error(run_all(block, x, moved), y) < (1e-13 if "gemma" in name else 1e-20)  # float32 norms
        stale = {**moved, **prefix.params(0)}
        assert relative_error(run_all(block, x, stale), y) > 1e-9


MOVING = ("affinequant", "rptq")  # maps over heads, and over q and k
KEEPING = {
    name: {"heads": "matrix", "qk": "matrix"} if name == "affinequant" else {}
    for name, method in METHODS.items()
    if method.keeps_function
}


@pytest.mark.parametrize("name", KEEPING)
def test_every_transform_keeps_the_function_behind_a_prefix(name: str) -> None:
    """In OPT, where biases take shifts; heads and q, k are moved, so stale keys and values would show."""
    model = tiny_model("opt")
    prefix, skeleton = prefix_by_the_library(model), skeleton_of(model)
    skeleton.behind(len(GIVEN))
    x = skeleton.embed(tiny_ids())
    block = skeleton.block(0, params_of(model, skeleton, 0) | prefix.params(0))
    block = planned(block, "w4a8-static16" if name == "rptq" else "w4a4kv4")
    y = run_all(block, x)
    step = with_options(METHODS[name](), **KEEPING[name])
    step = with_options(step, epochs=1) if step.schedule is not None else step
    step = with_options(step, grid=4) if name == "outlier-suppression+" else step
    done = step(block, Calib(x, x, y))
    assert relative_error(run_all(done, x), y) < 1e-8
    changed = [n for n in (f"0.{KEYS}", f"0.{VALUES}") if not torch.equal(done.params[n], block.params[n])]
    if name in MOVING:
        assert changed
        stale = {**done.params, **prefix.params(0)}
        assert relative_error(run_all(done, x, stale), y) > 1e-7


# Runs.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prefix") / "model"
    save_tiny(folder, "llama", num_hidden_layers=2)
    return folder


@pytest.fixture(scope="module")
def run(model: Path) -> Path:
    return quantize_tiny(model, model.parent / "run", "w8a8kv4", "smoothquant", prefix="5,9").out


def test_close_to_the_float_model_behind_the_tokens(model: Path, run: Path) -> None:
    exact = behind_tokens(AutoModelForCausalLM.from_pretrained(model), IDS)
    assert relative_error(streamed_logits(run, IDS), exact) < 0.03


def test_load_computes_what_is_evaluated(run: Path) -> None:
    with torch.no_grad():
        assert torch.equal(lowbit.load(run)(IDS).logits, streamed_logits(run, IDS))


def test_keys_and_values_are_not_quantized(run: Path) -> None:
    """With two bits for all but the prefix, those of the prefix arrive at the attention as they are stored."""
    loaded, seen = lowbit.load(run), []
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((key, value))
        return sdpa(module, query, key, value, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("sdpa", watched)
    try:
        with torch.no_grad():
            loaded(IDS)
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa)
    stored = loaded.lowbit_prefix.prefix()
    for (key, value), own_key, own_value in zip(seen, stored.keys, stored.values, strict=True):
        assert torch.equal(key[0, :, :2], own_key)
        assert torch.equal(value[1, :, :2], own_value)
        assert len(key[0, 0, 5].unique()) <= 16  # 4 bits


def test_generation_starts_behind_the_prefix(run: Path) -> None:
    loaded, out = lowbit.load(run), IDS[:1]
    got = loaded.generate(out, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        for _ in range(6):
            out = torch.cat([out, loaded(out, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert got.tolist() == out.tolist()
    beams = loaded.generate(IDS, max_new_tokens=3, do_sample=False, num_beams=2)
    assert beams.shape == (2, IDS.shape[1] + 3)


def test_generation_beyond_a_sliding_window(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "gemma3", num_hidden_layers=2)
    loaded = lowbit.load(quantize_tiny(tmp_path / "model", tmp_path / "run", "w8a8kv8", prefix="5,9").out)
    with torch.no_grad():
        step = loaded(IDS[:, :12], use_cache=True)
        last = loaded(IDS[:, 12:13], cache=step.cache).logits
        assert relative_error(last, loaded(IDS[:, :13]).logits[:, -1:]) < 1e-9


def test_padded_texts(run: Path) -> None:
    loaded, pad = lowbit.load(run), 3
    ids = torch.cat([torch.zeros(2, pad, dtype=torch.int64), IDS], 1)
    mask = torch.cat([torch.zeros(2, pad, dtype=torch.int64), torch.ones_like(IDS)], 1)
    with torch.no_grad():
        plain = loaded(IDS).logits
        got = loaded(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, pad:]
    assert relative_error(got, plain) < 1e-9


def test_a_cache_of_an_earlier_call(run: Path) -> None:
    loaded = lowbit.load(run)
    with torch.no_grad():
        first = loaded(IDS[:1, :12], use_cache=True)
        assert first.cache.get_seq_length() == 12 + len(GIVEN)
    with pytest.raises(LowbitError, match="without a cache"):
        loaded.generate(IDS[:1], cache=first.cache, max_new_tokens=2)
    with pytest.raises(LowbitError, match="cache_implementation"):
        loaded.generate(IDS[:1], cache_implementation="static", max_new_tokens=2)


def test_copies_and_pickles(run: Path) -> None:
    loaded = lowbit.load(run)
    with torch.no_grad():
        exact = loaded(IDS).logits
        for other in (copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))):
            assert torch.equal(other(IDS).logits, exact)
        assert relative_error(loaded.double()(IDS).logits, exact.double()) < 1e-2  # 4-bit keys are rounded otherwise
    with pytest.raises(LowbitError, match="a prefix of 2 tokens"):
        loaded.save_pretrained("nowhere")


def test_perplexity_behind_the_prefix(model: Path, run: Path) -> None:
    """Windows come behind the prefix, which is not scored."""
    got = lowbit.evaluate(run, str(model / "calib.txt"), length=16, tokens=64)
    ids = tiny_tokenizer()((model / "calib.txt").read_text(), add_special_tokens=False)["input_ids"][:64]
    windows = torch.tensor(ids).view(4, 16)
    with torch.no_grad():
        logits = lowbit.load(run)(windows).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert next(iter(got.perplexity.values())) == pytest.approx(math.exp(loss), rel=1e-5)
    assert next(iter(got.scored.values())) == 4 * 15
    with pytest.raises(LowbitError, match="give 126 or less"):
        lowbit.evaluate(run, str(model / "calib.txt"), length=127)


def test_what_is_said_of_it(run: Path) -> None:
    manifest = lowbit.runs.manifest.manifest_of(run)
    assert manifest is not None
    assert manifest.prefix is not None
    assert manifest.prefix.ids == list(GIVEN)
    assert not manifest.transformers.loads
    assert "a prefix of 2 tokens" in str(manifest.transformers.why_not)
    assert "prefix of 2 tokens" in inspect_model(str(run), "w8a8", "rtn")["prefix"]
    assert "| prefix | prefix of 2 tokens" in (run / "README.md").read_text()
    assert "--prefix=5,9" in command(manifest.request)[0]
    floats = 2 * 2 * 2 * 2 * 16 * 32  # layers, keys and values, tokens, heads, width, bits
    plain = manifest.bits_per_weight - floats / sum(math.prod(s) for s in shapes(run))
    assert plain == pytest.approx(8 + (16 + 8) / (sum(math.prod(s) for s in shapes(run)) / rows(run)), rel=0.05)


def shapes(run: Path) -> list[tuple[int, ...]]:
    loaded = lowbit.load(run)
    return [tuple(m.weight.shape) for n, m in loaded.named_modules() if "proj" in n]


def rows(run: Path) -> int:
    return sum(shape[0] for shape in shapes(run))


def test_nothing_else_runs_it(run: Path) -> None:
    with pytest.raises(Exception, match="behind a prefix"):
        AutoModelForCausalLM.from_pretrained(run)
    for name in EXPORTERS:
        with pytest.raises(LowbitError, match="prefix: texts come behind the keys and values of 2 tokens"):
            lowbit.export(run, name, out=run.parent / "export")


def test_a_broken_prefix_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run" / "block-00001.safetensors"
    tensors = load_file(file)
    name = f"model.layers.1.{VALUES}"
    save_file({**tensors, name: tensors[name][:, :1].contiguous()}, file, metadata={"format": "pt"})
    for use in (lowbit.load, lambda folder: streamed_logits(folder, IDS)):
        with pytest.raises(LowbitError, match=f"'{name}' in .* is not the float32 keys or values of 2 tokens"):
            use(tmp_path / "run")


def test_what_takes_no_prefix(model: Path, run: Path) -> None:
    """Divergence of single blocks needs the float model behind the prefix; a prompt and it have to fit together."""
    with pytest.raises(LowbitError, match="has a prefix, whose keys and values fit none of the float model's blocks"):
        diagnose(run, exact=str(model))
    assert diagnose(run).blocks
    with pytest.raises(LowbitError, match="5 tokens, the prefix 2, and --tokens is 122"):
        generate_text(run, "abcde", 122)
    assert generate_text(run, "abcde", 121).startswith("abcde")
    with pytest.raises(LowbitError, match="give 126 or less"):
        lowbit.compare(model, [run], data=str(model / "calib.txt"), length=127)


@pytest.mark.parametrize("recipe", ["steps: [gptq, tune: {epochs: 1, rank: 2, held_out: 0}]\nwindow: 2"])
def test_a_tuned_window_of_layers(model: Path, tmp_path: Path, recipe: str) -> None:
    (tmp_path / "own.yaml").write_text(recipe)
    done = quantize_tiny(model, tmp_path / "run", "w4a8kv4h", str(tmp_path / "own.yaml"), prefix="5,9")
    with torch.no_grad():
        assert torch.equal(lowbit.load(done.out)(IDS).logits, streamed_logits(done.out, IDS))
    exact = behind_tokens(AutoModelForCausalLM.from_pretrained(model), IDS)
    assert relative_error(streamed_logits(done.out, IDS), exact) < 0.2


class Killed(BaseException):
    """Passes every handler of errors, as a kill does."""


def test_kill_and_resume(model: Path, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, out = os.replace, tmp_path / "run"
    for stop in ("prefix.safetensors", "prefix.json", "model-rest.safetensors", "block-00001.safetensors"):

        def replace(source: Any, target: Any, stop: str = stop) -> None:
            if Path(target).name == stop:
                raise Killed
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(Killed):
                quantize_tiny(model, out, "w8a8kv4", "smoothquant", prefix="5,9")
    quantize_tiny(model, out, "w8a8kv4", "smoothquant", prefix="5,9")
    assert folder_bytes(out) == folder_bytes(run)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"prefix": ""}, "which is 0 tokens"),
        ({"prefix": "a" * 65}, "which is 65 tokens; 1 to 64 are allowed"),
        ({"prefix": "96"}, "has token 96; this model has 96"),
        ({"prefix": "auto", "target": "llama.cpp", "scheme": None}, "no runtime starts from keys and values"),
    ],
)
def test_refused_before_work(model: Path, tmp_path: Path, given: dict[str, Any], why: str) -> None:
    arguments = {"scheme": "w8a8", **given}
    with pytest.raises(LowbitError, match=why):
        quantize_tiny(model, tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


def test_no_room_for_it(model: Path, tmp_path: Path) -> None:
    text = str(model / "calib.txt")
    with pytest.raises(LowbitError, match="leave room for 1; give a shorter --length"):
        lowbit.quantize(
            str(model), tmp_path / "run", scheme="w8a8", recipe="rtn", data=text, length=127, prefix="5,9"
        )


# The search. In OPT the first position has an embedding of its own, so its token can be made massive.


@pytest.fixture(scope="module")
def massive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("massive") / "model"
    model = save_tiny(folder, "opt", num_hidden_layers=2)
    with torch.no_grad():
        decoder = model.model.decoder
        for table in (decoder.embed_positions, decoder.embed_tokens):
            table.weight[:, 7] = 0.0
        decoder.embed_positions.weight[2, 7] = 3000.0
        decoder.layers[0].fc1.weight[:, 7] *= 40.0  # what the down projection reads of that token is massive, too
    model.save_pretrained(folder)
    return folder


def test_the_search_finds_a_massive_first_token(massive: Path) -> None:
    """The prefix is BOS, text behind it has no massive token, and static ranges fit what is left."""
    plain = quantize_tiny(massive, massive.parent / "plain", "w8a8-static", input_range="min-max")
    found = quantize_tiny(massive, massive.parent / "found", "w8a8-static", input_range="min-max", prefix="auto")
    facts = found.manifest.prefix
    assert facts is not None
    assert facts.ids == [1]
    assert facts.massive_before == 1
    assert facts.massive_after == 0
    exact = AutoModelForCausalLM.from_pretrained(massive)
    errors = [
        relative_error(streamed_logits(plain.out, IDS)[:, 1:], behind_tokens(exact, IDS, ())[:, 1:]),
        relative_error(streamed_logits(found.out, IDS)[:, 1:], behind_tokens(exact, IDS, (1,))[:, 1:]),
    ]
    assert errors[1] < 0.6 * errors[0]
    name = "model.decoder.layers.0.fc2.input_scale"
    scales = [float(load_file(done.out / "block-00000.safetensors")[name].max()) for done in (plain, found)]
    assert scales[1] < 0.3 * scales[0]


def test_what_the_tokenizer_gives_is_no_prefix(massive: Path, tmp_path: Path) -> None:
    """The only massive token is BOS, which each window starts with already."""
    shutil.copytree(massive, tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 2)]
    )
    tokenizer.save_pretrained(tmp_path / "model")
    done = quantize_tiny(tmp_path / "model", tmp_path / "run", "w8a16", prefix="auto")
    assert done.manifest.prefix is not None
    assert done.manifest.prefix.ids == []
    assert done.manifest.prefix.massive_before == 0


def test_a_prefix_that_does_not_help_is_dropped(tmp_path: Path) -> None:
    """Tokens that are massive wherever they stand are as massive behind a prefix."""
    model = save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    with torch.no_grad():
        model.model.embed_tokens.weight[40:50] *= 3000.0
    model.save_pretrained(tmp_path / "model")
    done = quantize_tiny(tmp_path / "model", tmp_path / "run", "w8a16", prefix="auto")
    assert done.manifest.prefix is not None
    assert done.manifest.prefix.ids == []
    assert done.manifest.prefix.massive_before > 0
    with torch.no_grad():
        assert torch.equal(lowbit.load(done.out)(IDS).logits, streamed_logits(done.out, IDS))


def test_no_prefix_where_no_token_is_massive(model: Path, tmp_path: Path) -> None:
    done = quantize_tiny(model, tmp_path / "run", "w8a16", prefix="auto")
    assert done.manifest.prefix is not None
    assert done.manifest.prefix.ids == []
    assert done.manifest.transformers.loads
    AutoModelForCausalLM.from_pretrained(done.out)
    assert not any(name.endswith((KEYS, VALUES)) for name in lowbit.load(done.out).state_dict())
