"""The head by GPTQ against the last hidden states, and scales of embedding and head that are searched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import lowbit
from lowbit.errors import LowbitError
from lowbit.exporters.run import open_run
from lowbit.methods.gptq import GPTQ
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline import runner
from lowbit.pipeline.head import head_gram
from tiny import save_tiny, skeleton_of, tiny_ids, tiny_model

BOTH = {"lm_head": "w4g32", "model.embed_tokens": "w4g32"}


def run_of(folder: Path, name: str, overrides: dict[str, str], *settings: str) -> Path:
    given: dict[str, Any] = {"data": str(folder / "model/calib.txt"), "samples": 8, "length": 24}
    made = lowbit.quantize(
        str(folder / "model"),
        folder / name,
        scheme="w8a16g32-sym",
        recipe="gptq",
        overrides=overrides,
        settings=settings,
        **given,
    )
    return made.out


def test_the_input_of_the_head_is_what_the_model_gives_it() -> None:
    """Gemma 2, whose norm has an offset and whose logits are capped."""
    model, ids = tiny_model("gemma2"), tiny_ids(3)
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        hidden: list[torch.Tensor] = []
        model.model.layers[-1].register_forward_hook(
            lambda module, args, out: hidden.append(out if isinstance(out, torch.Tensor) else out[0])
        )
        model(ids)
    skeleton: Skeleton = skeleton_of(model)
    skeleton.embed(ids[:1])
    found = head_gram(skeleton, ids, hidden[0], GPTQ(tokens="unweighted"), None)
    rows = seen[0].flatten(0, -2)
    assert torch.allclose(found, rows.T @ rows, rtol=1e-4, atol=1e-4 * float(found.abs().max()))


def test_the_head_errs_less_on_the_last_hidden_states_and_a_resumed_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(tmp_path / "model", "llama")
    nearest = run_of(tmp_path, "nearest", BOTH)
    ours = run_of(tmp_path, "ours", BOTH, "gptq.head=true")
    weights = {name: open_run(folder).qtensor("lm_head") for name, folder in (("rtn", nearest), ("gptq", ours))}
    for module in ("model.embed_tokens", "model.layers.1.mlp.up_proj"):
        assert torch.equal(open_run(nearest).qtensor(module).codes, open_run(ours).qtensor(module).codes)
    model = lowbit.load(str(nearest))
    seen: list[torch.Tensor] = []
    model.lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tiny_ids(8, seed=5))
    original = tiny_model("llama").lm_head.weight.detach()
    error = {name: float((seen[0] @ (q.dequantize() - original).T).square().sum()) for name, q in weights.items()}
    assert error["gptq"] < 0.9 * error["rtn"]

    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(runner, "head_codes", stop)
        with pytest.raises(KeyboardInterrupt):
            run_of(tmp_path, "again", BOTH, "gptq.head=true")
    again = run_of(tmp_path, "again", BOTH, "gptq.head=true")
    for file in sorted(ours.glob("*.safetensors")):
        assert (again / file.name).read_bytes() == file.read_bytes()


def test_a_matrix_that_embedding_and_head_share_in_one_format_keeps_one_set_of_codes(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama", tie_word_embeddings=True)
    run = open_run(run_of(tmp_path, "run", BOTH, "gptq.head=true"))
    assert torch.equal(run.qtensor("lm_head").codes, run.qtensor("model.embed_tokens").codes)
    own = open_run(run_of(tmp_path, "own", {**BOTH, "lm_head": "w8g32"}, "gptq.head=true"))
    weight = tiny_model("llama", tie_word_embeddings=True).lm_head.weight.detach()
    head = own.qtensor("lm_head")
    assert not torch.equal(head.format.quantize(weight, head.qparams).codes, head.codes)


def test_searched_scales_of_an_embedding_err_less(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    weight = tiny_model("llama").model.embed_tokens.weight.detach()
    errors = []
    for name, settings in (("rule", ()), ("searched", ("gptq.search=true",))):
        q = open_run(run_of(tmp_path, name, {"model.embed_tokens": "w4g32"}, *settings)).qtensor("model.embed_tokens")
        errors.append(float((q.dequantize() - weight).square().sum()))
    assert errors[1] < errors[0]


def test_an_unknown_option_beside_it_is_refused(tmp_path: Path) -> None:
    save_tiny(tmp_path / "model", "llama")
    with pytest.raises(LowbitError, match="heads"):
        run_of(tmp_path, "run", BOTH, "gptq.heads=true")
