"""Random-sign Hadamard transforms: where they stand, what they keep, what they help against, and runs with them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import outliers
from method_contract import output_error

import lowbit
from lowbit.errors import LowbitError
from lowbit.exporters import EXPORTERS
from lowbit.methods import GPTQ, METHODS, RTN
from lowbit.methods.hadamard import RandomHadamard
from lowbit.methods.mixing import mix_sites
from lowbit.models.block import Calib
from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.forward import relative_error, run, run_all
from lowbit.models.hadamard import Hadamard, times_hadamard
from lowbit.models.runtime_ops import Clip, Gather, at_input
from lowbit.pipeline.recipe import recipe_from_dict
from runs import folder_bytes, quantize_tiny, streamed_logits
from tiny import CONFIGS, block_of, planned, save_tiny, tiny_ids, tiny_model

FAMILIES = ["llama-odd", "qwen3", "gemma3", "phi3", "mixtral", "qwen3-moe", "opt"]


def made(family, scheme="w4a4", dtype=torch.float32, count=1, change=lambda block: block):
    """A block of outlier channels and its calibration data."""
    block, x = block_of(tiny_model(family), 1, count, dtype=dtype)
    block = planned(change(block), scheme)
    return block, Calib(x, x, run_all(block, x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block": 8},
        {"qkv": False, "mlp": False},
        {"heads": False, "channels": False},
        {"signs": False},
        {"signs": False, "block": 8},
    ],
)
def test_in_float64_the_function_stays_and_depends_on_every_op(family, options):
    block, calib = made(family, dtype=torch.float64, count=2, change=lambda b: outliers(b, channels=(5,), times=100))
    done = RandomHadamard(**options)(block, calib)
    wanted, close = calib.y_fp, 1e-10
    assert float((run(done, calib.x_fp) - wanted).abs().max() / wanted.abs().max()) < close
    assert done.ops
    for name in done.ops:
        if ".experts." in name:  # which tokens reach an expert is for the router to say
            continue
        others = {other: op for other, op in done.ops.items() if other != name}
        changed = run(replace(done, ops=others), calib.x_fp)
        assert float((changed - wanted).abs().max() / wanted.abs().max()) > 1e-3, name


def test_every_linear_reads_mixed_channels_of_one_site():
    block, calib = made("llama")
    found = {site.name: (site.places, [reader.module for reader in site.readers]) for site in mix_sites(block)}
    assert found == {
        "qkv": (("1.input_layernorm",), [f"1.self_attn.{name}_proj" for name in "qkv"]),
        "heads": (("1.self_attn.o_proj.input",), ["1.self_attn.o_proj"]),
        "mlp": (("1.post_attention_layernorm",), ["1.mlp.gate_proj", "1.mlp.up_proj"]),
        "channels": (("1.mlp.down_proj.input",), ["1.mlp.down_proj"]),
    }
    for name, (places, _) in found.items():
        alone = RandomHadamard(**{**dict.fromkeys(found, False), name: True})(block, calib)
        assert set(alone.ops) == set(places)


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_sites_without_edges_have_the_same_names(family):
    """Where no edge leads to a linear, its place in the layer says what it reads."""
    block, _ = made(family)
    named = {reader.module: site.name for site in mix_sites(block) for reader in site.readers}
    bare = replace(block, kinds=tuple(replace(kind, edges=()) for kind in block.kinds))
    sites = mix_sites(bare)
    assert {
        reader.module: site.name for site in sites for reader in site.readers if ".experts." not in reader.module
    } == {module: name for module, name in named.items() if module in block.formats and ".experts." not in module}
    assert all(place == at_input(r.module) for s in sites for place, r in zip(s.places, s.readers, strict=True))


def test_the_weights_take_the_transform_that_the_inputs_take():
    block, calib = made("llama")
    done = RandomHadamard(seed=3)(block, calib)
    op = done.ops["1.mlp.down_proj.input"]
    assert isinstance(op, Hadamard)
    signs = 1 - 2.0 * op.flips.flatten()
    wanted = times_hadamard(block.weight("1.mlp.down_proj").double() * signs)
    assert torch.allclose(done.weight("1.mlp.down_proj").double(), wanted, atol=1e-6)
    other = RandomHadamard(seed=4)(block, calib).ops["1.mlp.down_proj.input"]
    assert not torch.equal(op.flips, other.flips)
    second = RandomHadamard(seed=3)(*made("llama", count=2)).ops
    assert not torch.equal(second["2.mlp.down_proj.input"].flips, second["1.mlp.down_proj.input"].flips)


def test_behind_an_op_of_an_earlier_step_the_inputs_are_mixed():
    block, calib = made("llama", dtype=torch.float64)
    gather = Gather(torch.arange(64).flip(0), torch.ones(64, dtype=torch.float64))
    params = dict(block.params)
    for name in ("gate", "up"):
        params[f"1.mlp.{name}_proj.weight"] = params[f"1.mlp.{name}_proj.weight"].flip(1)
    block = replace(block, params=params, ops={"1.post_attention_layernorm": gather})
    done = RandomHadamard()(block, calib)
    assert done.ops["1.post_attention_layernorm"] is gather
    assert done.ops["1.mlp.gate_proj.input"] is done.ops["1.mlp.up_proj.input"]
    assert float((run(done, calib.x_fp) - calib.y_fp).abs().max()) < 1e-10 * float(calib.y_fp.abs().max())
    again = RandomHadamard(seed=1)(done, calib)  # behind the norm that had none yet nothing is left to mix
    assert float((run(again, calib.x_fp) - calib.y_fp).abs().max()) < 1e-10 * float(calib.y_fp.abs().max())


def test_without_signs_blocks_are_powers_of_two():
    block, calib = made("llama")
    done = RandomHadamard(signs=False)(block, calib)
    sizes = {name: op.size for name, op in done.ops.items() if isinstance(op, FixedHadamard)}
    assert sizes == {
        "1.input_layernorm": 64,
        "1.post_attention_layernorm": 64,
        "1.self_attn.o_proj.input": 64,
        "1.mlp.down_proj.input": 32,
    }
    assert RandomHadamard(signs=False).runtime_ops(None) == {FixedHadamard}
    with pytest.raises(
        LowbitError, match=r"hadamard\.block 12 with hadamard\.signs=false given; .* give 4, or"
    ) as caught:
        RandomHadamard(signs=False, block=12)
    assert "\n" not in str(caught.value)


def test_blocks_are_those_of_the_groups_that_share_a_scale():
    block, calib = made("llama", "nvfp4")
    done = RandomHadamard(block="group")(block, calib)
    assert {tuple(op.flips.shape) for op in done.ops.values()} == {(4, 16), (6, 16)}
    whole = RandomHadamard(block="group")(*made("llama", "w4a4"))  # one scale a row
    assert {tuple(op.flips.shape) for op in whole.ops.values()} == {(1, 64), (1, 96)}
    wide, x = block_of(tiny_model("llama", intermediate_size=80), 1)
    with pytest.raises(LowbitError, match=r"hadamard\.block 32 given; it does not divide the 80 channels"):
        RandomHadamard(block=32)(planned(wide, "w4a4"), Calib(x, x, x))


def test_a_fixed_clip_cuts_every_range_and_keeps_offsets_of_channels_that_stay():
    block, calib = made("llama")
    offset = torch.linspace(-0.4, 0.4, 96)
    block = replace(block, ops={"1.mlp.down_proj": Clip(torch.ones(2), offset)})
    done = RandomHadamard(input_clip=0.9)(block, calib)
    for name in block.linears():
        op = done.ops[name]
        assert isinstance(op, Clip)
        assert op.ratios.tolist() == pytest.approx([0.9, 0.9])
    assert done.ops["1.mlp.down_proj"].offset is None  # it was of channels that are mixed now
    kept = RandomHadamard(input_clip=0.9, channels=False)(block, calib)
    assert torch.equal(kept.ops["1.mlp.down_proj"].offset, offset)
    weights_alone = RandomHadamard(input_clip=0.9)(*made("llama", "w4a16"))
    assert {type(op) for op in weights_alone.ops.values()} == {Hadamard}
    assert not any(isinstance(op, Clip) for op in RandomHadamard()(*made("llama")).ops.values())


def test_what_was_chosen_for_other_columns_is_chosen_again():
    block, calib = made("llama", "w8a8-static")
    ranged = RTN()(block, calib)
    clips = {name: (torch.tensor(0.9), torch.tensor(0.8)) for name in block.linears()}
    given = replace(block, clips=clips, input_qparams=ranged.input_qparams)
    done = RandomHadamard(heads=False)(given, calib)
    assert set(done.clips) == set(done.input_qparams) == {"1.self_attn.o_proj"}


def test_an_outlier_channel_is_spread():
    change = lambda block: outliers(block, channels=(5,))  # noqa: E731
    block, calib = made("llama", "w8a4", change=change)
    assert output_error(block, calib, RandomHadamard(), RTN()) < 0.4 * output_error(block, calib, RTN())
    assert output_error(block, calib, RandomHadamard(), GPTQ()) < 0.4 * output_error(block, calib, GPTQ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_clip": 0.0}, r"hadamard\.input_clip 0 given; it must be above 0 and at most 1"),
        ({"input_clip": 1.1}, r"hadamard\.input_clip 1\.1 given"),
        ({"block": "rows"}, r"hadamard\.block 'rows' given; allowed: whole, group, or a width"),
        ({"block": 1}, r"hadamard\.block 1 given"),
        ({"seed": -1}, r"hadamard\.seed -1 given; it must be 0 or more"),
        (dict.fromkeys(("qkv", "heads", "mlp", "channels"), False), "no site is chosen"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(LowbitError, match=message):
        RandomHadamard(**options)


def test_no_map_is_folded_across_it():
    steps = {"steps": ["hadamard", "affinequant", "rtn"]}
    with pytest.raises(LowbitError, match="affinequant cannot come after hadamard"):
        recipe_from_dict(steps, "given")
    block, calib = made("llama")
    done = METHODS["reassemble"]()(RandomHadamard()(block, calib), calib)
    assert [note.text for note in done.notes] == [
        "reassemble: a hadamard mixes what 1.mlp.down_proj reads, where no channel stands out: none is reassembled"
    ]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama", "mixtral"):
        save_tiny(folder / family, family)
    return folder


@pytest.mark.parametrize(("family", "scheme"), [("llama", "w4a4"), ("llama", "w4a16g32"), ("mixtral", "w4a4")])
def test_a_run_computes_what_it_stores(family, scheme, models, tmp_path):
    made = quantize_tiny(models / family, tmp_path / "run", scheme, "hadamard+gptq")
    ids = tiny_ids()
    simulated = streamed_logits(tmp_path / "run", ids)
    loaded = lowbit.load(tmp_path / "run")(ids, use_cache=False).logits.detach()
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 1e-5
    kinds = set(made.manifest.runtime_ops.values())
    assert kinds == ({"hadamard", "clip"} if scheme == "w4a4" else {"hadamard"})
    assert not made.manifest.transformers.loads
    assert "Hadamard transforms" in made.manifest.transformers.why_not
    plain = quantize_tiny(models / family, tmp_path / "plain", scheme, "gptq")
    assert made.bits_per_weight > plain.bits_per_weight
    refusing = [name for name in EXPORTERS if name != "onnx" or scheme == "w4a4"]
    for name in refusing:
        with pytest.raises(LowbitError) as caught:
            lowbit.export(tmp_path / "run", name, out=tmp_path / f"export-{name}")
        assert "\n" not in str(caught.value)


def test_tuning_of_the_whole_model_runs_them(models, tmp_path):
    """It starts from files of latent weights, which hold the ops on inputs too."""
    steps = {"steps": ["hadamard", "rtn", {"tune": {"epochs": 1}}]}
    recipe = recipe_from_dict(steps, "given")
    quantize_tiny(models / "llama", tmp_path / "run", "w4a4", recipe)
    ids = tiny_ids()
    simulated = streamed_logits(tmp_path / "run", ids)
    loaded = lowbit.load(tmp_path / "run")(ids, use_cache=False).logits.detach()
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 1e-5
    quantize_tiny(models / "llama", tmp_path / "before", "w4a4", "hadamard")
    exact = streamed_logits(models / "llama", ids)
    before, after = (
        relative_error(logits, exact) for logits in (streamed_logits(tmp_path / "before", ids), simulated)
    )
    assert 0.1 * before < after < 1.5 * before  # without an op on an input the logits are unrelated


def test_a_run_that_is_made_again_has_the_same_bytes(models, tmp_path):
    for out in ("one", "two"):
        torch.manual_seed(len(out))
        quantize_tiny(models / "llama", tmp_path / out, "w4a4", "hadamard")
    assert folder_bytes(tmp_path / "one") == folder_bytes(tmp_path / "two")


def test_a_target_that_cannot_run_it_is_refused_before_any_work(models, tmp_path):
    with pytest.raises(LowbitError, match="hadamard leaves Hadamard transforms at run time") as caught:
        quantize_tiny(models / "llama", tmp_path / "run", None, "hadamard", target="executorch")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_bits_of_a_run_are_those_of_its_tensors(models, tmp_path):
    made = quantize_tiny(models / "llama", tmp_path / "run", "w4a4", "hadamard")
    plain = quantize_tiny(models / "llama", tmp_path / "plain", "w4a4", "rtn")
    assert len(made.manifest.quantized) == 3 * 7
    weights = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96  # q and o, k and v, gate, up and down
    assert made.bits_per_weight - plain.bits_per_weight == pytest.approx(8 * (64 + 64 + 64 + 96) / weights)
