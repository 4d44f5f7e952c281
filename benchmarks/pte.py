"""A run in ExecuTorch: size, speed, and whether its runtime computes what the simulation says.

    python benchmarks/pte.py RUN [--program FOLDER] [--threads 1] [--json FILE]

``RUN`` is a run folder; ``FOLDER`` its export, made if it is not there (minutes). With one thread the process's own
CPU time is taken, so that other work on the machine does not count. Needs ``pip install 'lowbit[executorch]'``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lowbit
import turns
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.exporters.api import TEXT
from lowbit.exporters.executorch import PROGRAM
from lowbit.exporters.pte_runtime import Session, set_threads
from lowbit.exporters.run import open_run
from lowbit.exporters.verify import relative_error
from lowbit.exporters.xnnpack import stored

CONTEXT, PROMPT = 512, 128
MOVED = 1e-7
QUESTION = "The best way to learn a new language is to"


def speeds(session: Session, ids: list[int], threads: int) -> dict[str, float]:
    """Tokens a second of a prompt and of single tokens after it, medians."""

    def start() -> Any:
        return lambda: session.step(ids, 0), lambda i: session.step([ids[i]], len(ids) + i)

    (found,) = turns.speeds({"": start}, PROMPT, threads).values()
    return {what: statistics.median(values) for what, values in found.items()}


def agreement(folder: Path, session: Session, ids: list[int]) -> dict[str, Any]:
    """Logits against three simulations, greedy text against the nearest, and how far that one parts from itself."""
    run, logits = open_run(folder), session.logits(ids, 1)
    out: dict[str, Any] = {}

    def greedy(given: list[int], tokens: int) -> list[int]:
        return list(itertools.islice(session.greedy(given), tokens))

    with torch.no_grad():
        for name, target in (("float inputs", "float"), ("XNNPACK's inputs", "executorch")):
            model = lowbit.load(folder, target=target)
            out[name] = relative_error(logits, model(torch.tensor([ids])).logits[0])
        for module in run.quantized:
            model.get_submodule(module).weight.data = stored(run.qtensor(module)).dequantize()
        simulated = model(torch.tensor([ids])).logits[0]
        out["XNNPACK's inputs and scales"] = relative_error(logits, simulated)
        text = turns.beside(model, load_tokenizer(folder), QUESTION, greedy)
        embedding = model.get_input_embeddings()
        noise = torch.randn(embedding.weight.shape, generator=torch.Generator().manual_seed(0))
        embedding.weight = torch.nn.Parameter(embedding.weight * (1 + MOVED * noise), requires_grad=False)
        out[f"that simulation against itself, embeddings moved by {MOVED}"] = relative_error(
            model(torch.tensor([ids])).logits[0], simulated
        )
    return {"logits": out, "same": text["same"], "of": text["of"], "text": text["text"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--program", type=Path, help="by default beside the run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    program = options.program or options.run.with_name(f"{options.run.name}-executorch")
    if not program.exists():
        lowbit.export(options.run, "executorch", out=program, context=CONTEXT)
    ids = load_tokenizer(options.run)(TEXT).input_ids
    set_threads(options.threads)
    session = Session(program / PROGRAM)
    found = {
        "bytes": (program / PROGRAM).stat().st_size,
        **speeds(session, list(itertools.islice(itertools.cycle(ids), PROMPT)), options.threads),
        **agreement(options.run, session, ids),
        "protocol": f"{turns.timing(PROMPT, options.threads)}; "
        f"logits on the {len(ids)} tokens of lowbit verify; executorch {version('executorch')}",
    }
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
