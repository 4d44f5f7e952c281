"""On an NVIDIA GPU: recipes against the same run on a CPU, resume, streams on the host, fused fake quantization.

Float32 on both sides sums in different orders, and CUDA divides by a constant with one product. A scale then differs
now and then in the last bit that float16 keeps, and a value at the edge between two codes takes the other. How far
two correct runs may be apart is stated where it is asked for.
"""

from __future__ import annotations

import gc
import itertools
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import lowbit
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.methods import training
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.training import loss_unit
from lowbit.models import offload
from lowbit.models.block import Block, Calib
from lowbit.models.forward import relative_error, run_all
from lowbit.models.offload import Rows, batches, concatenate
from lowbit.pipeline import runner
from lowbit.quant import inductor
from lowbit.quant.activations import IntTokens
from lowbit.quant.integer import IntFormat
from lowbit.runs.streamed_model import StreamedModel
from runs import folder_bytes, quantize_tiny, streamed_logits
from tiny import block_of, planned, save_tiny, tiny_ids, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none")

CUDA = torch.device("cuda", 0)
SCHEMES = ("w4a4", "w3a16-asym")
# Without learning nothing amplifies a last bit but GPTQ, which spreads every changed code over the columns behind it:
# the least share of equal codes, and the largest distance of the logits in units of their own error.
FIXED = {"rtn": (0.999, 0.05), "smoothquant": (0.99, 0.1), "awq": (0.98, 0.1), "gptq": (0.8, 0.5)}
# Learned steps go through rounding, so that a last bit ends in other codes: what they reach is compared instead.
LEARNED = ("omniquant", "affinequant", "qllm", "qllm-fold", "affinequant+qllm")
REACHED = 1.4  # factor between the errors of two runs; a map or clip that is off makes it several


def on(device: str, folder: Path, scheme: str, recipe: str, **more) -> Path:
    out = folder / f"{device}-{scheme}-{recipe}-{more.get('dtype', 'float32')}"
    quantize_tiny(folder / "m", out, scheme, recipe, device=device, effort="quick", **more)
    return out


def codes(folder: Path) -> torch.Tensor:
    model = StreamedModel(folder)
    found = [q.codes.flatten() for i in range(model.blocks) for q in model.block(i).qweights.values()]
    return torch.cat(found)


def exact_logits(folder: Path) -> torch.Tensor:
    return streamed_logits(folder / "m", tiny_ids())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("recipe", FIXED)
def test_a_recipe_that_learns_nothing_gives_nearly_the_cpus_codes(recipe, scheme, tmp_path):
    save_tiny(tmp_path / "m", "llama")
    theirs, ours = (on(device, tmp_path, scheme, recipe) for device in ("cpu", "cuda"))
    equal = float((codes(theirs) == codes(ours)).double().mean())
    exact, wanted, got = exact_logits(tmp_path), *(streamed_logits(folder, tiny_ids()) for folder in (theirs, ours))
    apart = relative_error(got, wanted) / relative_error(wanted, exact)
    print(f"{recipe} {scheme}: {equal:.5f} of the codes equal, logits {apart:.4f} of their error apart")
    share, most = FIXED[recipe]
    assert equal >= share
    assert apart <= most


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("recipe", LEARNED)
def test_a_learned_recipe_reaches_what_it_reaches_on_a_cpu(recipe, scheme, tmp_path):
    save_tiny(tmp_path / "m", "llama")
    exact = exact_logits(tmp_path)
    folders = [on(device, tmp_path, scheme, recipe) for device in ("cpu", "cuda")]
    theirs, ours = (relative_error(streamed_logits(folder, tiny_ids()), exact) for folder in folders)
    print(f"{recipe} {scheme}: error {theirs:.5f} on the CPU, {ours:.5f} on the GPU")
    assert 1 / REACHED < ours / theirs < REACHED


@pytest.mark.parametrize("recipe", ["rtn", "gptq", "affinequant", "qllm", "affinequant+qllm"])
def test_sixteen_bits_reach_what_float32_reaches(recipe, tmp_path):
    """Activations in bfloat16 have 8 bits; their noise is far below that of 4-bit codes."""
    save_tiny(tmp_path / "m", "llama")
    exact, errors = exact_logits(tmp_path), {}
    for dtype in ("float32", "bfloat16"):
        got = streamed_logits(on("cuda", tmp_path, "w4a4", recipe, dtype=dtype), tiny_ids())
        assert bool(got.isfinite().all())
        errors[dtype] = relative_error(got, exact)
    print(recipe, errors)
    assert errors["bfloat16"] <= REACHED * errors["float32"]


class Stopped(BaseException):
    pass


def differing(ours: Path, wanted: Path) -> list[str]:
    """Files that differ, and of weights the tensors; printed by pytest where the assertion fails."""
    found, out = (folder_bytes(folder) for folder in (ours, wanted)), []
    a, b = found
    for name in sorted(a.keys() | b.keys()):
        if a.get(name) == b.get(name):
            continue
        out.append(name)
        if name.endswith(".safetensors") and name in a and name in b:
            left, right = Checkpoint(ours, [name]), Checkpoint(wanted, [name])
            both = sorted(set(left.names) & set(right.names))
            out += [n for n in both if not torch.equal(left.read([n])[n], right.read([n])[n])]
    return out


@pytest.mark.parametrize("recipe", ["smoothquant+gptq", "affinequant", "affinequant+qllm"])
def test_a_run_that_was_stopped_ends_with_the_same_bytes(recipe, tmp_path, monkeypatch):
    """After its first block; a recipe over the whole model between two epochs of its last step."""
    save_tiny(tmp_path / "m", "llama")
    whole = on("cuda", tmp_path, "w4a4", recipe)
    out, calls = tmp_path / "stopped", []

    def stops(real, at):
        def call(*args):
            if len(calls) == at:
                raise Stopped
            calls.append(0)
            real(*args)

        return call

    def again():
        quantize_tiny(tmp_path / "m", out, "w4a4", recipe, device="cuda", effort="quick")

    with monkeypatch.context() as patched:
        if recipe == "affinequant+qllm":
            patched.setattr(training, "_save", stops(training._save, 2))
        else:
            patched.setattr(runner.Walk, "write", stops(runner.Walk.write, 1))
        with pytest.raises(Stopped):
            again()
    assert not (out / "lowbit.json").exists()
    again()
    assert differing(out, whole) == []


@pytest.mark.parametrize(("scheme", "close", "apart"), [("w3a16-asym", 1e-5, 1e-8), ("w4a4", 1e-2, 0.02)])
def test_evaluate_and_load_give_the_cpus_numbers(scheme, close, apart, tmp_path):
    """Rounded inputs sit at edges between codes now and then, weights do not: hence two tolerances."""
    save_tiny(tmp_path / "m", "llama")
    out = on("cuda", tmp_path, scheme, "rtn")
    text = str(tmp_path / "m" / "calib.txt")
    found = [
        lowbit.evaluate(str(out), data=text, length=24, device=device).perplexity[text] for device in ("cpu", "cuda")
    ]
    assert found[1] == pytest.approx(found[0], rel=close)
    ids, wanted = tiny_ids(), streamed_logits(out, tiny_ids())
    loaded = lowbit.load(out, device="cuda")
    assert {p.device.type for p in loaded.parameters()} == {"cuda"}
    with torch.no_grad():
        got = loaded(ids.cuda(), use_cache=False).logits.cpu()
    assert relative_error(got, wanted) < apart
    with torch.no_grad():
        half = lowbit.load(out, device="cuda", dtype=torch.bfloat16)(ids.cuda(), use_cache=False).logits
    assert bool(half.isfinite().all())


def busy(size: int = 2048) -> torch.Tensor:
    """Work that keeps the device's stream busy for a while."""
    a = torch.randn(size, size, device=CUDA)
    for _ in range(8):
        a = a @ a / size
    return a


@pytest.mark.parametrize("pinned", [True, False])
def test_parts_are_the_very_sequences_and_come_back_joined(pinned):
    x = torch.randn(23, 64, 512)
    x = x.pin_memory() if pinned else x

    def worked():
        for part in batches(x, 4, torch.device("cuda")):
            assert part.device == CUDA
            busy()  # what comes next must neither overtake this nor overwrite the part
            yield part + 1

    got = concatenate(worked(), len(x), x.device)
    assert got.is_pinned()
    assert torch.equal(got, x + 1)
    here = x.cuda()
    assert all(p.untyped_storage().data_ptr() == here.untyped_storage().data_ptr() for p in batches(here, 4, CUDA))


def test_few_parts_are_on_the_device_at_once():
    x = torch.zeros(64, 256, 1024).pin_memory()  # a sequence is a megabyte
    busy()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for part in batches(x, 4, CUDA):
        part.sum()
        busy()
        del part
    assert torch.cuda.max_memory_allocated() - before < 100 << 20  # five parts and what keeps the device busy


def test_few_pieces_wait_on_the_device_while_they_are_joined():
    size, count = 1 << 22, 24  # numbers in a piece, pieces; each is made far faster than it is copied
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    pieces = (torch.full((1, size), float(i), device=CUDA) for i in range(count))
    out = concatenate(pieces, count, torch.device("cpu"))
    assert torch.equal(out[:, 0], torch.arange(float(count)))
    assert torch.equal(out[:, -1], torch.arange(float(count)))
    assert torch.cuda.max_memory_allocated() - before <= 4 * 4 * size


def test_rows_are_the_chosen_ones_prepared_or_not(monkeypatch):
    x, y, here = torch.randn(9, 64, 512).pin_memory(), torch.randn(9, 33), torch.randn(9, 5, device=CUDA)
    sent = []
    real = offload._start_copy
    monkeypatch.setattr(offload, "_start_copy", lambda *args: sent.append(0) or real(*args))
    rows = Rows(torch.device("cuda"), x, y, here)
    order = [torch.tensor(some) for some in ([3, 1], [0], [8, 7, 2], [3, 1], [5])]
    for now, then in itertools.zip_longest(order, order[1:]):
        if then is not None:
            rows.prepare(then)
        busy()
        got = rows(now)
        assert all(value.device == CUDA for value in got)
        for value, stream in zip(got, (x, y, here), strict=True):
            assert torch.equal(value.cpu(), stream.cpu()[now])
    assert len(sent) == len(order)  # each was copied once: what was prepared was used
    for index in range(4):  # never asked for: only the last are kept
        rows.prepare(torch.tensor([index]))
    assert len(rows._ready) == offload.READY
    assert torch.equal(rows(torch.tensor([6]))[0].cpu(), x[[6]])


def test_a_block_over_a_stream_on_the_host_gives_the_devices_bits():
    block, x = block_of(tiny_model("llama"))
    block = on_gpu(block)
    here = x.cuda()
    far = run_all(block, x.pin_memory(), batch=3)
    assert far.device.type == "cpu"
    assert torch.equal(far, run_all(block, here, batch=3).cpu())
    for loss in ("token", "mse"):
        torch.testing.assert_close(
            loss_unit(x.pin_memory(), loss, CUDA, 3), loss_unit(here, loss, CUDA), rtol=1e-6, atol=0
        )


def on_gpu(value):
    """A block, or what it holds, with every tensor on the GPU."""
    if isinstance(value, torch.Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {key: on_gpu(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(on_gpu(one) for one in value)
    if isinstance(value, Block):
        return replace(value, kwargs=on_gpu(value.kwargs), params=on_gpu(value.params))
    return value


@pytest.mark.parametrize("recipe", ["smoothquant+gptq", "affinequant+qllm"])
def test_memory_on_the_device_does_not_grow_with_calibration(recipe, tmp_path):
    """One stream of the sequences that are more takes 12 MiB; growth of a quarter of it would be no stream."""
    save_tiny(tmp_path / "m", "llama", max_position_embeddings=512)
    text = tiny_ids(1, 90_000, seed=5)[0].tolist()
    (tmp_path / "m" / "calib.txt").write_text("".join(chr(30 + i) for i in text))
    settings = [f"{step}.epochs=1" for step in ("affinequant", "lowrank", "tune") if "qllm" in recipe]
    peaks = []
    for run, samples in enumerate((32, 32, 128)):  # the first makes what stays: libraries' workspaces
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        lowbit.quantize(
            str(tmp_path / "m"),
            tmp_path / str(run),
            scheme="w4a4",
            recipe=recipe,
            data=str(tmp_path / "m" / "calib.txt"),
            samples=samples,
            length=512,
            device="cuda",
            settings=settings,
        )
        peaks.append(torch.cuda.max_memory_allocated() - before)
    stream = 96 * 512 * 64 * 4
    print(recipe, [f"{peak / 2**20:.1f} MiB" for peak in peaks])
    assert peaks[2] - peaks[1] < stream / 4


@pytest.fixture(scope="module")
def _kernels(tmp_path_factory):
    """Kernels of these tests, not those that an earlier torch has left."""
    before = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path_factory.mktemp("inductor"))
    yield
    if before is None:
        del os.environ["TORCHINDUCTOR_CACHE_DIR"]
    else:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = before


def close(got: torch.Tensor, wanted: torch.Tensor, most: float = 1e-4) -> None:
    """Gradients are sums in another order; measured by their norm."""
    assert float((got - wanted).double().norm()) <= most * float(wanted.double().norm()) + 1e-12


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize(
    "format",
    [
        IntFormat(4),
        IntFormat(3, None, False),
        IntFormat(2, 64, False),
        IntFormat(8, 16),
        IntFormat(4, 32, False, torch.bfloat16),
        IntFormat(4, None, False, torch.float32),
    ],
    ids=lambda format: f"{format.name}-{format.scale_dtype}",
)
def test_a_compiled_weight_is_the_plain_one_bit_for_bit(format):
    generator = torch.Generator().manual_seed(0)
    for rows, columns in ((64, 192), (333, 4096)):
        weight = torch.randn(rows, columns, generator=generator)
        weight[:, 3] *= 40
        weight[5] = 0
        weight[6] *= 1e-9
        weight[7] = weight[7].abs()
        ends = [torch.rand(rows, format.groups(columns), generator=generator) * 0.5 + 0.5 for _ in range(2)]
        leaves = [value.cuda().requires_grad_() for value in (weight, *ends)]
        slope = torch.randn(rows, columns, generator=generator).cuda()
        slope[5] = 0  # a scale below 1e-38 leaves nothing of a gradient to compare
        wanted = format.fake_quant(leaves[0], format.qparams(*leaves))
        exact = torch.autograd.grad(wanted, leaves, slope)
        with inductor.on():
            got = format.fake_quant_clipped(*leaves)
            found = torch.autograd.grad(got, leaves, slope)
        assert got.grad_fn is not None
        off = int((got != wanted).sum())
        assert off == 0, f"{off} of {got.numel()} values differ at {rows} x {columns}"
        for mine, theirs in zip(found, exact, strict=True):
            close(mine, theirs)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "symmetric"), [(4, False), (6, True)])
def test_compiled_tokens_are_the_plain_ones_bit_for_bit(bits, symmetric, dtype):
    format, generator = IntTokens(bits, symmetric), torch.Generator().manual_seed(0)
    for shape in ((1, 3, 9, 64), (1, 128, 11008)):
        x = torch.randn(shape, generator=generator)
        x[..., 3] *= 30
        x[:, 1] = 0
        x = x.cuda().to(dtype).requires_grad_()
        ends = torch.tensor([0.9, 0.8], device=CUDA, dtype=dtype)
        offset = (torch.rand(shape[-1], generator=generator) - 0.5).cuda().to(dtype)
        for more in ((), (ends[0], ends[1]), (ends[0], ends[1], offset)):
            wanted = format.fake_quant(x, *more)
            with inductor.on():
                got = format.fake_quant(x, *more)
                (found,) = torch.autograd.grad(got.float().square().sum(), x)
            off = int((got != wanted).sum())
            assert off == 0, f"{off} of {got.numel()} values differ at {shape}, {len(more)} more"
            (exact,) = torch.autograd.grad(wanted.float().square().sum(), x)
            close(found, exact, 1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("scheme", ["w4a4", "w2a16g16-asym"])
def test_a_fits_loss_is_the_same_number_compiled(scheme):
    block, x = block_of(tiny_model("llama"))
    block, x = on_gpu(planned(block, scheme)), x.cuda()
    step = AffineQuant()
    calib = Calib(x, x, run_all(block, x))
    fitting = AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)
    fitting.begin(1)
    chosen = torch.arange(len(x))
    leaves = [leaf for group, _ in fitting.groups() for leaf in group]
    plain = fitting.loss(chosen)
    exact = torch.autograd.grad(plain, leaves, allow_unused=True)
    with inductor.on():
        fused = fitting.loss(chosen)
        found = torch.autograd.grad(fused, leaves, allow_unused=True)
    assert fused.item() == plain.item()
    largest = max(float(one.norm()) for one in exact if one is not None)
    for mine, theirs in zip(found, exact, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:  # some are differences of large terms
            assert float((mine - theirs).norm()) <= 1e-3 * float(theirs.norm()) + 1e-5 * largest


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("recipe", ["affinequant", "affinequant+qllm"])
def test_a_compiled_run_reaches_what_a_plain_one_reaches_and_says_that_it_was(recipe, tmp_path):
    save_tiny(tmp_path / "m", "llama")
    exact, errors = exact_logits(tmp_path), []
    for fused in (False, True):
        out = tmp_path / f"out-{fused}"
        made = quantize_tiny(tmp_path / "m", out, "w4a4", recipe, device="cuda", effort="quick", compiled=fused)
        assert made.manifest.identity.compiled == fused
        errors.append(relative_error(streamed_logits(out, tiny_ids()), exact))
    print(recipe, errors)
    assert errors[1] <= REACHED * errors[0]
    assert not inductor._using[0]
