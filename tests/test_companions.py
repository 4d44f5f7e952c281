"""Everything that the source's own loaders read comes along into runs and exports, and nothing else does."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lowbit
from lowbit.checkpoints import companions as module
from lowbit.checkpoints.companions import companions
from lowbit.checkpoints.resolve import load_config
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from runs import quantize_tiny
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

COME = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "tokenizer.model.v3", "tekken.json"),
    *("qwen.tiktoken", "sentencepiece.bpe.model", "source.spm", "chat_template.jinja", "chat_template.json"),
    *("processor_config.json", "preprocessor_config.json", "generation_config.json", "LICENSE", "NOTICE.txt"),
    "additional_chat_templates/tool_use.jinja",
)
STAY = (
    *("README.md", "readme.txt", ".gitattributes", ".DS_Store", "model.onnx", "model.onnx_data", "tf_model.h5"),
    *("flax_model.msgpack", "m.gguf", "pytorch_model.bin", "consolidated.00.pth", "model-00009-of-00009.safetensors"),
    *("pytorch_model.bin.index.json", "training_args.bin", "trainer_state.json", "eval_results.json", "optimizer.pt"),
    *("adapter_config.json", "params.json", "quantize_config.json", "logo.png", "notes.txt", "chats.jsonl", "a.yaml"),
    *("lowbit-timing.json", "lowbit-evaluations.json", "lowbit.json", "x.json.partial", "original/tokenizer.model"),
    *("checkpoints/tokenizer.json", "additional_chat_templates/.x", "onnx/config.json"),
)


def fill(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}" if name.endswith(".json") else name)


def test_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, (*COME, *STAY, "config.json", "code.py"))
    assert companions(tmp_path, code=False) == sorted(COME)
    assert companions(tmp_path, code=True) == sorted([*COME, "code.py"])
    monkeypatch.setattr(module, "LARGEST", 3)  # "{}" still fits
    assert "vocab.txt" not in companions(tmp_path, code=False)
    assert "vocab.json" in companions(tmp_path, code=False)


def test_what_tokenizer_config_and_code_name_comes_along(tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("secret")
    m = tmp_path / "m"
    fill(m, ("words/en.txt", "words/other.txt", "codes.txt", "merge-table.tsv", "sub/code.py", ".venv/x.py"))
    fill(m, ("env/pyvenv.cfg", "env/lib/y.py", "__pycache__/z.py", "words/w.bin"))
    named: dict[str, Any] = {
        "vocab_file": "words/en.txt",
        "a": "../outside.txt",
        "b": str(outside),
        "c": "words/w.bin",
    }
    (m / "tokenizer_config.json").write_text(json.dumps(named | {"merges_file": "codes.txt", "d": 3, "e": "no/such"}))
    assert companions(m, code=False) == ["codes.txt", "tokenizer_config.json", "words/en.txt"]
    (m / "sub/code.py").write_text('FILES = {"table": "merge-table.tsv"}')
    with_code = ["codes.txt", "merge-table.tsv", "sub/code.py", "tokenizer_config.json", "words/en.txt"]
    assert companions(m, code=True) == with_code


# What a run and its exports have: everything.


def test_a_run_and_its_export_have_all_files_of_the_source(tmp_path: Path) -> None:
    save_tiny(m := tmp_path / "m", "llama")
    kept = ("additional_chat_templates/tool_use.jinja", "preprocessor_config.json", "extra.tiktoken")
    fill(m, (*kept, "notes.txt", "model.onnx"))
    (m / "additional_chat_templates/tool_use.jinja").write_text("tools {{ messages[0]['content'] }}")
    (m / "chat_template.jinja").write_text("default {{ messages[0]['content'] }}")
    run = quantize_tiny(m, tmp_path / "run", "w4a16g32-sym").out
    export = lowbit.export(run, "gptq").out
    manifest = json.loads((run / "lowbit.json").read_text())
    for folder in (run, export):
        assert all((folder / name).read_bytes() == (m / name).read_bytes() for name in kept)
        assert not any((folder / name).exists() for name in ("notes.txt", "model.onnx", "calib.txt"))
        tokenizer = AutoTokenizer.from_pretrained(folder)
        said = [{"role": "user", "content": "hello"}]
        assert tokenizer.apply_chat_template(said, chat_template="tool_use", tokenize=False) == "tools hello"
        assert tokenizer.apply_chat_template(said, tokenize=False) == "default hello"
    assert set(kept) < set(manifest["files"])
    assert lowbit.verify(run, [export], logits=False)[0].ok
    (export / kept[0]).write_text("changed")
    assert lowbit.verify(run, [export], logits=False)[0].other == [kept[0]]


@pytest.mark.parametrize("name", ["config.json", "./config.json", "README.md"])
def test_a_tokenizers_config_replaces_nothing_that_the_run_writes(name: str, tmp_path: Path) -> None:
    save_tiny(m := tmp_path / "m", "llama")
    said = json.loads((m / "tokenizer_config.json").read_text())
    (m / name).touch()
    (m / "tokenizer_config.json").write_text(json.dumps(said | {"some_file": name}))
    run = quantize_tiny(m, tmp_path / "run", "w4a16g32-sym").out
    assert "quantization_config" in json.loads((run / "config.json").read_text())
    assert json.loads((run / "lowbit.json").read_text())["transformers"]["loads"]
    assert "lowbit" in (run / "README.md").read_text()


def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    save_tiny(tmp_path / "m", "llama")
    (tmp_path / "secret.json").write_text("{}")
    run = quantize_tiny(tmp_path / "m", tmp_path / "run", "w4a16g32-sym").out
    manifest = json.loads((run / "lowbit.json").read_text())
    manifest["files"] |= {"../secret.json": "0" * 64, str(tmp_path / "secret.json"): "0" * 64}
    (run / "lowbit.json").write_text(json.dumps(manifest))
    export = lowbit.export(run, "gptq", out=tmp_path / "deep/er/export").out
    assert not list(tmp_path.glob("deep/**/secret.json"))
    assert (export / "tokenizer.json").exists()


# Code of the model's own: half of Llama's logits, so that nobody takes one class for the other.

MODELING = """
import transformers
from .configuration_half import HalfConfig
from .factors import FACTOR


class HalfForCausalLM(transformers.LlamaForCausalLM):
    config_class = HalfConfig

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * FACTOR
        return out
"""
CODE = {
    "configuration_half.py": "import transformers\n\n\nclass HalfConfig(transformers.LlamaConfig):\n    pass\n",
    "factors.py": "FACTOR = 0.5\n",
    "modeling_half.py": MODELING,
}
MAP = {"AutoConfig": "configuration_half.HalfConfig", "AutoModelForCausalLM": "modeling_half.HalfForCausalLM"}


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama with code of its own beside it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)
    save_tiny(m := tmp_path / "half", "llama")
    for name, content in CODE.items():
        (m / name).write_text(content)
    config = json.loads((m / "config.json").read_text())
    # The name of another place, where its code must not be looked for.
    (m / "config.json").write_text(json.dumps({**config, "auto_map": MAP, "_name_or_path": "somebody/else"}))
    (m / "tokenizer_config.json").write_text(
        json.dumps(json.loads((m / "tokenizer_config.json").read_text()) | {"auto_map": {"AutoProcessor": "a.B"}})
    )
    return m


def test_code_comes_along_if_it_was_permitted_and_runs_only_if_it_is(half: Path, tmp_path: Path, capsys) -> None:
    ids = tiny_ids(1, 12)
    run = quantize_tiny(half, tmp_path / "run", "w8a16g32-sym", trust_remote_code=True).out
    export = lowbit.export(run, "gptq").out
    for folder in (run, export):
        assert all((folder / name).read_text() == content for name, content in CODE.items())
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).auto_map
    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(half, trust_remote_code=True, dtype=torch.float32)(ids).logits
        ours = lowbit.load(run, trust_remote_code=True)(ids).logits
        stock = AutoModelForCausalLM.from_pretrained(run, trust_remote_code=True, dtype=torch.float32)(ids).logits
        builtin = AutoModelForCausalLM.from_pretrained(half, trust_remote_code=False, dtype=torch.float32)(ids).logits
    near = 0.1 * float(right.std())
    assert torch.allclose(ours, right, rtol=0, atol=near)
    assert torch.allclose(stock, ours, atol=1e-4)
    assert not torch.allclose(builtin, right, rtol=0, atol=near)
    text, how = str(half / "calib.txt"), ("--length", "16", "--tokens", "64")
    asked = [
        lambda: lowbit.load(run),
        lambda: lowbit.evaluate(str(run), data=text, length=16, tokens=64),
        lambda: lowbit.compare(str(half), str(run), data=text, length=16, tokens=64),
    ]
    for ask in asked:
        with pytest.raises(
            LowbitError, match=r"quantized with --trust-remote-code .* pass --trust-remote-code \(in"
        ) as e:
            ask()
        assert "\n" not in str(e.value)
    for command in ("evaluate", "inspect"):
        assert call([command, str(run), *(("--data", text, *how) if command == "evaluate" else ())]) == 2
        assert "pass --trust-remote-code" in capsys.readouterr().err
    assert call(["evaluate", str(run), "--data", text, *how, "--trust-remote-code"]) == 0


def test_without_permission_the_library_has_the_class_and_no_map_comes_along(half: Path, tmp_path: Path) -> None:
    ids = tiny_ids(1, 12)
    run = quantize_tiny(half, tmp_path / "run", "w8a16g32-sym").out
    for folder in (run, lowbit.export(run, "gptq").out):
        assert not list(folder.rglob("*.py"))
        for name in ("config.json", "tokenizer_config.json"):
            assert "auto_map" not in json.loads((folder / name).read_text())
    with torch.no_grad():
        builtin = AutoModelForCausalLM.from_pretrained(half, trust_remote_code=False, dtype=torch.float32)(ids).logits
        for trusted in (False, True):
            ours = lowbit.load(run, trust_remote_code=trusted)(ids).logits
            assert torch.allclose(ours, builtin, rtol=0, atol=0.1 * float(builtin.std()))
            stock = AutoModelForCausalLM.from_pretrained(run, trust_remote_code=trusted, dtype=torch.float32)
            assert torch.allclose(stock(ids).logits, ours, atol=1e-4)


def test_a_type_that_the_library_does_not_have(
    half: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its config is code: export and verify take the option too."""
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "model_type": "half"}))
    code = CODE["configuration_half.py"].replace("    pass", '    model_type = "half"')
    (half / "configuration_half.py").write_text(code)
    run = quantize_tiny(half, tmp_path / "run", "w4a16g32-sym", trust_remote_code=True).out
    for command in (["export", str(run), "--to", "gptq"], ["verify", str(run), str(tmp_path / "run-gptq")]):
        assert call(command) == 2
        assert "pass --trust-remote-code" in capsys.readouterr().err
        assert call([*command, "--trust-remote-code"]) == 0


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import no_such_package", "no_such_package.*: install what its code needs$"),
        ("class (", "SyntaxError.*fetch it"),
    ],
)
def test_code_that_cannot_run_is_one_line(code: str, said: str, half: Path, tmp_path: Path) -> None:
    (half / "modeling_half.py").write_text(f"{MODELING}\n{code}\n")
    asked = (
        lambda: quantize_tiny(half, tmp_path / "run", "w4a16", trust_remote_code=True),
        lambda: lowbit.load(half, trust_remote_code=True),
    )
    for ask in asked:
        with pytest.raises(LowbitError, match=said) as caught:
            ask()
        assert "\n" not in str(caught.value)


def test_the_place_of_code_is_the_folder_whatever_the_config_says(half: Path) -> None:
    assert load_config(half, trust_remote_code=True)._name_or_path == str(half)
    assert load_config(half)._name_or_path == str(half)


def test_a_run_names_its_own_weights(tmp_path: Path) -> None:
    """``transformers_weights`` names files of the source; the run has others."""
    save_tiny(m := tmp_path / "m", "llama")
    (m / "model.safetensors").rename(m / "mine.safetensors")
    save_file({"x": torch.zeros(1)}, m / "model.safetensors")
    config = json.loads((m / "config.json").read_text())
    (m / "config.json").write_text(json.dumps({**config, "transformers_weights": "mine.safetensors"}))
    run = quantize_tiny(m, tmp_path / "run", "w8a16g32-sym").out
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32)(ids).logits
        got = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32)(ids).logits
    assert torch.allclose(got, right, rtol=0, atol=0.1 * float(right.std()))
