"""Bad input takes one line, exit code 2 and no work: checkpoints, configs, tokenizers, run folders."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.cli.main import call
from test_bad_input import EVALUATE, GENERATE, INSPECT, QUANTIZE, contents, filled, refusal
from tiny import save_tiny

Break = Callable[[Path], object]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DOWN, EMBED, NORM = "model.layers.2.mlp.down_proj.weight", "model.embed_tokens.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny checkpoints and a finished run, to be copied and broken."""
    root = tmp_path_factory.mktemp("models")
    save_tiny(root / "one", "llama")
    save_tiny(root / "shards", "llama", shards=True)
    save_tiny(root / "opt", "opt", do_layer_norm_before=False)
    assert call([*filled(QUANTIZE, root / "one"), "--out", str(root / "run")]) == 0
    shutil.copyfile(root / "one/calib.txt", root / "run/calib.txt")
    return root


def copied(folder: Path, m: Path, broken: Break) -> Path:
    shutil.copytree(folder, m)
    broken(m)
    return m


def config(**changes: object) -> Break:
    """Set keys of ``config.json``; ``None`` removes one."""

    def change(m: Path) -> None:
        content = json.loads((m / "config.json").read_text()) | changes
        (m / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))

    return change


def weights(**changes: torch.Tensor | None) -> Break:
    """Replace tensors by the name that a keyword stands for; ``None`` removes one."""
    names = {"down": DOWN, "embed": EMBED, "norm": NORM, "head": "lm_head.weight", "bias": DOWN[:-6] + "bias"}

    def change(m: Path) -> None:
        content = load_file(m / WEIGHTS) | {names[key]: value for key, value in changes.items()}
        save_file({k: v for k, v in content.items() if v is not None}, m / WEIGHTS, {"format": "pt"})

    return change


def number(name: str, value: float) -> Break:
    """Put one number into a tensor."""

    def change(m: Path) -> None:
        content = load_file(m / WEIGHTS)
        content[name].view(-1)[7] = value
        save_file(content, m / WEIGHTS, {"format": "pt"})

    return change


def text(name: str, content: str) -> Break:
    return lambda m: (m / name).write_text(content)


def cut(name: str, size: int) -> Break:
    """Leave the first ``size`` bytes of a file, or all but the last ``-size``."""
    return lambda m: (m / name).write_bytes((m / name).read_bytes()[:size])


def gone(pattern: str) -> Break:
    return lambda m: [path.unlink() for path in sorted(m.glob(pattern))[:2]]


def header(**changes: object) -> Break:
    """Let the header say something else about a norm, over the same bytes."""

    def change(m: Path) -> None:
        raw = (m / WEIGHTS).read_bytes()
        (size,) = struct.unpack("<Q", raw[:8])
        content = json.loads(raw[8 : 8 + size])
        content[NORM] |= changes
        told = json.dumps(content).encode()
        (m / WEIGHTS).write_bytes(struct.pack("<Q", len(told)) + told + raw[8 + size :])

    return change


def pickled(m: Path) -> None:
    torch.save(load_file(m / WEIGHTS), m / "pytorch_model.bin")
    (m / WEIGHTS).unlink()


def fewer_embeddings(m: Path) -> None:
    content = load_file(m / WEIGHTS)
    weights(embed=content[EMBED][:50].clone(), head=content["lm_head.weight"][:50].clone())(m)
    config(vocab_size=50)(m)


def renamed_in_index(m: Path) -> None:
    (m / INDEX).write_text((m / INDEX).read_text().replace(NORM, "model.nrm.weight"))


def mapped(weight_map: object) -> Break:
    return text(INDEX, json.dumps({"weight_map": weight_map}))


FP8 = torch.ones(64, 96).to(torch.float8_e4m3fn)
OTHER_TOOL = {"quant_method": "bitsandbytes", "load_in_4bit": True}
OWN_CODE = {"model_type": "mine", "auto_map": {"AutoConfig": "configuration_mine.Mine"}}
# Name; which checkpoint is copied; how it is broken; what the line must say. All are refused before any work.
CASES: list[tuple[str, str, Break, list[str]]] = [
    (
        "architecture",
        "one",
        config(architectures=["LlamaForCausalML"]),
        ["names the architecture LlamaForCausalML", "is that of LlamaForCausalLM", "do not match"],
    ),
    ("no architecture", "one", config(architectures=None), ["names no architecture", "['LlamaForCausalLM']"]),
    (
        "of another type",
        "one",
        config(architectures=["BloomForCausalLM"]),
        ["names the architecture BloomForCausalLM", "is that of LlamaForCausalLM"],
    ),
    ("layer norm after", "opt", lambda m: None, ["do_layer_norm_before: false", "not supported"]),
    ("config without JSON", "one", text("config.json", "{"), ["cannot read", "config.json"]),
    ("config of a list", "one", text("config.json", "[]"), ["config.json does not hold a JSON object"]),
    ("config with a wrong type", "one", config(hidden_size="x"), ["not a valid config", "hidden_size"]),
    ("no config", "one", gone("config.json"), ["has no config.json"]),
    ("unknown activation", "one", config(hidden_act="foo"), ["no model can be built", "config.json", "'foo'"]),
    ("architecture of a number", "one", config(architectures=3), ["names no architecture", "config.json"]),
    ("no layers", "one", config(num_hidden_layers=0), ["tensors of 3 layers", "num_hidden_layers 0"]),
    ("too many layers", "one", config(num_hidden_layers=5), ["tensors of 3 layers", "num_hidden_layers 5"]),
    ("too few layers", "one", config(num_hidden_layers=2), ["'model.layers.2.", "its config.json does not imply"]),
    ("hidden size", "one", config(hidden_size=128), ["(96, 64)", "(96, 128)", "config.json implies"]),
    ("width of the MLP", "one", config(intermediate_size=128), ["gate_proj", "(96, 64)", "(128, 64)"]),
    (
        "another tool's",
        "one",
        config(quantization_config=OTHER_TOOL),
        ["already quantized ('bitsandbytes')", "read are awq, compressed-tensors", "give the float"],
    ),
    (
        "no codes",
        "one",
        config(quantization_config={"quant_method": "gptq", "bits": 4}),
        ["says that weights are quantized (GPTQ, 4 bits", "none are"],
    ),
    ("own code", "one", config(**OWN_CODE), ["Python code from the model", "--trust-remote-code"]),
    ("no weights", "one", gone(WEIGHTS), ["has no weights", WEIGHTS, INDEX]),
    ("pickles", "one", pickled, ["pytorch_model.bin", "can run code", "--allow-pickle"]),
    ("truncated", "one", cut(WEIGHTS, -1000), [WEIGHTS, "not a complete safetensors file", "fetch it again"]),
    ("truncated header", "one", cut(WEIGHTS, 100), [WEIGHTS, "not a complete safetensors file", "fetch it again"]),
    ("header of a lying shape", "one", header(shape=[65]), ["not a complete safetensors file", "fetch it again"]),
    ("header of a lying place", "one", header(data_offsets=[2**40, 2**40 + 256]), ["not a complete safetensors"]),
    ("header of another dtype", "one", header(dtype="I32"), [f"'{NORM}'", "is I32", "F16, BF16, F32, F64"]),
    ("shape of a norm", "one", weights(norm=torch.ones(32)), [f"'{NORM}'", "(32,)", "(64,)"]),
    ("integers", "one", weights(down=torch.ones(64, 96, dtype=torch.int8)), [f"'{DOWN}'", "is I8", "F16, BF16"]),
    ("float8", "one", weights(down=FP8), [f"'{DOWN}'", "is F8_E4M3", "F16, BF16, F32, F64"]),
    ("a bias too many", "one", weights(bias=torch.ones(64)), ["down_proj.bias", "its config.json does not imply"]),
    ("no linear", "one", weights(down=None), [f"no tensor '{DOWN}'", "config.json"]),
    ("no head", "one", weights(head=None), ["no tensor 'lm_head.weight'", "config.json"]),
    ("NaN in a linear", "one", number(DOWN, float("nan")), [f"'{DOWN}'", "NaN or infinity", "broken"]),
    ("-infinity in a norm", "one", number(NORM, float("-inf")), [f"'{NORM}'", "NaN or infinity"]),
    ("no tokenizer", "one", gone("tokenizer*"), ["no tokenizer in", "tokenizer.json"]),
    ("broken tokenizer", "one", text("tokenizer.json", "{"), ["cannot load the tokenizer"]),
    ("another tokenizer", "one", fewer_embeddings, ["gives token", "50 embeddings", "do not match"]),
    ("missing shard", "shards", gone("model-*"), ["lacks the shard model-00001-of-0000", "fetch it again"]),
    ("truncated shard", "shards", cut("model-00001-of-00005.safetensors", -9), ["model-00001-of", "not a complete"]),
    ("index without JSON", "shards", text(INDEX, "{"), ["cannot read", INDEX]),
    ("index that climbs", "shards", mapped({"a": "../x.safetensors"}), ["'../x.safetensors'", "plain file names"]),
]


@pytest.mark.parametrize(("base", "broken", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_broken_checkpoint_is_refused_before_any_work(base, broken, said, models, tmp_path, capsys):
    m = copied(models / base, tmp_path / "m", broken)
    before = contents(tmp_path)
    line = refusal(capsys, filled(QUANTIZE, m))
    for part in said:
        assert part in line
    assert not (tmp_path / "out").exists()
    assert contents(tmp_path) == before


def test_unbroken_checkpoints_of_these_cases_are_taken(models, tmp_path, capsys):
    """Else every refusal above would prove nothing."""
    for base in ("one", "shards"):
        out = ["--out", str(tmp_path / base)]
        assert call(filled(QUANTIZE, models / base) + out) == 0, capsys.readouterr().err


def test_an_index_of_another_save_is_said_and_not_believed(models, tmp_path, capsys):
    m = copied(models / "shards", tmp_path / "m", renamed_in_index)
    assert call(filled(QUANTIZE, m)) == 0
    assert "lists 1 tensors that its shards do not have ('model.nrm.weight'): ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("scale", "layer", "said"),
    [
        (1e30, DOWN, "so large that their scale"),
        (1e38, DOWN.replace("mlp.down_proj", "input_layernorm"), "output is NaN"),
    ],
)
def test_finite_weights_that_overflow_end_the_run_without_a_manifest(scale, layer, said, models, tmp_path, capsys):
    m = tmp_path / "m"
    shutil.copytree(models / "one", m)
    save_file({k: v * (scale if k == layer else 1) for k, v in load_file(m / WEIGHTS).items()}, m / WEIGHTS)
    line = refusal(capsys, filled(QUANTIZE, m))
    assert said in line
    assert "block 2" in line
    assert not (tmp_path / "out/lowbit.json").exists()
    assert not (tmp_path / "out/block-00002.safetensors").exists()


NEEDED = ("identity", "request", "quantized", "layouts", "blocks", "bits_per_weight", "transformers")


def without(key: str) -> Break:
    def change(run: Path) -> None:
        content = json.loads((run / "lowbit.json").read_text())
        del content[key]
        (run / "lowbit.json").write_text(json.dumps(content))

    return change


RUNS: list[tuple[str, Break, list[str]]] = [
    ("truncated shard", cut("block-00001.safetensors", -9), ["block-00001.safetensors", "not a complete"]),
    ("removed shard", gone("block-00001.*"), ["lacks the shard block-00001.safetensors"]),
    ("manifest without JSON", text("lowbit.json", "{"), ["cannot read", "lowbit.json"]),
    ("manifest of another format", text("lowbit.json", '{"format": 99}'), ["format 99", "quantize again"]),
    *((f"manifest without {key}", without(key), ["lowbit.json", f"no valid '{key}'"]) for key in NEEDED),
]


INSPECT_RUN = ["inspect", "{m}", "--json"]  # what plans a run is refused for one that is there


@pytest.mark.parametrize("command", [EVALUATE, GENERATE, INSPECT_RUN], ids=lambda command: command[0])
@pytest.mark.parametrize(("broken", "said"), [case[1:] for case in RUNS], ids=[case[0] for case in RUNS])
def test_a_broken_run_folder_is_not_read(broken, said, command, models, tmp_path, capsys):
    m = copied(models / "run", tmp_path / "m", broken)
    line = refusal(capsys, filled(command, m))
    for part in said:
        assert part in line


FLOATS = [
    case for case in CASES if case[0] in ("truncated", "no linear", "shape of a norm", "float8", "another tool's")
]


@pytest.mark.parametrize("command", [EVALUATE, GENERATE, INSPECT], ids=lambda command: command[0])
@pytest.mark.parametrize(("base", "broken", "said"), [case[1:] for case in FLOATS], ids=[case[0] for case in FLOATS])
def test_a_broken_checkpoint_is_not_read_by_others(base, broken, said, command, models, tmp_path, capsys):
    m = copied(models / base, tmp_path / "m", broken)
    line = refusal(capsys, filled(command, m))
    for part in said:
        assert part in line


@pytest.mark.parametrize(
    ("command", "broken"),
    [
        *((EVALUATE, broken) for broken in (number(DOWN, float("nan")), gone("tokenizer*"), fewer_embeddings)),
        *((GENERATE, broken) for broken in (gone("tokenizer*"), text("generation_config.json", "{"))),
    ],
)
def test_what_is_only_needed_later_is_refused_too(command, broken, models, tmp_path, capsys):
    refusal(capsys, filled(command, copied(models / "one", tmp_path / "m", broken)))


@pytest.mark.parametrize("command", [EVALUATE, GENERATE], ids=lambda command: command[0])
def test_a_run_folder_with_the_config_of_another_model_is_not_read(command, models, tmp_path, capsys):
    m = copied(models / "run", tmp_path / "m", config(hidden_size=128))
    assert "config.json implies" in refusal(capsys, filled(command, m))


def test_a_finished_run_that_lost_a_shard_is_not_called_finished(models, tmp_path, capsys):
    shutil.copytree(models / "one", tmp_path / "m")
    assert call(filled(QUANTIZE, tmp_path / "m")) == 0
    (tmp_path / "out/block-00001.safetensors").unlink()
    before = contents(tmp_path / "out")
    line = refusal(capsys, filled(QUANTIZE, tmp_path / "m"))
    assert "lacks block-00001.safetensors" in line
    assert "delete the folder" in line
    assert contents(tmp_path / "out") == before


def test_a_stopped_run_with_a_broken_shard_says_which(models, tmp_path, capsys):
    shutil.copytree(models / "one", tmp_path / "m")
    arguments = filled(QUANTIZE, tmp_path / "m")
    assert call(arguments) == 0
    out = tmp_path / "out"
    identity = json.loads((out / "lowbit.json").read_text())["identity"]
    (out / ".run").mkdir()
    (out / ".run/identity.json").write_text(json.dumps(identity))
    (out / "lowbit.json").unlink()
    cut("block-00001.safetensors", -9)(out)
    notes = {"notes": [], "record": {"sensitivity": {}}, "seconds": 1, "peak_memory_bytes": 1}
    for index in range(3):
        (out / f".run/block-0000{index}.json").write_text(json.dumps(notes))
    assert "block-00001.safetensors is not a complete safetensors file" in refusal(capsys, arguments)
    assert not (out / "lowbit.json").exists()
