"""What the gather after norms costs: tokens a second without it, as a pass of its own, and in one module.

    python benchmarks/gather.py [--device cuda] [--prompt 512] [--steps 32] [--rounds 7] [--clock cpu] [--json FILE]

SmolLM2-135M-Instruct as ``lowbit.load`` gives it, with a gather after each of its norms that splits ``--share`` of
the channels: prefill of one prompt, then decoding token by token with a cache, batch 1. The forms take turns within
one process; a ratio is the median over the rounds. On a GPU with Triton installed the kernel (norm, gather and
quantization per token) is timed against the same passes in PyTorch.

``--clock cpu`` counts the process's own time on the CPU: on a machine that others use, with ``OMP_NUM_THREADS=1``, it
is what the wall clock would show on an idle core.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import lowbit
from lowbit.checkpoints.resolve import resolve
from lowbit.models.families import architecture_of
from lowbit.models.gathered_norm import GatheredRMSNorm, gathered_norm
from lowbit.models.runtime_ops import Gather
from lowbit.quant.activations import IntTokens

Work = Callable[[], object]
FORMS = ("no gather", "norm, then gather", "one module")
CONTEXT = 128  # tokens in the cache before the first that is decoded


class NormThenGather(nn.Module):
    """The naive form: the norm's output is written, then read in the new order."""

    idx: Tensor
    factor: Tensor

    def __init__(self, norm: nn.Module, op: Gather) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("idx", op.idx)
        self.register_buffer("factor", op.factor)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., width) -> (..., width)``."""
        return Gather(self.idx, self.factor)(self.norm(x))


def gather(width: int, share: float, seed: int) -> Gather:
    """``share`` of the channels have become copies of one other channel each, divided by 2."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    count = max(1, round(share * width))
    gone, split = order[:count], order[count : 2 * count]
    idx, factor = torch.arange(width), torch.ones(width)
    idx[gone] = split
    factor[gone] = factor[split] = 0.5
    return Gather(idx, factor)


class Model:
    """SmolLM2 with its norms in one of the ``FORMS``."""

    def __init__(self, device: str, share: float) -> None:
        self.model = lowbit.load(resolve("demo").folder, device=device)
        self.device = device
        architecture = architecture_of(self.model.config)
        self.places: list[tuple[nn.Module, str, dict[str, nn.Module]]] = []
        for layer, kind in zip(self.model.get_submodule(architecture.blocks), architecture.layers, strict=True):
            for name, offset in sorted(kind.norm_offsets.items()):
                norm = layer.get_submodule(name)
                op = gather(self.model.config.hidden_size, share, len(self.places)).to(device)
                fused = gathered_norm(norm, offset, op)
                assert fused is not None
                forms = dict(zip(FORMS, (norm, NormThenGather(norm, op), fused), strict=True))
                self.places.append((layer, name, forms))

    def take(self, form: str) -> None:
        """Put every norm into ``form``."""
        for layer, name, forms in self.places:
            layer.set_submodule(name, forms[form])

    def prefill(self, ids: Tensor) -> Work:
        """One pass over the whole prompt ``(1, length)``."""
        return lambda: self.model(ids, use_cache=False, logits_to_keep=1)

    def decode(self, steps: int) -> Work:
        """``steps`` passes over one token each, behind ``CONTEXT`` tokens."""
        token = torch.ones(1, 1, dtype=torch.long, device=self.device)
        cache = DynamicCache(config=self.model.config)
        self.model(token.expand(1, CONTEXT), cache=cache)

        def work() -> None:
            for _ in range(steps):
                self.model(token, cache=cache)
            cache.crop(-steps)

        return work


def seconds(work: Work, device: str, clock: str) -> float:
    """Time of one call."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    began = now()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return now() - began


def compare(
    forms: dict[str, Work], options: argparse.Namespace, before: Callable[[str], object] = str
) -> dict[str, list[float]]:
    """Seconds of each form, in turns, ``before`` called with its name; the first round warms up and is left out."""
    times: dict[str, list[float]] = {name: [] for name in forms}
    for _ in range(options.rounds + 1):
        for name, work in forms.items():
            before(name)
            times[name].append(seconds(work, options.device, options.clock))
    return {name: values[1:] for name, values in times.items()}


def rows_of(what: str, tokens: int, times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Medians, and each form's time as a multiple of the first one's."""
    first = next(iter(times.values()))
    rows = []
    for name, values in times.items():
        ratios = sorted(value / base for value, base in zip(values, first, strict=True))
        row = {"what": what, "form": name, "tokens_per_second": tokens / statistics.median(values)}
        rows.append({**row, "ratio": statistics.median(ratios), "least": ratios[0], "most": ratios[-1]})
    return rows


@torch.no_grad()
def measure_model(model: Model, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Prefill and decoding of the whole model."""
    ids = torch.randint(3, 1000, (1, options.prompt), generator=torch.Generator().manual_seed(0)).to(options.device)
    model.take(FORMS[0])
    tasks = {
        f"prefill, {options.prompt} tokens": (options.prompt, model.prefill(ids)),
        f"decode, {options.steps} tokens, batch 1": (options.steps, model.decode(options.steps)),
    }
    rows = []
    for what, (tokens, work) in tasks.items():
        rows += rows_of(what, tokens, compare(dict.fromkeys(FORMS, work), options, model.take))
    return rows


@torch.no_grad()
def measure_norm(model: Model, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The model's first norm, with quantization per token behind it; on a GPU also as one kernel."""
    _, _, forms = model.places[0]
    x = torch.randn(options.prompt, model.model.config.hidden_size, device=options.device)
    format, times = IntTokens(4, symmetric=False), 20 if options.device == "cpu" else 500

    def often(work: Work) -> Work:
        return lambda: [work() for _ in range(times)][-1]

    def quantized(norm: nn.Module) -> Work:
        return often(lambda: format.fake_quant(norm(x)))

    works = {name: quantized(norm) for name, norm in forms.items()}
    if options.device.startswith("cuda") and importlib.util.find_spec("triton"):
        from lowbit.models.gathered_norm_triton import norm_gather_quantize

        fused = forms[FORMS[-1]]
        assert isinstance(fused, GatheredRMSNorm)
        works["one Triton kernel"] = often(lambda: norm_gather_quantize(fused, x, 4))
    return rows_of(f"norm and quantization, {' x '.join(map(str, x.shape))}", len(x) * times, compare(works, options))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--share", type=float, default=0.03)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = Model(options.device, options.share)
    rows = [*measure_model(model, options), *measure_norm(model, options)]
    name = torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU"
    print(
        f"SmolLM2-135M-Instruct, float32, {name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, "
        f"{options.clock} clock, {options.rounds} rounds, {options.share:.0%} of the channels split"
    )
    print("\n| | | tokens/s | time, x no gather | least to most |\n|---|---|---:|---:|---:|")
    for row in rows:
        print(
            f"| {row['what']} | {row['form']} | {row['tokens_per_second']:,.1f} | {row['ratio']:.3f} | "
            f"{row['least']:.3f} to {row['most']:.3f} |"
        )
    if not options.device.startswith("cuda"):
        print("\nGPU: skipped, torch sees no CUDA device. The Triton kernel was not timed.")
    elif not importlib.util.find_spec("triton"):
        print("\nTriton kernel: skipped, triton is not installed (pip install triton).")
    if options.json:
        options.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
