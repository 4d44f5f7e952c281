"""The valid models that are mutated, tiny: of several architectures, in one file or in shards, GGUF, quantized."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lowbit
from lowbit.checkpoints.resolve import resolve
from quantized_sources import (
    FP8_CONFIG,
    Pack,
    compressed,
    compressed_config,
    fp8,
    gptq,
    gptq_config,
    ints,
    save_quantized,
)
from test_gguf_reader import write_gguf
from tiny import save_tiny

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FOLDERS = ("llama", "gemma2", "qwen2", "phi3", "opt", "shards")
RUNS = {"run": "w4a16g16-asym", "run-a8": "w4a8g16-sym"}  # of the Llama, by scheme
GGUF = ("llama.gguf", "gemma2.gguf")
INTS = ints(4, 16, False)
QUANTIZED: dict[str, tuple[Pack, dict[str, Any]]] = {  # Llamas as other tools store them
    "gptq": (gptq(4, 16), gptq_config(4, 16)),
    "fp8": (fp8, FP8_CONFIG),
    "packed": (compressed("pack-quantized", INTS, torch.float16), compressed_config("pack-quantized", INTS)),
}
# Longer than the sliding windows; ids that every vocabulary has.
IDS = torch.randint(3, 95, (1, 12), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Base:
    """A valid model and what it computes.

    Attributes:
        path: a folder, or a ``.gguf`` file.
        folder: the folder that transformers loads: itself, what ``lowbit`` makes of the unmutated file, or the float
            model that quantized weights stand for.
    """

    path: Path
    folder: Path
    _logits: dict[str, Tensor | None] = field(default_factory=dict)

    def logits(self, config: Mapping[str, Any]) -> Tensor | None:
        """Logits of transformers with fields of the config set; ``None`` where it builds no model of them."""
        key = json.dumps(config, sort_keys=True)
        if key not in self._logits:
            patched = self.path.parent / "patched"
            shutil.rmtree(patched, ignore_errors=True)
            shutil.copytree(self.folder, patched)
            content = json.loads((patched / "config.json").read_text()) | dict(config)
            (patched / "config.json").write_text(json.dumps(content))
            self._logits[key] = theirs(patched)
        return self._logits[key]

    def copy(self, target: Path) -> Path:
        """A copy to be mutated, in an empty folder ``target``."""
        copied = target / self.path.name
        if self.path.is_dir():
            shutil.copytree(self.path, copied)
        else:
            shutil.copyfile(self.path, copied)
        return copied


@torch.no_grad()
def theirs(folder: Path) -> Tensor:
    """Logits ``(1, 12, vocabulary)`` that transformers computes from a folder in float32.

    Raises ``ValueError`` where it would fill in tensors at random: it reads such a folder with a warning.
    """
    options = {"dtype": torch.float32, "local_files_only": True, "trust_remote_code": False}
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
    if found["missing_keys"]:
        raise ValueError(f"missing: {', '.join(sorted(found['missing_keys'])[:3])}")
    return model.eval()(IDS, use_cache=False, return_dict=True).logits


def make_bases(root: Path) -> dict[str, Base]:
    """Every base by name, and ``text.txt`` for evaluation beside them; files are converted into ``$LOWBIT_CACHE``."""
    bases = {}
    for name in FOLDERS:
        family = "llama" if name == "shards" else name
        changes = {"ffn_dim": 48, "word_embed_proj_dim": 32} if name == "opt" else {}
        size = {key: value for key, value in SMALL.items() if name != "opt" or key != "num_key_value_heads"}
        if family in ("llama", "gemma2"):
            changes["head_dim"] = 8
        folder = root / name
        model = save_tiny(folder, family, **size, **changes)
        if name == "shards":
            (folder / "model.safetensors").unlink()
            model.save_pretrained(folder, max_shard_size="20KB")
        shutil.move(folder / "calib.txt", root / "text.txt")
        bases[name] = Base(folder, folder)
    for name, scheme in RUNS.items():
        options = {"recipe": "rtn", "data": str(root / "text.txt"), "samples": 1, "length": 12}
        lowbit.quantize(str(root / "llama"), root / name, scheme=scheme, **options)
        bases[name] = Base(root / name, root / name)
    for name, (pack, config) in QUANTIZED.items():
        values = save_quantized(root / name, pack, config, **SMALL, head_dim=8)
        save_tiny(float_model := root / f"{name}-float", "llama", **SMALL, head_dim=8)
        save_file(values, float_model / "model.safetensors", metadata={"format": "pt"})
        bases[name] = Base(root / name, float_model)
    for name in GGUF:
        architecture = name.removesuffix(".gguf")
        path = write_gguf(root / name, architecture, tied=architecture == "gemma2")
        bases[name] = Base(path, resolve(str(path)).folder)
    return bases
