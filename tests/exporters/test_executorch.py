"""An ExecuTorch program holds the run's own integers, and its runtime computes what the simulation says."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.cli.main import call
from lowbit.errors import LowbitError
from lowbit.evaluation.generate import generate_text
from lowbit.exporters.pte_model import int_tensor, program_of
from lowbit.exporters.run import open_run
from lowbit.exporters.xnnpack import signed_codes, stored, stored_bits, unpack, why_not
from lowbit.quant.format import QParams, QTensor
from lowbit.quant.integer import IntFormat
from lowbit.quant.runtimes import qd8
from tiny import save_tiny, tiny_ids


def make(folder: Path, family: str, scheme: str | None = "w4a16g32-sym", changes: Any = None, **more: Any) -> Path:
    save_tiny(folder / "model", family, **{"num_hidden_layers": 2, **(changes or {})})
    text = str(folder / "model" / "calib.txt")
    made = {"recipe": "rtn", "data": text, "samples": 2, "length": 16, **more}
    lowbit.quantize(str(folder / "model"), folder / "run", scheme=scheme, **made)
    return folder / "run"


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w4a4", r"w4a4, act: inputs are quantized to a4-asym; XNNPACK's are a8-asym.*nearest that fits: w4a8-asym$"),
        ("w4a8g32-sym", r"act: inputs are quantized to a8-sym; .*nearest that fits: w4a8g32-sym-asym$"),
        ("w4a8g32-asym", r"weight: .*asymmetric 4 bits.*nearest that fits: w4a8-asym$"),
        ("w4afp8g32", r"act: inputs are quantized to fp8; .*nearest that fits: w4a8g32-sym-asym$"),
        ("w4a16g32-asym", r"weight: .*asymmetric 4 bits.*nearest that fits: w4a16-asym$"),
        ("w4a16g16-sym", r"weight: .*groups of 16.*nearest that fits: w4a16g32-sym$"),
        ("w8a16g32-sym", r"weight: .*one scale per row.*nearest that fits: w8a16-sym$"),
        ("w4a16kv8", r"kv: .*nearest that fits: w4a16-sym$"),
    ],
)
def test_what_does_not_fit_is_refused(refusal_of: Callable[..., str], scheme: str, message: str) -> None:
    assert re.search(message, refusal_of("executorch", scheme))


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "opt"])
def test_attention_that_the_program_lacks_is_refused(refusal_of: Callable[..., str], family: str) -> None:
    assert "architecture: model_type" in refusal_of("executorch", "w4a16g32-sym", family)


@pytest.mark.parametrize(
    ("bits", "symmetric", "size", "kind"),
    [
        (2, False, 64, "qbint4"), (3, False, 32, "qbint4"), (4, True, 32, "qbint4"), (4, True, None, "qbint4"),
        (4, False, None, "qcint8"), (6, True, None, "qcint8"), (7, False, None, "qcint8"), (8, True, None, "qcint8"),
    ],
)  # fmt: skip
def test_stores_hold_codes_and_qparams(bits: int, symmetric: bool, size: int | None, kind: str) -> None:
    format = IntFormat(bits, size, symmetric, torch.bfloat16)
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(bits))
    q = format.quantize(weight, format.qparams(weight))
    assert why_not(format, 128) is None
    assert stored_bits(format) == int(kind[-1])
    codes = signed_codes(q)
    if kind.endswith("4"):  # as XNNPACK's serializer packs them
        halves = (codes + 8).to(torch.uint8)
        codes = halves[:, 1::2] << 4 | halves[:, ::2]
    scale = q.qparams.scale.to(torch.bfloat16) if kind == "qbint4" else q.qparams.scale
    raw = bytes(scale.contiguous().flatten().view(torch.uint8).tolist())
    data = bytes(codes.contiguous().view(torch.uint8).flatten().tolist())
    assert torch.equal(unpack(data, raw, kind, (6, 128)), q.dequantize())


def test_scales_of_int4_are_rounded_and_no_others() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for format, moves in (
        (IntFormat(4, 32), True),
        (IntFormat(4), True),
        (IntFormat(8), False),
        (IntFormat(4, 32, True, torch.bfloat16), False),
    ):
        q = format.quantize(weight, format.qparams(weight))
        gap = (stored(q).qparams.scale - q.qparams.scale).abs() / q.qparams.scale
        assert torch.equal(stored(q).codes, q.codes)
        assert float(gap.max()) <= 2.0**-8  # half a step of bfloat16's 8 significant bits
        assert bool(gap.any()) == moves


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that was made for ExecuTorch, and its export."""
    pytest.importorskip("executorch", reason="pip install 'lowbit[executorch]'; make test-runtimes does")
    folder = tmp_path_factory.mktemp("executorch")
    run = make(folder, "llama", None, target="executorch")
    made = lowbit.export(run, "executorch", context=64)
    assert made.warnings == []
    assert {"model.pte", "tokenizer.json"} <= {file.name for file in made.out.iterdir()}
    return run, made.out


@pytest.mark.heavy
@pytest.mark.runtimes
def test_integers_read_back_bit_for_bit_and_logits_are_the_simulations(program: tuple[Path, Path]) -> None:
    (found,) = lowbit.verify(program[0], [program[1]])
    assert found.ok, found
    parameters = len(lowbit.load(program[0]).state_dict())
    assert found.exact == found.tensors == parameters + 1  # and the frequencies of the rotary embedding
    # The same int8 inputs on both sides; what is left is the order of sums, which now and then moves a code.
    assert found.logits is not None
    assert found.logits < 0.01


@pytest.mark.heavy
@pytest.mark.runtimes
def test_inputs_are_rounded_as_the_simulation_says() -> None:
    pytest.importorskip("executorch", reason="pip install 'lowbit[executorch]'; make test-runtimes does")
    from executorch.runtime import Runtime

    linear = torch.nn.Linear(64, 64, bias=False)  # the identity: what comes out is what went in, rounded
    eye = QTensor(8 + torch.eye(64).byte(), QParams(torch.ones(64, 2), torch.full((64, 2), 8.0)), IntFormat(4, 32))
    linear.weight = torch.nn.Parameter(int_tensor(eye), requires_grad=False)
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-4, 4, 200)[:, None]
    x[0], x[1], x[2], x[3] = 0.0, x[1].abs(), -x[2].abs(), 7.0  # no range, ranges that do not straddle 0, one value
    x[100:] += torch.logspace(4, -4, 100)[:, None]
    program = program_of(linear, (x,), None, {}).buffer
    got = Runtime.get().load_program(program).load_method("forward").execute([x])[0]
    # A code off by one would be 1 / 255 of the range; one rounding of the product with the scale is 2**-24 of it.
    assert float(((got - qd8(x)).abs().amax(1) / x.abs().amax(1).clamp(min=1e-30)).max()) < 2.0**-20


@pytest.mark.heavy
@pytest.mark.runtimes
def test_text_goes_on_as_in_the_simulation(program: tuple[Path, Path]) -> None:
    from lowbit.exporters.pte_runtime import Session

    run, out = program
    ids = tiny_ids(1, 12)
    with torch.no_grad():
        expected = lowbit.load(run).generate(ids, max_new_tokens=16, do_sample=False)[0, 12:].tolist()
    session = Session(out / "model.pte")
    got = [token for token, _ in zip(session.greedy(ids[0].tolist(), (2,)), range(16), strict=False)]
    assert got == expected


@pytest.mark.heavy
@pytest.mark.runtimes
def test_executorchs_own_text_runner_takes_the_folder(program: tuple[Path, Path]) -> None:
    import executorch.extension.llm.custom_ops.custom_ops
    import executorch.kernels.quantized  # noqa: F401
    from executorch.extension.llm.runner import GenerationConfig, TextLLMRunner

    run, out = program
    pieces: list[str] = []
    runner = TextLLMRunner(str(out / "model.pte"), str(out / "tokenizer.json"))
    runner.generate("ABCDEFGH", GenerationConfig(max_new_tokens=12, temperature=0.0, echo=False), pieces.append)
    assert "".join(pieces) == generate_text(run, "ABCDEFGH", 12).removeprefix("ABCDEFGH")


@pytest.mark.heavy
@pytest.mark.runtimes
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("model.layers.1.mlp.up_proj", "codes"),
        ("model.layers.0.self_attn.k_proj", "scales"),
        ("model.norm", "floats"),
    ],
)
def test_one_wrong_byte_is_named(program: tuple[Path, Path], tmp_path: Path, name: str, key: str) -> None:
    run, out = program
    opened = open_run(run)
    if key == "floats":
        needle = bytes(opened.tensor(f"{name}.weight").float().view(torch.uint8).tolist())
    else:
        q = opened.qtensor(name)
        halves = (signed_codes(q) + 8).to(torch.uint8)
        packed = (halves[:, 1::2] << 4 | halves[:, ::2]).flatten()
        needle = bytes(
            (packed if key == "codes" else q.qparams.scale.bfloat16().flatten().view(torch.uint8)).tolist()
        )
    content = bytearray((out / "model.pte").read_bytes())
    assert content.count(needle) == 1
    content[content.index(needle) + 9] ^= 0x10
    (tmp_path / "m.pte").write_bytes(content)
    (found,) = lowbit.verify(run, [tmp_path / "m.pte"], logits=False)
    assert found.differs == [f"{name}.weight"]
    assert found.max_difference > 0
    assert call(["verify", str(run), str(tmp_path / "m.pte"), "--no-logits"]) == 1


@pytest.mark.heavy
@pytest.mark.runtimes
def test_a_cut_file_and_another_tokenizer_are_seen(program: tuple[Path, Path], tmp_path: Path) -> None:
    run, out = program
    (tmp_path / "m.pte").write_bytes((out / "model.pte").read_bytes()[:-3000])
    assert lowbit.verify(run, [tmp_path / "m.pte"], logits=False)[0].unreadable
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in out.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / "tokenizer.json").write_text("{}")
    assert lowbit.verify(run, [copy], logits=False)[0].other == ["tokenizer.json"]


@pytest.mark.heavy
@pytest.mark.runtimes
@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama-odd", {}),
        ("qwen2", {}),
        ("qwen3", {"model.embed_tokens": "w8", "lm_head": "w8", "*.down_proj": "w6"}),
        ("phi3", {}),
        ("llama", {"model.embed_tokens": "w4g32", "lm_head": "w4", "*.down_proj": "w3"}),
    ],
)
def test_other_families_with_float16_scales(tmp_path: Path, family: str, overrides: dict[str, str]) -> None:
    pytest.importorskip("executorch", reason="pip install 'lowbit[executorch]'; make test-runtimes does")
    run = make(tmp_path, family, changes={"num_hidden_layers": 3, "vocab_size": 128}, overrides=overrides)
    made = lowbit.export(run, "executorch", context=64)
    assert "scales as bfloat16" in made.warnings[0]
    (found,) = lowbit.verify(run, [made.out])
    assert found.ok, found


@pytest.mark.heavy
@pytest.mark.runtimes
def test_quantized_inputs_of_the_scheme_are_those_of_the_program(tmp_path: Path) -> None:
    """8da4w: symmetric weights in groups, and inputs in int8 with a zero point, which the folder states itself."""
    pytest.importorskip("executorch", reason="pip install 'lowbit[executorch]'; make test-runtimes does")
    run = make(tmp_path, "llama", "w4a8g32-sym-asym", target="executorch")
    made = lowbit.export(run, "executorch", context=64)
    assert made.warnings == []
    (found,) = lowbit.verify(run, [made.out])
    assert found.ok, found
    assert found.exact == found.tensors == len(lowbit.load(run).state_dict()) + 1
    # The folder computes as compressed-tensors does, the program as XNNPACK: floats round differently in few places.
    assert found.logits is not None
    assert found.logits < 0.01


def test_a_cache_longer_than_the_model_is_refused(run_of: Callable[..., Path], tmp_path: Path) -> None:
    for context in (1, 129):
        with pytest.raises(LowbitError, match=f"--context {context} given; allowed: 2 to 128"):
            lowbit.export(run_of("w4a16g32-sym"), "executorch", out=tmp_path / "out", context=context)
    assert not list(tmp_path.iterdir())


def test_without_the_package_there_is_one_line(
    run_of: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_of("w4a16g32-sym")
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(LowbitError, match=r"pip install 'lowbit\[executorch\]'"):
        lowbit.export(run, "executorch", out=tmp_path / "out")
    assert not list(tmp_path.iterdir())
