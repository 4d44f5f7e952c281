"""What one optimisation step of AffineQuant costs, against a plain float forward and backward of the same block.

    python benchmarks/fit_step.py [--device cuda] [--tokens 2048] [--rounds 9] [--json FILE]
        [--dtype bfloat16] [--like 7b] [--length 2048] [--sequences 4] [--compile] [--kernels] [--graph] [--host]

Both sides run the first block of SmolLM2-135M-Instruct on the same tokens, in turns within one process; the ratio is
that of the medians. The plain side makes gradients for all the block's parameters; a step of the fit adds maps,
inverses, quantizers, their gradients, the optimiser and the projections. Fails if a ratio is above 2.

``--like 7b`` takes a block with random weights of Llama 2 7B's shape: nothing is downloaded, and on a GPU products
are large enough to be what takes the time. ``--compile`` adds each case with fused fake quantization, ``--kernels``
each with one kernel that folds diagonals and quantizes (``quant/weight_kernel.py``), ``--graph`` each with kernels
and with forward and backward pass launched as one CUDA graph, where that can be recorded. ``--sequences 4`` takes as
many sequences a step; so does the plain side.

On a GPU times are of the device, between events, and two columns say how far from the card's best a step is: the
block's own products, ``6 x weights x tokens`` for its linears and ``12 x tokens x length x hidden`` for attention
(not halved for the causal mask), over the time, as a share of the rate of an 8192 x 8192 x 8192 product in the same
dtype, measured before. What the fit multiplies beside these (maps with weights) does not count. There a ratio above
2 fails nothing: SmolLM2's block is so small that launching kernels is what is measured, and in 16 bits the products
of a large one are so fast that launching and the passes over its float32 weights are.

``--host`` (on a GPU) also times the steps of a fit whose activations come from the host, one sequence a step:
``here``: all on the device; ``ahead``: from pinned memory, each step's rows copied during the step before; ``late``:
copied when they are asked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fit_step_blocks import LIKE, first_block, random_block
from fit_step_graph import NotRecorded, graph_stepper
from lowbit.methods.adam import Adam
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.options import with_options
from lowbit.models.block import Block, Calib
from lowbit.models.forward import run
from lowbit.models.offload import Rows
from lowbit.models.shard import own_states
from lowbit.quant import inductor, weight_kernel
from lowbit.quant.scheme_names import parse_scheme

ALLOWED = 2.0
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "omniquant w4a4": ("w4a4", {"heads": "diagonal", "qk": "diagonal", "channels": "off"}),
    "affinequant w4a4": ("w4a4", {}),
    "affinequant w3a16": ("w3a16-asym", {}),
    "affinequant w2a16g64": ("w2a16g64-asym", {}),
    "affinequant w4a4, float-double": ("w4a4", {"precision": "float-double"}),
}
# What each way of computing a step adds to a case's name.
WAYS = {"plain": "", "compile": ", compiled", "kernels": ", kernels", "graph": ", kernels, graph"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEQUENCES = 8  # of the fit that ``--host`` times


def seconds(work: Callable[[], None], device: str) -> float:
    """Time of one call: of the wall, or of the GPU between two events."""
    if device.startswith("cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def product_rate(device: str, dtype: torch.dtype) -> float:
    """Operations a second of a product of 8192 x 8192 matrices, the median of many; float32 without TF32."""
    a, b = (torch.randn(8192, 8192, device=device).to(dtype) for _ in range(2))
    times = [seconds(lambda: torch.mm(a, b), device) for _ in range(33)]  # type: ignore[arg-type]
    return 2 * 8192.0**3 / statistics.median(times[3:])


def operations(block: Block, tokens: int, length: int) -> float:
    """Of the products of one forward and backward pass of the block."""
    weights = sum(block.weight(name).numel() for name in block.linears())
    width = next(edge.layout.query * edge.layout.dim for edge in block.edges() if edge.kind == "heads")
    return 6.0 * weights * tokens + 12.0 * tokens * length * width


def planned(block: Block, scheme: str) -> Block:
    """The block with a scheme's formats, as the plan of a run gives them."""
    parsed = parse_scheme(scheme)
    found = {name: parsed.module(block.full_name(name)) for name in block.linears()}
    return replace(block, formats={name: own for name, own in found.items() if own is not None}, kv=parsed.kv)


def fit_of(step: AffineQuant, block: Block, calib: Calib) -> AffineFit:
    """The step's fit of a block, in its last epoch: masks are open."""
    fit = AffineFit(step.sites, step.maps, step.clipping, step.objective, step.schedule, block, calib)
    fit.begin(step.schedule.epochs)
    return fit


def stepper(fit: AffineFit) -> Callable[[Tensor], None]:
    """One optimisation step for the chosen sequences, as ``training.fit`` takes it."""
    adam = Adam(fit.groups())
    leaves = [leaf for group, _ in fit.groups() for leaf in group]

    def step(chosen: Tensor) -> None:
        for leaf in leaves:
            leaf.grad = None
        fit.loss(chosen).backward()
        adam.step(1.0)
        with torch.no_grad():
            fit.project()

    return step


def measured(block: Block, calib: Calib, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each case: the medians of both sides in seconds, and their ratio."""
    everything, x, y_fp = torch.arange(len(calib.x_q)), own_states(calib.x_q), own_states(calib.y_fp)
    params = {name: value.clone().requires_grad_() for name, value in block.params.items()}

    def plain() -> None:
        for value in params.values():
            value.grad = None
        (run(block, x, params) - y_fp).square().mean().backward()

    rows: list[dict[str, Any]] = []
    for name, (scheme, given) in CASES.items():
        # Which signs a block takes costs a step nothing, and their search on random weights would find none.
        settings = given | {"signs": False} if options.like else given
        for way in options.ways:
            fit = fit_of(with_options(AffineQuant(), **settings), planned(block, scheme), calib)
            with context_of(way, options.device):
                try:
                    step = graph_stepper(fit, everything) if way == "graph" else stepper(fit)
                except NotRecorded as error:
                    print(f"{name}{WAYS[way]}: cannot be recorded: {error}")
                    continue
                times: dict[str, list[float]] = {"plain": [], "fit": []}
                for _ in range(options.rounds + options.warm):
                    times["plain"].append(seconds(plain, options.device))
                    times["fit"].append(seconds(lambda step=step: step(everything), options.device))  # type: ignore[misc]
            medians = {side: statistics.median(values[options.warm :]) for side, values in times.items()}
            rows.append({"case": name + WAYS[way], **medians, "ratio": medians["fit"] / medians["plain"]})
    return rows


def context_of(way: str, device: str) -> AbstractContextManager[None]:
    """The context in which a step is computed in one of ``WAYS``."""
    if way == "plain":
        return nullcontext()
    return inductor.on() if way == "compile" else weight_kernel.on(device)


def fed(block: Block, calib: Calib, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step of one sequence, by where its rows come from; the three take turns."""
    take = torch.arange(SEQUENCES) % len(calib.x_q)
    x_fp, x_q, y_fp = (
        own_states(stream).cpu()[take].to(block.device) for stream in (calib.x_fp, calib.x_q, calib.y_fp)
    )
    here = Calib(x_fp, x_q, y_fp)
    far = [stream.cpu().pin_memory() for stream in (x_q, y_fp)]
    scheme, settings = CASES["affinequant w4a4"]
    fit = fit_of(with_options(AffineQuant(), **settings, signs=not options.like), planned(block, scheme), here)
    sources = {"here": fit.rows} | {kind: Rows(block.device, *far, fit.unit) for kind in ("ahead", "late")}
    step = stepper(fit)
    order = [torch.tensor([i]) for i in range(SEQUENCES)]

    def epoch(kind: str) -> None:
        fit.rows = sources[kind]
        for now, then in zip(order, [*order[1:], order[0]], strict=True):
            if kind == "ahead":
                fit.rows.prepare(then)
            step(now)
            torch.cuda.current_stream().synchronize()  # as a fit does, which looks at every loss

    times: dict[str, list[float]] = {kind: [] for kind in sources}
    with inductor.on() if options.compile else nullcontext():
        for _ in range(options.rounds + options.warm):
            for kind, values in times.items():
                values.append(seconds(lambda kind=kind: epoch(kind), options.device))  # type: ignore[misc]
    return [{"rows": k, "step": statistics.median(v[options.warm :]) / SEQUENCES} for k, v in times.items()]


def report(rows: list[dict[str, Any]], options: argparse.Namespace, facts: dict[str, Any]) -> None:
    """Print the table; on a GPU with what a step reaches of the card's own rate."""
    print(
        f"{facts['block']}, {options.tokens} tokens a step, {options.device}, {torch.get_num_threads()} threads"
        + (f", {options.dtype}" if options.cuda or options.like else "")
    )
    if options.cuda:
        print(f"{facts['card']}, torch {torch.__version__}, {facts['peak'] / 1e12:.1f} T/s in products of 8192^3")
    width, digits = 32 + max(len(WAYS[way]) for way in options.ways), 5 if options.cuda else 3
    more = f" {'of peak':>8} {'plain':>8}" if options.cuda else ""
    print(f"{'':{width}} {'plain s':>8} {'fit s':>8} {'ratio':>6} {'tokens/s':>9}{more}")
    for row in rows:
        more = "".join(f" {facts['work'] / row[k] / facts['peak']:>8.1%}" for k in ("fit", "plain") if options.cuda)
        print(
            f"{row['case']:{width}} {row['plain']:>8.{digits}f} {row['fit']:>8.{digits}f} {row['ratio']:>6.2f} "
            f"{options.tokens / row['fit']:>9.0f}{more}"
        )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--length", type=int, help="tokens in a sequence: 256, or 2048 like a larger model")
    parser.add_argument("--rounds", type=int, help="9, on a GPU 30")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what the block runs in")
    parser.add_argument("--like", choices=LIKE)
    parser.add_argument("--sequences", type=int, default=0, help="of a step, in place of --tokens")
    for way in ("compile", "kernels", "graph"):
        parser.add_argument(f"--{way}", action="store_true", help="needs a GPU")
    parser.add_argument("--host", action="store_true", help="needs a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.cuda = options.device.startswith("cuda")
    if (options.compile or options.host or options.graph) and not options.cuda:
        parser.error("--compile, --graph and --host need --device cuda")
    options.ways = [way for way in WAYS if way == "plain" or getattr(options, way)]
    options.rounds = options.rounds or (30 if options.cuda else 9)
    options.warm = 5 if options.cuda else 1
    options.length = options.length or min(options.tokens, 2048 if options.like else 256)
    if options.sequences:
        options.tokens = options.sequences * options.length
    return options


def main() -> None:
    options = parsed()
    dtype = DTYPES[options.dtype]
    given = (options.tokens, options.device, dtype, options.length)
    block, calib = random_block(options.like, *given) if options.like else first_block(*given)
    facts: dict[str, Any] = {"block": f"Llama block like {options.like}" if options.like else "SmolLM2 block 0"}
    if options.cuda:
        facts["card"] = torch.cuda.get_device_name()
        facts["peak"] = product_rate(options.device, dtype)
        facts["work"] = operations(block, options.tokens, options.length)
    rows = measured(block, calib, options)
    report(rows, options, facts)
    host = fed(block, calib, options) if options.host else []
    for row in host:
        print(f"{'rows ' + row['rows']:32} {row['step']:>10.5f} s a step of {options.length} tokens")
    if options.json:
        kept = {"torch": torch.__version__, "rows": rows}
        if options.cuda:
            kept |= facts | {"host": host, "dtype": options.dtype, "tokens": options.tokens, "length": options.length}
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    judged = [] if options.cuda else [row for row in rows if "double" not in row["case"]]
    worst = max(judged, key=lambda row: row["ratio"], default={"ratio": 0.0})
    if worst["ratio"] > ALLOWED:
        raise SystemExit(f"{worst['case']}: {worst['ratio']:.2f} times a plain step; {ALLOWED:g} is allowed")


if __name__ == "__main__":
    main()
