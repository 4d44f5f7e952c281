"""Packed layouts against their own format's reader (invariant 5), and the config that describes them."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig

from formats import Halves, Ternary
from lowbit.errors import LowbitError
from lowbit.quant.activations import IntTokens
from lowbit.quant.compressed_tensors import quantization_config, stock_dtype, stock_loads
from lowbit.quant.floating import MXFP4
from lowbit.quant.format import QParams, QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.layouts import LAYOUTS as ALL
from lowbit.quant.layouts import layout_of
from lowbit.quant.runtimes import RuntimeInput
from lowbit.quant.scheme import ModelFormats, ModuleFormats
from lowbit.quant.scheme_names import parse_scheme

LAYOUTS = ["pack-quantized", "int-quantized"]
# Neither rows nor codes of a row fill whole words: 40 columns at 3 bits are 3.75 words.
# (compressed-tensors 0.20 itself fails to read 4-bit zeros of 8 rows or fewer in several groups: it asks a tensor
# of one word a group for a view that its strides do not allow. No linear of a language model is that narrow.)
SHAPES = [(32, 64), (33, 40), (9, 72), (11, 8)]


def quantized(format, rows, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) + 0.3 * torch.randn(rows, 1, generator=generator)
    return format.quantize(weight, format.qparams(weight, 0.9, 0.8))


def formats():
    for rows, columns in SHAPES:
        for group in (None, 8):
            for symmetric in (True, False):
                yield rows, columns, group, symmetric


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_unpacking_gives_back_what_was_packed(bits, layout):
    for rows, columns, group, symmetric in formats():
        format = IntFormat(bits, group, symmetric)
        q = quantized(format, rows, columns)
        assert int(q.codes.min()) == 0
        assert int(q.codes.max()) == format.levels
        stored = ALL[layout].pack(q)
        back = ALL[layout].unpack(stored, format)
        assert back.codes.dtype == torch.uint8
        assert torch.equal(back.codes, q.codes)
        assert torch.equal(back.qparams.scale, q.qparams.scale)
        assert torch.equal(back.qparams.zero, q.qparams.zero)
        assert torch.equal(back.dequantize(), q.dequantize())
        assert tuple(stored) == ALL[layout].tensors(format)
        if layout == "pack-quantized":
            assert stored["weight_packed"].shape == (rows, -(-columns * bits // 32))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_code_and_zero_survives(bits, layout):
    format = IntFormat(bits, 8, symmetric=False)
    levels = 2**bits
    codes = torch.stack([torch.arange(64) % levels, (levels - 1) - torch.arange(64) % levels]).to(torch.uint8)
    codes = codes.repeat(levels, 1)
    zero = (torch.arange(codes.shape[0] * 8) % levels).reshape(-1, 8).float()
    q = QTensor(codes, QParams(torch.full_like(zero, 0.25), zero), format)
    assert len(zero.unique()) == levels
    back = ALL[layout].unpack(ALL[layout].pack(q), format)
    assert torch.equal(back.codes, q.codes)
    assert torch.equal(back.qparams.zero, q.qparams.zero)


def library_scheme(format, inputs=None):
    """What compressed-tensors reads out of the config that goes into ``config.json``."""
    formats = ModelFormats({"a": ModuleFormats(format, inputs)})
    config = quantization_config(formats, ["lm_head"], "embed")
    group = QuantizationConfig.model_validate(config).config_groups["group_0"]
    assert config["format"] == group.format == layout_of(format, inputs).name
    return group


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_librarys_own_decompressor_gives_the_same_values(bits, layout):
    compressor = BaseCompressor.get_value_from_registry(layout)
    for rows, columns, group, symmetric in formats():
        format = IntFormat(bits, group, symmetric)
        inputs = None if layout == "pack-quantized" else IntTokens(8, symmetric)
        q = quantized(format, rows, columns)
        stored = ALL[layout].pack(q)
        # A loader asked for float32 widens the scale first; in its 16 bits the product itself would be rounded.
        stored["weight_scale"] = stored["weight_scale"].float()
        got = compressor.decompress(stored, library_scheme(format, inputs))["weight"]
        assert got.dtype == torch.float32
        assert torch.equal(got, q.dequantize())


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_librarys_own_compressor_writes_the_same_bytes(bits):
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    for group, symmetric in ((None, True), (8, True), (None, False), (8, False)):
        format = IntFormat(bits, group, symmetric)
        q = quantized(format, 33, 40)
        ours = ALL["pack-quantized"].pack(q)
        given = {"weight": q.dequantize(), "weight_scale": q.qparams.scale}
        if not symmetric:
            given["weight_zero_point"] = (q.qparams.zero - 2 ** (bits - 1)).to(torch.int8)
        theirs = compressor.compress(given, library_scheme(format))
        assert theirs.keys() == ours.keys()
        for name, value in ours.items():
            assert torch.equal(value.to(theirs[name].dtype), theirs[name]), name


def test_golden_words():
    """Worked by hand: code i of a row stands in bits [i * b, (i + 1) * b) of a little-endian stream."""
    format = IntFormat(4, None, symmetric=False)
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15], [0, 0, 0, 0, 0, 0, 0, 8]], dtype=torch.uint8)
    stored = ALL["pack-quantized"].pack(
        QTensor(codes, QParams(torch.tensor([[0.5], [2.0]]), torch.tensor([[3.0], [9.0]])), format)
    )
    assert stored["weight_packed"].dtype == torch.int32
    assert stored["weight_packed"].tolist() == [[0xF7654321 - 2**32], [0x80000000 - 2**32]]
    assert stored["weight_shape"].tolist() == [2, 8]
    assert stored["weight_zero_point"].tolist() == [[0x93]]  # zeros are packed down the rows
    assert stored["weight_scale"].dtype == torch.float32
    assert stored["weight_scale"].tolist() == [[0.5], [2.0]]
    # 3 bits: the eleventh code straddles two words. 7 = 111, 1 = 001, then zeros, code 10 = 101.
    odd = torch.zeros(1, 16, dtype=torch.uint8)
    odd[0, 0], odd[0, 1], odd[0, 10] = 7, 1, 5
    qparams = QParams(torch.ones(1, 1), torch.full((1, 1), 4.0))
    stored = ALL["pack-quantized"].pack(QTensor(odd, qparams, IntFormat(3)))
    assert stored["weight_packed"].tolist() == [[0b001_111 + (0b01 << 30), 0b1]]
    assert stored["weight_scale"].dtype == torch.float16
    assert "weight_zero_point" not in stored
    stored = ALL["int-quantized"].pack(
        QTensor(codes, QParams(torch.ones(2, 1), torch.tensor([[3.0], [9.0]])), format)
    )
    assert stored["weight"].dtype == stored["weight_zero_point"].dtype == torch.int8
    assert stored["weight"].tolist()[0] == [-7, -6, -5, -4, -3, -2, -1, 7]
    assert stored["weight_zero_point"].tolist() == [[-5], [1]]


def test_packing_leaves_the_tensor_alone():
    q = quantized(IntFormat(4, 8, symmetric=False), 5, 72)
    before = q.codes.clone(), q.qparams.scale.clone(), q.qparams.zero.clone()
    for layout in LAYOUTS:
        for name, value in ALL[layout].pack(q).items():
            if name != "weight_shape":
                value.zero_()
    assert torch.equal(q.codes, before[0])
    assert torch.equal(q.qparams.zero, before[2])
    # In float32 the scale is handed over as it is; anything that writes into it would change the weight.
    q = quantized(IntFormat(4, 8, symmetric=True), 5, 72)
    ALL[LAYOUTS[0]].pack(q)["weight_scale"].zero_()
    assert bool((q.qparams.scale > 0).all())


def formats_of(scheme, *modules, **own):
    """What a scheme gives ``modules``, and formats of their own for some."""
    scheme = parse_scheme(scheme)
    found = {name: scheme.module(name) for name in modules}
    return ModelFormats(found | {name: ModuleFormats(format, scheme.act) for name, format in own.items()}, scheme.kv)


def test_the_config_names_formats_activations_and_what_stays_float():
    formats = formats_of("w4a8g16-sym", "m.0.q", "m.0.k", **{"m.0.down": IntFormat(8)})
    config = quantization_config(formats, ["lm_head"], "m.embed")
    parsed = QuantizationConfig.model_validate(config)
    first, second = parsed.config_groups["group_0"], parsed.config_groups["group_1"]
    assert parsed.quant_method == "compressed-tensors"
    assert parsed.quantization_status.value == "compressed"
    assert parsed.ignore == ["lm_head"]
    assert first.targets == ["Linear"]
    assert (first.weights.num_bits, first.weights.group_size, first.weights.strategy) == (4, 16, "group")
    assert second.targets == [r"re:^m\.0\.down$"]
    assert (second.weights.num_bits, second.weights.strategy) == (8, "channel")
    for group in (first, second):
        act = group.input_activations
        assert (act.num_bits, act.symmetric, act.strategy, act.dynamic) == (8, True, "token", True)
    plain = quantization_config(formats_of("w4a16", "a"), [], "e")
    assert plain["config_groups"]["group_0"]["input_activations"] is None


def test_an_embedding_has_a_group_of_its_own_and_no_format_of_inputs():
    formats = formats_of("w4a8", "m.0.q")
    formats = ModelFormats({**formats.modules, "m.embed": ModuleFormats(IntFormat(8), outside=True)})
    config = quantization_config(formats, ["lm_head"], "m.embed")
    assert config["config_groups"]["embeddings"]["format"] == "int-quantized"
    assert set(config["config_groups"]) == {"group_0", "embeddings"}
    found = QuantizationConfig.model_validate(config).config_groups["embeddings"]
    assert found.targets == [r"re:^m\.embed$"]
    assert (found.weights.num_bits, found.input_activations) == (8, None)


def test_what_a_runtime_makes_of_inputs_is_no_part_of_the_checkpoint():
    weight = IntFormat(4, 32)
    formats = ModelFormats({"a": ModuleFormats(weight, RuntimeInput("llama.cpp", weight))})
    assert formats.layouts == ["pack-quantized"]
    assert quantization_config(formats, [], "e")["config_groups"]["group_0"]["input_activations"] is None
    assert stock_loads(formats, "e", two_d_inputs=True) is None


def test_layouts():
    for name in ("w4a16", "w2a16g64-asym", "w8a8-sym", "w4a8g32-sym-asym", "w4afp8"):
        assert formats_of(name, "a").layouts == ["pack-quantized"]
    assert formats_of("w4a4", "a").layouts == ["int-quantized"]  # stock loaders misread packed zero points there
    assert layout_of(IntFormat(4), outside=True).name == "int-quantized"
    names = {"nvfp4a16": "nvfp4-pack-quantized", "mxfp4": "mxfp4-pack-quantized", "fp8": "float-quantized"}
    for name, layout in names.items():
        assert formats_of(name, "a").layouts == [layout]


def test_dtypes_of_stock_transformers():
    assert [stock_dtype(formats_of(name, "a")) for name in ("w4a8", "fp8", "mxfp4", "nvfp4a16")] == [
        "float32",
        "float32",
        "bfloat16",
        "bfloat16",
    ]


def test_why_stock_transformers_cannot_run_formats():
    assert stock_loads(formats_of("w4a8", "a"), "e", two_d_inputs=False) is None
    assert "one range for all tokens" in stock_loads(formats_of("w4a8", "a"), "e", two_d_inputs=True)
    assert "Q, K and V" in stock_loads(formats_of("w4a8kv4", "a"), "e", two_d_inputs=False)
    embedding = ModelFormats({"e": ModuleFormats(IntFormat(4), outside=True)})
    assert stock_loads(embedding, "e", two_d_inputs=False) is None
    embedding = ModelFormats({"e": ModuleFormats(MXFP4, outside=True)})
    assert "embeddings in mxfp4" in stock_loads(embedding, "e", two_d_inputs=False)
    assert "q4_k is a format of llama.cpp" in stock_loads(formats_of("q4_k", "a"), "e", two_d_inputs=False)
    mixed = formats_of("w4a16", "a", b=IntFormat(4, symmetric=False))
    assert "side by side do not load" in stock_loads(mixed, "e", two_d_inputs=False)
    assert stock_loads(formats_of("w4a16", "a", b=IntFormat(8)), "e", two_d_inputs=False) is None


def test_a_format_of_weights_that_is_not_known_is_refused_everywhere():
    format, weight = Ternary(), torch.randn(4, 32)
    q = format.quantize(weight, format.qparams(weight))
    formats = ModelFormats({"a": ModuleFormats(format)})
    for refused in (
        lambda: ALL["pack-quantized"].pack(q),
        lambda: ALL["int-quantized"].unpack({}, format),
        lambda: ALL["float-quantized"].pack(q),
        lambda: ALL["lowbit-packed"].pack(q),
        lambda: layout_of(format),
        lambda: quantization_config(formats, [], "e"),
        lambda: quantization_config(ModelFormats({"e": ModuleFormats(format)}), [], "e"),
        lambda: stock_loads(formats, "e", two_d_inputs=False),
    ):
        with pytest.raises(LowbitError, match=r"ternary"):
            refused()


def test_a_format_of_inputs_that_is_not_known_is_not_taken_for_float():
    formats = ModelFormats({"a": ModuleFormats(IntFormat(4), Halves())})
    for refused in (
        lambda: quantization_config(formats, [], "e"),
        lambda: stock_loads(formats, "e", two_d_inputs=False),
    ):
        with pytest.raises(LowbitError, match=r"holds integer and float input formats; halves given$"):
            refused()
