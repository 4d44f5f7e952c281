"""Reading checkpoints that may be broken, and writing files that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.checkpoints import writing
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params
from lowbit.checkpoints.shards import INDEX, SINGLE
from lowbit.checkpoints.writing import write_bytes, write_index, write_json, write_tensors
from lowbit.errors import LowbitError

A, B = "model.layers.0.a.weight", "model.layers.1.b.weight"


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {A: torch.randn(4, 6, generator=generator), B: torch.randn(3, generator=generator)}


def sharded(folder):
    """Two shards with an index."""
    content = tensors()
    for file, name in (("one.safetensors", A), ("two.safetensors", B)):
        save_file({name: content[name]}, folder / file, metadata={"format": "pt"})
    write_index(folder, {"one.safetensors": [A], "two.safetensors": [B]})
    return content


def test_a_single_file(tmp_path):
    content = tensors()
    save_file(content, tmp_path / SINGLE)
    read = Checkpoint(tmp_path)
    assert read.names == sorted(content)
    assert read.files == [tmp_path / SINGLE]
    got = read.read([B, A])
    assert list(got) == [B, A]
    assert all(torch.equal(got[name], content[name]) for name in content)


def test_shards(tmp_path):
    content = sharded(tmp_path)
    (tmp_path / "stray.safetensors").write_bytes(b"not in the index, so nobody looks at it")
    read = Checkpoint(tmp_path)
    assert read.names == sorted(content)
    assert read.files == [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    assert all(torch.equal(value, content[name]) for name, value in read.read([A, B]).items())
    assert Checkpoint(tmp_path, ["two.safetensors"]).names == [B]
    total = sum(path.stat().st_size for path in read.files)
    assert read_json(tmp_path / INDEX)["metadata"] == {"total_size": total}


def test_an_empty_folder_is_told_what_is_wanted(tmp_path):
    with pytest.raises(LowbitError, match=f"has neither {SINGLE} nor {INDEX}"):
        Checkpoint(tmp_path)


def test_a_missing_shard_is_named(tmp_path):
    sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(LowbitError, match=r"lacks the shard two\.safetensors that its index names"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    "path", ["../x.safetensors", "/etc/passwd", "sub/x.safetensors", "..", ".", "", "x/", 3, None]
)
def test_an_index_that_points_outside_of_the_folder_is_refused(tmp_path, path):
    folder = tmp_path / "inner"
    (folder / "sub").mkdir(parents=True)
    for target in (tmp_path, folder / "sub"):  # the files are there; the name alone is the reason
        save_file(tensors(), target / "x.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {A: path}}))
    with pytest.raises(LowbitError, match="only plain file names are allowed there"):
        Checkpoint(folder)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', "[1]", "{", "\udcff"])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(LowbitError, match=r"weight_map|not hold a JSON object|cannot read"):
        Checkpoint(tmp_path)


def test_shards_and_not_their_index_say_where_a_tensor_is(tmp_path):
    """As ``transformers`` reads them: an index of another save may list tensors elsewhere, or too many."""
    content = sharded(tmp_path)
    index = read_json(tmp_path / INDEX)
    for changed in ({A: "two.safetensors", B: "one.safetensors"}, {"model.more": "one.safetensors"}):
        write_json(tmp_path / INDEX, {"weight_map": {**index["weight_map"], **changed}})
        read = Checkpoint(tmp_path)
        assert read.names == sorted(content)
        assert all(torch.equal(value, content[name]) for name, value in read.read(content).items())
    save_file({B: content[B], A: content[A] + 1}, tmp_path / "two.safetensors")
    assert torch.equal(Checkpoint(tmp_path).read([A])[A], content[A] + 1)  # of two the last one


def split_file(raw):
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def concatenate(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def lies(raw):
    """Files whose header does not fit what follows, by what is wrong."""
    header, data = split_file(raw)

    def with_entry(**changes):
        return concatenate({**header, A: {**header[A], **changes}}, data)

    end = len(data)
    yield "empty", b""
    yield "cut in its length", raw[:5]
    yield "cut in its header", raw[:40]
    yield "cut in its data", raw[:-1]
    yield "longer than it says", raw + b"\0"
    yield "a length beyond the file", struct.pack("<Q", len(raw) + 1) + raw[8:]
    yield "an absurd length", struct.pack("<Q", 2**63) + raw[8:]
    yield "no JSON", raw[:8] + b"#" + raw[9:]
    yield "offsets beyond the file", with_entry(data_offsets=[end, end + 96])
    yield "offsets backwards", with_entry(data_offsets=[96, 0])
    yield "a shape that does not fit", with_entry(shape=[4, 7])
    yield "an unknown dtype", with_entry(dtype="F33")
    yield "HTML from a proxy", b"<!DOCTYPE html><html><body>sign in</body></html>" * 9


def test_a_file_that_lies_is_refused_and_named(tmp_path):
    save_file(tensors(), tmp_path / SINGLE)
    raw = (tmp_path / SINGLE).read_bytes()
    header, data = split_file(raw)
    (tmp_path / SINGLE).write_bytes(concatenate(header, data))
    assert Checkpoint(tmp_path).names == sorted(tensors())  # taking it apart and putting it together is no lie
    for what, content in lies(raw):
        (tmp_path / SINGLE).write_bytes(content)
        with pytest.raises(LowbitError) as caught:
            Checkpoint(tmp_path).read([A])
        assert f"{tmp_path / SINGLE} is not a complete safetensors file" in str(caught.value), what


def test_a_missing_tensor_is_named(tmp_path):
    save_file(tensors(), tmp_path / SINGLE)
    with pytest.raises(LowbitError, match=r"has no tensor 'model\.norm\.weight'"):
        Checkpoint(tmp_path).read([A, "model.norm.weight"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, bad, dtype):
    content = {name: value.to(dtype) for name, value in tensors().items()}
    content[B][1] = bad
    save_file(content, tmp_path / SINGLE)
    read = Checkpoint(tmp_path)
    assert torch.equal(read.read([A])[A], content[A])
    with pytest.raises(LowbitError, match=rf"'{B}' in .*{SINGLE} holds NaN or infinity"):
        read.read([A, B])


def test_base_model_checkpoints_leave_out_the_prefix(tmp_path):
    content = {name.removeprefix("model."): value for name, value in tensors().items()}
    content["lm_head.weight"] = torch.ones(2, 2)
    save_file(content, tmp_path / SINGLE)
    read = Checkpoint(tmp_path)
    assert read.find(A) == "layers.0.a.weight"
    assert read.find("lm_head.weight") == "lm_head.weight"
    assert read.find("model.none") is None
    assert torch.equal(read.read([A])[A], tensors()[A])


def test_dtypes_convert_exactly_and_integers_stay(tmp_path):
    half = torch.randn(64, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    save_file({"x": half, "n": torch.arange(3)}, tmp_path / SINGLE)
    read = Checkpoint(tmp_path)
    got = read.read(["x", "n"], torch.float32)
    assert got["x"].dtype == torch.float32
    assert torch.equal(got["x"].to(torch.bfloat16), half)
    # bfloat16 is the upper half of a float32, so an exact conversion has zeros below.
    assert not (got["x"].view(torch.int32) & 0xFFFF).any()
    assert got["n"].dtype == torch.int64
    assert read.read(["x"])["x"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_tensors_are_copies_that_outlive_the_file(tmp_path, dtype):
    content = {**tensors(), "n": torch.arange(1000)}
    save_file(content, tmp_path / SINGLE)
    got = Checkpoint(tmp_path).read(content, dtype)
    size = (tmp_path / SINGLE).stat().st_size
    with (tmp_path / SINGLE).open("r+b") as file:  # in place: a memory map would see it
        file.write(b"\xff" * size)
    (tmp_path / SINGLE).unlink()
    assert all(torch.equal(got[name], content[name]) for name in content)


def test_a_blocks_parameters_and_a_config_that_does_not_fit(tmp_path):
    layer = {"a.weight": torch.Size((4, 6))}
    save_file({A: tensors()[A].to(torch.float16)}, tmp_path / SINGLE)
    got = block_params(Checkpoint(tmp_path), "model.layers", 0, layer)
    assert list(got) == ["0.a.weight"]
    assert torch.equal(got["0.a.weight"], tensors()[A].to(torch.float16).float())
    wrong = {"a.weight": torch.Size((4, 5))}
    with pytest.raises(LowbitError, match=rf"'{A}' in .* is \(4, 6\), config.json implies \(4, 5\)"):
        block_params(Checkpoint(tmp_path), "model.layers", 0, wrong)


def writers(folder):
    yield folder / "t.safetensors", lambda path: write_tensors(path, tensors())
    yield folder / "j.json", lambda path: write_json(path, {"a": 1})
    yield folder / "b.bin", lambda path: write_bytes(path, b"abc")


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def half_written(tensors, path, **kwargs):
    path.write_bytes(b"half")
    no_space()


@pytest.mark.parametrize("where", ["while it is written", "when it is forced to the disk", "when it is renamed"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, where, existing):
    if where == "while it is written":
        monkeypatch.setattr(writing, "save_file", half_written)
        monkeypatch.setattr(writing.Path, "write_bytes", no_space)
    else:
        monkeypatch.setattr(os, "replace" if "renamed" in where else "fsync", no_space)
    for path, write in writers(tmp_path):
        if existing:
            with path.open("wb") as file:
                file.write(b"old")
        with pytest.raises(LowbitError, match=f"cannot write {path}: .*No space left on device.*free some space"):
            write(path)
        assert list(tmp_path.iterdir()) == ([path] if existing else [])
        if existing:
            assert path.read_bytes() == b"old"
            path.unlink()


def test_a_file_has_its_name_only_after_it_is_on_the_disk(tmp_path, monkeypatch):
    calls = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), rename(a, b)))
    for path, write in writers(tmp_path):
        calls.clear()
        write(path)
        assert calls == ["fsync", "replace"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.bin", "j.json", "t.safetensors"]
    assert torch.equal(load_file(tmp_path / "t.safetensors")[A], tensors()[A])
    assert (tmp_path / "b.bin").read_bytes() == b"abc"


def test_a_folder_that_is_not_there(tmp_path):
    for path, write in writers(tmp_path / "no" / "such"):
        with pytest.raises(LowbitError, match=f"cannot write {path}"):
            write(path)


SCRIPT = """
import sys, torch
from pathlib import Path
from lowbit.checkpoints.writing import write_json, write_tensors
out = Path(sys.argv[1])
names = {"b", "a", "zz", "y", "q"}  # a set of texts has another order in every process
write_json(out / "j", {name: {"ä": [1, 2.5, None], "k": name} for name in names})
write_tensors(out / "t", {name: torch.arange(6.0).reshape(2, 3).T for name in names})
"""


@pytest.mark.heavy
def test_equal_content_gives_equal_bytes_in_different_processes(tmp_path, monkeypatch):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    monkeypatch.setattr(sys, "argv", ["", str(here)])
    exec(SCRIPT, {})
    other = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    subprocess.run([sys.executable, "-c", SCRIPT, there], env={**os.environ, "PYTHONHASHSEED": other}, check=True)
    for name in ("j", "t"):
        assert (here / name).read_bytes() == (there / name).read_bytes()
    assert read_json(here / "j")["zz"] == {"k": "zz", "ä": [1, 2.5, None]}
