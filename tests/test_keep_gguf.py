"""``--keep`` on ``.gguf`` files: every type that is a format of ours, in blocks of random bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import gguf_files
import lowbit
from lowbit.checkpoints.gguf_file import open_gguf
from lowbit.checkpoints.gguf_types import SIZES as BLOCK_SIZES
from lowbit.checkpoints.gguf_types import AnyKind, OwnKind, Reader, values_of
from lowbit.checkpoints.resolve import resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.errors import LowbitError
from lowbit.pipeline.inspect import inspect_model
from lowbit.quant.format import QTensor
from lowbit.sources.gguf_codes import BLOCKS, decoded, unpack
from test_keep import check_values

SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": len(gguf_files.TOKENS),
    "tie_word_embeddings": False,
}
# Where the float16 numbers of a block are; all other bytes may be any.
HALVES = {
    Kind.Q4_0: (0,), Kind.Q4_1: (0, 2), Kind.Q5_0: (0,), Kind.Q5_1: (0, 2), Kind.Q8_0: (0,), Kind.Q2_K: (80, 82),
    Kind.Q3_K: (108,), Kind.Q4_K: (0, 2), Kind.Q5_K: (0, 2), Kind.Q6_K: (208,), Kind.IQ4_NL: (0,), Kind.IQ4_XS: (0,),
    Kind.TQ1_0: (52,), Kind.TQ2_0: (64,), Kind.MXFP4: (), Kind.NVFP4: (),
    OwnKind.Q2_0: (0,),
}  # fmt: skip
SCHEMES = {
    Kind.Q4_0: "w4a16g32-sym", Kind.Q5_0: "w5a16g32-sym", Kind.Q8_0: "w8a16g32-sym", Kind.MXFP4: "mxfp4a16",
    Kind.NVFP4: "nvfp4a16", Kind.IQ4_NL: "iq4_nl", Kind.Q2_K: "q2_k", Kind.Q3_K: "q3_k", Kind.Q4_K: "q4_k",
    Kind.Q5_K: "q5_k", Kind.Q6_K: "q6_k", OwnKind.Q2_0: "q2_0",
}  # fmt: skip


def random_blocks(kind: AnyKind, rows: int, columns: int, seed: int = 0) -> Any:
    """Rows of blocks ``uint8 (rows, bytes)`` whose scales are finite and of both signs where a type has signs."""
    values, size = BLOCK_SIZES[kind]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows, columns // values, size), dtype=np.uint8)
    for place in HALVES[kind]:
        scale = draw.normal(0, 0.01, blocks.shape[:2]).astype("<f2")
        blocks[..., place : place + 2] = scale[..., None].view(np.uint8)
    if kind == Kind.MXFP4:
        blocks[..., 0] = draw.integers(115, 122, blocks.shape[:2])
    if kind == Kind.NVFP4:
        blocks[..., :4] = draw.integers(0x10, 0x38, (*blocks.shape[:2], 4))
    return blocks.reshape(rows, -1)


def save_blocks(path: Path, kind: AnyKind, extra: dict[str, Any] | None = None) -> Path:
    """A Llama whose linears are blocks of a type."""
    model = gguf_files.random_model("llama", **SIZES)
    tensors = gguf_files.tensors_of(model)
    for seed, (name, value) in enumerate(sorted(tensors.items())):
        if name.startswith("blk") and value.ndim == 2:
            tensors[name] = random_blocks(kind, *value.shape, seed=seed), kind
    keys = gguf_files.keys_of(model.config) | gguf_files.TOKENIZER
    return gguf_files.write(path, "llama", keys, tensors | (extra or {}))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOWBIT_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_codes_are_what_the_package_dequantizes(kind: AnyKind) -> None:
    data = random_blocks(kind, 4, 512)
    q = unpack(data, kind)
    assert q.format == BLOCKS[kind].format
    assert torch.equal(q.dequantize(), torch.from_numpy(values_of(data, kind)))


@pytest.mark.heavy
@pytest.mark.parametrize("kind", BLOCKS, ids=lambda kind: kind.name)
def test_a_file_goes_through_a_run_to_a_file_with_equal_values(kind: AnyKind, tmp_path: Path) -> None:
    path = save_blocks(tmp_path / "m.gguf", kind)
    facts = inspect_model(str(path), "w4a16", "rtn", length=16)
    assert facts["quantized"] == f"GGUF, {kind.name} 7"
    made = lowbit.quantize(path, tmp_path / "run", keep=True)
    assert made.manifest.identity.scheme["scheme"] == SCHEMES[kind]
    source = Checkpoint(resolve(str(path)).folder)
    check_values(made.out, source.read(source.names))
    exported = lowbit.export(made.out, "gguf", pre="gpt-2").out
    (result,) = lowbit.verify(made.out, [exported], logits=False)
    assert result.ok, result
    before, after = ({t.name: t for t in Reader(file).tensors} for file in (path, exported))
    for name, tensor in before.items():
        if tensor.tensor_type == kind:
            assert after[name].tensor_type == kind
            scale = after[f"{name.removesuffix('weight')}scale"].data if kind == Kind.NVFP4 else 1
            ours, theirs = (values_of(t.data, kind) for t in (after[name], tensor))
            assert np.array_equal(ours * scale, theirs), name


@pytest.mark.heavy
@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0], ids=lambda kind: kind.name)
def test_a_file_goes_to_onnx_with_equal_values(kind: AnyKind, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    made = lowbit.quantize(save_blocks(tmp_path / "m.gguf", kind), tmp_path / "run", keep=True)
    (result,) = lowbit.verify(made.out, [lowbit.export(made.out, "onnx").out])
    assert result.ok, result


@pytest.mark.parametrize("kind", sorted(HALVES.keys() - BLOCKS.keys()), ids=lambda kind: kind.name)
def test_other_types_are_read_and_not_kept(kind: AnyKind, tmp_path: Path) -> None:
    path = save_blocks(tmp_path / "m.gguf", kind)
    with pytest.raises(LowbitError, match=f"no format is llama.cpp's {kind.name}; leave out --keep") as caught:
        lowbit.quantize(path, tmp_path / "run", keep=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    name = "blk.0.ffn_up.weight"
    tensor = next(tensor for tensor in Reader(path).tensors if tensor.name == name)
    source = Checkpoint(resolve(str(path)).folder).read(["model.layers.0.mlp.up_proj.weight"])
    (value,) = source.values()
    assert np.array_equal(value.numpy(), values_of(tensor.data, kind))


@pytest.mark.parametrize("scale", [0.25, 0.3])
def test_nvfp4_with_a_scale_of_its_tensor(scale: float, tmp_path: Path) -> None:
    """A power of two is kept; any other is read, and no format has it."""
    name, module = "blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight"
    extra = {"blk.0.ffn_up.scale": np.array([scale])}
    path = save_blocks(tmp_path / "m.gguf", Kind.NVFP4, extra)
    file = open_gguf(path)
    tensor = next(tensor for tensor in file.tensors if tensor.name == name)
    expected = torch.from_numpy(values_of(tensor.data, Kind.NVFP4) * np.float32(scale))
    assert torch.equal(Checkpoint(resolve(str(path)).folder).read([module])[module], expected)
    found = decoded(file, name)
    assert torch.equal(found.dequantize(), expected)
    assert isinstance(found, QTensor) == (scale == 0.25)


def test_float_files_have_nothing_to_keep(tmp_path: Path) -> None:
    model = gguf_files.random_model("llama", **SIZES)
    path = gguf_files.save(tmp_path / "m.gguf", model, gguf_files.TOKENIZER)
    with pytest.raises(LowbitError, match=r"--keep given, and the weights of .* are float: leave it out"):
        lowbit.quantize(path, tmp_path / "run", keep=True)


def test_a_broken_scale_is_one_line(tmp_path: Path) -> None:
    blocks = random_blocks(Kind.Q4_0, 512, 256)
    blocks[3, :2] = np.frombuffer(np.float16(np.nan).tobytes(), np.uint8)
    path = save_blocks(tmp_path / "m.gguf", Kind.Q4_0, {"blk.0.ffn_up.weight": (blocks, Kind.Q4_0)})
    with pytest.raises(LowbitError, match="is NaN or infinite: the source is broken") as caught:
        lowbit.quantize(path, tmp_path / "run", keep=True)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
