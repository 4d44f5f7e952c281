"""SparseGPT against its paper's equations taken literally, its patterns, and what is stored."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowbit.errors import LowbitError
from lowbit.methods.gptq import inverse_factor
from lowbit.methods.gptq_columns import gptq_codes
from lowbit.methods.sparsegpt import OF_EACH, SparseGPT
from lowbit.methods.sparsity import Share
from lowbit.models.block import Calib
from lowbit.models.forward import relative_error, run_all, run_quantized
from lowbit.quant.floating import MXFP4
from lowbit.quant.integer import IntFormat
from lowbit.quant.scheme_names import parse_scheme, with_overrides
from runs import quantize_tiny
from tiny import block_of, planned, save_tiny, tiny_model

COLUMNS, DAMPING = 32, 0.01


def problem(seed, rows=6):
    """A weight and the second moments of correlated inputs, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(COLUMNS, COLUMNS, generator=generator, dtype=torch.float64)
    x = torch.randn(80, COLUMNS, generator=generator, dtype=torch.float64) @ mix
    return torch.randn(rows, COLUMNS, generator=generator, dtype=torch.float64), x.T @ x


def removed(costs, pattern, zeros):
    """The entries ``(row, column)`` of a block of columns that become 0, from their costs, one by one."""
    entries = {(r, c): float(costs[r, c]) for r in range(costs.shape[0]) for c in range(costs.shape[1])}
    if pattern == "unstructured":
        return sorted(entries, key=entries.__getitem__)[: round(zeros * len(entries))]
    return [
        entry
        for row in range(costs.shape[0])
        for entry in sorted((e for e in entries if e[0] == row), key=entries.__getitem__)[: costs.shape[1] // 2]
    ]


def literal(weight, gram, format, pattern, width, zeros):
    """Algorithm 1 with joint quantization: inverses of the columns that are left, no Cholesky factor."""
    weight, qparams = weight.clone(), format.qparams(weight)
    own = format.per_column(qparams, COLUMNS)
    damped = gram + DAMPING * gram.diagonal().mean() * torch.eye(COLUMNS, dtype=torch.float64)
    inverses = [torch.linalg.inv(damped[c:, c:]) for c in range(COLUMNS)]
    codes, gone = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
    for c in range(COLUMNS):
        if c % width == 0:
            ahead = range(c, min(c + width, COLUMNS))
            costs = torch.stack([weight[:, j].square() / inverses[j][0, 0] for j in ahead], 1)
            for row, column in removed(costs, pattern, zeros):
                gone[row, c + column] = True
        here = type(qparams)(own.scale[:, c], own.zero[:, c])
        codes[:, c] = format.round(torch.where(gone[:, c], 0.0, weight[:, c]), here)
        error = weight[:, c] - format.value(codes[:, c], here)
        weight[:, c:] -= error[:, None] * inverses[c][0] / inverses[c][0, 0]
    return codes.to(torch.uint8), gone


def codes_of(weight, gram, format, pattern, block_size):
    upper, used = inverse_factor(gram, DAMPING)
    assert used == DAMPING
    qparams = format.qparams(weight)
    return gptq_codes(weight, upper, torch.arange(COLUMNS), qparams, format, block_size, None, pattern)


CASES = [("2:4", 4, 4), ("2:4", 4, 128), ("4:8", 8, 16), ("unstructured", 16, 16), ("unstructured", 128, 128)]


@pytest.mark.parametrize(("name", "width", "block_size"), CASES)
@pytest.mark.parametrize(
    "format", [IntFormat(3), IntFormat(4, 8, symmetric=False), IntFormat(8), MXFP4], ids=lambda format: format.name
)
def test_the_codes_are_those_of_the_literal_algorithm(format, name, width, block_size):
    for seed in range(3):
        weight, gram = problem(seed)
        wanted, gone = literal(weight, gram, format, name, width, 0.4)
        found = codes_of(weight, gram, format, OF_EACH.get(name) or Share(0.4, block_size), block_size)
        assert torch.equal(found, wanted)
        assert bool((format.dequantize(found, format.qparams(weight))[gone] == 0).all())


def test_nothing_to_remove_is_gptq():
    weight, gram = problem(0)
    format = IntFormat(3)
    assert torch.equal(
        codes_of(weight, gram, format, Share(0.0, 128), 128), codes_of(weight, gram, format, None, 128)
    )


def case(scheme="w4a16g16-asym", family="llama-odd"):
    block, x = block_of(tiny_model(family), 1)
    block = planned(block, scheme)
    return block, Calib(x, x, run_all(block, x))


def zeros_of(weight, of):
    """Zeros in each ``of`` consecutive weights of a row."""
    return (weight == 0).unflatten(1, (-1, of)).sum(-1)


@pytest.mark.parametrize(("pattern", "of"), [("2:4", 4), ("4:8", 8)])
def test_every_group_of_every_linear_has_the_patterns_zeros(pattern, of):
    block, calib = case()
    done = SparseGPT(pattern=pattern)(block, calib)
    assert set(done.qweights) == set(block.formats)
    for q in done.qweights.values():
        assert int(zeros_of(q.dequantize(), of).min()) >= of // 2
    figures = done.record[1]["sparsegpt"]
    assert (figures["pattern"], figures["stored"]) == (pattern, "dense")
    assert all(0.5 <= share < 0.75 for share in figures["zeros"].values())


@pytest.mark.parametrize("sparsity", [0.25, 0.7])
def test_a_share_is_that_of_each_linear(sparsity):
    block, calib = case("w8a16")
    done = SparseGPT(pattern="unstructured", sparsity=sparsity)(block, calib)
    for name, q in done.qweights.items():
        share = float((q.dequantize() == 0).double().mean())
        assert sparsity - 0.01 <= share < sparsity + 0.05, name  # a few that stay round to 0


def test_what_stays_makes_up_for_what_goes():
    """Against the same pattern by magnitude, each weight rounded by itself."""
    block, calib = case("w8a16")
    done = SparseGPT()(block, calib)
    plain = {}
    for name in block.linears():
        weight, format = block.weight(name), block.weight_format(name)
        kept = OF_EACH["2:4"]
        parts = [kept.kept(part.T, torch.ones(4)).T for part in weight.split(4, 1)]
        plain[name] = format.quantize(weight * torch.cat(parts, 1), block.qparams(name))
    errors = [
        relative_error(run_quantized(found, calib.x_q), calib.y_fp)
        for found in (done, replace(block, qweights=plain))
    ]
    assert errors[0] < 0.8 * errors[1], errors


def test_experts_without_data_have_the_pattern_too():
    block, calib = case("w4a16g16-sym", "mixtral")
    done = SparseGPT()(replace(block, least_tokens=10**6), calib)
    assert any("quantized without calibration data" in note.text for note in done.notes)
    for name, q in done.qweights.items():
        assert int(zeros_of(q.dequantize(), 4).min()) >= 2, name


def test_a_run_with_a_format_without_a_zero_is_refused_before_any_work(tmp_path):
    save_tiny(tmp_path / "model", "llama")
    with pytest.raises(LowbitError, match=r"^sparsegpt: iq4_nl, a format of model\.layers.*, has no code for 0"):
        quantize_tiny(tmp_path / "model", tmp_path / "run", "iq4_nl", "sparsegpt")
    assert not (tmp_path / "run").exists()


def test_formats_without_a_zero_and_widths_without_the_pattern_are_refused():
    block, calib = case("iq4_nl")
    with pytest.raises(LowbitError, match=r"iq4_nl.* has no code for 0"):
        SparseGPT()(block, calib)
    wide, x = block_of(tiny_model("llama-odd", intermediate_size=66), 1)
    wide = planned(wide, with_overrides(parse_scheme("w4a16"), {"*.down_proj": "w4"}))
    with pytest.raises(LowbitError, match="down_proj has 66 inputs, no multiple of 4"):
        SparseGPT()(wide, Calib(x, x, run_all(wide, x)))
    SparseGPT(pattern="unstructured")(wide, Calib(x, x, run_all(wide, x)))


@pytest.mark.parametrize(
    "options", [{"pattern": "1:4"}, {"sparsity": 1.0}, {"damping": 0.0}, {"block_size": 6}, {"tokens": "some"}]
)
def test_options_out_of_range(options):
    with pytest.raises(LowbitError, match=rf"sparsegpt\.{next(iter(options))}"):
        SparseGPT(**options)


def test_stock_transformers_loads_the_zeros_and_computes_the_simulated_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    import lowbit

    save_tiny(tmp_path / "m", "llama")
    (tmp_path / "sparse.yaml").write_text("steps: [sparsegpt]\n")
    made = quantize_tiny(tmp_path / "m", tmp_path / "out", "w4a16g16-sym", str(tmp_path / "sparse.yaml"))
    assert made.manifest.blocks[0].steps["sparsegpt"]["stored"] == "dense"
    ids = torch.arange(12)[None]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        found, wanted = stock(ids).logits, lowbit.load(tmp_path / "out")(ids).logits
    assert torch.allclose(found, wanted, atol=1e-5 * float(wanted.abs().max()))
