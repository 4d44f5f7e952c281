"""Importance matrices in llama.cpp's layout: what is written is the sum over the model's inputs, and reads back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import gguf_text_models
import lowbit
from lowbit.checkpoints.resolve import load_config, load_tokenizer
from lowbit.cli.main import call
from lowbit.data.text import calibration
from lowbit.errors import LowbitError
from lowbit.exporters.imatrix import Squares, read_imatrix, write_imatrix
from lowbit.exporters.run import open_run
from lowbit.pipeline.imatrix import _squares
from lowbit.pipeline.opened import open_model
from lowbit.pipeline.recipe import recipe_from_dict
from lowbit.quant.scale_search import search_scales
from lowbit.quant.scheme_names import parse_scheme
from lowbit.runs.plan import linear_shapes
from lowbit.runs.streamed_model import StreamedModel
from tiny import save_tiny

GIVEN = {"samples": 3, "length": 20, "seed": 4}
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny model and its importance matrix."""
    folder = tmp_path_factory.mktemp("imatrix")
    save_tiny(folder / "model", "llama")
    made = lowbit.imatrix(str(folder / "model"), folder / "i.gguf", data=str(folder / "model/calib.txt"), **GIVEN)
    assert (made.linears, made.tokens) == (21, 60)
    return folder / "model", made.out


def observed(model: Path) -> dict[str, torch.Tensor]:
    """Sums of squares of every linear's input, with hooks in the library's own model."""
    text = calibration(str(model / "calib.txt"), load_tokenizer(model), *GIVEN.values())
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    seen: dict[str, torch.Tensor] = {}

    def add(name: str, module: Any, args: Any) -> None:
        seen[name] = args[0].flatten(0, -2).square().sum(0)

    for name, module in theirs.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            module.register_forward_pre_hook(partial(add, name))
    with torch.no_grad():
        theirs(text.ids)
    return seen


def test_the_file_has_llama_cpps_layout_and_the_models_sums(written: tuple[Path, Path]) -> None:
    model, path = written
    reader = gguf.GGUFReader(path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert fields == {
        "general.type": "imatrix",
        "imatrix.datasets": ["calib.txt"],
        "imatrix.chunk_count": 3,
        "imatrix.chunk_size": 20,
    }
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors) == [f"{name}.{end}" for name in sorted({n.rpartition(".")[0] for n in tensors})
                             for end in ("in_sum2", "counts")]  # fmt: skip
    names = {"attn_q": "self_attn.q_proj", "attn_output": "self_attn.o_proj", "ffn_down": "mlp.down_proj"}
    for (stored, own), index in [(pair, i) for pair in names.items() for i in range(3)]:
        sums, counts = (tensors[f"blk.{index}.{stored}.weight.{end}"] for end in ("in_sum2", "counts"))
        expected = observed(model)[f"model.layers.{index}.{own}"]
        assert sums.data.dtype == counts.data.dtype == np.float32
        assert sums.data.shape == (1, len(expected))
        assert counts.data.tolist() == [[60.0]]
        assert torch.allclose(torch.from_numpy(np.array(sums.data[0])), expected, rtol=1e-4)


def test_what_is_read_are_mean_squares(written: tuple[Path, Path]) -> None:
    model, path = written
    found = read_imatrix(path, load_config(model), {DOWN: 96})
    assert torch.allclose(found[DOWN], observed(model)[DOWN] / 60, rtol=1e-4)


def test_experts_are_one_tensor_with_a_count_each(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "mixtral")
    text = str(tmp_path / "model/calib.txt")
    made = lowbit.imatrix(str(tmp_path / "model"), tmp_path / "i.gguf", data=text, **GIVEN)
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(made.out).tensors}
    assert tensors["blk.0.ffn_down_exps.weight.in_sum2"].shape == (4, 96)
    assert tensors["blk.0.ffn_down_exps.weight.counts"].sum() == 2 * 60  # two experts a token
    config, name = load_config(tmp_path / "model"), "model.layers.0.mlp.experts.{}.down_proj"
    squares = {name.format(i): Squares(torch.full((96,), 6.0 * (i + 1)), 3 * (i > 0)) for i in range(4)}
    write_imatrix(tmp_path / "cold.gguf", config, squares, "text", 1, 3)
    found = read_imatrix(tmp_path / "cold.gguf", config, dict.fromkeys(squares, 96))
    assert {key: float(value[0]) for key, value in found.items()} == {
        name.format(i): 2.0 * (i + 1) for i in (1, 2, 3)
    }


@pytest.mark.parametrize("case", ["qwen3-vl", "qwen3.5"])
def test_a_text_model_within_another_has_its_own_tensors(case: str, tmp_path: Path) -> None:
    """By the names that its file has; Qwen3.5's has some columns in another order."""
    model = gguf_text_models.saved(tmp_path / "model", case)
    text = str(model / "calib.txt")
    made = lowbit.imatrix(str(model), tmp_path / "i.gguf", data=text, **GIVEN)
    names = {tensor.name for tensor in gguf.GGUFReader(made.out).tensors}
    assert "blk.1.ffn_down.weight.in_sum2" in names
    assert not [name for name in names if not name.startswith("blk.")]
    opened = open_model(str(model), None, False, False)
    widths = {name: columns for name, (_, columns) in linear_shapes(opened.skeleton).items()}
    found = read_imatrix(made.out, opened.config, widths)
    assert found.keys() == widths.keys()
    streamed = StreamedModel(model)
    x = streamed.enter(calibration(text, load_tokenizer(model), *GIVEN.values()).ids)
    own = _squares(streamed.block(0), x)
    for name, squares in own.items():
        assert torch.allclose(found[name], squares.total / squares.count, rtol=1e-4), name
    given = {"scheme": "iq4_nl", "data": text, "samples": 2, "length": 16, "settings": ["rtn.search=true"]}
    lowbit.quantize(str(model), tmp_path / "run", recipe="rtn", imatrix=made.out, **given)


@pytest.mark.parametrize("recipe", ["rtn", "gptq"])
def test_scales_are_searched_with_the_given_weights(recipe: str, written: tuple[Path, Path], tmp_path: Path) -> None:
    """One column counts for everything: its error becomes that of a search with these weights."""
    model, _ = written
    config, weight = load_config(model), AutoModelForCausalLM.from_pretrained(model).get_submodule(DOWN).weight
    one = torch.zeros(96)
    one[5] = 1.0
    write_imatrix(tmp_path / "one.gguf", config, {DOWN: Squares(one, 1)}, "one", 1, 1)
    given = {"scheme": "iq4_nl", "recipe": recipe, "data": str(model / "calib.txt"), "samples": 2, "length": 16}
    given["settings"] = [f"{recipe}.search=true"]
    lowbit.quantize(str(model), tmp_path / "run", imatrix=tmp_path / "one.gguf", **given)
    lowbit.quantize(str(model), tmp_path / "plain", **given)
    format = parse_scheme("iq4_nl").weight
    weight = weight.detach().float()
    expected = search_scales(weight, format, format.qparams(weight), one).scale
    run, plain = (open_run(tmp_path / name) for name in ("run", "plain"))
    got, other = (one.qtensor(DOWN).qparams.scale for one in (run, plain))
    assert torch.equal(got[:, 0], expected[:, 0])  # the group of that column; the others keep the rule's scale
    assert not torch.equal(got, other)
    assert run.manifest.identity.imatrix != plain.manifest.identity.imatrix is None


def test_what_cannot_be_used_is_one_line(written: tuple[Path, Path], tmp_path: Path) -> None:
    model, path = written
    config = load_config(model)
    run: Any = partial(lowbit.quantize, str(model), tmp_path / "run", scheme="w4a16g32-sym", samples=2, length=16)
    run = partial(run, data=str(model / "calib.txt"))
    with pytest.raises(LowbitError, match=r"no step of gptq searches scales; give --set gptq\.search=true"):
        run(imatrix=path)
    # What refit searches is no scale.
    with pytest.raises(LowbitError, match=r"no step of mine searches scales; give --set gptq\.search=true"):
        run(imatrix=path, recipe=recipe_from_dict({"steps": ["refit", "gptq"]}, "mine"))
    with pytest.raises(LowbitError, match="affinequant changes the channels that an importance matrix describes"):
        run(imatrix=path, recipe="affinequant+refit")
    with pytest.raises(LowbitError, match="does not exist"):
        run(imatrix=tmp_path / "none.gguf", settings=["gptq.search=true"])
    (tmp_path / "text.gguf").write_text("not a file of this format")
    with pytest.raises(LowbitError, match=r"text\.gguf"):
        read_imatrix(tmp_path / "text.gguf", config, {DOWN: 96})
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LowbitError, match=r"cut\.gguf"):
        read_imatrix(tmp_path / "cut.gguf", config, {DOWN: 96})
    with pytest.raises(LowbitError, match="96 sums and 1 counts"):
        read_imatrix(path, config, {DOWN: 64})
    write_imatrix(tmp_path / "bad.gguf", config, {DOWN: Squares(torch.full((96,), -1.0), 1)}, "bad", 1, 1)
    with pytest.raises(LowbitError, match="negative sums"):
        read_imatrix(tmp_path / "bad.gguf", config, {DOWN: 96})
    assert not (tmp_path / "run").exists()


def test_what_is_no_importance_matrix_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among others the model itself; before any work."""
    monkeypatch.setattr("lowbit.pipeline.imatrix.open_model", lambda *given: pytest.fail("work has begun"))
    model, folder = tmp_path / "m.gguf", tmp_path / "folder.gguf"
    writer = gguf.GGUFWriter(model, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    folder.mkdir()
    (tmp_path / "link.gguf").symlink_to(model)
    (tmp_path / "notes.gguf").write_text("mine")
    before = model.read_bytes()
    for out in (model, tmp_path / "link.gguf", tmp_path / "notes.gguf", folder):
        with pytest.raises(LowbitError, match="exists and is no importance matrix, which alone is replaced"):
            lowbit.imatrix(model, out)
    assert (model.read_bytes(), (tmp_path / "notes.gguf").read_text()) == (before, "mine")


def test_an_importance_matrix_is_replaced_and_a_refused_one_leaves_no_folder(
    written: tuple[Path, Path], tmp_path: Path
) -> None:
    model, path = written
    out = tmp_path / "a/i.gguf"
    with pytest.raises(LowbitError):
        lowbit.imatrix(tmp_path / "nowhere", out)
    assert not out.parent.exists()
    for given in (GIVEN, {**GIVEN, "seed": 5}):
        lowbit.imatrix(str(model), out, data=f"{model}/calib.txt", **given)
        assert (out.read_bytes() == path.read_bytes()) == (given is GIVEN)


def test_a_file_in_the_way_is_one_line_before_any_work(
    written: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    given = ["--data", f"{written[0]}/calib.txt", "--length", "20"]
    assert call(["imatrix", str(written[0]), "-o", str(tmp_path / "file/a.gguf"), *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a file is where a folder should be" in line


def test_the_command(written: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, path = written
    given = ["imatrix", str(model), "-o", str(tmp_path / "i.gguf"), "--data", f"{model}/calib.txt"]
    assert call([*given, "--samples", "3", "--length", "20", "--seed", "4"]) == 0
    assert "21 linears, 60 tokens of calib.txt" in capsys.readouterr().out
    assert (tmp_path / "i.gguf").read_bytes() == path.read_bytes()
    assert call([*given[:3], str(tmp_path / "i.dat")]) == 2
    assert "ends in .gguf" in capsys.readouterr().err
