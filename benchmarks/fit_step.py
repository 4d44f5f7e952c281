"""What one optimisation step of AffineQuant costs, against a plain float forward and backward of the same block.

    python benchmarks/fit_step.py [--device cuda] [--tokens 2048] [--rounds 9] [--json FILE]
        [--dtype bfloat16] [--like 7b] [--length 2048] [--compile] [--host]

Both sides run the first block of SmolLM2-135M-Instruct on the same tokens, in turns within one process; the ratio is
that of the medians. The plain side makes gradients for all the block's parameters; a step of the fit adds maps,
inverses, quantizers, their gradients, the optimiser and the projections. Fails if a ratio is above 2.

``--like 7b`` takes a block with random weights of Llama 2 7B's shape: nothing is downloaded, and on a GPU products
are large enough to be what takes the time. ``--compile`` adds each case with fused fake quantization.

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
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from lowbit.checkpoints.resolve import load_config, load_tokenizer, resolve
from lowbit.checkpoints.safetensors_folder import Checkpoint, block_params
from lowbit.data.text import calibration
from lowbit.methods.adam import Adam
from lowbit.methods.affine_fit import AffineFit
from lowbit.methods.affinequant import AffineQuant
from lowbit.methods.options import with_options
from lowbit.models.block import Block, Calib
from lowbit.models.families import architecture_of
from lowbit.models.forward import run, run_all
from lowbit.models.offload import Rows
from lowbit.models.shard import own_states
from lowbit.models.skeleton import Skeleton
from lowbit.quant import inductor
from lowbit.quant.scheme_names import parse_scheme

ALLOWED = 2.0
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "omniquant w4a4": ("w4a4", {"heads": "diagonal", "qk": "diagonal", "channels": "off"}),
    "affinequant w4a4": ("w4a4", {}),
    "affinequant w3a16": ("w3a16-asym", {}),
    "affinequant w2a16g64": ("w2a16g64-asym", {}),
    "affinequant w4a4, float-double": ("w4a4", {"precision": "float-double"}),
}
FUSED = ", compiled"
LIKE = {"7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 32}}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SEQUENCES = 8  # of the fit that ``--host`` times


def first_block(
    tokens: int, device: str, dtype: torch.dtype = torch.float32, length: int = 256
) -> tuple[Block, Calib]:
    """Block 0 with its input for ``tokens`` tokens of built-in text in sequences of ``length``."""
    folder = resolve("demo").folder
    skeleton, checkpoint = Skeleton(load_config(folder)), Checkpoint(folder)
    rest = checkpoint.read(skeleton.shared_names)
    skeleton.fill({n: value.float().to(device, dtype) for n, value in rest.items()})
    skeleton.model.to(device)
    ids = calibration("builtin", load_tokenizer(folder), tokens // length, length, 0).ids.to(device)
    x = skeleton.embed(ids)
    params = block_params(checkpoint, skeleton.architecture.blocks, 0, skeleton.parameter_shapes(0))
    block = skeleton.block(0, {name: value.to(device) for name, value in params.items()})
    return block, Calib(x, x, run_all(block, x))


def random_block(size: str, tokens: int, device: str, dtype: torch.dtype, length: int) -> tuple[Block, Calib]:
    """A Llama block of the shape of ``LIKE`` with random weights and inputs; a few channels are outliers."""
    config = LlamaConfig(**LIKE[size], vocab_size=32, num_hidden_layers=1, max_position_embeddings=max(4096, length))
    config.architectures, config._attn_implementation = ["LlamaForCausalLM"], "sdpa"
    with torch.device("meta"):
        layer = LlamaDecoderLayer(config, 0).eval()
    generator = torch.Generator(device).manual_seed(0)

    def made(shape: Sequence[int]) -> Tensor:
        if len(shape) == 1:
            return torch.ones(*shape, device=device)
        return torch.randn(*shape, generator=generator, device=device) / shape[1] ** 0.5

    params = {f"0.{name}": made(value.shape) for name, value in layer.named_parameters()}
    x = torch.randn(tokens // length, length, config.hidden_size, generator=generator, device=device)
    x[..., :: config.hidden_size // 8] *= 20.0
    x = x.to(dtype)
    at = torch.arange(length, device=device)[None]
    rotary = LlamaRotaryEmbedding(config).to(device)(x[:1], at)
    architecture = architecture_of(config)
    kwargs = ({"position_embeddings": rotary},)
    block = Block((layer,), 0, kwargs, architecture.layers, architecture.blocks, params)
    return block, Calib(x, x, run_all(block, x, batch=1))


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
        for fused in (False, True) if options.compile else (False,):
            fit = fit_of(with_options(AffineQuant(), **settings), planned(block, scheme), calib)
            with inductor.on() if fused else nullcontext():
                step = stepper(fit)
                times: dict[str, list[float]] = {"plain": [], "fit": []}
                for _ in range(options.rounds + options.warm):
                    times["plain"].append(seconds(plain, options.device))
                    times["fit"].append(seconds(lambda step=step: step(everything), options.device))  # type: ignore[misc]
            medians = {side: statistics.median(values[options.warm :]) for side, values in times.items()}
            case = name + FUSED if fused else name
            rows.append({"case": case, **medians, "ratio": medians["fit"] / medians["plain"]})
    return rows


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
    width, digits = 41 if options.compile else 32, 5 if options.cuda else 3
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
    parser.add_argument("--compile", action="store_true", help="needs a GPU")
    parser.add_argument("--host", action="store_true", help="needs a GPU")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.cuda = options.device.startswith("cuda")
    if (options.compile or options.host) and not options.cuda:
        parser.error("--compile and --host need --device cuda")
    options.rounds = options.rounds or (30 if options.cuda else 9)
    options.warm = 5 if options.cuda else 1
    options.length = options.length or min(options.tokens, 2048 if options.like else 256)
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
