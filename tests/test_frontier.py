"""A frontier with sizes that are made in full: measured, drawn, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from gguf import GGUFReader

from lowbit.allocation import frontier_run, quantizer_files
from lowbit.allocation.frontier import Frontier, Full, Point, chosen
from lowbit.checkpoints.resolve import load_config
from lowbit.cli.main import call
from lowbit.exporters import gguf
from lowbit.exporters.float_run import float_run
from lowbit.exporters.gguf_readback import read
from lowbit.exporters.imatrix import Squares, tensor_means, write_imatrix
from lowbit.exporters.target import Options
from lowbit.pipeline.opened import open_model
from lowbit.reports.frontier_page import render
from tiny import save_tiny, tiny_tokenizer


def test_one_size_in_full_is_measured_drawn_and_not_made_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    tiny_tokenizer(merge=True).save_pretrained(tmp_path / "model")
    text, out = str(tmp_path / "model/calib.txt"), tmp_path / "out"
    words = ["fit", str(tmp_path / "model"), "--target", "llama.cpp", "-o", str(out), "--frontier", "--full", "1"]
    words += ["--data", text, "--samples", "2", "--length", "24", "--tokens", "48", "--text", text, "--json"]

    def stop(*args: object, **more: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(frontier_run, "write_json", stop)
        assert call(words) == 130
    table = (out / "sensitivity.json").stat().st_mtime_ns
    (folder,) = out.glob("size-*")
    run = (folder / "run/lowbit.json").stat().st_mtime_ns
    assert (folder / "sensitivity.json").read_bytes() == (out / "sensitivity.json").read_bytes()
    capsys.readouterr()
    assert call(words) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads((out / "frontier.json").read_text())
    assert table == (out / "sensitivity.json").stat().st_mtime_ns
    assert run == (folder / "run/lowbit.json").stat().st_mtime_ns
    (full,) = told["full"]
    assert full["verified"]
    assert (folder / "model.gguf").stat().st_size == full["size_bytes"] <= int(folder.name.removeprefix("size-"))
    assert full["size_bytes"] > told["points"][0]["size_bytes"]
    assert f"{full['size_bytes']:,}" in (out / "frontier.html").read_text()


def test_a_folder_of_others_is_left_alone_and_the_recipe_checked_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    tiny_tokenizer(merge=True).save_pretrained(tmp_path / "model")
    (tmp_path / "other.txt").write_text("another text " * 400)
    text, out = str(tmp_path / "model/calib.txt"), tmp_path / "out"
    words = ["fit", str(tmp_path / "model"), "--target", "llama.cpp", "-o", str(out), "--tokens", "48"]
    words += ["--samples", "2"]
    predict = [*words, "--length", "24", "--frontier", "--data"]

    def refused(given: list[str]) -> str:
        capsys.readouterr()
        assert call(given) == 2
        return capsys.readouterr().err

    assert "hadamard leaves" in refused([*predict, text, "--recipe", "hadamard", "--full", "1"])
    assert not out.exists()
    assert call([*predict, text, "--full", "0"]) == 0
    table = (out / "sensitivity.json").read_bytes()
    assert "sensitivities of another text" in refused([*predict, str(tmp_path / "other.txt"), "--full", "0"])
    assert "sensitivities of another seed" in refused([*predict, text, "--full", "0", "--seed", "1"])
    # A fit neither takes over the table of another text, nor claims the folder.
    fit = [*words, "--length", "24", "--size", "66kB", "--data", str(tmp_path / "other.txt")]
    for _ in range(2):
        assert "sensitivities of another text" in refused(fit)
    assert (out / "sensitivity.json").read_bytes() == table
    (out / "fit.json").write_text("{}")
    assert "holds another fit" in refused([*predict, text, "--full", "0"])
    (out / "fit.json").rename(out / "mine.txt")
    assert "holds mine.txt, and is no frontier" in refused([*predict, text, "--full", "0"])


def test_the_page_draws_every_point_and_escapes_names() -> None:
    points = [Point(10**6 * (at + 1), 4.0, 0.1 / (at + 1), {}) for at in range(4)]
    full = [Full(p.size_bytes, p.expected, 0.2, {"a<b": 9.0}, {"a<b": 0.3}, True, "f") for p in chosen(points, 2)]
    page = render(Frontier("<model>", "vllm", points, full))
    root = ElementTree.fromstring(page.partition("<figure>")[2].partition("</figure>")[0])
    drawn = [one for one in root.iter() if one.tag.endswith("circle")]
    assert len(drawn) == len(points) + 2 * len(full)
    assert "<model>" not in page
    assert "a<b" not in page
    assert "KL 0.3000, perplexity 9.000" in page
    assert "<svg" in render(Frontier("m", "vllm", points, []))


def test_a_float_model_is_a_file_and_comes_back(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1)
    tiny_tokenizer(merge=True).save_pretrained(tmp_path / "model")
    opened = open_model(str(tmp_path / "model"), None, False, False)
    run = float_run(opened.source.folder, opened.config, opened.checkpoint, "tiny")
    gguf.write(run, tmp_path / "float.gguf", Options(embeddings="f32"))
    assert {tensor.tensor_type.name for tensor in GGUFReader(tmp_path / "float.gguf").tensors} <= {"F32", "F16"}
    stored = dict(read(run, tmp_path / "float.gguf"))
    assert sorted(stored) == sorted(opened.checkpoint.names)
    for name in opened.checkpoint.names:
        assert torch.equal(stored[name].float(), opened.checkpoint.read([name])[name].float())


def test_the_matrix_is_told_by_tensor_as_the_quantizer_takes_it(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "mixtral", num_hidden_layers=1)
    config = load_config(tmp_path / "model")
    experts = [f"model.layers.0.mlp.experts.{at}.down_proj" for at in range(config.num_local_experts)]
    width = config.intermediate_size
    sums = {name: Squares(torch.full((width,), 6.0 * at), 3 * at) for at, name in enumerate(experts)}
    write_imatrix(tmp_path / "imatrix.gguf", config, sums, "text", 1, 8)
    (means,) = tensor_means(tmp_path / "imatrix.gguf").values()
    # Six thirds, and one for the expert that no token reached.
    assert means.tolist() == [1.0] * width + [2.0] * width * (len(experts) - 1)


def test_what_a_file_holds_is_measured_in_the_models_own_form(tmp_path: Path) -> None:
    """Gemma's norms are 1 + w in a file; measured as parameters, the float file is the float model."""
    save_tiny(tmp_path / "model", "gemma2", num_hidden_layers=2)
    tiny_tokenizer(merge=True).save_pretrained(tmp_path / "model")
    opened = open_model(str(tmp_path / "model"), None, False, False)
    run = float_run(opened.source.folder, opened.config, opened.checkpoint, "tiny")
    gguf.write(run, tmp_path / "float.gguf", Options(embeddings="f32"))
    text = quantizer_files.QuantizerText([str(tmp_path / "model/calib.txt")], 24, 48, None, None, None, 0)
    permits = {"revision": None, "allow_pickle": False, "trust_remote_code": False}
    _, kl = quantizer_files._measured(str(tmp_path / "model"), run, tmp_path / "float.gguf", text, permits, False)
    assert list(kl.values()) == [pytest.approx(0, abs=1e-6)]


def test_files_of_another_text_are_made_anew(tmp_path: Path) -> None:
    for name in ("Q4_0.gguf", "imatrix.gguf", "mine.txt"):
        (tmp_path / name).write_text("")
    key = {"text": "a"}
    assert quantizer_files._finished(tmp_path, key) == {}
    assert {path.name for path in tmp_path.iterdir()} == {"measured.json", "mine.txt"}
    (tmp_path / "Q4_0.gguf").write_text("")
    (tmp_path / "measured.json").write_text(json.dumps({"key": key, "files": {"Q4_0": {"kl": {"a": 1.0}}}}))
    assert quantizer_files._finished(tmp_path, key) == {"Q4_0": {"kl": {"a": 1.0}}}
    assert (tmp_path / "Q4_0.gguf").exists()
    assert quantizer_files._finished(tmp_path, {"text": "b"}) == {}
    assert not (tmp_path / "Q4_0.gguf").exists()


@pytest.mark.runtimes
def test_llamacpps_own_files_stand_beside_the_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llama_cpp", reason="pip install 'lowbit[llamacpp]'")
    save_tiny(tmp_path / "model", "llama", num_hidden_layers=1, hidden_size=64, intermediate_size=256)
    tiny_tokenizer(merge=True).save_pretrained(tmp_path / "model")
    text, out = str(tmp_path / "model/calib.txt"), tmp_path / "out"
    words = ["fit", str(tmp_path / "model"), "--target", "llama.cpp", "-o", str(out), "--frontier", "--full", "1"]
    words += ["--data", text, "--samples", "2", "--length", "24", "--tokens", "48", "--text", text, "--json"]
    monkeypatch.setattr(quantizer_files, "KINDS", ("Q8_0", "Q4_0"))
    assert call(words) == 0
    told = json.loads(capsys.readouterr().out)
    small, large = told["quantizer"]
    assert (small["name"], large["name"]) == ("Q4_0", "Q8_0")
    assert (out / "quantizer/Q4_0.gguf").stat().st_size == small["size_bytes"] < large["size_bytes"]
    # What is measured is what the file holds, and 8 bits are close to float.
    (name,) = small["kl"]
    assert 0 < large["kl"][name] < small["kl"][name]
    assert sorted(path.name for path in (out / "quantizer").iterdir()) == [
        "Q4_0.gguf", "Q8_0.gguf", "imatrix.gguf", "measured.json",
    ]  # fmt: skip
    made = (out / "quantizer/Q4_0.gguf").stat().st_mtime_ns
    assert call(words) == 0
    assert json.loads(capsys.readouterr().out) == told
    assert made == (out / "quantizer/Q4_0.gguf").stat().st_mtime_ns
