"""A frontier with sizes that are made in full: measured, drawn, and resumed."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from lowbit.allocation import frontier_run
from lowbit.allocation.frontier import Frontier, Full, Point, chosen
from lowbit.cli.main import call
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
