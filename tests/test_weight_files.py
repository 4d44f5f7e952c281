"""Which weight files of a folder count: those that ``transformers`` loads, with all others named and not read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.resolve import resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.shards import INDEX, SINGLE
from lowbit.errors import LowbitError
from runs import quantize_tiny, streamed_logits
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

NORM = "model.norm.weight"
Change = Callable[[Path, Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One model as one file and another one, of the same sizes, as shards."""
    root = tmp_path_factory.mktemp("saved")
    save_tiny(root / "one", "llama", seed=0, num_hidden_layers=1)
    save_tiny(root / "shards", "llama", seed=1, shards=True, num_hidden_layers=1)
    return root


def merged(source: Path, m: Path, pattern: str = "model*") -> None:
    """Add the weight files of another save."""
    for path in source.glob(pattern):
        shutil.copyfile(path, m / path.name)


def stale_single_of_one_tensor(one: Path, m: Path) -> None:
    (m / "extra.safetensors").write_bytes((one / SINGLE).read_bytes())


def index_entries(m: Path, **changes: str) -> None:
    content = json.loads((m / INDEX).read_text())
    (m / INDEX).write_text(json.dumps({**content, "weight_map": {**content["weight_map"], **changes}}))


def one_tensor_twice(one: Path, m: Path) -> None:
    """The last shard repeats a tensor of the first with other values, as a careless patch does."""
    last = sorted(m.glob("model-*"))[-1]
    save_file({**load_file(last), NORM: torch.full((64,), 3.0)}, last, {"format": "pt"})


def as_pickles(m: Path) -> None:
    for path in m.glob("model*.safetensors"):
        torch.save(load_file(path), m / path.name.replace("model", "pytorch_model").replace("safetensors", "bin"))
        path.unlink()
    if (m / INDEX).exists():
        text = (m / INDEX).read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (m / "pytorch_model.bin.index.json").write_text(text)
        (m / INDEX).unlink()


def pickles_beside(one: Path, m: Path) -> None:
    torch.save(load_file(one / SINGLE), m / "pytorch_model.bin")


def pickled_single_beside_pickled_shards(one: Path, m: Path) -> None:
    as_pickles(m)
    pickles_beside(one, m)


# By case: which of the two folders is changed, how, and what is said about files that do not count.
CASES: dict[str, tuple[str, Change, str]] = {
    "one file": ("one", lambda other, m: None, ""),
    "shards": ("shards", lambda other, m: None, ""),
    "one file over a whole older save": (
        "one",
        merged,
        rf"from {SINGLE}; unused: model-00001-of.*{INDEX}|and \d+ more",
    ),
    "one file over an older index alone": ("one", lambda other, m: merged(other, m, INDEX), f"unused: {INDEX}$"),
    "shards of another save": ("shards", stale_single_of_one_tensor, rf"from {INDEX}; unused: extra\.safetensors$"),
    "an index with tensors too many": (
        "shards",
        lambda other, m: index_entries(m, **{"model.rotary.inv_freq": sorted(m.glob("model-*"))[0].name}),
        r"lists 1 tensors that its shards do not have \('model\.rotary\.inv_freq'\): ignored$",
    ),
    "a tensor in two shards": ("shards", one_tensor_twice, ""),
    "safetensors beside a pickle": ("shards", pickles_beside, ""),
    "a pickle": ("one", lambda other, m: as_pickles(m), ""),
    "pickled shards": ("shards", lambda other, m: as_pickles(m), ""),
    "a pickle over pickled shards": (
        "shards",
        pickled_single_beside_pickled_shards,
        r"from pytorch_model\.bin; unused",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_same_files_count_as_in_transformers(
    case: str, saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    base, change, said = CASES[case]
    m = tmp_path / "m"
    shutil.copytree(saved / base, m)
    change(saved / ("shards" if base == "one" else "one"), m)
    ids = tiny_ids(1, 8)
    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32)(ids).logits
    capsys.readouterr()
    folder = resolve(str(m), allow_pickle=True).folder
    lines = [line for line in capsys.readouterr().err.splitlines() if "converting" not in line]
    assert len(lines) == (1 if said else 0), lines
    assert not said or re.search(said, lines[0])
    assert torch.allclose(streamed_logits(folder, ids), right, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: (m / SINGLE).rename(m / "model.fp16.safetensors"),
            "variant of them .*rename it to model.safetensors",
        ),
        (lambda m: (m / SINGLE).rename(m / "weights.safetensors"), "has weights.safetensors but neither"),
        (lambda m: (m / SINGLE).unlink(), "has no weights: neither"),
        (
            lambda m: (m / "adapter_config.json").write_text("{}"),
            "is a PEFT adapter of its base model: 'lowbit merge .*merge_and_unload",
        ),
    ],
    ids=["variant", "another name", "nothing", "adapter"],
)
def test_what_does_not_count_is_told_apart(change: Callable[[Path], object], message: str, saved, tmp_path) -> None:
    m = tmp_path / "m"
    shutil.copytree(saved / "one", m)
    change(m)
    for ask in (lambda: resolve(str(m)), lambda: lowbit.evaluate(str(m), length=8)):
        with pytest.raises(LowbitError, match=message) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_a_run_folder_says_nothing_of_its_own_files(saved: Path, tmp_path: Path, capsys) -> None:
    run = quantize_tiny(saved / "one", tmp_path / "run", "w4a16").out
    capsys.readouterr()
    resolve(str(run))
    assert capsys.readouterr().err == ""


def test_tensors_that_stand_in(saved: Path) -> None:
    checkpoint = Checkpoint(saved / "one")
    checkpoint.let_stand_in("lm_head.weight", "model.embed.weight")
    assert checkpoint.find("model.embed.weight") == "lm_head.weight"
    assert torch.equal(*checkpoint.read(["lm_head.weight", "model.embed.weight"]).values())
    checkpoint.let_stand_in("none", "model.other.weight")
    assert checkpoint.find("model.other.weight") is None
