"""Bad input takes one line, exit code 2 and no work: options, texts, the run folder, the disk."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from lowbit.cli.main import call
from tiny import save_tiny

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

QUANTIZE = ["quantize", "{m}", "--out", "{out}", "--data", "{m}/calib.txt", "--samples", "2", "--length", "16"]
QUANTIZE += ["--scheme", "w4a16g16-sym", "--recipe", "rtn"]
EVALUATE = ["evaluate", "{m}", "--data", "{m}/calib.txt", "--length", "16", "--json"]
GENERATE = ["generate", "{m}", "--prompt", "Hello", "--json"]
INSPECT = ["inspect", "{m}", "--scheme", "w4a16g16-sym", "--length", "16", "--json"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two tiny checkpoints of one shape."""
    root = tmp_path_factory.mktemp("models")
    for seed, folder in enumerate(("one", "other")):
        save_tiny(root / folder, "llama", seed)
    return root


@pytest.fixture
def m(models, tmp_path):
    """A copy of a tiny checkpoint, to be broken."""
    shutil.copytree(models / "one", tmp_path / "m")
    return tmp_path / "m"


def filled(arguments: list[str], m: Path) -> list[str]:
    return [part.replace("{m}", str(m)).replace("{out}", str(m.parent / "out")) for part in arguments]


def refusal(capsys, arguments: list[str]) -> str:
    """The one line that a command is refused with."""
    capsys.readouterr()
    code = call(arguments)
    out, err = capsys.readouterr()
    assert (code, out) == (2, ""), err
    assert err.startswith("lowbit: error: ")
    assert len(err.splitlines()) == 1
    assert "Traceback" not in err
    return err


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder but the file that says how long it took."""
    files = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "lowbit-timing.json")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Name; what is put into the folder first; options; what the line must say: what was given, what is allowed.
OPTIONS = [
    ("recipe", {}, ["--recipe", "gtpq"], ["unknown recipe 'gtpq'", "did you mean 'gptq'", "smoothquant+gptq"]),
    ("recipe file", {}, ["--recipe", "{m}/no.yaml"], ["cannot read the recipe", "no.yaml", "No such file"]),
    ("step", {"r.yaml": "steps: [gptqq]"}, ["--recipe", "{m}/r.yaml"], ["unknown step 'gptqq'", "'gptq'", "awq"]),
    ("field", {"r.yaml": "steps: [{gptq: {dampin: 1}}]"}, ["--recipe", "{m}/r.yaml"], ["'dampin'", "'damping'?"]),
    ("key", {"r.yaml": "steps: [rtn]\nwindw: 2"}, ["--recipe", "{m}/r.yaml"], ["'windw'", "did you mean 'window'"]),
    (
        "type",
        {"r.yaml": "steps: [{gptq: {damping: x}}]"},
        ["--recipe", "{m}/r.yaml"],
        ["gptq.damping: 'x' given; a number is allowed"],
    ),
    ("no YAML", {"r.yaml": "steps: [:\n - {"}, ["--recipe", "{m}/r.yaml"], ["is not valid YAML", "r.yaml"]),
    ("no steps", {"r.yaml": "- 1"}, ["--recipe", "{m}/r.yaml"], ["expected a key 'steps'"]),
    (
        "no rounding",
        {"r.yaml": "steps: [awq]"},
        ["--recipe", "{m}/r.yaml"],
        ["exactly one step quantizes", "rtn, llm-int8, gptq, rounding"],
    ),
    ("window", {"r.yaml": "steps: [rtn]\nwindow: 0"}, ["--recipe", "{m}/r.yaml"], ["window 0 given", "1 or more"]),
    ("set without field", {}, ["--set", "rtn"], ["--set rtn", "step.field=value", "gptq.damping=0.05"]),
    ("set of another step", {}, ["--set", "gptq.damping=1"], ["'gptq'", "Known: rtn"]),
    ("set of no field", {}, ["--recipe", "gptq", "--set", "gptq.damp=1"], ["unknown field of gptq", "'damping'?"]),
    (
        "set to nothing",
        {},
        ["--recipe", "gptq", "--set", "gptq.damping="],
        ["gptq.damping: None given", "a number is allowed (default: 0.01)"],
    ),
    (
        "set to nonsense",
        {},
        ["--recipe", "gptq", "--set", "gptq.damping=[1"],
        ["--set gptq.damping=[1", "is not valid YAML"],
    ),
    ("set out of range", {}, ["--recipe", "gptq", "--set", "gptq.damping=-1"], ["gptq.damping -1 given", "above 0"]),
    ("scheme", {}, ["--scheme", "w4b16"], ["unknown scheme 'w4b16'", "w{2..8}a{4,6,8,16,fp8}", "w4a16g64-sym"]),
    ("9 bits", {}, ["--scheme", "w9a16"], ["9 weight bits given", "2, 3, 4, 5, 6, 7, 8"]),
    ("1 bit", {}, ["--scheme", "w1a16"], ["1 weight bits given", "2, 3, 4, 5, 6, 7, 8"]),
    ("5 activation bits", {}, ["--scheme", "w4a5"], ["5 activation bits given", "4, 6, 8, 16"]),
    ("3 kv bits", {}, ["--scheme", "w4a8kv3"], ["3 kv bits given", "4, 8"]),
    (
        "group for 64",
        {},
        ["--scheme", "w4a16g48-sym"],
        ["self_attn.q_proj", "48", "width of 64", "usable sizes: 16, 32"],
    ),
    (
        "group for 96",
        {},
        ["--scheme", "w4a16g64-sym"],
        ["mlp.down_proj", "64", "width of 96", "usable sizes: 16, 32"],
    ),
    (
        "scales that the target does not store",
        {},
        ["--scheme", "w4a16g32-sym:bf16", "--target", "llama.cpp"],
        ["w4g32-sym:bf16 given with --target llama.cpp", "torch.float16", "leave out ':bf16'"],
    ),
    (
        "scales of an override that the target does not store",
        {},
        ["--scheme", "w4a16g32-sym", "--override", "*down_proj=w8g32-sym:f32", "--target", "vllm"],
        ["w8g32-sym:f32 given with --target vllm", "leave out ':f32'"],
    ),
    ("group of 0", {}, ["--scheme", "w4a16g0"], ["group size 0 given", "2 or more"]),
    ("scheme file", {}, ["--scheme", "{m}/no.yml"], ["cannot read the scheme file", "no.yml"]),
    ("scheme key", {"s.yaml": "scheme: w4a16\noverides: {}"}, ["--scheme", "{m}/s.yaml"], ["mean 'overrides'"]),
    ("overrides", {"s.yaml": "scheme: w4a16\noverrides: [a]"}, ["--scheme", "{m}/s.yaml"], ["must map a glob"]),
    ("override of nothing", {}, ["--override", "*.nope=w8"], ["'*.nope' matches no module", "q_proj", "lm_head"]),
    ("override form", {}, ["--override", "lm_head"], ["--override lm_head", "GLOB=FORMAT", "'*.down_proj=w8'"]),
    ("override format", {}, ["--override", "lm_head=int8"], ["'int8'", "'float', w{2..8}[g{n}][-sym|-asym]", "q4_k"]),
    ("override bits", {}, ["--override", "lm_head=w9"], ["9 bits given", "2 to 8"]),
    ("override group", {}, ["--override", "*.down_proj=w8g36"], ["down_proj", "36", "96", "16, 32, 48, 96"]),
    ("all float", {}, ["--override", "*=float"], ["nothing to quantize"]),
    ("0 samples", {}, ["--samples", "0"], ["--samples 0 given", "1 or more"]),
    ("-3 samples", {}, ["--samples", "-3"], ["--samples -3 given", "1 or more"]),
    ("samples in words", {}, ["--samples", "many"], ["--samples", "integer", "--help"]),
    ("length 1", {}, ["--length", "1"], ["--length 1 given", "2 or more"]),
    ("length of 129", {}, ["--length", "129"], ["--length is 129", "end at 128"]),
    ("seed -1", {}, ["--seed", "-1"], ["--seed -1 given", "0 or more"]),
    ("seed too large", {}, ["--seed", str(2**70)], [f"--seed {2**70} given", "below 2**63"]),
    ("device", {}, ["--device", "gpu"], ["--device 'gpu' given", "cpu, cuda, cuda:N", "mps"]),
    ("device meta", {}, ["--device", "meta"], ["--device 'meta' given", "allowed: cpu"]),
    (
        "device that is not there",
        {},
        ["--device", "cuda:99"],
        ["--device cuda:99 cannot be used here", "use --device"],
    ),
    ("dtype", {}, ["--dtype", "int8"], ["--dtype int8 given", "float32, bfloat16, float16"]),
    ("bfloat16 on a CPU", {}, ["--dtype", "bfloat16"], ["--dtype bfloat16 on a CPU", "use float32"]),
    ("compiling for a CPU", {}, ["--compile"], ["--compile with --device cpu", "use --device cuda"]),
    ("unknown option", {}, ["--sample", "3"], ["No such option", "--samples", "--help"]),
    ("revision of a folder", {}, ["--revision", "main"], ["--revision is for hub ids", "leave it out"]),
    ("no text", {}, ["--data", "{m}/no.txt"], ["cannot read", "no.txt", "No such file", ".jsonl"]),
    ("unknown data", {}, ["--data", "wikitxt2"], ["unknown data 'wikitxt2'", "'wikitext2'?", "builtin", ".jsonl"]),
    ("empty text", {"e.txt": ""}, ["--data", "{m}/e.txt"], ["e.txt has 0 tokens", "needs 16", "give more text"]),
    ("short text", {"e.txt": "abc"}, ["--data", "{m}/e.txt"], ["e.txt has 3 tokens", "needs 16", "less length"]),
    ("no UTF-8", {"e.txt": b"ab\xff"}, ["--data", "{m}/e.txt"], ["e.txt", "not UTF-8 at byte 2", "convert it"]),
    ("no text field", {"e.jsonl": '{"a": 1}'}, ["--data", "{m}/e.jsonl"], ["e.jsonl", "line 1", "text"]),
    ("kind of file", {}, ["--data", "{m}/table.csv"], ["table.csv", "not a supported text", ".parquet"]),
    ("out below a file", {}, ["--out", "{m}/calib.txt/out"], ["calib.txt/out", "choose a folder"]),
    ("out too long", {}, ["--out", "{m}/" + "x" * 300], ["File name too long", "choose a folder"]),
]


@pytest.mark.parametrize(("given", "options", "said"), [case[1:] for case in OPTIONS], ids=[c[0] for c in OPTIONS])
def test_quantize_refuses(given, options, said, m, capsys):
    for name, content in given.items():
        (m / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(p for p in m.parent.rglob("*"))
    line = refusal(capsys, filled(QUANTIZE + options, m))
    for part in said:
        assert part in line
    assert sorted(m.parent.rglob("*")) == before, "something was written"


OTHERS = [
    ("no tokens", [*EVALUATE, "--tokens", "0"], ["0 tokens given", "one window needs 16"]),
    ("tokens below a window", [*EVALUATE, "--tokens", "15"], ["15 tokens given", "needs 16"]),
    ("length 1", [*EVALUATE, "--length", "1"], ["length 1 given", "2 or more"]),
    (
        "length above the model's",
        [*EVALUATE, "--length", "200"],
        ["--length is 200", "end at 128", "give 128 or less"],
    ),
    ("data self", [*EVALUATE, "--data", "self"], ["'self' is for calibration only", "builtin"]),
    ("one of several texts", [*EVALUATE, "--data", "nope"], ["unknown data 'nope'", "builtin"]),
    ("device", [*EVALUATE, "--device", "tpu"], ["--device 'tpu' given", "cpu, cuda"]),
    ("float16 on a CPU", [*EVALUATE, "--dtype", "float16"], ["--dtype float16 on a CPU", "float32"]),
    ("0 new tokens", [*GENERATE, "--tokens", "0"], ["--tokens 0 given", "1 or more", "number of tokens to generate"]),
    ("no prompt", [*GENERATE, "--prompt", ""], ["--prompt is empty"]),
    ("unknown recipe", [*INSPECT, "--recipe", "awg"], ["unknown recipe 'awg'", "'awq'?"]),
    ("group size", [*INSPECT, "--scheme", "w4a16g64"], ["width of 96", "usable sizes: 16, 32"]),
    ("0 samples", [*INSPECT, "--samples", "0"], ["--samples 0 given", "1 or more"]),
    ("length", [*INSPECT, "--length", "129"], ["--length is 129", "end at 128"]),
    ("command", ["quantise", "{m}"], ["quantise", "'quantize'?"]),
    ("no --out", ["quantize", "{m}"], ["--out"]),
    ("a path to nothing", ["evaluate", "./nowhere/at/all"], ["no such file or folder: ./nowhere/at/all", "'demo'"]),
    ("the hub offline", ["evaluate", "some-org/some-model"], ["some-org/some-model", "HF_HUB_OFFLINE", "unset it"]),
    ("a name too long", ["evaluate", "a" * 300], ["aaa"]),
    ("a file of another kind", ["inspect", "{m}/calib.txt"], ["calib.txt is a file", ".gguf", "hub id"]),
]


@pytest.mark.parametrize(("arguments", "said"), [case[1:] for case in OTHERS], ids=[case[0] for case in OTHERS])
def test_other_commands_refuse(arguments, said, m, capsys):
    line = refusal(capsys, filled(arguments, m))
    for part in said:
        assert part in line


@pytest.fixture(scope="module")
def finished(models):
    """A copy of the model and its finished run, side by side."""
    root = models / "finished"
    shutil.copytree(models / "one", root / "m")
    assert call(filled(QUANTIZE, root / "m")) == 0
    return root


@pytest.mark.parametrize("state", ["finished", "running"])
@pytest.mark.parametrize(
    ("said", "options"),
    [
        ("recipe_name is rtn, this one's gptq", ["--recipe", "gptq"]),
        ("scheme.scheme is w4a16g16-sym, this one's w4a16g32-sym", ["--scheme", "w4a16g32-sym"]),
        ("scheme.overrides.0.*.down_proj is None, this one's w8-sym", ["--override", "*.down_proj=w8"]),
        ("data.length is 16, this one's 17", ["--length", "17"]),
        ("data.samples is 2, this one's 3", ["--samples", "3"]),
        ("data.corpus is calib.txt, this one's calib.txt + more.txt", ["--data", "{m}/more.txt"]),
        ("seed is 0, this one's 1", ["--seed", "1"]),
        ("fingerprint is ", []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_run_s_folder_is_refused_and_left_alone(said, options, state, finished, models, tmp_path, capsys):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    m, out = tmp_path / "m", tmp_path / "out"
    (m / "more.txt").write_text((m / "calib.txt").read_text()[::-1])
    if state == "running":
        identity = json.loads((out / "lowbit.json").read_text())["identity"]
        (out / ".run").mkdir()
        (out / ".run/identity.json").write_text(json.dumps(identity))
        (out / "lowbit.json").unlink()
    if not options:
        shutil.copyfile(models / "other/model.safetensors", m / "model.safetensors")
    before = contents(out)
    line = refusal(capsys, filled(QUANTIZE + options, m))
    assert f"holds another run: its {said}" in line
    assert "choose another folder" in line
    assert contents(out) == before


def test_a_folder_or_file_with_something_else_is_refused_and_left_alone(m, capsys):
    out = m.parent / "out"
    out.write_text("mine")
    assert "is a file" in refusal(capsys, filled(QUANTIZE, m))
    assert out.read_text() == "mine"
    out.unlink()
    out.mkdir()
    (out / "thesis.tex").write_text("mine")
    assert "exists and is not a lowbit run" in refusal(capsys, filled(QUANTIZE, m))
    assert contents(out) == {"thesis.tex": b"mine"}
    before = contents(m)
    assert "exists and is not a lowbit run" in refusal(capsys, [*filled(QUANTIZE, m), "--out", str(m)])
    assert contents(m) == before


def test_a_folder_that_may_not_be_written_is_refused(m, capsys, monkeypatch):
    def refuse(self, *given, **more):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert "Permission denied; choose a folder you may write" in refusal(capsys, filled(QUANTIZE, m))
    assert not (m.parent / "out").exists()


def test_too_little_space_is_refused_before_any_work(m, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    line = refusal(capsys, filled(QUANTIZE, m))
    assert "out of disk" in line
    assert "1,000 free" in line
    assert not (m.parent / "out").exists()


def test_space_that_a_stopped_run_has_taken_is_not_asked_for_again(m, capsys, monkeypatch):
    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.pipeline.runner.Walk._window", stop)
    assert call(filled(QUANTIZE, m)) == 130
    monkeypatch.undo()
    rest = (m.parent / "out/model-rest.safetensors").stat().st_size
    # Codes and scales of the blocks, but not the embeddings that are there already.
    free = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96) * 5 // 8 + rest // 2
    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(10**9, 0, free))
    capsys.readouterr()
    assert call(filled(QUANTIZE, m)) == 0


@pytest.mark.parametrize("at", [1, 2, 3, 5, 8, 9, 11, 14])
@pytest.mark.parametrize("where", ["rename", "write"])
def test_a_disk_that_fills_up_leaves_no_half_file_and_the_run_goes_on(
    at, where, finished, tmp_path, capsys, monkeypatch
):
    shutil.copytree(finished / "m", tmp_path / "m")
    out, writes = tmp_path / "out", []
    real = os.fsync if where == "write" else os.replace

    def fill(*given):
        """The write, or the rename, number ``at`` finds the disk full."""
        writes.append(given)
        if len(writes) == at:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(*given)

    monkeypatch.setattr(os, real.__name__, fill)
    line = refusal(capsys, filled(QUANTIZE, tmp_path / "m"))
    assert "cannot write" in line
    assert "No space left on device" in line
    assert "free some space or choose another --out" in line
    assert not list(out.rglob("*.partial"))
    assert not (out / "lowbit.json").exists()
    monkeypatch.undo()
    assert call(filled(QUANTIZE, tmp_path / "m")) == 0
    assert contents(out) == contents(finished / "out")


def test_a_full_disk_inside_a_shard_is_one_line(m, capsys, monkeypatch):
    def half(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lowbit.checkpoints.writing.save_file", half)
    line = refusal(capsys, filled(QUANTIZE, m))
    assert "model-rest.safetensors" in line
    assert [name for name in contents(m.parent / "out") if not name.startswith(".run/")] == []
