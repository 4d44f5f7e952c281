"""Runs in every number format: what is on disk, what stock ``transformers`` computes from it, and resuming."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

import lowbit
from loads import ROWS
from lowbit.checkpoints.resolve import load_config
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline import block_writing
from lowbit.quant.scheme_files import scheme_from_dict
from lowbit.quant.scheme_names import NAMED
from lowbit.runs.plan import make_plan
from runs import folder_bytes, quantize_tiny, streamed_logits
from tiny import save_tiny, tiny_ids

pytestmark = pytest.mark.heavy  # makes whole runs, or tries dozens of models

# Superblocks of 256 values divide every width; 96 rows of the head are no whole tile of 128.
SIZES = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1, "head_dim": 64}
# What the table of what loads where says of integers; keys and values: exporters/test_stock.py.
INTEGERS = [name for name in ROWS if name not in NAMED and "kv" not in name]
STATIC = ["w8a8-static", "w4a8g32-sym-static", "w4a16g32-static", "w8a8-static16"]
OUTSIDE = {"lm_head": "w8", "model.embed_tokens": "w8"}
# A format of another kind beside the scheme's.
MIXED = [
    ("nvfp4a16", {"*.down_proj": "q6_k"}),
    ("mxfp4", {"*.down_proj": "w8", **OUTSIDE}),
    ("fp8", {"*.down_proj": "w8", "lm_head": "nvfp4", "*.q_proj": "mxfp6"}),
    ("w8a8", {"*.down_proj": "nvfp4"}),
    ("nvfp4", {"*.down_proj": "w8", **OUTSIDE}),
    ("w8a8-static", {"*.down_proj": "fp8", "lm_head": "w8"}),
    ("q4_k", {"*.down_proj": "w8", "lm_head": "q6_k", "model.embed_tokens": "iq4_nl"}),
]
MORE = [
    ("nvfp4a16", {"*.down_proj": "fp8"}),
    ("mxfp8", {"*.down_proj": "fp8-block"}),
    ("w4a16g32", {"*.down_proj": "fp8"}),
    ("w4a16g32-asym", {"*.down_proj": "fp8"}),
    ("w8a16-asym", {"*.down_proj": "mxfp4"}),
    ("w4afp8", {"*.down_proj": "fp8-tensor", "*.v_proj": "float"}),
    *((name, OUTSIDE) for name in ("nvfp4a16", "fp8", "mxfp6a16", "q2_k", "w4a8-sym")),
]
RUNS = [*((name, {}) for name in (*NAMED, *INTEGERS, *STATIC)), *MIXED]
RUNS = [*RUNS, *(pytest.param(run, marks=pytest.mark.heavy) for run in MORE)]
IDS = tiny_ids(2, 20)


def shown(run):
    """What pytest calls a run's scheme and overrides."""
    name, overrides = run
    return "+".join([name, *(f"{glob}={text}" for glob, text in overrides.items())])


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("formats") / "model"
    save_tiny(folder, "llama", **SIZES)
    return folder


def start(model, out, name, overrides):
    """A run by rounding to nearest."""
    scheme = {"scheme": name, "overrides": overrides}
    return quantize_tiny(model, out, scheme_from_dict(scheme))


@pytest.fixture(scope="module")
def made(model):
    """A finished run's folder and manifest, made once."""

    @cache
    def run(name, overrides):
        out = model.parent / f"{len(list(model.parent.iterdir()))}"
        return out, start(model, out, name, dict(overrides)).manifest

    return lambda name, overrides: run(name, tuple(overrides.items()))


@cache
def logits(folder, dtype=torch.float32):
    """Of the run as ``lowbit.load`` gives it."""
    with torch.no_grad():
        return lowbit.load(folder, dtype=dtype)(IDS).logits


@pytest.mark.parametrize("run", RUNS, ids=shown)
def test_stock_transformers_gives_the_logits_of_the_loaded_run_bit_for_bit(run, made):
    folder, manifest = made(*run)
    stock = manifest.transformers
    if not run[1]:
        assert (stock.dtype if stock.loads else None) == ROWS[run[0]].transformers
    if not stock.loads:
        assert re.search("llama.cpp|asymmetric and other formats|cluster of channels", stock.why_not)
        with pytest.raises(Exception, match=r"."):
            AutoModelForCausalLM.from_pretrained(folder)
        return
    dtype = getattr(torch, stock.dtype)
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(IDS).logits
    assert found.std() > 0
    assert torch.equal(found, logits(folder, dtype))


@pytest.mark.parametrize("run", RUNS, ids=shown)
def test_a_run_evaluated_block_by_block_gives_the_logits_of_the_loaded_model(run, made):
    folder, _ = made(*run)
    wanted = logits(folder)
    # The same operations in the same dtype; the masks are made in another way.
    assert float((streamed_logits(folder, IDS) - wanted).abs().max() / wanted.abs().max()) < 1e-5


@pytest.mark.parametrize("run", RUNS, ids=shown)
def test_the_sizes_and_layouts_that_are_stated_are_those_on_disk(run, made):
    folder, manifest = made(*run)
    plan = make_plan(Skeleton(load_config(folder)), scheme_from_dict(manifest.identity.scheme))
    stored = {}
    for file in folder.glob("*.safetensors"):
        if file.name.startswith(("block-", "model-")):
            with safe_open(file, "pt") as tensors:
                stored |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    found = 0
    for module, formats in plan.formats.modules.items():
        names = {f"{module}.{name}" for name in (*formats.layout.tensors(formats.weight), *formats.input_tensors)}
        assert {name for name in stored if name.startswith(f"{module}.")} == names
        inputs = {f"{module}.{name}" for name in formats.input_tensors}
        found += sum(stored[name].nbytes for name in names - inputs)
    assert {formats.layout.name for formats in plan.formats.modules.values()} == set(manifest.layouts)
    # Shapes, the tensors' own scales and those of tiles are not counted, nor the ranges of static inputs.
    assert 0 <= found - plan.size_bytes <= 32 * len(plan.formats.modules)


def test_tiles_that_are_smaller_at_the_edges_run_in_stock_transformers(tmp_path):
    """Widths of 192 and 320 are a tile and a half, and two and a half."""
    save_tiny(tmp_path / "m", "llama", **{**SIZES, "hidden_size": 192, "intermediate_size": 320, "head_dim": 48})
    out = tmp_path / "run"
    run = start(tmp_path / "m", out, "fp8-blocka16", {"lm_head": "fp8-block", "model.embed_tokens": "fp8-block"})
    assert run.manifest.transformers.loads
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)(IDS).logits
    assert found.std() > 0
    assert torch.equal(found, logits(out))
    with pytest.raises(lowbit.LowbitError, match=r"inputs in fp8-group have groups of 128, .* a width of 192"):
        start(tmp_path / "m", tmp_path / "no", "fp8-block", {})


class Killed(BaseException):
    """Passes every handler of errors, as a kill does."""


@pytest.mark.parametrize("run", [RUNS[0], MIXED[2]], ids=shown)
def test_a_run_that_is_killed_between_its_shards_ends_with_the_same_bytes(run, model, made, tmp_path, monkeypatch):
    folder, _ = made(*run)
    real = block_writing.write_tensors

    def write(path, tensors):
        if path.name == "block-00000.safetensors":
            raise Killed
        real(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(block_writing, "write_tensors", write)
        with pytest.raises(Killed):
            start(model, tmp_path / "out", *run)
    assert (tmp_path / "out" / "model-rest.safetensors").exists()
    start(model, tmp_path / "out", *run)
    assert folder_bytes(tmp_path / "out") == folder_bytes(folder)
