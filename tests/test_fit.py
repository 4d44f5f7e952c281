"""The best file of a size: exact bytes, losses that predict, and one command that goes on where it stopped."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import gguf_models
import gguf_text_models
import lowbit
from lowbit.allocation import api, steps
from lowbit.allocation.divergence import divergences
from lowbit.allocation.frontier import points_of
from lowbit.allocation.goal import Goal, _least_bits
from lowbit.allocation.losses import Losses, formats_of, measure_losses
from lowbit.allocation.probes import Probe, factors_of
from lowbit.allocation.rounds import settle
from lowbit.allocation.scheme import scheme_of
from lowbit.allocation.solution import best_within, check_size, smallest_within, uniform
from lowbit.allocation.target import footprint_of
from lowbit.analysis import knapsack
from lowbit.analysis.curvature import curvatures
from lowbit.analysis.knapsack import solve
from lowbit.checkpoints.gguf_types import Reader
from lowbit.checkpoints.writing import write_json
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.exporters.fit import Misfit
from lowbit.exporters.folder_footprint import footprint as footprint_of_folder
from lowbit.exporters.footprint import Choice, FloatModel, Footprint, Option
from lowbit.metrics.sensitivity import divergence
from lowbit.models.validate import shapes_of
from lowbit.pipeline.opened import open_model
from lowbit.quant.integer import IntFormat
from lowbit.quant.scale_search import search_scales
from lowbit.quant.scheme_names import override_text
from lowbit.quant.tables import IQ4_NL
from lowbit.runs.plan import linear_shapes
from lowbit.runs.streamed_model import StreamedModel
from tiny import save_tiny, tiny_ids, tiny_tokenizer

BLOCKS = "model.layers"


def save(folder: Path, family: str) -> Path:
    """A tiny model with a tokenizer that GGUF files hold."""
    save_tiny(folder / "model", family)
    tiny_tokenizer(merge=True).save_pretrained(folder / "model")
    return folder / "model"


def footprint_at(model: Path) -> Footprint:
    return footprint_of("llama.cpp", str(model), open_model(str(model), None, False, False))


@pytest.fixture(scope="module", params=["llama", "llama-odd"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untied and a tied model."""
    return save(tmp_path_factory.mktemp("fit"), request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("fit"), "llama")


@pytest.fixture(scope="module")
def measured(untied: Path) -> tuple[StreamedModel, Footprint, Losses, dict[str, torch.Tensor]]:
    """The table of losses of the untied model."""
    streamed, footprint = StreamedModel(untied), footprint_at(untied)
    return streamed, footprint, *measure_losses(streamed, tiny_ids(16), footprint, 0)


def run_with(model: Path, out: Path, formats: dict[str, Any], target: str | None = "llama.cpp") -> Path:
    """A run with these formats."""
    outside = tuple(name for name in formats if name.endswith(("embed_tokens", "lm_head")))
    text = yaml.safe_dump(scheme_of(formats, outside))
    (out.parent / "scheme.yaml").write_text(text)
    given = {"recipe": "rtn", "data": str(model / "calib.txt"), "samples": 2, "length": 16, "target": target}
    lowbit.quantize(str(model), out, scheme=str(out.parent / "scheme.yaml"), **given)
    return out


@pytest.mark.parametrize("family", ["llama", "llama-odd", "phi3", "gemma2", "mixtral"])
def test_the_bytes_of_a_file_are_known_before_it_is_made(family: str, tmp_path: Path) -> None:
    assert bytes_are_known(save(tmp_path, family), tmp_path) > 3


@pytest.mark.parametrize("case", gguf_models.MODELS)
def test_the_bytes_are_known_of_every_architecture(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the file has a parameter in another shape, as Granite 4's and Falcon-H1's decays of a state."""
    gguf_models.declare(monkeypatch)
    bytes_are_known(gguf_models.saved(tmp_path / "model", case), tmp_path)


@pytest.mark.parametrize("case", ["qwen3-vl", "gemma4", "qwen3-vl-moe", "smolvlm"])
def test_the_bytes_are_known_of_a_text_model_within_another(case: str, tmp_path: Path) -> None:
    bytes_are_known(gguf_text_models.saved(tmp_path / "model", case), tmp_path)


@pytest.mark.parametrize("target", ["llama.cpp", "transformers", "vllm"])
def test_an_embedding_that_layers_read_stays_float(target: str, tmp_path: Path) -> None:
    """Gemma 4's small models: quantize refuses a format for it, so that none is offered."""
    model = gguf_models.saved(tmp_path / "model", "gemma4")
    found = footprint_of(target, str(model), open_model(str(model), None, False, False))
    (choice,) = (one for one in found.choices if "model.embed_tokens" in one.modules)
    assert [option.format for option in choice.options] == [None]
    assert choice.options[0].size >= 2 * choice.weights


def bytes_are_known(model: Path, folder: Path) -> int:
    """Compare the size of a file with random formats with its footprint; returns how many types the file has."""
    draw, footprint = random.Random(3), footprint_at(model)
    picks = [draw.randrange(len(choice.options)) for choice in footprint.choices]
    size = footprint.fixed + sum(c.options[at].size for c, at in zip(footprint.choices, picks, strict=True))
    run = run_with(model, folder / "run", formats_of(footprint.choices, picks))
    made = lowbit.export(run, "llama.cpp")
    assert made.size_bytes == size
    (found,) = lowbit.verify(run, [made.out], logits=False)
    assert found.ok
    return len({tensor.tensor_type for tensor in Reader(made.out).tensors})


def test_a_tied_embedding_is_one_tensor_of_the_file(tmp_path: Path) -> None:
    model = save(tmp_path, "llama-odd")
    both = {"model.embed_tokens": IntFormat(8, 32), "lm_head": IntFormat(8, 32)}
    linears = {name: IQ4_NL for choice in footprint_at(model).choices for name in choice.modules if name not in both}
    run = run_with(model, tmp_path / "run", {**linears, **both})
    made = lowbit.export(run, "gguf")
    names = [tensor.name for tensor in Reader(made.out).tensors]
    assert "token_embd.weight" in names
    assert "output.weight" not in names
    (found,) = lowbit.verify(run, [made.out], logits=False)
    assert found.ok
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=made.out.name, dtype=torch.float32, attention_bias=True, mlp_bias=True
    )
    with torch.no_grad():
        ours = lowbit.load(run, target="float")(tiny_ids(1)).logits
        assert torch.allclose(theirs(tiny_ids(1)).logits, ours, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))


def test_a_head_with_codes_of_its_own_stays_a_tensor(tmp_path: Path) -> None:
    model = save(tmp_path, "llama")
    every = {name: IntFormat(8, 32) for choice in footprint_at(model).choices for name in choice.modules}
    made = lowbit.export(run_with(model, tmp_path / "run", every), "gguf")
    assert "output.weight" in [tensor.name for tensor in Reader(made.out).tensors]


def test_curvature_is_the_square_of_whole_gradients(model: Path) -> None:
    """Against the library's model and autograd through all of it, with the same tokens drawn."""
    ids, draw = tiny_ids(3), torch.Generator().manual_seed(7)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    squares = {name: torch.zeros_like(value) for name, value in theirs.named_parameters() if value.ndim == 2}
    for row in ids:
        logits = theirs(row[None]).logits[0, :-1].log_softmax(-1)
        score = logits.gather(-1, torch.multinomial(logits.detach().exp(), 1, generator=draw)).sum()
        grads = torch.autograd.grad(score, [theirs.get_parameter(name) for name in squares])
        for total, grad in zip(squares.values(), grads, strict=True):
            total += grad.square()
    found = {one.module: one for one in curvatures(StreamedModel(model), ids, seed=7)}
    tied = theirs.config.tie_word_embeddings
    assert set(found) == {name.removesuffix(".weight") for name in squares}
    for name, expected in squares.items():
        module, expected = name.removesuffix(".weight"), expected / ids[:, 1:].numel()
        got = found[module].curvature
        if tied and module == "model.embed_tokens":  # both uses are squared by themselves
            assert float((got.sum() / expected.sum()).log().abs()) < 0.5
            continue
        assert torch.allclose(got, expected, rtol=2e-3, atol=1e-4 * float(expected.max())), module


def test_divergences_are_those_of_models_with_weights_replaced(model: Path) -> None:
    ids = tiny_ids(2, seed=4)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    linear, format = f"{BLOCKS}.1.mlp.up_proj", IntFormat(4, 32)
    ends = {"model.embed_tokens": IntFormat(4, 32), "lm_head": IntFormat(4, 32)}
    found = divergences(StreamedModel(model), [{}, {linear: format}, ends], {}, ids)
    assert found[0] == 0
    with torch.no_grad():
        exact = theirs(ids).logits[:, :-1]
        for module in dict.fromkeys(ends):
            weight = theirs.get_submodule(module).weight
            if module == "model.embed_tokens" or not theirs.config.tie_word_embeddings:
                weight.copy_(format.fake_quant(weight, search_scales(weight, format, format.qparams(weight))))
        other = float(divergence(exact, theirs(ids).logits[:, :-1]).mean())
    assert found[2] == pytest.approx(other, rel=1e-3)
    assert 0 < found[1] < other


def test_expected_divergence_ranks_single_changes(measured: Any) -> None:
    streamed, footprint, losses, columns = measured
    draw = random.Random(0)
    every = [(c, o.format) for c in footprint.choices for o in c.options if o.format is not None]
    chosen = draw.sample(every, 30)
    expected = [losses.of(choice, format, BLOCKS) for choice, format in chosen]
    assignments = [dict.fromkeys(choice.modules, format) for choice, format in chosen]
    found = divergences(streamed, assignments, columns, tiny_ids(4, seed=9))
    places = [torch.tensor(values).argsort().argsort().double() for values in (expected, found)]
    assert float(torch.corrcoef(torch.stack(places))[0, 1]) > 0.85
    # and the size is right, not the order alone
    ratios = torch.tensor(found).log() - torch.tensor(expected).log()
    assert abs(float(ratios.median())) < math.log(2)


def test_the_chosen_assignment_beats_random_and_uniform_ones_of_its_size(measured: Any) -> None:
    streamed, footprint, losses, columns = measured
    same = uniform(footprint, losses, BLOCKS)
    room = same["w5g32-sym"].size
    chosen = best_within(footprint, losses, room, BLOCKS)
    assert chosen.size <= room
    draw, others = random.Random(1), []
    while len(others) < 8:
        picks = [draw.randrange(len(choice.options)) for choice in footprint.choices]
        size = footprint.fixed + sum(c.options[at].size for c, at in zip(footprint.choices, picks, strict=True))
        if 0.9 * room < size <= room:
            others.append(formats_of(footprint.choices, picks))
    ids = tiny_ids(4, seed=9)
    ours, *found = divergences(streamed, [chosen.formats, same["w5g32-sym"].formats, *others], columns, ids)
    assert ours < min(found)


def test_expected_divergence_ranks_random_assignments_of_one_size(measured: Any) -> None:
    streamed, footprint, losses, columns = measured
    room, draw = uniform(footprint, losses, BLOCKS)["w5g32-sym"].size, random.Random(2)
    drawn: list[Any] = []
    while len(drawn) < 20:
        picks = [draw.randrange(len(choice.options)) for choice in footprint.choices]
        options = [choice.options[at] for choice, at in zip(footprint.choices, picks, strict=True)]
        if abs(footprint.fixed + sum(option.size for option in options) - room) < 0.05 * room:
            pairs = zip(footprint.choices, options, strict=True)
            sums = sum(losses.of(choice, option.format, BLOCKS) for choice, option in pairs)
            drawn.append((formats_of(footprint.choices, picks), sums))
    found = divergences(streamed, [formats for formats, _ in drawn], columns, tiny_ids(4, seed=9))
    places = [torch.tensor(values).argsort().argsort().double() for values in ([s for _, s in drawn], found)]
    assert float(torch.corrcoef(torch.stack(places))[0, 1]) > 0.8


def test_the_least_cost_within_a_loss_is_what_trying_all_finds() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        costs = [[draw.randint(1, 9) for _ in range(3)] for _ in range(4)]
        losses = [[draw.random() for _ in group] for group in costs]
        limit = draw.uniform(sum(map(min, losses)), sum(map(max, losses)))
        table = solve(costs, losses, sum(map(max, costs)))
        assert table is not None
        step = table.first_within(limit)
        picks = None if step is None else table.picks(step)
        tried = [
            sum(group[at] for group, at in zip(costs, picked, strict=True))
            for picked in itertools.product(range(3), repeat=4)
            if sum(group[at] for group, at in zip(losses, picked, strict=True)) <= limit
        ]
        assert picks is not None
        assert sum(group[at] for group, at in zip(costs, picks, strict=True)) == min(tried)


@pytest.mark.parametrize("units", [1, 5, 40])
def test_with_rounded_costs_the_largest_options_are_in_reach(units: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs up, bounds down: with few steps all largest options together were beyond a bound that holds them."""
    monkeypatch.setattr(knapsack, "UNITS", units)
    for seed in range(20):
        draw = random.Random(seed)
        costs = [sorted(draw.sample(range(1, 1000), 4)) for _ in range(6)]
        losses = [[1.0 / cost for cost in group] for group in costs]
        largest = solve(costs, losses, sum(map(max, costs)))
        assert largest is not None
        assert largest.best() == [3] * 6
        assert largest.cheapest(sum(map(min, losses)) * (1 + 1e-12)) == [3] * 6
        # In between nothing is left for which a larger option would have room, and none is larger than it needs.
        room = draw.randint(sum(map(min, costs)), sum(map(max, costs)))
        table = solve(costs, losses, room)
        assert table is not None
        picks = table.best()
        assert picks is not None
        left = room - sum(group[at] for group, at in zip(costs, picks, strict=True))
        assert left >= 0
        assert all(at == 3 or group[at + 1] - group[at] > left for group, at in zip(costs, picks, strict=True))
        limit = sum(group[at] for group, at in zip(losses, picks, strict=True))
        less = largest.cheapest(limit)
        assert less is not None
        slack = limit - sum(group[at] for group, at in zip(losses, less, strict=True))
        assert slack >= -1e-12
        assert all(at == 0 or group[at - 1] - group[at] > slack for group, at in zip(losses, less, strict=True))


def test_a_quality_is_reached_by_the_smallest_file(measured: Any) -> None:
    _, footprint, losses, _ = measured
    found = smallest_within(footprint, losses, math.log(1.05), BLOCKS)
    assert found.expected <= math.log(1.05)
    below = best_within(footprint, losses, found.size - 1, BLOCKS)
    assert below.expected > math.log(1.05)
    with pytest.raises(LowbitError, match="give a larger --quality"):
        smallest_within(Footprint(0, footprint.choices[:1]), losses, -1.0, BLOCKS)


def test_factors_are_drawn_to_the_mean_of_all_formats() -> None:
    choice = Choice(("a",), 1, ())
    probes = [Probe(choice, IntFormat(4), 1.0), Probe(choice, IntFormat(4), 1.0), Probe(choice, IntFormat(8), 1.0)]
    found = factors_of(probes, [4.0, 4.0, 1.0])
    mean = math.log(4) * 2 / 3
    assert found["w4-sym"] == pytest.approx(math.exp((2 * math.log(4) + mean) / 3))
    assert found["w8-sym"] == pytest.approx(math.exp(mean / 2))


def test_a_second_round_moves_bits_to_the_block_that_costs_more(measured: Any) -> None:
    """Losses that are told too small for one block: the round finds out and the block gets more."""
    streamed, footprint, losses, columns = measured
    wrong = Losses(losses.by_module, {}, {1: 1 / 50})
    room = uniform(footprint, losses, BLOCKS)["iq4_nl"].size
    first = best_within(footprint, wrong, room, BLOCKS)
    found = settle(footprint, wrong, Goal(size=room), streamed, columns, tiny_ids(4))
    assert found.rounds == 2
    assert found.measured < divergences(streamed, [first.formats], columns, tiny_ids(4))[0]
    assert found.solution.size <= room


def command(model: Path, out: Path, *more: str) -> list[str]:
    given = ["fit", str(model), "--target", "llama.cpp", "-o", str(out), "--data", f"{model}/calib.txt"]
    return [*given, "--samples", "4", "--length", "24", "--tokens", "96", "--text", f"{model}/calib.txt", *more]


def test_one_command_makes_a_verified_file_of_a_size_and_goes_on_after_an_interruption(
    untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, given = tmp_path / "out", command(untied, tmp_path / "out", "--size", "66kB")

    def stop(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(steps, "export", stop)
        assert call(given) == 130
    assert not (out / "model.gguf").exists()
    written = (out / "run/lowbit.json").stat().st_mtime_ns
    table = (out / "sensitivity.json").stat().st_mtime_ns
    capsys.readouterr()
    assert call([*given, "--json"]) == 0
    told, said = capsys.readouterr()
    result = json.loads(told)
    assert (out / "run/lowbit.json").stat().st_mtime_ns == written
    assert (out / "sensitivity.json").stat().st_mtime_ns == table
    assert result["verified"]
    assert (out / "model.gguf").stat().st_size == result["size_bytes"] == result["expected_bytes"] <= 66_000
    assert all(line in said for line in result["commands"])
    assert [line.split()[1] for line in result["commands"]] == ["quantize", "export", "verify", "compare"]
    assert result["uniform"]["w8g32-sym"]["size_bytes"] > result["size_bytes"]
    # What was printed makes the same file.
    words = result["commands"][0].split()[1:]
    words[words.index("--out") + 1] = str(tmp_path / "again")
    assert call(words) == 0
    made = lowbit.export(tmp_path / "again", "llama.cpp", out=tmp_path / "again.gguf")
    data = [[tensor.data.tobytes() for tensor in Reader(p).tensors] for p in (made.out, out / "model.gguf")]
    assert data[0] == data[1]
    assert call([*command(untied, out, "--size", "70kB")]) == 2
    assert "holds another fit, with another size" in capsys.readouterr().err


def test_the_frontier_falls_and_quantizes_nothing(
    untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["fit", str(untied), "--target", "llama.cpp", "-o", str(tmp_path / "out"), "--frontier", "--json"]
    given += ["--full", "0"]
    assert call([*given, "--data", f"{untied}/calib.txt"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert len(points) > 8
    sizes, expected = [p["size_bytes"] for p in points], [p["expected"] for p in points]
    assert sizes == sorted(sizes)
    assert expected == sorted(expected, reverse=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "sensitivity.json",
        "sensitivity.safetensors",
    ]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--size", "20kB"], "the smallest that can be is --size 4"),
        (["--size", "5kB"], "what has no format in llama.cpp takes"),
        (["--size", "many"], "such as 90MB"),
        (["--bits", "1"], "the smallest that can be is --bits 2."),
        (["--bits", "99"], "--bits 99 given"),
        (["--quality", "0.9"], "give a ratio of perplexities above 1"),
        ([], "give one of --size, --memory, --bits and --quality"),
        (["--size", "66kB", "--bits", "4"], "give one of --size, --memory, --bits and --quality"),
        (["--size", "66kB", "--frontier"], "leave one out"),
        (["--size", "66kB", "--target", "vllm", "--pre", "qwen2"], "it names a pre-tokenizer of llama.cpp"),
        (["--size", "66kB", "--recipe", "gtpq"], "gtpq"),
        (["--size", "66kB", "--recipe", "hadamard"], "hadamard leaves"),
        (["--size", "66kB", "--recipe", "llm-int8"], "llm-int8 leaves"),
        (["--size", "66kB", "--recipe", "sparsegpt"], "sparsegpt: iq4_nl, a format of"),
        (["--size", "150kB", "--target", "transformers", "--recipe", "hadamard"], "hadamard leaves"),
        (["--size", "150kB", "--target", "vllm", "--recipe", "llm-int8"], "llm-int8 leaves"),
        (["--size", "66kB", "--set", "gptq.dampening=1"], "dampening"),
        (["--size", "66kB", "--effort", "much"], "much"),
        (["--size", "66kB", "--data", "typo.txt"], "typo.txt"),
        (["--size", "66kB", "--text", "typo.txt"], "typo.txt"),
        (["--size", "66kB", "--length", "4000"], "--length is 4000"),
    ],
)
def test_what_cannot_be_reached_is_one_line_before_any_work(
    given: list[str], said: str, untied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call([*command(untied, tmp_path / "out"), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
    assert not (tmp_path / "out").exists()


def test_another_recipe_takes_over_a_folder_in_which_nothing_was_quantized(tmp_path: Path) -> None:
    old, new = {"recipe": {"name": "gptq"}, "size": 1}, {"recipe": {"name": "rtn"}, "size": 1}
    write_json(tmp_path / api.STATE, {"format": api.FORMAT, "request": old})
    assert api._claimed(tmp_path, old)
    assert not api._claimed(tmp_path, new)  # written anew
    with pytest.raises(LowbitError, match="another size"):
        api._claimed(tmp_path, {**old, "size": 2})
    (tmp_path / steps.RUN).mkdir()
    with pytest.raises(LowbitError, match="another recipe"):
        api._claimed(tmp_path, new)


def test_the_smallest_size_that_is_said_can_be_made(untied: Path) -> None:
    footprint = footprint_at(untied)
    assert footprint.least == min(
        one.size for one in [best_within(footprint, Losses({}, {}, {}), footprint.least, BLOCKS)]
    )


@pytest.mark.parametrize("target", ["llama.cpp", "vllm"])
def test_bits_are_of_weights_that_have_a_format(target: str, untied: Path) -> None:
    """vLLM's embedding and head have none: their bytes are beside."""
    footprint = footprint_of(target, str(untied), open_model(str(untied), None, False, False))
    ends = 2 * 96 * 64
    linears = sum(choice.weights for choice in footprint.choices) - ends
    assert footprint.weights == linears + (ends if target == "llama.cpp" else 0)
    room = Goal(bits=5.0).room(footprint)
    assert room == footprint.beside + footprint.weights * 5 // 8
    (point, *_) = points_of(footprint, Losses({}, {}, {}), BLOCKS)
    assert 2 < point.bits < (4 if target == "llama.cpp" else 6)
    least = _least_bits(footprint)
    Goal(bits=least).check(footprint, target)
    with pytest.raises(LowbitError, match=f"the smallest that can be is --bits {least:.3f}"):
        Goal(bits=least - 0.001).check(footprint, target)


def test_a_float_tensor_that_alone_exceeds_the_size_is_named() -> None:
    big = Choice(("lm_head",), 4, (Option(None, 1000),))
    small = Choice(("a",), 4, (Option(IntFormat(4), 10),))
    with pytest.raises(LowbitError, match=r"lm_head, for which llama\.cpp has no format, takes 1,000 in float"):
        check_size(Footprint(100, (big, small)), 600, "llama.cpp")


def test_a_folder_with_other_files_is_left_alone(untied: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    with pytest.raises(LowbitError, match="is no fit"):
        api.fit(str(untied), tmp_path / "out", target="llama.cpp", size="66kB")


def test_an_unknown_target_is_one_line(untied: Path, tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"Known: .*llama\.cpp"):
        api.fit(str(untied), tmp_path / "out", target="lama.cpp", size="66kB")


@pytest.mark.parametrize(
    ("family", "target"),
    [("llama", "vllm"), ("llama-odd", "transformers"), ("mixtral", "transformers"), ("qwen3-moe", "transformers")],
)
def test_folders_of_other_targets_keep_the_size(family: str, target: str, tmp_path: Path) -> None:
    """The bound on the bytes is close, and formats are those that the target reads."""
    model, draw = save(tmp_path, family), random.Random(1)
    footprint = footprint_of(target, str(model), open_model(str(model), None, False, False))
    picks = [draw.randrange(len(choice.options)) for choice in footprint.choices]
    size = footprint.fixed + sum(c.options[at].size for c, at in zip(footprint.choices, picks, strict=True))
    formats = formats_of(footprint.choices, picks)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(scheme_of(formats, ("model.embed_tokens", "lm_head"))))
    given: dict[str, Any] = {"recipe": "rtn", "data": str(model / "calib.txt"), "samples": 2, "length": 16}
    given["target"] = target if target == "vllm" else None
    made = lowbit.quantize(str(model), tmp_path / "run", scheme=str(tmp_path / "s.yaml"), **given)
    assert made.manifest.transformers.loads
    folder = lowbit.export(tmp_path / "run", "vllm").out if target == "vllm" else tmp_path / "run"
    actual = steps.weight_bytes(folder)
    tensors = 12 * sum(len(choice.modules) for choice in footprint.choices) + 100
    assert size - 40 * tensors < actual <= size
    if target == "vllm":
        groups = [len(choice.modules) for choice in footprint.choices]
        assert groups == [3, 1, 2, 1] * 3 + [1, 1]


MTP = {"mtp.0.weight": torch.ones(300, 64), "mtp.0.bias": torch.ones(5, dtype=torch.float16)}


def with_predictor(folder: Path) -> Path:
    """A tiny Llama with tensors that its class does not have."""
    model = save(folder, "llama")
    tensors = load_file(model / "model.safetensors") | MTP
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize("case", ["vision", "predictor"])
def test_what_a_run_carries_over_is_counted(case: str, tmp_path: Path) -> None:
    """To the byte, and before any work: what is carried is most of these files."""
    model = (
        with_predictor(tmp_path) if case == "predictor" else gguf_text_models.saved(tmp_path / "model", "qwen3-vl")
    )
    opened = open_model(str(model), None, False, False)
    footprint = footprint_of("transformers", str(model), opened)
    picks = [0] * len(footprint.choices)
    run = run_with(model, tmp_path / "run", formats_of(footprint.choices, picks), None)
    carried = (run / "model-carried.safetensors").stat().st_size
    assert footprint.floats[0] == ("model-carried.safetensors", carried)
    tensors = 12 * len(footprint.choices) + 100
    assert footprint.least - 40 * tensors < steps.weight_bytes(run) <= footprint.least
    with pytest.raises(LowbitError, match=r"what has no format in transformers takes .*, model-carried\.safetensors"):
        check_size(footprint, carried, "transformers")


def test_what_an_export_leaves_out_is_not_counted(tmp_path: Path) -> None:
    model = with_predictor(tmp_path)
    opened = open_model(str(model), None, False, False)
    assert "model-carried.safetensors" not in dict(footprint_of("vllm", str(model), opened).floats)


def test_a_target_without_other_parts_refuses_a_model_that_has_them(tmp_path: Path) -> None:
    model = gguf_text_models.saved(tmp_path / "model", "qwen3-vl")
    opened = open_model(str(model), None, False, False)
    with pytest.raises(LowbitError, match=r"vllm exports hold a text model alone.* give --target llama\.cpp"):
        footprint_of("vllm", str(model), opened)


def test_experts_that_a_loader_reads_in_one_format_are_one_choice(tmp_path: Path) -> None:
    """In all layers, with no float beside quantized linears; a run with every format then loads."""
    model = save(tmp_path, "qwen3-moe")
    opened = open_model(str(model), None, False, False)
    choices = footprint_of("transformers", str(model), opened).choices
    (experts,) = (one for one in choices if any("experts" in name for name in one.modules))
    assert len(experts.modules) == 2 * 4 * 3
    assert {option.format for option in experts.options} == {IntFormat(bits, 32) for bits in range(2, 9)}
    assert experts.weights == 2 * 4 * 3 * 32 * 64


def test_losses_of_a_choice_over_blocks_are_scaled_block_by_block() -> None:
    names, four = (f"{BLOCKS}.0.up", f"{BLOCKS}.1.up"), IntFormat(4, 32)
    losses = Losses({name: {"w4g32-sym": 1.0} for name in names}, {"w4g32-sym": 2.0}, {0: 3.0})
    choice = Choice(names, 2, ())
    assert losses.by_block(choice, four, BLOCKS) == {0: 6.0, 1: 2.0}
    assert losses.of(choice, four, BLOCKS) == 8.0
    assert losses.of(choice, None, BLOCKS) == 0.0


def test_a_model_that_a_target_has_no_format_for_is_refused_with_the_reason(untied: Path) -> None:
    opened = open_model(str(untied), None, False, False)
    shapes = {name: tuple(shape) for name, shape in shapes_of(opened.skeleton).items()}
    linears = linear_shapes(opened.skeleton)
    ends = ("model.embed_tokens", "lm_head")
    model = FloatModel(opened.config, untied, "m", opened.checkpoint, shapes, linears, *ends, tied=False)
    groups = [(name,) for name in linears]
    with pytest.raises(LowbitError, match="no format for any linear of this model: it has none; choose another"):
        footprint_of_folder(model, opened.skeleton, groups, lambda *given: Misfit("weight", "it has none"), None)


def test_experts_without_a_format_are_refused_before_any_work(tmp_path: Path) -> None:
    """gpt-oss: its experts are stored together, and no loader reads codes of one."""
    model = gguf_models.saved(tmp_path / "model", "gpt-oss")
    said = "no format for this model's experts: transformers stores the experts of a layer together"
    with pytest.raises(LowbitError, match=said):
        footprint_of("transformers", str(model), open_model(str(model), None, False, False))


def test_targets_that_fuse_linears_give_them_one_format(tmp_path: Path) -> None:
    model = save(tmp_path, "llama")
    footprint = footprint_of("vllm", str(model), open_model(str(model), None, False, False))
    texts = {override_text(o.format) for choice in footprint.choices for o in choice.options if o.format}
    # q alone gains: k and v go along
    losses = Losses({f"{BLOCKS}.0.self_attn.q_proj": {text: 8.0 - int(text[1]) for text in texts}}, {}, {})
    found = best_within(footprint, losses, footprint.least + 100_000, BLOCKS).formats
    (format,) = {found[f"{BLOCKS}.0.self_attn.{name}_proj"] for name in "qkv"}
    assert format is not None
    assert format.elements.bits == 8


def test_tokens_that_the_text_lacks_count_in_the_loss_of_an_embedding(untied: Path) -> None:
    """One window of one token: only its row has curvature, and smoothing gives every row some."""
    streamed, footprint = StreamedModel(untied), footprint_at(untied)
    ids = torch.full((1, 8), 5)
    (curved,) = (one for one in curvatures(streamed, ids, 0) if one.module == "model.embed_tokens")
    assert curved.curvature.sum(1).count_nonzero() == 1
    losses, columns = measure_losses(streamed, ids, footprint, 0)
    assert torch.allclose(columns["model.embed_tokens"], curved.curvature.mean(0), rtol=1e-4)
    format = IntFormat(4, 32)
    errors = format.fake_quant(curved.weight, format.qparams(curved.weight)) - curved.weight
    every = (8 * curved.curvature + curved.curvature.sum(0)) / (8 + len(errors))
    expected = 0.5 * float((errors.square() * every).sum())
    assert losses.by_module["model.embed_tokens"][override_text(format)] == pytest.approx(expected, rel=0.05)
