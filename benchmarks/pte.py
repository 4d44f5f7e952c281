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
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import lowbit
from lowbit.export.executorch import PROGRAM
from lowbit.export.pte_runtime import Session, set_threads
from lowbit.export.run import open_run
from lowbit.export.verify import relative_error
from lowbit.export.xnnpack import stored
from lowbit.exporting import TEXT
from lowbit.source import load_tokenizer

CONTEXT, PROMPT, DECODED, ROUNDS, ANSWER = 512, 128, 32, 5, 32
MOVED = 1e-7
QUESTION = "The best way to learn a new language is to"


def speeds(session: Session, ids: list[int], threads: int) -> dict[str, float]:
    """Tokens a second of a prompt and of single tokens after it, medians."""
    clock = time.process_time if threads == 1 else time.perf_counter
    prefill, decode = [], []
    for turn in range(ROUNDS + 1):
        began = clock()
        session.step(ids, 0)
        middle = clock()
        for i in range(DECODED):
            session.step([ids[i]], len(ids) + i)
        ended = clock()
        if turn:  # the first one warms up
            prefill.append(len(ids) / (middle - began))
            decode.append(DECODED / (ended - middle))
    return {"prefill": statistics.median(prefill), "decode": statistics.median(decode)}


def agreement(folder: Path, session: Session, ids: list[int], question: list[int]) -> dict[str, Any]:
    """Logits against three simulations, greedy text against the nearest, and how far that one parts from itself."""
    run, logits = open_run(folder), session.logits(ids, 1)
    out: dict[str, Any] = {}
    with torch.no_grad():
        for name, runs_on in (("float inputs", "float"), ("XNNPACK's inputs", "executorch")):
            model = lowbit.load(folder, runs_on=runs_on)
            out[name] = relative_error(logits, model(torch.tensor([ids])).logits[0])
        for module in run.rounded:
            model.get_submodule(module).weight.data = stored(run.qtensor(module)).dequantize()
        simulated = model(torch.tensor([ids])).logits[0]
        out["XNNPACK's inputs and scales"] = relative_error(logits, simulated)
        answer = model.generate(torch.tensor([question]), max_new_tokens=ANSWER, do_sample=False, eos_token_id=None)
        embedding = model.get_input_embeddings()
        noise = torch.randn(embedding.weight.shape, generator=torch.Generator().manual_seed(0))
        embedding.weight = torch.nn.Parameter(embedding.weight * (1 + MOVED * noise), requires_grad=False)
        out[f"that simulation against itself, embeddings moved by {MOVED}"] = relative_error(
            model(torch.tensor([ids])).logits[0], simulated
        )
    theirs = list(itertools.islice(session.greedy(question), ANSWER))
    pairs = zip(answer[0, len(question) :].tolist(), theirs, strict=True)
    same = next((i for i, (ours, got) in enumerate(pairs) if ours != got), ANSWER)
    return {"logits": out, "same": same, "of": ANSWER, "text": load_tokenizer(folder).decode(theirs)}


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
        lowbit.export(options.run, "executorch", program, context=CONTEXT)
    tokenizer = load_tokenizer(options.run)
    ids = tokenizer(TEXT).input_ids
    set_threads(options.threads)
    session = Session(program / PROGRAM)
    found = {
        "bytes": (program / PROGRAM).stat().st_size,
        **speeds(session, list(itertools.islice(itertools.cycle(ids), PROMPT)), options.threads),
        **agreement(options.run, session, ids, tokenizer(QUESTION).input_ids),
        "protocol": f"{options.threads} thread, a prompt of {PROMPT} tokens, {DECODED} single ones, {ROUNDS} rounds; "
        f"logits on the {len(ids)} tokens of lowbit verify; executorch {version('executorch')}",
    }
    text = json.dumps(found, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
