"""Hadamard transform and quantization as one operation, and as one kernel, against the two after each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lowbit
from interpreted import DEVICE, needs_triton
from lowbit.errors import LowbitError
from lowbit.models import fused_kernels
from lowbit.models.fixed_hadamard import FixedHadamard
from lowbit.models.gathered_norm import GatheredRMSNorm
from lowbit.models.hadamard import Hadamard, random_flips
from lowbit.models.hadamard_quantize import HadamardQuantize
from lowbit.models.kronecker import Kronecker
from lowbit.models.runtime_ops import Clip, RuntimeOp
from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import IntFormat
from lowbit.quant.runtimes import RuntimeInput
from runs import quantize_tiny
from tiny import save_tiny, tiny_ids

MIXES: dict[str, Hadamard | FixedHadamard] = {
    "64": Hadamard(random_flips(1, 64, 0)),
    "96 = 32 x 3": Hadamard(random_flips(1, 96, 1)),
    "three blocks of 32": Hadamard(random_flips(3, 32, 2)),
    "two blocks of 24": Hadamard(random_flips(2, 24, 3)),
    "no signs": FixedHadamard.of(96, 32),
    "no butterflies": Hadamard(random_flips(1, 9, 4)),
}
FORMATS = [IntTokens(4, symmetric=False), IntTokens(8, symmetric=True)]


def draw(width: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Tokens with an outlier channel, and one of zeros."""
    x = torch.randn(2, 9, width, generator=torch.Generator().manual_seed(0))
    x[..., 5] *= 20
    x[1, 3] = 0
    return x.to(dtype)


def test_where_it_applies() -> None:
    mix, format = MIXES["64"], FORMATS[0]
    clip = Clip(torch.tensor([0.9, 0.8]))
    assert HadamardQuantize.of(mix, format, None) == HadamardQuantize(mix, format)
    assert HadamardQuantize.of(mix, format, clip) == HadamardQuantize(mix, format, clip.ratios)
    others: list[tuple[RuntimeOp | None, object, RuntimeOp | None]] = [
        (None, format, None),
        (Kronecker(torch.eye(8), torch.eye(8)), format, None),
        (mix, RuntimeInput("llama.cpp", IntFormat(4, 32)), None),
        (mix, format, Clip(torch.ones(2), torch.zeros(64))),
        (FixedHadamard.of(2**16, 2**16), format, None),
    ]
    for given in others:
        assert HadamardQuantize.of(*given) is None  # type: ignore[arg-type]


def test_the_plain_form_is_the_two_after_each_other() -> None:
    x, mix = draw(64), MIXES["64"]
    for format in FORMATS:
        assert torch.equal(HadamardQuantize(mix, format)(x), format.fake_quant(mix(x)))
        clip = Clip(torch.tensor([0.9, 0.8]))
        assert torch.equal(HadamardQuantize(mix, format, clip.ratios)(x), clip(mix(x), format))


@needs_triton
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_the_kernel_gives_the_plain_forms_numbers(
    mix: Hadamard | FixedHadamard, format: IntTokens, clipped: bool
) -> None:
    x = draw(mix.width).to(DEVICE)
    what = HadamardQuantize(mix.to(DEVICE), format, torch.tensor([0.9, 0.8], device=DEVICE) if clipped else None)
    found, wanted = what.fused(x), what(x)
    spread = what.mix(x)
    step = (spread.amax(-1) - spread.amin(-1)).clamp(min=1e-6) / (2**format.bits - 1)
    # A sum in another order moves a value by an ulp, which may take one at the edge between two codes a step further.
    off = (found - wanted).abs() / step[..., None]
    assert float(off.max()) < 2.01
    assert float((off > 1e-3).float().mean()) < 2e-3
    assert torch.equal(found[1, 3], torch.zeros_like(found[1, 3]))


@needs_triton
def test_the_kernel_keeps_shape_and_dtype_and_refuses_another_width() -> None:
    what = HadamardQuantize(MIXES["64"].to(DEVICE), FORMATS[0])
    x = draw(64, torch.bfloat16).to(DEVICE)
    found = what.fused(x)
    assert found.shape == x.shape
    assert found.dtype == torch.bfloat16
    assert float((found.float() - what(x).float()).abs().mean()) < 0.05 * float(what(x).float().abs().mean())
    assert what.fused(x[:0]).shape == (0, 9, 64)
    with pytest.raises(LowbitError, match=r"the transform takes \(\.\.\., 64\)"):
        what.fused(draw(96).to(DEVICE))


@needs_triton
@pytest.mark.parametrize(
    ("recipe", "settings", "kernels"), [("hadamard+gptq", (), {"hadamard"}), ("qllm", (), {"gather"})]
)
def test_a_loaded_run_goes_through_the_kernels_and_computes_the_same(
    recipe: str, settings: tuple[str, ...], kernels: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "m", "llama")
    settings = ("reassemble.sites=norms", "reassemble.theta=most") if recipe == "qllm" else settings
    quantize_tiny(tmp_path / "m", tmp_path / "out", "w4a4", recipe, settings=settings, effort="quick")
    model, ids = lowbit.load(tmp_path / "out", device=DEVICE), tiny_ids(2).to(DEVICE)
    monkeypatch.setattr(fused_kernels, "TRITON", False)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    monkeypatch.setattr(fused_kernels, "on_kernels", lambda x: True)
    called: set[str] = set()
    for kind, owner, name in (("hadamard", HadamardQuantize, "fused"), ("gather", GatheredRMSNorm, "fused")):
        real = getattr(owner, name)

        def spy(self: object, x: torch.Tensor, real: object = real, kind: str = kind) -> torch.Tensor:
            called.add(kind)
            return real(self, x)  # type: ignore[operator, no-any-return]

        monkeypatch.setattr(owner, name, spy)
    with torch.no_grad():
        fused = model(ids, use_cache=False).logits
    assert called == kernels
    # A code at a tie may fall the other way, and the rest of the model follows it.
    assert float((fused - plain).square().mean().sqrt() / plain.std()) < 0.1
