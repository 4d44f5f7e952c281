"""Scheme names, overrides and scheme files."""

from __future__ import annotations

import itertools
import json
import time
from dataclasses import replace

import pytest
import torch

from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.writing import write_json
from lowbit.errors import LowbitError
from lowbit.quant.activations import IntTokens
from lowbit.quant.float_activations import FP8_TOKENS
from lowbit.quant.integer import IntFormat
from lowbit.quant.runtimes import RuntimeInput
from lowbit.quant.scheme import ModelFormats, ModuleFormats, for_runtime
from lowbit.quant.scheme_files import load_scheme, scheme_from_dict, scheme_to_dict
from lowbit.quant.scheme_names import override_text, parse_override, parse_scheme, with_overrides

GRAMMAR = itertools.product(range(2, 9), (4, 6, 8, 16), (None, 4, 8), (None, 16, 128), ("", "-sym", "-asym"))


def test_every_name_of_the_grammar_parses_to_what_it_says():
    count = 0
    for w, a, kv, group, suffix in GRAMMAR:
        name = f"w{w}a{a}" + (f"kv{kv}" if kv else "") + (f"g{group}" if group else "") + suffix
        scheme = parse_scheme(name)
        symmetric = {"-sym": True, "-asym": False, "": a == 16}[suffix]
        assert scheme.name == name
        assert scheme.weight == IntFormat(w, group, symmetric)
        assert scheme.act == (None if a == 16 else IntTokens(a, symmetric))
        assert scheme.kv == (IntTokens(kv, symmetric=False) if kv else None)
        assert scheme.overrides == ()
        count += 1
    assert count == 7 * 4 * 3 * 3 * 3


@pytest.mark.parametrize(
    ("name", "weight", "act"),
    [("w4a16", True, None), ("w4a16g64", True, None), ("w4a4", False, False), ("w8a8-sym", True, True)],
)
def test_without_a_suffix_weight_only_is_symmetric_and_the_rest_is_not(name, weight, act):
    scheme = parse_scheme(name)
    assert scheme.weight.symmetric is weight
    assert (scheme.act and scheme.act.symmetric) is act


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("w1a16", "1 weight bits given; allowed: 2, 3, 4, 5, 6, 7, 8"),
        ("w9a16", "9 weight bits given; allowed: 2, 3"),
        ("w4a5", "5 activation bits given; allowed: 4, 6, 8, 16"),
        ("w4a32", "32 activation bits given; allowed: 4, 6, 8, 16"),
        ("w4a8kv6", "6 kv bits given; allowed: 4, 8"),
        ("w4a8kv16", "16 kv bits given; allowed: 4, 8"),
        ("w4a16g1", "group size 1 given; it must be 2 or more"),
        ("w4a16g0", "group size 0 given"),
    ],
)
def test_a_number_out_of_range_names_what_is_allowed(name, message):
    with pytest.raises(LowbitError, match=message):
        parse_scheme(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "w4",
        "a4",
        "4bit",
        "w4a16 ",
        "w4-a16",
        "w4a16g",
        "w4a16kv",
        "w4a16g64kv4",
        "w4a16-both",
        "w4a16g-1",
    ],
)
def test_a_malformed_name_is_told_the_form(name):
    with pytest.raises(LowbitError, match=r"unknown scheme .* give w\{2..8\}a\{4,6,8,16,fp8\}.* for example"):
        parse_scheme(name)


def test_inputs_in_fp8_beside_every_other_part_of_a_name():
    for name, symmetric in (("w4afp8", True), ("w4afp8g64-sym", True), ("w4afp8g64-asym", False)):
        scheme = parse_scheme(name)
        assert (scheme.weight.symmetric, scheme.act, scheme.kv) == (symmetric, FP8_TOKENS, None)
    assert parse_scheme("w4afp8kv4").kv == IntTokens(4, symmetric=False)
    with pytest.raises(LowbitError, match="3 kv bits given"):
        parse_scheme("w4afp8kv3")


def test_two_suffixes_are_for_integer_inputs():
    scheme = parse_scheme("w4a8-sym-asym")
    assert (scheme.weight.symmetric, scheme.act) == (True, IntTokens(8, symmetric=False))
    for name in ("w4a16-sym-asym", "w4afp8g64-sym-asym"):
        with pytest.raises(LowbitError, match="inputs have no zero point; give -sym or -asym"):
            parse_scheme(name)


def test_override_texts():
    assert parse_override("float") is None
    assert parse_override("w8") == IntFormat(8)
    assert parse_override("w4g64-asym") == IntFormat(4, 64, symmetric=False)
    for text in ("float", "w8-sym", "w4g64-asym", "w2g16-sym"):
        assert override_text(parse_override(text)) == text
    for wrong in ("w8a8", "8", "int8", "None", "w4-mixed", ""):
        with pytest.raises(LowbitError, match="give 'float', w"):
            parse_override(wrong)
    with pytest.raises(LowbitError, match="9 bits given; 2 to 8"):
        parse_override("w9")


def test_the_first_override_that_matches_wins():
    overrides = {"model.layers.0.*": "w8", "*.down_proj": "w6g32-asym", "*.layers.1.*": "float", "*": "w2"}
    scheme = with_overrides(parse_scheme("w4a8"), overrides)
    assert scheme.module("model.layers.0.mlp.down_proj").weight == IntFormat(8)
    assert scheme.module("model.layers.1.mlp.down_proj").weight == IntFormat(6, 32, symmetric=False)
    assert scheme.module("model.layers.10.mlp.up_proj").weight == IntFormat(2)
    assert scheme.override("lm_head") == ("*", IntFormat(2))
    # The input of a linear that stays float stays float, that of any other has the scheme's format.
    assert scheme.module("model.layers.1.mlp.up_proj") is None
    assert scheme.module("model.layers.0.mlp.down_proj").input == IntTokens(8, symmetric=False)


def test_a_plain_name_and_a_glob_have_their_places():
    before, behind = ("a.b", IntFormat(8)), ("*.b", IntFormat(4))
    scheme = parse_scheme("w4a8")
    assert replace(scheme, overrides=(before, behind)).override("a.b") == before
    assert replace(scheme, overrides=(behind, before)).override("a.b") == behind
    assert replace(scheme, overrides=(behind, before)).override("c.b") == behind
    assert replace(scheme, overrides=(before,)).override("a.c") is None


def test_an_override_for_every_linear_of_a_mixture_is_looked_up():
    """Of 20,000: compared one by one they take minutes in every plan."""
    names = [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in range(40) for j in range(500)]
    scheme = with_overrides(parse_scheme("w4a16"), dict.fromkeys(names, "w8"))
    begin = time.process_time()
    assert {scheme.module(name).weight for name in names} == {IntFormat(8)}
    assert time.process_time() - begin < 5


def test_embedding_and_head_stay_float_unless_an_override_names_them():
    scheme = with_overrides(parse_scheme("w4a8"), {"lm_head": "w8"})
    assert scheme.outside("lm_head") == ModuleFormats(IntFormat(8), scheme.act, outside=True)
    assert scheme.outside("model.embed_tokens") is None
    assert scheme.module("model.embed_tokens") == ModuleFormats(scheme.weight, scheme.act)
    assert with_overrides(scheme, {"lm_head": "float"}).outside("lm_head") is None


def test_formats_of_a_model_are_asked_by_module():
    weight, inputs = IntFormat(4), IntTokens(8, symmetric=True)
    formats = ModelFormats({"a": ModuleFormats(weight, inputs), "b": ModuleFormats(weight)})
    assert (formats.weight("a"), formats.weight("c")) == (weight, None)
    assert (formats.input("a"), formats.input("b"), formats.input("c")) == (inputs, None, None)
    assert formats.weights == {"a": weight, "b": weight}
    assert ModelFormats().weights == {}


def test_inputs_are_those_of_the_runtime_only_where_the_scheme_has_none():
    weight = IntFormat(4, 32)
    assert for_runtime(parse_scheme("w4a16g32"), "llama.cpp").module("a").input == RuntimeInput("llama.cpp", weight)
    assert for_runtime(parse_scheme("w4a16"), "vllm").module("a").input is None
    own = for_runtime(parse_scheme("w4a8-sym"), "onnxruntime")
    assert own.module("a").input == IntTokens(8, symmetric=True)


def test_without_a_match_the_scheme_holds_and_globs_are_case_sensitive():
    scheme = with_overrides(parse_scheme("w4a16"), {"*.DOWN_PROJ": "w8"})
    assert scheme.override("model.layers.0.mlp.down_proj") is None
    assert scheme.module("model.layers.0.mlp.down_proj").weight == IntFormat(4)


def test_later_overrides_come_first_and_replace_their_own_glob():
    scheme = with_overrides(parse_scheme("w4a16"), {"lm_head": "w8", "*.q_proj": "w3"})
    scheme = with_overrides(scheme, {"*_proj": "w2", "lm_head": "w6"})
    assert [glob for glob, _ in scheme.overrides] == ["*_proj", "lm_head", "*.q_proj"]
    assert scheme.module("lm_head").weight == IntFormat(6)
    assert scheme.module("model.layers.0.self_attn.q_proj").weight == IntFormat(2)
    assert scheme_from_dict(scheme_to_dict(scheme)) == scheme


SCHEMES = [
    parse_scheme("w4a16g64-sym"),
    with_overrides(parse_scheme("w3a8kv4"), {"lm_head": "w8-asym", "*.0.*": "float", "*.down_proj": "w6g32"}),
]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.name)
def test_a_scheme_survives_the_round_trip_through_plain_data(scheme):
    assert scheme_from_dict(scheme_to_dict(scheme)) == scheme
    assert scheme_from_dict(json.loads(json.dumps(scheme_to_dict(scheme)))) == scheme


def test_the_order_of_overrides_survives_a_manifest(tmp_path):
    scheme = with_overrides(parse_scheme("w4a16"), {"model.layers.0.*": "w8", "*.down_proj": "w3"})
    write_json(tmp_path / "manifest.json", scheme_to_dict(scheme))
    assert scheme_from_dict(read_json(tmp_path / "manifest.json")) == scheme


def test_a_scheme_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("scheme: w4a16g64\noverrides:\n  '*.down_proj': w8\n  lm_head: float\n")
    wanted = with_overrides(parse_scheme("w4a16g64"), {"*.down_proj": "w8", "lm_head": "float"})
    assert load_scheme(str(path)) == wanted
    path.write_text("scheme: w8a8\n")
    assert load_scheme(str(path)) == load_scheme("w8a8") == parse_scheme("w8a8")
    path.write_text("scheme: w8a8\noverrides:\n")  # an empty key is YAML for "none"
    assert load_scheme(str(path)) == parse_scheme("w8a8")
    path.write_text("scheme: w8a8\noverrides:\n  7: w8\n")  # YAML reads a number; a glob is text
    assert load_scheme(str(path)).module("lm_head").weight == parse_scheme("w8a8").weight


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- w4a16\n", "expected the keys 'scheme'"),
        ("overrides: {}\n", "expected the keys 'scheme'"),
        ("scheme: w4a16\noverides: {}\n", "unknown key in .* 'overides': did you mean 'overrides'"),
        ("scheme: w4a16\noverrides: [lm_head]\n", "must map a glob to a format"),
        ("scheme: w4a16\noverrides: {lm_head: }\n", "override 'None': give 'float', w"),
        ("scheme: w4a16\noverrides: {lm_head: w99}\n", "99 bits given; 2 to 8"),
        ("scheme: w4b16\n", "unknown scheme 'w4b16'"),
        ("scheme: [w4a16\n", "is not valid YAML"),
        ("\x00", "is not valid YAML"),
    ],
)
def test_a_wrong_scheme_file_is_told_what_is_wrong_in_one_line(tmp_path, text, message):
    path = tmp_path / "wrong.yml"
    path.write_text(text)
    with pytest.raises(LowbitError, match=message) as caught:
        load_scheme(str(path))
    assert "\n" not in str(caught.value)


def test_a_scheme_file_that_is_not_there(tmp_path):
    with pytest.raises(LowbitError, match=r"cannot read the scheme file .*nowhere\.yaml"):
        load_scheme(str(tmp_path / "nowhere.yaml"))


@pytest.mark.parametrize(
    ("name", "overrides", "dtype"),
    [
        ("nvfp4a16", {"*.down_proj": "w8"}, torch.bfloat16),
        ("w8a8", {"*.up_proj": "mxfp4"}, torch.bfloat16),
        ("fp8", {"*.down_proj": "w8"}, torch.float16),  # runs in float32
        ("q4_k", {"*.down_proj": "w8"}, torch.float16),
    ],
)
def test_integers_beside_formats_that_run_in_bfloat16_have_scales_that_stay_as_they_are_there(name, overrides, dtype):
    found = with_overrides(parse_scheme(name), overrides)
    assert found.module("model.layers.0.mlp.down_proj").weight.scale_dtype == dtype
    again = scheme_from_dict(scheme_to_dict(found))
    assert again.module("model.layers.0.mlp.down_proj") == found.module("model.layers.0.mlp.down_proj")
