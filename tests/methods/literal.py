"""Checks of methods against literal, independent computations: no format, hook or search of the library is used.

Each check takes nothing and raises ``AssertionError`` where the method differs; ``mutants.py`` has the wrong variants
that must fail them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lowbit.methods import RTN
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.lowrank import Correction, LowRank
from lowbit.methods.options import with_options
from lowbit.methods.reassemble import Reassemble
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run, run_all
from tiny import block_of, planned, tiny_model

GROUPS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
TRIES, MOST, GRID, DAMPING = 4, 0.3, 200, 0.01


# The search for theta.


def rounded_input(x: Tensor) -> Tensor:
    """Four bits per token, with a zero point."""
    high, low = x.amax(-1, keepdim=True).clamp(min=0), x.amin(-1, keepdim=True).clamp(max=0)
    scale = (high - low) / 15
    scale = torch.where(scale == 0, torch.finfo(x.dtype).eps, scale)
    zero = (-8 - low / scale).clamp(-8, 7).round()
    return ((x / scale + zero).clamp(-8, 7).round() - zero) * scale


def rounded_weight(weight: Tensor) -> Tensor:
    """Four bits per row, with a zero point and a float16 scale."""
    high, low = weight.amax(1, keepdim=True).clamp(min=0), weight.amin(1, keepdim=True).clamp(max=0)
    scale = ((high - low) / 15).half().float()
    zero = (-low / scale).round().clamp(0, 15)
    return (((weight / scale).round() + zero).clamp(0, 15) - zero) * scale


@dataclass
class Layer:
    """The library's layer, with what is gathered behind its norms: ``(index, divisor)`` by name."""

    module: Any
    kwargs: dict[str, Any]
    gathers: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def copy(self) -> Layer:
        return Layer(copy.deepcopy(self.module), self.kwargs, dict(self.gathers))

    def weight(self, name: str) -> Tensor:
        return self.module.get_submodule(name).weight.data

    def set(self, name: str, value: Tensor) -> None:
        self.module.get_submodule(name).weight.data = value.float().contiguous()

    @torch.no_grad()
    def output(self, x: Tensor, taps: dict[str, Any] | None = None) -> Tensor:
        """In float, behind its gathers; ``taps`` by linear receive and may replace its input."""
        hooks = []
        for name, tap in (taps or {}).items():
            hook = lambda module, args, tap=tap: (tap(args[0]),)  # noqa: E731
            hooks.append(self.module.get_submodule(name).register_forward_pre_hook(hook))
        for name, (idx, divisor) in self.gathers.items():
            gather = lambda module, args, out, idx=idx, d=divisor: out[..., idx] * (1 / d).float()  # noqa: E731
            hooks.append(self.module.get_submodule(name).register_forward_hook(gather))
        out = self.module(x, **self.kwargs)
        for hook in hooks:
            hook.remove()
        return out[0] if isinstance(out, tuple) else out

    def input(self, name: str, x: Tensor) -> Tensor:
        """Every token that a linear reads, as rows."""
        seen: list[Tensor] = []
        self.output(x, {name: lambda rows: seen.append(rows) or rows})
        return seen[0].flatten(0, 1)

    def error(self, x: Tensor, y: Tensor) -> float:
        """With weights and inputs rounded, each token's error relative to its float output."""
        whole, names = self.copy(), [name for group in GROUPS for name in group]
        for name in names:
            whole.set(name, rounded_weight(self.weight(name)))
        off = (whole.output(x, dict.fromkeys(names, rounded_input)) - y).square().mean(-1)
        return float((off / y.square().mean(-1)).mean())


def without(weight: Tensor, gram: Tensor, keep: Tensor, count: int) -> tuple[list[int], Tensor]:
    """The channels that greedy dropping takes, and the least-squares weight on the others, by brute force."""
    gram = gram + DAMPING * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    gone: list[int] = []

    def answer(dropped: list[int]) -> tuple[Tensor, float]:
        kept, solved = [i for i in range(len(gram)) if i not in dropped], torch.zeros_like(weight)
        moved = gram[kept][:, dropped] @ weight[:, dropped].T
        solved[:, kept] = weight[:, kept] + torch.linalg.solve(gram[kept][:, kept], moved).T
        change = solved - weight
        return solved, float(((change @ gram) * change).sum())

    while len(gone) < count:
        free = [i for i in range(len(gram)) if i not in gone and not keep[i]]
        gone.append(min(free, key=lambda i: answer([*gone, i])[1]))
    return gone, answer(gone)[0] if gone else weight


def search(layer: Layer, norm: str | None, readers: tuple[str, ...], step: Reassemble, calib: Calib) -> Any:
    """The scores by number of copies, and the layers that they are of, for one edge."""
    rows = layer.input(readers[0], calib.x_fp)
    unit = rows.square().mean(1, keepdim=True).sqrt()
    peak = rows.abs().amax(0) if step.peaks == "absolute" else (rows.abs() / unit).pow(8).mean(0).pow(1 / 8)
    rows = rows / unit if step.tokens == "normalized" else rows
    by_total: dict[int, Tensor] = {}
    for position in range(1, GRID):
        copies = (peak / (float(peak.max()) * (1 - position / GRID))).ceil().clamp(min=1).long()
        total = int((copies - 1).sum())
        if total > MOST * len(peak):
            break
        if total:
            by_total.setdefault(total, copies)
    totals = list(by_total)
    tried = {totals[int(i)] for i in torch.linspace(0, len(totals) - 1, min(TRIES, len(totals)))}
    weight = torch.cat([layer.weight(name) for name in readers]).double()
    keep = by_total[max(tried)] > 1
    made = {0: layer}
    for total in sorted(tried):
        copies = by_total[total]
        gone, solved = without(weight, (rows.T @ rows).double(), keep, total)
        idx = torch.arange(len(peak))
        idx[sorted(gone)] = torch.tensor([c for c in range(len(peak)) for _ in range(int(copies[c]) - 1)])
        divisor, other = copies[idx].double(), layer.copy()
        sizes = [len(layer.weight(name)) for name in readers]
        for name, part in zip(readers, solved[:, idx].split(sizes), strict=True):
            other.set(name, part)
        if norm is not None:
            other.gathers[norm] = (idx, divisor)
        else:
            other.set("mlp.gate_proj", layer.weight("mlp.gate_proj")[idx])
            other.set("mlp.up_proj", layer.weight("mlp.up_proj")[idx].double() / divisor[:, None])
        made[total] = other
    few = slice(0, step.sequences)
    return {total: one.error(calib.x_q[few], calib.y_fp[few]) for total, one in made.items()}, made


@cache
def theta_case() -> tuple[Block, Calib, Layer]:
    """A layer with outlier channels behind a norm and before down_proj, and hidden states of two streams."""
    model = tiny_model("llama", hidden_size=32, intermediate_size=48)
    block, x = block_of(model, 1)
    params = {name: value.clone() for name, value in block.params.items()}
    params["1.mlp.up_proj.weight"][[5, 9]] *= 30
    params["1.input_layernorm.weight"][7] *= 6
    block = planned(replace(block, params=params), "w4a4")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    layer = copy.deepcopy(model.model.layers[1])
    layer.load_state_dict({name.removeprefix("1."): value for name, value in params.items()})
    calib = Calib(x, x + 0.02 * x.std() * noise, run_all(block, x))
    return block, calib, Layer(layer, dict(block.kwargs[0]))


def check_theta() -> None:
    """The same candidates, scores and choice as a literal search, edge after edge."""
    block, calib, whole = theta_case()
    for sites, peaks, tokens in (("down", "absolute", "normalized"), ("norms", "relative", "unweighted")):
        step = Reassemble(sites, peaks=peaks, tokens=tokens, most=MOST, tries=TRIES, sequences=3, shrinkage=0.0)
        figures = step(block, calib).record[1]["reassemble"]
        edges = [("input_layernorm", GROUPS[0]), ("post_attention_layernorm", GROUPS[2])]
        layer, chosen = whole, 0
        for norm, readers in edges if sites == "norms" else [(None, GROUPS[3])]:
            scores, made = search(layer, norm, readers, step, calib)
            found = figures[f"1.{readers[0]}"]
            assert {int(total) for total in found["scores"]} == set(scores), "other candidates"
            for total, score in scores.items():
                # Ties in float32 sums of another order: one activation in thousands rounds the other way.
                assert abs(found["scores"][str(total)] - score) < 1e-3 * score, f"{total} copies: another score"
            assert found["copies"] == min(scores, key=lambda total: (scores[total], total)), "not the best"
            layer, chosen = made[found["copies"]], chosen + found["copies"]
        assert chosen, "nothing was split: the case does not test the choice"


# Precision, correction, weight decay.


def check_double() -> None:
    """``precision: double``: the loss that is recorded is the float64 block's, which float32 misses by 1e-7."""
    block, x = block_of(tiny_model("llama-odd"), 1)
    block = planned(block, "w4a4")
    calib = Calib(x, x, run_all(block, x))
    step = with_options(AffineQuant(), precision="double", epochs=1, held_out=0.25)
    done = step(block, calib)
    _, held = step.schedule.split(len(x))
    figures = done.record[1]["affinequant"]
    params = RTN()(done, calib).quantized_params()
    y = run(done, calib.x_q[held].double(), params, quantized=True)
    wanted = calib.y_fp[held]
    unit = wanted.square().mean(-1).clamp(min=1e-12).double()  # kept in float32
    literal = float(((y - wanted.double()).square().mean(-1) / unit).mean())
    kept = figures["held_out"][figures["best_epoch"]]
    assert abs(kept - literal) < 1e-12 * literal, f"{kept:.12f} recorded, {literal:.12f} in float64"


def correction(**options: Any) -> tuple[Block, Correction]:
    """A correction with random pairs."""
    block, x = block_of(tiny_model("llama-odd"), 1)
    block = planned(block, "w4a16")
    made = Correction(with_options(LowRank(), rank=4, **options), block, Calib(x, x, run_all(block, x)))
    with torch.no_grad():
        for pair in made.pairs:
            pair.up.normal_(generator=torch.Generator().manual_seed(0))
    return block, made


def check_correction() -> None:
    """``W + B A / r`` of every pair over its linear's rows."""
    block, made = correction(share="input")
    changed = made.params()
    for name in block.linears():
        wanted = block.weight(name).double()
        for pair in made.pairs:
            if name in pair.linears:
                first = sum(len(block.weight(n)) for n in pair.linears[: pair.linears.index(name)])
                up = pair.up.detach().double()[first : first + len(wanted)]
                wanted = wanted + up @ pair.down.detach().double() / pair.down.shape[0]
        assert torch.allclose(changed[f"{name}.weight"].double(), wanted, rtol=1e-5, atol=1e-6), name


def check_decay() -> None:
    """Weight decay is the mean relative size of the corrections, in the training loss and not in the validation's."""
    block, made = correction(weight_decay=3.0)
    _, plain = correction(weight_decay=0.0)
    chosen = torch.arange(2)
    with torch.no_grad():
        validation, exact = float(made.loss(chosen)), float(plain.loss(chosen))
    training = float(made.loss(chosen).detach())
    assert validation == exact, "the validation loss has weight decay"
    sizes = []
    for pair in made.pairs:
        change = pair.up.detach().double() @ pair.down.detach().double() / 4
        sizes.append(float(change.square().sum() / block.weight(pair.linears[0]).double().square().sum()))
    assert abs(training - exact - 3.0 * sum(sizes) / len(sizes)) < 1e-4 * training


LITERAL = {"theta": check_theta, "double": check_double, "correction": check_correction, "decay": check_decay}
