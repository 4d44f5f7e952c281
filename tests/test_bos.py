"""What windows start with, from the command line to the report: the model is measured as it is used."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors

import lowbit
from lowbit.reports.command import command
from tiny import save_tiny, tiny_ids, tiny_tokenizer

LENGTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer adds BOS, and to whose function BOS matters."""
    out = tmp_path_factory.mktemp("bos")
    model = save_tiny(out, "llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 30
    model.save_pretrained(out)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save_pretrained(out)
    (out / "held.txt").write_text("".join(chr(30 + i) for i in tiny_ids(1, 200, seed=8)[0].clamp(min=3).tolist()))
    return out


def expected(folder: Path, bos: str) -> float:
    """The perplexity of plain transformers, window by window."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = (folder / "held.txt").read_text()
    ids = tokenizer(text, add_special_tokens=bos == "stream")["input_ids"]
    front = [1] if bos == "auto" else []
    step, total, count = LENGTH - len(front), 0.0, 0
    for start in range(0, len(ids) - step + 1, step):
        window = torch.tensor(front + ids[start : start + step])
        with torch.no_grad():
            logits = model(window[None]).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
        count += len(window) - 1
    return math.exp(total / count)


@pytest.mark.parametrize("bos", ["auto", "stream", "never"])
def test_perplexity_of_each_protocol(folder: Path, bos: Any) -> None:
    got = lowbit.evaluate(folder, folder / "held.txt", length=LENGTH, bos=bos)
    assert list(got.perplexity.values()) == pytest.approx([expected(folder, bos)], rel=1e-4)
    assert (got.bos, got.special) == (bos, "<s>")
    values = {expected(folder, other) for other in ("auto", "stream", "never")}
    assert max(values) / min(values) > 1.01  # the protocols differ on this model


def test_compare_measures_the_same_windows(folder: Path, tmp_path: Path) -> None:
    text = str(folder / "held.txt")
    lowbit.quantize(
        folder, tmp_path / "run", scheme="w4a16g32-sym", recipe="rtn", data=text, samples=2, length=LENGTH
    )
    for bos in ("auto", "never"):
        compared = lowbit.compare(folder, tmp_path / "run", data=text, length=LENGTH, bos=bos)
        assert compared.texts[text]["perplexity"] == pytest.approx(expected(folder, bos), rel=1e-4)
        assert compared.protocol["bos"] == bos


@pytest.mark.parametrize("bos", ["auto", "stream", "never"])
def test_a_run_says_what_its_windows_start_with(folder: Path, tmp_path: Path, bos: Any) -> None:
    text = str(folder / "held.txt")
    made = lowbit.quantize(
        folder, tmp_path / "run", scheme="w4a16g32-sym", recipe="rtn", data=text, samples=2, length=LENGTH, bos=bos
    )
    data = made.manifest.identity.data
    special = "<s>" if bos == "auto" else ""
    assert (data.bos, data.special) == (bos, special)
    assert f"`--bos {bos}`: {f'`{special}`' if special else 'none'}" in (tmp_path / "run/README.md").read_text()
    assert ("--bos" in command(made.manifest.request)[0]) == (bos != "auto")
    page = lowbit.report([tmp_path / "run"], out=tmp_path / "report.html").out.read_text()
    assert f"(bos {bos})" in page
    other: Any = {"auto": "never", "never": "stream", "stream": "auto"}[bos]
    options: dict[str, Any] = {"recipe": "rtn", "data": text, "samples": 2, "length": LENGTH, "bos": other}
    with pytest.raises(lowbit.LowbitError, match=r"another run: its .*(bos|hash)"):
        lowbit.quantize(folder, tmp_path / "run", scheme="w4a16g32-sym", **options)


def test_own_samples_start_as_the_protocol_says(folder: Path, tmp_path: Path) -> None:
    hashes = set()
    for bos in ("auto", "never"):
        made = lowbit.quantize(
            folder, tmp_path / bos, scheme="w4a16g32-sym", recipe="rtn", data="self", samples=2, length=8, bos=bos
        )
        hashes.add(made.manifest.identity.data.hash)
    assert len(hashes) == 2


@pytest.mark.heavy
def test_command_line(folder: Path) -> None:
    arguments = [str(folder), "--data", str(folder / "held.txt"), "--length", str(LENGTH), "--json"]
    for more, value in (([], "auto"), (["--bos", "never"], "never")):
        done = subprocess.run(
            [sys.executable, "-m", "lowbit", "evaluate", *arguments, *more],
            capture_output=True,
            text=True,
            check=True,
        )
        result = json.loads(done.stdout)
        assert list(result["perplexity"].values()) == pytest.approx([expected(folder, value)], rel=1e-4)
        assert result["bos"] == value
    done = subprocess.run(
        [sys.executable, "-m", "lowbit", "evaluate", *arguments, "--bos", "always"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "unknown --bos 'always'" in done.stderr
