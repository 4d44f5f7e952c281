"""Two models are one only if every byte of their files is; and hashing them a second time costs nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lowbit
from lowbit.checkpoints import identity
from lowbit.checkpoints.identity import companions_digest, file_digest, fingerprint, tokenizer_digest
from lowbit.checkpoints.resolve import resolve
from lowbit.checkpoints.shards import INDEX
from lowbit.errors import LowbitError
from runs import quantize_tiny
from tiny import save_tiny

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

OLD = 1_600_000_000  # seconds since 1970: long before any test


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled at once, so that no test waits for seconds."""
    monkeypatch.setattr(identity, "RACY_NS", -(10**12))


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read and hashed."""
    names: list[str] = []
    real = identity.sha256_of
    monkeypatch.setattr(identity, "sha256_of", lambda path: (names.append(path.name), real(path))[1])
    return names


def large(folder: Path, name: str = "large.bin", size: int = identity.KEPT_FROM) -> Path:
    path = folder / name
    path.write_bytes(bytes(size))
    return path


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def test_every_byte_of_a_shard_counts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(3 << 20, dtype=torch.uint8)}, file)
    first = fingerprint(tmp_path)
    for position in (-1, 1000, (3 << 20) // 2, 1 << 20, 2 << 20):
        flip(file, position)
        assert fingerprint(tmp_path) != first, position
        flip(file, position)
        assert fingerprint(tmp_path) == first, position


def test_the_fingerprint_is_of_weights_config_index_and_code(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "llama", shards=True)
    first = fingerprint(tmp_path / "m")
    shutil.copytree(tmp_path / "m", copy := tmp_path / "copy")
    assert fingerprint(copy) == first  # the place does not count
    for name in ("tokenizer.json", "generation_config.json", "README.md", "unused.safetensors", "code.py"):
        (copy / name).write_text("{}")
        assert fingerprint(copy) == first, name
    for name in ("config.json", INDEX):
        before = (copy / name).read_text()
        (copy / name).write_text(before + " ")
        assert fingerprint(copy) != first, name
        (copy / name).write_text(before)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.Config"}}))
    with_code = fingerprint(copy)
    (copy / "code.py").write_text("x = 1")
    assert fingerprint(copy) != with_code


def test_a_tokenizers_digest_leaves_out_what_generates(tmp_path: Path) -> None:
    save_tiny(tmp_path, "llama")
    tokens, all_of_them = tokenizer_digest(tmp_path), companions_digest(tmp_path)
    (tmp_path / "generation_config.json").write_text("{}")
    assert tokenizer_digest(tmp_path) == tokens
    assert companions_digest(tmp_path) != all_of_them
    (tmp_path / "calib.txt").write_text("a text that somebody left here")
    assert tokenizer_digest(tmp_path) == tokens
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert tokenizer_digest(tmp_path) != tokens


@pytest.mark.usefixtures("settled")
def test_a_file_is_hashed_once(tmp_path: Path, hashed: list[str], cache: Path) -> None:
    path = large(tmp_path)
    right = sha256(path.read_bytes()).hexdigest()
    assert [file_digest(path), file_digest(path)] == [right, right]
    assert hashed == ["large.bin"]
    assert file_digest(path, tmp_path / "other cache") == right
    assert len(hashed) == 2
    small = tmp_path / "small"
    small.write_bytes(bytes(100))
    file_digest(small)
    assert len(list((cache / "digests").iterdir())) == 1


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("how", ["in place", "replaced", "in place, its time put back", "longer", "another link"])
def test_a_changed_file_is_hashed_again(tmp_path: Path, how: str) -> None:
    path, size = large(tmp_path), identity.KEPT_FROM
    before, first = path.stat(), file_digest(path)
    if how == "replaced":
        other = large(tmp_path, "other")
        flip(other, size // 2)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        os.replace(other, path)
    elif how == "another link":  # as the hub's cache moves to another revision
        target = large(tmp_path, "blob")
        flip(target, 5)
        path.unlink()
        path.symlink_to(target)
    else:
        with path.open("r+b") as file:
            file.seek(size if how == "longer" else size // 2)
            file.write(b"x")
        if how.endswith("back"):
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file_digest(path) == sha256(path.read_bytes()).hexdigest() != first


def test_a_file_of_the_last_two_seconds_is_not_believed(tmp_path: Path, cache: Path) -> None:
    """Size and times can stay as they were when a file is written twice within the file system's tick."""
    path = large(tmp_path)
    file_digest(path)
    os.utime(path, (OLD, OLD))  # the time of the last change of its status is still recent
    file_digest(path)
    os.utime(path, (4 * 10**9, 4 * 10**9))  # a clock of another machine, ahead of ours
    file_digest(path)
    assert not (cache / "digests").exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"stamp": 1}', '{"stamp": STAMP}', '{"stamp": STAMP, "sha256": 3}']
)
def test_a_broken_entry_is_ignored_and_replaced(tmp_path: Path, cache: Path, content: str) -> None:
    path = large(tmp_path)
    right = file_digest(path)
    (entry,) = (cache / "digests").iterdir()
    good = entry.read_text()
    entry.write_text(content.replace("STAMP", json.dumps(json.loads(good)["stamp"])))
    assert file_digest(path) == right
    assert entry.read_text() == good


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("obstacle", ["a file in its place", "no home"])
def test_the_cache_is_only_an_accelerator(tmp_path: Path, cache: Path, monkeypatch, obstacle: str) -> None:
    path = large(tmp_path)
    if obstacle == "no home":

        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(identity, "cache_dir", homeless)
    else:
        cache.write_text("")
    assert file_digest(path) == sha256(path.read_bytes()).hexdigest()


@pytest.mark.usefixtures("settled")
def test_many_at_once_leave_whole_entries(tmp_path: Path, cache: Path) -> None:
    path = large(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        digests = set(pool.map(lambda _: file_digest(path), range(24)))
    assert digests == {sha256(path.read_bytes()).hexdigest()}
    assert [json.loads(entry.read_text())["sha256"] for entry in (cache / "digests").iterdir()] == [*digests]


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(LowbitError, match=r"cannot read .*: No such file"):
        file_digest(tmp_path / "none")


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A sparse file of 256 MiB, hashed in a fresh process."""
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 28)
    script = (
        "import resource, sys; from lowbit.checkpoints.pypi import sha256_of; from pathlib import Path;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; sha256_of(Path(sys.argv[1]));"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 20_000  # KiB


# --- what is keyed by it


def tuned(folder: Path) -> None:
    """Change one number in the middle of the weights, and nothing about the file's size."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][40, 10] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_run_of_another_model_is_not_finished_or_resumed(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "llama")
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", "w4a16").out
    quantize_tiny(tmp_path / "m", run, "w4a16")  # the same: finished
    tuned(tmp_path / "m")
    with pytest.raises(LowbitError, match="holds another run: its fingerprint is"):
        quantize_tiny(tmp_path / "m", run, "w4a16")
    (run / ".run").mkdir()
    manifest = json.loads((run / "lowbit.json").read_text())
    (run / ".run/identity.json").write_text(json.dumps(manifest["identity"]))
    (run / "lowbit.json").unlink()
    with pytest.raises(LowbitError, match="holds another run: its fingerprint is"):
        quantize_tiny(tmp_path / "m", run, "w4a16")


def test_a_run_with_other_files_of_the_source_is_another_run(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "llama")
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", "w4a16").out
    (tmp_path / "m/calib-2.txt").write_text("notes of the user")
    quantize_tiny(tmp_path / "m", run, "w4a16")
    (tmp_path / "m/chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(LowbitError, match="holds another run: its source_files is"):
        quantize_tiny(tmp_path / "m", run, "w4a16")


def test_converted_pickles_of_two_models_are_two(tmp_path: Path) -> None:
    folders = []
    for name in ("base", "tuned"):
        save_tiny(m := tmp_path / name, "llama", hidden_size=512, intermediate_size=512, num_hidden_layers=1)
        state = load_file(m / "model.safetensors")
        if name == "tuned":
            state["model.layers.0.mlp.up_proj.weight"][200, 200] += 1
        torch.save(state, m / "pytorch_model.bin")
        assert (m / "pytorch_model.bin").stat().st_size > 3 << 20
        (m / "model.safetensors").unlink()
        folders.append(resolve(str(m), allow_pickle=True))
    assert folders[0].folder != folders[1].folder
    assert folders[0].identity != folders[1].identity


def test_task_scores_of_another_model_are_not_given(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    save_tiny(tmp_path / "m", "llama")
    row = {"goal": "abcd", "sol1": "efgh", "sol2": "ijkl", "label": 0}
    (tmp_path / "piqa.jsonl").write_text("\n".join(json.dumps({**row, "goal": f"abcd{i}"}) for i in range(4)))

    def measured() -> float:
        scores = lowbit.evaluate_tasks(str(tmp_path / "m"), "piqa", task_data=str(tmp_path))
        return float(scores.tasks["piqa"]["seconds"])

    first = measured()
    assert measured() == first  # stored
    tuned(tmp_path / "m")
    assert measured() != first
    second = measured()
    tokenizer = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps({**tokenizer, "add_prefix_space": True}))
    assert measured() != second
