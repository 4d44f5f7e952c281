"""What transforms on the inputs of linears cost: a forward pass with them and without, as ratios.

    OMP_NUM_THREADS=1 python benchmarks/online_ops.py [--model demo] [--prompt 512] [--steps 16] [--rounds 5]

A model as ``lowbit.load`` gives it, with an op of one kind behind every norm of its layers and on the input of every
other linear, as the step ``hadamard`` places them: prefill of one prompt, then decoding token by token with a cache,
batch 1. Ops are not folded into the weights, which changes what is computed and not what it costs. All forms take
turns within one process and a ratio is taken within a round, so that what else the machine does cancels; one thread,
the process's own CPU time. The table goes into ``docs/w4a4.md`` where the model is the demo.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

import lowbit
from lowbit.checkpoints.resolve import DEMO, resolve
from lowbit.models.architecture import module_of
from lowbit.models.diagonal_blocks import DiagonalBlocks
from lowbit.models.families import architecture_of
from lowbit.models.fixed_hadamard import FixedHadamard, largest_power
from lowbit.models.hadamard import Hadamard, random_flips
from lowbit.models.kronecker import Kronecker, sides
from lowbit.models.runtime_ops import Matrix, RuntimeOp
from rows import ROOT, put

PAGE = ROOT / "docs" / "w4a4.md"
BEGIN, END = "<!-- measured: made by benchmarks/online_ops.py -->\n", "<!-- /measured -->"
CONTEXT = 128  # tokens in the cache before the first that is decoded
BLOCK = 16
Work = Callable[[], object]


def drawn(*shape: int) -> Tensor:
    """Random numbers that keep the size of what they are multiplied with."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) / shape[-1] ** 0.5


KINDS: dict[str, Callable[[int], RuntimeOp]] = {
    "hadamard": lambda width: Hadamard(random_flips(1, width, 0)),
    "fixed-hadamard": lambda width: FixedHadamard.of(width, largest_power(width)),
    "kronecker": lambda width: Kronecker(*(drawn(size, size) for size in sides(width))),
    f"blocks of {BLOCK}": lambda width: DiagonalBlocks(drawn(width // BLOCK, BLOCK, BLOCK)),
    "matrix": lambda width: Matrix(drawn(width, width)),
}


def places(model: Any) -> Iterator[tuple[nn.Module, bool, int]]:
    """Modules whose output (True) or input an op stands on, and its width."""
    architecture = architecture_of(model.config)
    for layer, kind in zip(model.get_submodule(architecture.blocks), architecture.layers, strict=True):
        edges = [edge for edge in kind.edges if edge.kind == "norm" and edge.gathers]
        mixed = {module_of(reader) for edge in edges for reader in edge.dst}
        for norm in dict.fromkeys(module_of(edge.src) for edge in edges):
            yield layer.get_submodule(norm), True, len(layer.get_parameter(f"{norm}.weight"))
        for group in kind.groups:
            for name in (name for name in group if name not in mixed):
                yield layer.get_submodule(name), False, layer.get_parameter(f"{name}.weight").shape[1]


@contextmanager
def with_ops(model: Any, kind: str | None) -> Iterator[None]:
    """The model with an op of a kind at every place; ``None``: without any."""
    handles = []
    for module, behind, width in places(model) if kind else ():
        op = KINDS[str(kind)](width)
        if behind:
            handles.append(module.register_forward_hook(lambda module, args, out, op=op: op(out)))
        else:
            handles.append(module.register_forward_pre_hook(lambda module, args, op=op: (op(args[0]), *args[1:])))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def works(model: Any, options: argparse.Namespace) -> dict[str, Work]:
    """Prefill of one prompt, and ``steps`` passes over a token each behind ``CONTEXT`` tokens."""
    ids = torch.randint(3, model.config.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))
    token, cache = torch.full((1, 1), 5), DynamicCache(config=model.config)
    model(token.expand(1, min(CONTEXT, options.prompt)), cache=cache)

    def decode() -> None:
        for _ in range(options.steps):
            model(token, cache=cache)
        cache.crop(-options.steps)

    return {
        f"prefill of {options.prompt}": lambda: model(ids, use_cache=False, logits_to_keep=1),
        "decode, batch 1": decode,
    }


@torch.no_grad()
def measured(model: Any, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """By kind and work the ratios of CPU time, with ops over without, one a round; the first round warms up."""
    tasks = works(model, options)
    out: dict[str, dict[str, list[float]]] = {kind: {what: [] for what in tasks} for kind in KINDS}
    for turn in range(options.rounds + 1):
        for what, work in tasks.items():
            plain = seconds(work)
            for kind in KINDS:
                with with_ops(model, kind):
                    own = seconds(work)
                if turn:
                    out[kind][what].append(own / plain)
    return out


def seconds(work: Work) -> float:
    """CPU time of one call."""
    began = time.process_time()
    work()
    return time.process_time() - began


def table(ratios: dict[str, dict[str, list[float]]], model: Any) -> list[str]:
    """Lines of Markdown: for each kind its share of the linears' multiply-adds and of the time of a pass.

    A pass that takes 1.25 times as long spends a fifth of its time on the ops:

    >>> share([1.2, 1.25, 1.3])
    '20.0 %'
    """
    whats = next(iter(ratios.values()))
    sizes = [width for _, _, width in places(model)]
    architecture = architecture_of(model.config)
    names = [f"{name}.weight" for name in architecture.linears()]
    linears = sum(model.get_parameter(name).numel() for name in names)
    lines = ["| | multiply-adds |" + "".join(f" {what} |" for what in whats), "|---|---:|" + "---:|" * len(whats)]
    for kind, own in ratios.items():
        macs = sum(KINDS[kind](width).macs for width in sizes) / linears
        lines.append(f"| `{kind}` | {macs:.1%} |".replace("%", " %") + "".join(f" {share(own[w])} |" for w in whats))
    return lines


def share(ratios: list[float]) -> str:
    """The part of a pass that the ops take, from the median ratio."""
    return f"{1 - 1 / statistics.median(ratios):.1%}".replace("%", " %")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=DEMO)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--page", type=Path, help="written into; by default docs/w4a4.md for the demo, else none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = lowbit.load(resolve(options.model).folder)
    lines = table(measured(model, options), model)
    told = (
        f"{'SmolLM2-135M-Instruct' if options.model == DEMO else Path(options.model).name}, float32, one CPU thread, "
        f"torch {torch.__version__}, medians of {options.rounds} rounds (`make online-ops`)."
    )
    text = "\n".join([told, "", *lines, ""])
    print(text)
    page = options.page or (PAGE if options.model == DEMO else None)
    if page is not None:
        page.write_text(put(page.read_text(encoding="utf-8"), text, BEGIN, END, page), encoding="utf-8")


if __name__ == "__main__":
    main()
