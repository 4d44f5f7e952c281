"""Learned mixes of linears' inputs: the function, gradients, the start, the bounds, and what ships."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import outliers
from method_contract import attempt, check_ops, check_result, check_shipped, everything, output_error, same

import lowbit
from lowbit.errors import LowbitError
from lowbit.methods import RTN
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affine_options import MIXES, Maps, Sites
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.hadamard import RandomHadamard
from lowbit.methods.learned_mix import learned_mixes
from lowbit.methods.maps import DOMINANCE
from lowbit.methods.mixing import MIXED
from lowbit.methods.options import with_options
from lowbit.models.block import Calib
from lowbit.models.diagonal_blocks import DiagonalBlocks
from lowbit.models.forward import run, run_all
from lowbit.models.hadamard import Hadamard
from lowbit.models.kronecker import Kronecker
from lowbit.models.runtime_ops import Clip, Matrix, at_input
from runs import quantize_tiny, streamed_logits
from tiny import block_of, planned, save_tiny, tiny_ids, tiny_model

EVERYWHERE = {choice: dict.fromkeys(MIXED, choice) for choice in MIXES}
# Each choice with each parametrisation that it takes.
KINDS = [
    ("hadamard", {}),
    *(("kronecker", {"mixing": kind}) for kind in ("svd", "masked", "lu")),
    *(("blocks", {"mixing": kind, "block_size": 8}) for kind in ("svd", "masked", "lu")),
    *(("hadamard-matrix", {"parametrisation": kind}) for kind in ("masked", "lu", "svd", "blocks")),
]
DOWN = "1.mlp.down_proj"


def affine(**options):
    """The step with some options set, whatever group they are in."""
    return with_options(AffineQuant(), **options)


def made(family="llama", scheme="w4a4", dtype=torch.float32, change=lambda block: block):
    """A planned layer and its calibration data."""
    block, x = block_of(tiny_model(family), 1, dtype=dtype)
    block = planned(change(block), scheme)
    return block, Calib(x, x, run_all(block, x))


def trainer_of(step, block, calib):
    return AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)


def moved(step, family, change=lambda block: block):
    """A fit in float64 whose maps are random numbers."""
    block, calib = made(family, dtype=torch.float64, change=change)
    trainer = trainer_of(with_options(step, precision="double"), block, calib)
    trainer.begin(step.schedule.epochs)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in (leaf for own in (*trainer.sites, *trainer.mixes) for leaf in own.leaves()):
            leaf += 0.05 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64)
    return block, calib, trainer


@pytest.mark.parametrize("family", ["llama-odd", "gemma3", "phi3", "mixtral", "opt"])
@pytest.mark.parametrize(("choice", "options"), KINDS)
def test_in_float64_the_function_stays_whatever_is_learned(choice, options, family):
    plant = lambda block: outliers(block, channels=(5,), times=100)  # noqa: E731
    step = affine(**EVERYWHERE[choice], **options, signs=False)
    block, calib, trainer = moved(step, family, plant)
    with torch.no_grad():
        params, ops = trainer._applied()
    tolerance = 1e-4 if any(edge.offset for edge in block.edges()) else 1e-10
    got = run(replace(block, ops=ops), calib.x_fp, params)
    assert float((got - calib.y_fp).abs().max() / calib.y_fp.abs().max()) < tolerance
    assert {mix.site.name for mix in trainer.mixes} == set(MIXED)
    assert all(leaf.dtype == torch.float64 for mix in trainer.mixes for leaf in mix.leaves())
    without = run(replace(block, ops={}), calib.x_fp, params)
    assert float((without - calib.y_fp).abs().max() / calib.y_fp.abs().max()) > 1e-2


@pytest.mark.parametrize(("choice", "options"), KINDS[1:])
def test_gradients_are_those_of_finite_differences(choice, options):
    """Of the folded weight and of what stays online, in every leaf."""
    narrow, _ = block_of(tiny_model("llama", intermediate_size=12), 1, dtype=torch.float64)
    block = planned(narrow, "w4a4")
    maps = Maps(**{**options, "block_size": 4})
    (mix,) = learned_mixes(block, Sites(channels=choice), maps, torch.float64)
    for learned in mix.maps:
        learned.begin(1, 1)
    generator = torch.Generator().manual_seed(1)
    leaves = [leaf + 0.1 * torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in mix.leaves()]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]

    def both(*given):
        values = iter(given)
        for learned in mix.maps:
            learned.leaves = {name: next(values) for name in learned.leaves}
        params = dict(block.params)
        op = mix.apply(params)
        return params[f"{DOWN}.weight"][:5], *(getattr(op, name) for name in op.fields())

    assert torch.autograd.gradcheck(both, leaves)


@pytest.mark.parametrize(
    ("choice", "kind"), [("kronecker", Kronecker), ("blocks", DiagonalBlocks), ("hadamard-matrix", Matrix)]
)
def test_every_mix_starts_as_a_rotation_with_entries_of_equal_size(choice, kind):
    block, calib = made()
    trainer = trainer_of(affine(**EVERYWHERE[choice]), block, calib)
    with torch.no_grad():
        _, ops = trainer.transformed()
    assert {type(op) for op in ops.values()} == {kind}
    for op in ops.values():
        eye = torch.eye(op.width)
        matrix = op(eye)
        assert torch.allclose(matrix @ matrix.T, eye, atol=1e-5)
        assert float(matrix.abs().max()) < (0.75 if choice == "blocks" else 0.45)
        assert not torch.allclose(matrix, matrix.T, atol=1e-2)  # the signs are random
    fixed = trainer_of(affine(**EVERYWHERE["hadamard"]), block, calib)
    assert all(not mix.maps and isinstance(mix.turns[0], Hadamard) for mix in fixed.mixes)


def test_factors_before_o_proj_are_heads_and_their_channels():
    block, calib = made("llama-odd")
    ops = affine(heads="kronecker", epochs=0)(block, calib).ops
    (op,) = ops.values()
    assert (len(op.left), len(op.right)) == (4, 24)
    ops = affine(channels="kronecker", epochs=0)(block, calib).ops
    assert [(len(op.left), len(op.right)) for op in ops.values()] == [(8, 12)]


@pytest.mark.parametrize(("scheme", "width"), [("nvfp4", 16), ("mxfp4", 32), ("w4a4", 16)])
def test_blocks_are_groups_that_share_a_scale(scheme, width):
    block, calib = made(scheme=scheme)
    done = affine(**EVERYWHERE["blocks"], epochs=0)(block, calib)
    assert {op.blocks.shape[1] for op in done.ops.values()} == {width}
    assert {op.width for op in done.ops.values()} == {64, 96}


def test_dominance_is_kept_relative_to_the_rotation():
    block, calib = made()
    options = {"channels": "hadamard-matrix", "dominance": "enforce", "lr_maps": 0.2, "held_out": 0.0, "epochs": 2}
    done = affine(**options)(block, calib)
    op = done.ops[at_input(DOWN)].matrix.double()
    start = affine(**{**options, "epochs": 0})(block, calib).ops[at_input(DOWN)].matrix.double()
    learned = torch.linalg.inv(op) @ start  # M, where the op is Q^T M^-1 and starts at Q^T
    diagonal = learned.diagonal().abs()
    shares = (learned.abs().sum(1) - diagonal) / diagonal
    assert 0.05 < float(shares.max()) <= DOMINANCE + 1e-3
    plain = torch.linalg.inv(op)
    assert float(((plain.abs().sum(1) - plain.diagonal().abs()) / plain.diagonal().abs()).max()) > 1
    entry = done.record[1]["affinequant"]["sites"]["1.channels-hadamard-matrix"]
    assert entry["map"] == "hadamard-matrix"
    assert entry["margin"] == pytest.approx(1 - float(shares.max()), abs=1e-3)


@pytest.mark.parametrize("options", [{"condition": 4.0, "mixing": "svd"}, {"condition": 4.0, "mixing": "masked"}])
def test_the_condition_of_a_factor_stays_below_its_bound(options):
    block, calib = made()
    done = affine(channels="kronecker", lr_maps=0.5, epochs=2, held_out=0.0, **options)(block, calib)
    op = done.ops[at_input(DOWN)]
    for factor in (op.left, op.right):
        assert 1.05 < float(torch.linalg.cond(factor.double())) <= 4.0 * (1 + 1e-5)
    entry = done.record[1]["affinequant"]["sites"]["1.channels-kronecker"]
    assert entry["condition"] > 1.05


TRAINED = [
    ("llama", "w4a4", {**EVERYWHERE["kronecker"], "act_clip": True}),
    ("llama", "nvfp4", EVERYWHERE["blocks"]),
    ("llama-odd", "w8a8-static", {**EVERYWHERE["hadamard"], "channels": "hadamard-matrix"}),
    ("mixtral", "w4a4", {"channels": "kronecker", "mlp": "hadamard"}),
]


@pytest.mark.parametrize(("family", "scheme", "options"), TRAINED)
def test_what_is_trained_is_what_ships(family, scheme, options):
    block, calib = made(family, scheme)
    step = affine(**options, epochs=1)
    found = attempt(step, block, calib)
    check_result(found)
    check_ops(found)
    check_shipped(step, block, calib)
    assert {type(op) for op in found.done.ops.values()} == step.runtime_ops(next(iter(block.formats.values())).input)


def test_it_beats_the_transform_that_it_starts_as():
    block, calib = made(scheme="w4a4", change=lambda block: outliers(block, channels=(5,)))
    fixed = output_error(block, calib, RandomHadamard(), RTN())
    learned = affine(**EVERYWHERE["kronecker"], epochs=2)
    assert output_error(block, calib, learned, RTN()) < 0.5 * fixed


def test_what_was_chosen_for_other_columns_is_chosen_again():
    block, calib = made(scheme="w8a8-static")
    ranges = RTN()(block, calib).input_qparams
    clips = {name: (torch.full((len(block.weight(name)), 1), 0.5),) * 2 for name in block.linears()}
    given = replace(block, clips=clips, input_qparams=ranges)
    done = affine(channels="kronecker", start="given", epochs=0)(given, calib)
    low, _ = done.clips[DOWN]
    assert torch.equal(low, torch.ones_like(low))
    assert torch.equal(done.clips["1.mlp.up_proj"][0], clips["1.mlp.up_proj"][0])
    assert not torch.equal(done.input_qparams[DOWN].scale, ranges[DOWN].scale)
    assert torch.equal(done.input_qparams["1.mlp.up_proj"].scale, ranges["1.mlp.up_proj"].scale)


def test_a_fit_on_float_inputs_depends_on_nothing_else():
    block, calib = made()
    noisy = replace(calib, x_q=calib.x_q + torch.randn(calib.x_q.shape, generator=torch.Generator().manual_seed(0)))
    for inputs in ("float", "quantized"):
        step = affine(channels="kronecker", inputs=inputs, epochs=1, act_clip=True)
        one, other = step(block, calib), step(block, noisy)
        assert same(everything(one), everything(other)) == (inputs == "float")


def test_a_range_is_clipped_among_mixed_channels():
    """The op on the input first, then the clip and the rounding before the linear."""
    block, calib = made()
    done = affine(channels="kronecker", act_clip=True, epochs=1, held_out=0.0)(block, calib)
    mix, clip = done.ops[at_input(DOWN)], done.ops[DOWN]
    assert isinstance(mix, Kronecker)
    assert isinstance(clip, Clip)
    seen = []
    for ops, formats in (({}, {}), (done.ops, {DOWN: block.formats[DOWN]})):
        run(replace(done, ops=ops, formats=formats), calib.x_q, quantized=True, taps={DOWN: seen.append})
    given, rounded = seen
    assert torch.equal(rounded, clip(mix(given), block.input_format(DOWN)))
    assert not torch.equal(rounded, mix(clip(given, block.input_format(DOWN))))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"qkv": "hadamards"}, "affinequant.qkv"),
        ({"qk": "hadamard"}, "affinequant.qk"),
        ({"channels": "matrix"}, "affinequant.channels"),
        ({"mixing": "blocks"}, "affinequant.mixing"),
        ({"inputs": "both"}, "affinequant.inputs"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(LowbitError, match=message):
        affine(**options)


@pytest.mark.parametrize("choices", [("kronecker", "hadamard-matrix"), ("blocks", "hadamard")])
def test_a_run_computes_what_it_stores(choices, tmp_path):
    save_tiny(tmp_path / "model", "llama")
    norms, inputs = choices
    settings = [f"affinequant.{site}={norms}" for site in ("qkv", "mlp")]
    settings += [f"affinequant.{site}={inputs}" for site in ("heads", "channels")]
    settings += ["affinequant.epochs=1"]
    done = quantize_tiny(tmp_path / "model", tmp_path / "run", "w4a4", "affinequant", settings=settings)
    ids = tiny_ids()
    simulated = streamed_logits(tmp_path / "run", ids)
    loaded = lowbit.load(tmp_path / "run")(ids, use_cache=False).logits.detach()
    assert float((loaded - simulated).abs().max() / simulated.abs().max()) < 1e-5
    kinds = {"hadamard-matrix": "matrix"}
    assert set(done.manifest.runtime_ops.values()) == {kinds.get(choice, choice) for choice in choices}
