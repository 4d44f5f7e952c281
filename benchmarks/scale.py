"""What ``lowbit inspect`` predicts of a run, against the run, and of runs of large models: for docs/scale.md.

    python benchmarks/scale.py [--model demo] [--samples 16] [--length 256] [--ranks 1 2] [--only gptq] [--json FILE]
    python benchmarks/scale.py --plan

Each case runs in processes of its own, one thread each. Compared are the processor's seconds of the busiest process,
which other programs on the machine disturb less than the time of day, and its peak resident memory. Rates are
measured before each case. What a process does before and behind its blocks (text, files, digests) is not predicted;
``rtn`` shows how much that is, as hardly anything else takes its time. ``--plan`` writes the table of large models
into docs/scale.md, from their configs' shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from lowbit.checkpoints.resolve import load_config, resolve
from lowbit.models.skeleton import Skeleton
from lowbit.pipeline.estimate import Calibration, Model, estimate, with_own_rates
from lowbit.pipeline.machine import Machine, stated_rates
from lowbit.pipeline.recipe import load_recipe, with_effort, with_settings
from lowbit.pipeline.smallest_change import Choice, misfits, smallest_change
from lowbit.quant.scheme_files import load_scheme
from lowbit.runs.plan import make_plan
from rows import ROOT, line, put

LEARNED = ("affinequant.epochs=1", "affinequant.batch=4", "affinequant.micro_batch=1", "affinequant.signs=false")
CASES: dict[str, tuple[str, tuple[str, ...]]] = {
    "rtn": ("w4a16g64-sym", ()),
    "smoothquant": ("w4a8", ()),
    "gptq": ("w4a16g64-sym", ()),
    "awq": ("w4a16g64-sym", ()),
    "affinequant": ("w4a8", LEARNED),
}
SHAPES: dict[str, PretrainedConfig] = {
    "Llama-3-70B": LlamaConfig(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
    "Qwen3-235B-A22B": Qwen3MoeConfig(
        hidden_size=4096,
        moe_intermediate_size=1536,
        num_hidden_layers=94,
        num_attention_heads=64,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
    ),
    "Llama-3-405B": LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    ),
}
PLANS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rtn": ("w4a16g128-sym", ()),
    "awq": ("w4a16g128-sym", ()),
    "gptq": ("w4a16g128-sym", ()),
    "affinequant": ("w4a8", ("affinequant.batch=8", "affinequant.micro_batch=1")),
}
DEVICE, PRODUCTS, BANDWIDTH, SLOW, FAST = 80 * 10**9, 700e12, 3e12, 1e9, 50e9
PAGE = ROOT / "docs" / "scale.md"
BEGIN, END = "<!-- plan: made by benchmarks/scale.py --plan -->\n", "<!-- /plan -->"
WORK = """
import json, sys, time
import lowbit
from lowbit.pipeline.peak_memory import peak_memory_bytes
model, out, recipe, scheme, samples, length, *settings = sys.argv[1:]
import lowbit.pipeline.quantize
began = time.process_time()
lowbit.quantize(model, out, recipe=recipe, scheme=scheme, samples=int(samples), length=int(length), settings=settings)
print(json.dumps({"seconds": time.process_time() - began, "bytes": peak_memory_bytes()}), flush=True)
"""


def measured(recipe: str, ranks: int, options: argparse.Namespace) -> dict[str, float]:
    """Seconds and bytes of the busier process."""
    scheme, settings = CASES[recipe]
    with tempfile.TemporaryDirectory() as name:
        script = Path(name) / "work.py"
        script.write_text(WORK)
        launch = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run"]
        launch += [] if ranks == 1 else ["--nproc-per-node", str(ranks)]
        arguments = [
            options.model,
            f"{name}/out",
            recipe,
            scheme,
            str(options.samples),
            str(options.length),
            *settings,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, str(script), *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(done.stderr)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {key: max(row[key] for row in rows) for key in ("seconds", "bytes")}


def predicted(skeleton: Skeleton, recipe: str, ranks: int, options: argparse.Namespace) -> dict[str, float]:
    """The same by ``inspect``, without what processes exchange, which takes no processor's time."""
    scheme, settings = CASES[recipe]
    model = Model.of(skeleton, make_plan(skeleton, load_scheme(scheme)))
    steps = with_settings(with_effort(load_recipe(recipe), "normal"), settings)
    calibration = Calibration(options.samples, options.length)
    machine = with_own_rates(Machine(None, ranks=ranks), model, calibration)
    assert machine.rates is not None
    found = estimate(model, steps, calibration, replace(machine, rates=replace(machine.rates, network=1e30)))
    return {"seconds": found.total_seconds or 0.0, "bytes": float(found.needs.of("host"))}


def plan() -> str:
    """The table of ``SHAPES`` by ``PLANS``: 128 windows of 2048 tokens, bfloat16, one device a rank."""
    heads = ["model", "recipe", "scheme", "1 rank", "8 ranks, 1 GB/s", "8 ranks, 50 GB/s"]
    lines = [
        line([*heads, "device", "host, 1 and 8 ranks", "fits 80 GB"]),
        "|---|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for name, config in SHAPES.items():
        config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
        config.tie_word_embeddings = False
        skeleton = Skeleton(config)
        for recipe, (scheme, settings) in PLANS.items():
            model = Model.of(skeleton, make_plan(skeleton, load_scheme(scheme)))
            steps = with_settings(with_effort(load_recipe(recipe), "normal"), settings)
            calibration = Calibration(128, 2048)

            def on(ranks: int, network: float) -> Machine:
                rates = stated_rates(PRODUCTS, BANDWIDTH, network)
                return Machine(rates, None, DEVICE, value_bytes=2, ranks=ranks, network=network)

            machines = [on(1, SLOW), on(8, SLOW), on(8, FAST)]
            found = [estimate(model, steps, calibration, machine) for machine in machines]
            hours = [f"{(one.total_seconds or 0.0) / 3600:.2f} h" for one in found]
            needs = found[0].needs
            sizes = [f"{needs.of(place) / 1e9:.0f} GB" for place in ("device", "host")]
            sizes[1] += f", {found[2].needs.of('host') / 1e9:.0f}"
            fits = "yes"
            if misfits(needs, machines[0]):
                change = smallest_change(model, Choice(steps, calibration, machines[0]))
                fits = f"with `{change}`" if not change.startswith("no") else "no"
            lines.append(line([name, recipe, scheme, *hours, *sizes, fits]))
            print(lines[-1], flush=True)
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", choices=CASES, nargs="+", default=list(CASES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plan", action="store_true", help="write the table of large models instead")
    options = parser.parse_args()
    if options.plan:
        PAGE.write_text(put(PAGE.read_text(), plan(), BEGIN, END, PAGE))
        return
    import torch

    torch.set_num_threads(1)
    skeleton = Skeleton(load_config(resolve(options.model).folder))
    rows: list[dict[str, Any]] = []
    print(f"{'':12} {'ranks':>5} {'predicted s':>12} {'measured s':>11} {'predicted MB':>13} {'measured MB':>12}")
    for recipe in options.only:
        for ranks in options.ranks:
            ours, real = predicted(skeleton, recipe, ranks, options), measured(recipe, ranks, options)
            rows.append({"recipe": recipe, "ranks": ranks, "predicted": ours, "measured": real})
            print(
                f"{recipe:12} {ranks:>5} {ours['seconds']:>12.1f} {real['seconds']:>11.1f} "
                f"{ours['bytes'] / 1e6:>13.0f} {real['bytes'] / 1e6:>12.0f}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
