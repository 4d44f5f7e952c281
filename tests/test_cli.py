"""The command line: results on standard output and nothing else there, one line for what went wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.cli.main import call
from lowbit.data.text import calibration
from lowbit.evaluation.evaluate import Evaluated
from tiny import VOCAB, save_tiny, tiny_ids


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny float model's folder, with a second text beside its ``calib.txt``."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    save_tiny(folder, "llama")
    (folder / "held.txt").write_text("".join(chr(30 + i) for i in tiny_ids(1, 700, seed=8)[0].tolist()))
    return folder


def arguments(model: Path, out: Path, *more: str) -> list[str]:
    """A quick quantization; options in ``more`` come last and win."""
    sizes = ["--samples", "2", "--length", "16", "--scheme", "w4a16g16-sym", "--recipe", "rtn"]
    data = [] if "--data" in more else ["--data", f"{model}/calib.txt"]
    return ["quantize", str(model), "--out", str(out), *data, *sizes, *more]


@pytest.fixture(scope="module")
def run(model):
    """The folder of a finished run with activations rounded too."""
    out = model.parent / "run"
    assert call(arguments(model, out, "--scheme", "w4a8")) == 0
    return out


@pytest.fixture
def command(capsys):
    """Runs the command in this process: ``(exit code, stdout, stderr)``."""

    def run_command(*given: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = call([str(part) for part in given])
        return code, *capsys.readouterr()

    return run_command


def manifest(out: Path) -> dict:
    return json.loads((out / "lowbit.json").read_text())


def python_m(*given: str | Path) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRANSFORMERS_")}
    return subprocess.run(
        [sys.executable, "-m", "lowbit", *map(str, given)], capture_output=True, text=True, env=environment
    )


def test_help_lists_the_commands():
    done = python_m("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for name in ("quantize", "evaluate", "compare", "report", "generate", "inspect", "demo"):
        assert f" {name} " in done.stdout


def test_help_is_what_a_bare_command_gives(command):
    assert command()[:2] == command("--help")[:2]
    assert "GLOB=FORMAT" in command("quantize", "--help")[1]


def test_quantize_as_a_process_prints_one_json_document_and_is_quiet(model, tmp_path):
    done = python_m(*arguments(model, tmp_path / "out", "--json"))
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert set(found) == {"out", "bits_per_weight", "seconds", "peak_memory_bytes", "warnings"}
    assert found["out"] == str(tmp_path / "out")
    assert found["bits_per_weight"] == 4 + 16 / 16
    assert found["warnings"] == []
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 1e7
    assert (tmp_path / "out/lowbit.json").exists()


def test_a_mistake_as_a_process_is_one_line_and_code_2(model, tmp_path):
    done = python_m(*arguments(model, tmp_path / "out", "--samples", "many"))
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("lowbit: error: Invalid value for '--samples'")
    assert not (tmp_path / "out").exists()


def test_quantize_for_a_reader(model, tmp_path, command):
    code, out, err = command(*arguments(model, tmp_path / "out", "--scheme", "w4a8kv4"))
    assert (code, len(out.splitlines())) == (0, 1)
    assert out.startswith(f"{tmp_path / 'out'}: 4.")
    assert "bits per weight" in out
    assert err.startswith("warning: stock transformers does not run this folder")
    assert len(err.splitlines()) == 1
    assert not {"\x1b", "\r"} & set(out + err)


def test_a_finished_run_given_again_says_so(model, run, command):
    code, out, err = command(*arguments(model, run, "--scheme", "w4a8", "--json"))
    assert code == 0
    assert err == f"{run} already holds this run, finished\n"
    assert json.loads(out)["bits_per_weight"] == manifest(run)["bits_per_weight"]


def plain_perplexity(
    model: torch.nn.Module, folder: Path, text: str, length: int, windows: int | None = None
) -> float:
    """The protocol, written down once more: consecutive windows, each on its own, all tokens but the first."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(folder)((folder / text).read_text())["input_ids"])
    losses = []
    for start in range(0, len(ids) - length + 1, length)[:windows]:
        window = ids[start : start + length]
        with torch.no_grad():
            scores = model(window[None], use_cache=False).logits[0].double().log_softmax(-1)
        losses += [-scores[i, window[i + 1]] for i in range(length - 1)]
    return float(torch.stack(losses).mean().exp())


def test_evaluate_equals_a_plain_loop_for_every_text(model, command):
    texts = [f"{model}/calib.txt", f"{model}/held.txt"]
    code, out, err = command("evaluate", model, "--data", texts[0], "--data", texts[1], "--length", "64", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    facts = {"target", "bos", "special", "scored", "scheme", "bits_per_weight", "fingerprint"}
    facts |= {"calibrated", "reference", "ratios", "device", "dtype"}
    assert set(found) == {"model", "perplexity", "tokens", "length", "seconds", "data_hash", *facts}
    assert found["length"] == 64
    assert found["tokens"] == {texts[0]: 3000 // 64 * 64, texts[1]: 700 // 64 * 64}
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    for text in texts:
        wanted = plain_perplexity(exact, model, Path(text).name, 64)
        assert found["perplexity"][text] == pytest.approx(wanted, rel=1e-5)
    assert found["perplexity"][texts[0]] != found["perplexity"][texts[1]]


def test_evaluate_of_a_run_folder_equals_a_plain_loop_over_the_loaded_model(model, run, command):
    found = lowbit.evaluate(str(run), data=f"{model}/held.txt", length=50, tokens=349)
    assert found.tokens == {f"{model}/held.txt": 300}
    ours = lowbit.load(run)
    (value,) = found.perplexity.values()
    assert value == pytest.approx(plain_perplexity(ours, model, "held.txt", 50, windows=6), rel=1e-5)
    assert value != pytest.approx(plain_perplexity(ours, model, "held.txt", 50), rel=1e-5)
    told = command("evaluate", run, "--data", f"{model}/held.txt", "--length", "50", "--tokens", "349", "--json")[1]
    assert json.loads(told)["perplexity"] == found.perplexity


def test_evaluate_for_a_reader(model, command, tmp_path):
    text = tmp_path / "held [bold]:on:.txt"  # neither markup nor emoji
    text.write_text((model / "held.txt").read_text())
    code, out, err = command("evaluate", model, "--data", text, "--length", "64", "--tokens", "128")
    assert (code, err) == (0, "")
    (value,) = lowbit.evaluate(str(model), data=str(text), length=64, tokens=128).perplexity.values()
    assert f"{value:.4f}" in out
    assert " 128 " in out
    assert "held [bold]:on:.txt" in out
    assert "\x1b" not in out


def test_an_infinite_perplexity_is_null_in_json(monkeypatch, command):
    endless = Evaluated({"x": float("inf")}, {"x": 4}, {"x": 2}, 2, 0.0, {"x": ""})
    monkeypatch.setattr("lowbit.evaluation.evaluate.evaluate", lambda *given, **options: endless)
    assert json.loads(command("evaluate", "any", "--json")[1])["perplexity"] == {"x": None}


@pytest.mark.parametrize("which", ["model", "run"])
def test_generate_continues_greedily(which, model, run, command):
    folder = model if which == "model" else run
    code, out, err = command("generate", folder, "--prompt", "Hello", "--tokens", "6", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert set(found) == {"model", "prompt", "text"}
    ids = AutoTokenizer.from_pretrained(folder)("Hello", return_tensors="pt").input_ids
    theirs = lowbit.load(folder) if which == "run" else AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    for _ in range(6):
        with torch.no_grad():
            best = theirs(ids, use_cache=False).logits[:, -1].argmax(-1)
        if best == 2:  # the end of the text
            break
        ids = torch.cat([ids, best[:, None]], 1)
    assert found["text"] == AutoTokenizer.from_pretrained(folder).decode(ids[0], skip_special_tokens=True)
    assert found["text"].startswith("Hello")
    assert found["text"] != "Hello"
    assert command("generate", folder, "--prompt", "Hello", "--tokens", "6")[:2] == (0, found["text"] + "\n")


def test_inspect_tells_facts_and_estimates_of_a_float_model(model, command):
    code, out, err = command("inspect", model, "--scheme", "w4a16g16-sym", "--length", "64", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    exact = AutoModelForCausalLM.from_pretrained(model)
    assert (found["architecture"], found["blocks"]) == ("LlamaForCausalLM", 3)
    assert found["parameters"] == sum(p.numel() for p in exact.parameters() if p.ndim == 2)
    assert found["checkpoint_bytes"] == (model / "model.safetensors").stat().st_size
    assert found["bits_per_weight"] == 5.0
    assert min(found["estimated_memory_bytes"], found["estimated_disk_bytes"]) > 2 * VOCAB * 64 * 2
    (kind,) = found["kinds"]
    assert (kind["layers"], kind["linears"][1], found["origin"]) == ("0-2", "self_attn.o_proj", "declared")
    table = command("inspect", model, "--scheme", "w4a16", "--length", "64")[1]
    printed = " ".join(table.replace("│", " ").split())
    for text in ("LlamaForCausalLM", "layers 0-2 self_attn", "up_proj -> mlp.down_proj (a diagonal)"):
        assert text in printed


def test_inspect_tells_of_a_run_folder_what_was_done(run, command):
    found = json.loads(command("inspect", run, "--json")[1])
    told = {key: found[key] for key in ("scheme", "recipe", "loads_in_transformers")}
    assert told == {"scheme": "w4a8", "recipe": "rtn", "loads_in_transformers": True}
    assert found["relative_error_of_last_block"] == manifest(run)["blocks"][-1]["relative_error"]


def test_settings_and_overrides_reach_the_run(model, tmp_path, command):
    more = ["--recipe", "gptq", "--set", "gptq.damping=5e-2", "--set", "gptq.block_size=32"]
    more += ["--override", "*.down_proj=w8", "--override", "lm_head=w8g16", "--seed", "7", "--json"]
    assert command(*arguments(model, tmp_path / "out", *more))[0] == 0
    made = manifest(tmp_path / "out")
    (step,) = made["identity"]["recipe"]["steps"]
    assert (step["gptq"]["damping"], step["gptq"]["block_size"]) == (0.05, 32)
    assert made["identity"]["scheme"]["overrides"] == [{"*.down_proj": "w8-sym"}, {"lm_head": "w8g16-sym"}]
    assert made["identity"]["seed"] == 7
    assert "lm_head" in made["quantized"]


def test_effort_reaches_the_run_and_a_setting_is_exact(model, tmp_path, command):
    (tmp_path / "mine.yaml").write_text("steps: [{affinequant: {epochs: 3}}, rtn]\nrun: {effort: paper, seed: 5}\n")
    cases = [([], 3), (["--effort", "quick"], 1), (["--effort", "quick", "--set", "affinequant.epochs=2"], 2)]
    for i, (more, wanted) in enumerate(cases):
        given = arguments(model, tmp_path / f"{i}", "--recipe", str(tmp_path / "mine.yaml"), *more)
        assert command(*given)[0] == 0
        made = manifest(tmp_path / f"{i}")
        assert made["identity"]["recipe"]["steps"][0]["affinequant"]["epochs"] == wanted
        assert made["identity"]["seed"] == 5
    code, out, err = command(*arguments(model, tmp_path / "no", "--effort", "quik"))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "unknown effort 'quik': did you mean 'quick'? Known: normal, paper, quick" in err
    assert not (tmp_path / "no").exists()


def test_a_recipe_and_a_scheme_from_files_are_those_by_options(model, tmp_path, command):
    (tmp_path / "mine.yaml").write_text("steps:\n- gptq: {damping: 0.05}\n")
    (tmp_path / "formats.yaml").write_text("scheme: w4a16g16-sym\noverrides: {'*.down_proj': w8}\n")
    files = ["--recipe", str(tmp_path / "mine.yaml"), "--scheme", str(tmp_path / "formats.yaml")]
    options = ["--recipe", "gptq", "--set", "gptq.damping=0.05", "--override", "*.down_proj=w8"]
    assert command(*arguments(model, tmp_path / "files", *files))[0] == 0
    assert command(*arguments(model, tmp_path / "options", *options))[0] == 0
    recipes = [manifest(tmp_path / name)["identity"]["recipe"] for name in ("files", "options")]
    assert recipes[0] == recipes[1]
    shards = sorted(path.name for path in (tmp_path / "files").glob("*.safetensors"))
    assert len(shards) == 5
    for name in shards:
        assert (tmp_path / "files" / name).read_bytes() == (tmp_path / "options" / name).read_bytes()
    assert manifest(tmp_path / "files")["identity"]["recipe_name"] == "mine"


def test_data_self_is_sampled_from_the_model(model, tmp_path, command):
    code, out, err = command(*arguments(model, tmp_path / "out", "--data", "self", "--recipe", "gptq", "--json"))
    assert code == 0
    assert json.loads(out)["warnings"] == []
    assert err == "sampling 2 x 16 tokens from the model itself\n"
    told = manifest(tmp_path / "out")["identity"]["data"]
    text = calibration(f"{model}/calib.txt", load_tokenizer(model), 2, 16, 0)
    assert (told["corpus"], told["hash"] == text.hash) == ("self", False)


def test_an_interrupt_is_one_line_and_code_130(model, tmp_path, monkeypatch, command):
    def stop(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr("lowbit.pipeline.runner.Walk.walk", stop)
    code, out, err = command(*arguments(model, tmp_path / "out"))
    assert (code, out) == (130, "")
    assert (err.startswith("lowbit: stopped"), len(err.splitlines())) == (True, 1)
    monkeypatch.undo()
    assert command(*arguments(model, tmp_path / "out"))[0] == 0


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory.\nTried to"),
            "out of memory: CUDA out of memory. Tried to; give",
        ),
        (MemoryError(), "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), "No space left on device: /x/y; free some space"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), "Permission denied: /x/y; fix its permissions"),
    ],
)
def test_what_the_machine_lacks_is_one_line(raised, said, monkeypatch, command):
    def fail(*given, **options):
        raise raised

    monkeypatch.setattr("lowbit.pipeline.quantize.quantize", fail)
    code, out, err = command("quantize", "any", "--out", "x")
    assert (code, out) == (2, "")
    assert (err.startswith(f"lowbit: error: {said}"), len(err.splitlines())) == (True, 1)


@pytest.mark.parametrize("raised", [RuntimeError("a bug"), FileNotFoundError(errno.ENOENT, "a bug")])
def test_a_bug_keeps_its_traceback(raised, monkeypatch):
    def fail(*given, **options):
        raise raised

    monkeypatch.setattr("lowbit.pipeline.quantize.quantize", fail)
    with pytest.raises(type(raised), match="a bug"):
        call(["quantize", "any", "--out", "x"])
