"""Models that no family declares: their structure is found from the config, and every command runs on them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

import lowbit
from decoders import CONFIGS, config_of, saved
from lowbit.checkpoints.resolve import load_config
from lowbit.errors import LowbitError
from lowbit.models.discovery import known
from lowbit.models.families import architecture_of, family_of
from lowbit.models.validate import open_weights
from lowbit.pipeline.inspect import inspect_model
from lowbit.runs.manifest import manifest_of
from runs import quantize_tiny

IDS = torch.arange(3, 40)[None]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and no results in memory."""
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "_FOUND", {})
    return tmp_path / "cache" / "architectures"


@pytest.mark.heavy
@pytest.mark.parametrize("name", CONFIGS)
def test_stock_transformers_computes_what_a_run_simulates(name: str, tmp_path: Path) -> None:
    model = tmp_path / "m"
    saved(model, config_of(name))
    made = quantize_tiny(model, tmp_path / "run", "w4a16g16-sym", recipe="awq+gptq")
    assert made.manifest.transformers.loads
    with torch.no_grad():
        ours = lowbit.load(tmp_path / "run")(IDS).logits
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "run", dtype=torch.float32)(IDS).logits
        float_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(IDS).logits
    assert torch.equal(ours, stock)
    assert 0 < (ours - float_model).norm() < 0.7 * float_model.norm()
    manifest = manifest_of(tmp_path / "run")
    assert manifest is not None
    assert manifest.architecture["origin"] == "discovered"


def test_a_head_of_another_name_in_files_is_found(tmp_path: Path) -> None:
    saved(tmp_path / "m", config_of("gpt_neox"))
    stored = load_file(tmp_path / "m/model.safetensors")
    assert "lm_head.weight" not in stored
    checkpoint, _ = open_weights(tmp_path / "m", load_config(tmp_path / "m"))
    assert torch.equal(checkpoint.read(["lm_head.weight"])["lm_head.weight"], stored["embed_out.weight"])


def test_the_result_is_kept_and_a_broken_file_is_found_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("granite")
    assert family_of(config) is None
    first = architecture_of(config)
    assert first.origin == "discovered"
    assert len(first.layers) == 2
    (file,) = cache.glob("*.json")
    with monkeypatch.context() as patch:
        patch.setattr(known, "discover", lambda *args, **more: pytest.fail("found a second time"))
        assert architecture_of(config) == first  # from memory
        known._FOUND.clear()
        assert architecture_of(config) == first  # from the file
    for broken in ("{", "[]", '{"architecture": {}, "record": {}}'):
        file.write_text(broken)
        known._FOUND.clear()
        assert architecture_of(config) == first
    assert "GraniteForCausalLM is not declared" in capsys.readouterr().err


def test_without_a_folder_to_keep_it_the_result_is_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = config_of("granite")
    first = architecture_of(config)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "file"))
    known._FOUND.clear()
    assert architecture_of(config) == first


def test_another_config_is_another_result(cache: Path) -> None:
    one, other = (architecture_of(config_of("granite", num_key_value_heads=heads)) for heads in (2, 4))
    assert one != other
    assert len(list(cache.glob("*.json"))) == 2
    renamed = config_of("granite", num_key_value_heads=2)
    renamed._name_or_path = "elsewhere"
    assert architecture_of(renamed) == one
    assert len(list(cache.glob("*.json"))) == 2


def test_inspect_tells_what_was_refuted(tmp_path: Path) -> None:
    saved(tmp_path / "m", config_of("nemotron"))
    facts = inspect_model(str(tmp_path / "m"), "w4a16g16-sym", "rtn", samples=2, length=16)
    assert facts["origin"] == "discovered"
    assert isinstance(facts["refuted"], list)
    assert isinstance(facts["notes"], list)
    assert any("power 2" in edge for edge in facts["kinds"][0]["edges"])


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("granite", {"architectures": ["GraniteForSequenceClassification"]}, "do not match"),
        ("granite", {"architectures": ["OPTForCausalLM"]}, "do not match"),
        ("granite", {"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ("granite", {"architectures": [None]}, "unknown architecture"),
    ],
)
def test_configs_that_name_no_such_model_are_refused(name: str, changes: dict[str, Any], said: str) -> None:
    config = config_of(name)
    for key, value in changes.items():
        setattr(config, key, value)
    with pytest.raises(LowbitError, match=said):
        architecture_of(config)


def test_a_class_that_is_no_causal_language_model_is_refused() -> None:
    config = CONFIG_MAPPING["vit"]()
    config.architectures = ["ViTModel"]
    with pytest.raises(LowbitError, match="ViTModel is no causal language model of transformers"):
        architecture_of(config)


# A Granite whose queries, keys and values are those of its class, or cut at a bound that its config does not name.
OWN = {
    "configuration_mine.py": "import transformers\n\n\nclass MineConfig(transformers.GraniteConfig):\n    pass\n",
    "modeling_mine.py": """
import transformers
from .configuration_mine import MineConfig


class MineForCausalLM(transformers.GraniteForCausalLM):
    config_class = MineConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: CHANGED)
""",
}
OWN_MAP = {"AutoConfig": "configuration_mine.MineConfig", "AutoModelForCausalLM": "modeling_mine.MineForCausalLM"}


def mine(folder: Path, changed: str, mapped: dict[str, str] = OWN_MAP) -> Any:
    """The config of a folder with code of its own, in which values are ``changed``."""
    folder.mkdir(exist_ok=True)
    content = config_of("granite").to_dict() | {"architectures": ["MineForCausalLM"], "auto_map": mapped}
    (folder / "config.json").write_text(json.dumps({**content, "model_type": "mine"}))
    for name, code in OWN.items():
        (folder / name).write_text(code.replace("CHANGED", changed))
    return load_config(folder, trust_remote_code=True)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers' copies of such code go to a folder of the test's own."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    for name in [name for name in sys.modules if name.split(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)


def kinds(config: Any) -> set[str]:
    return {edge.kind for edge in architecture_of(config).layers[0].edges}


@pytest.mark.usefixtures("modules")
def test_other_code_with_the_same_config_is_another_result(cache: Path, tmp_path: Path) -> None:
    """Edges that were proven for old code would be used for new code, which has none there."""
    assert "heads" in kinds(mine(tmp_path / "a", "out"))
    assert "heads" not in kinds(mine(tmp_path / "b", "out.clamp(-8, 8)"))
    assert len(list(cache.glob("*.json"))) == 2
    known._FOUND.clear()  # as in another process: the files are told apart too
    assert "heads" in kinds(mine(tmp_path / "a", "out"))
    assert "heads" not in kinds(mine(tmp_path / "b", "out.clamp(-8, 8)"))
    assert "heads" in kinds(mine(tmp_path / "copy", "out"))
    assert len(list(cache.glob("*.json"))) == 2


@pytest.mark.usefixtures("modules")
def test_code_that_cannot_be_read_leaves_no_file(cache: Path, tmp_path: Path) -> None:
    config = mine(tmp_path / "a", "out")
    assert known.code_of(config)
    config.auto_map = {**OWN_MAP, "AutoModelForCausalLM": "org/other--modeling_mine.MineForCausalLM"}
    assert known.code_of(config) is None
    config.auto_map = OWN_MAP
    config.name_or_path = str(tmp_path / "gone")
    assert known.code_of(config) is None
    del config.auto_map  # a class that a program has registered
    assert known.code_of(config) is None
    assert known.code_of(config_of("granite")) == ""
    config.auto_map, config.name_or_path = OWN_MAP, str(tmp_path / "a")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(known, "code_of", lambda config: None)
        first = architecture_of(config)
        assert architecture_of(config) is first  # kept in memory
    assert not list(cache.glob("*.json"))
