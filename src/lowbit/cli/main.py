"""The command line: ``lowbit quantize | evaluate | compare | report | export | verify | generate | inspect | demo``.

Results go to standard output, everything else to standard error. A mistake ends in one line and exit code 2.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lowbit.cli.console import Device, DType, Json, Model, Pickle, Remote, Revision, print_json, table
from lowbit.cli.inspect import inspect
from lowbit.cli.measure import compare, evaluate, report
from lowbit.errors import LowbitError
from lowbit.progress import say

_ROOM, _RIGHTS = "free some space or choose another folder", "mend its permissions or choose another path"
MENDABLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    errno.ENAMETOOLONG: "give a shorter one",
}
# typer brings its own copy of click or uses the installed one, by version; this is the class of either.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Make large language models small enough for phones, laptops and single GPUs, and keep them good.",
)


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="The run folder: new, empty, or of this same run, which then goes on.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w{2..8}a{4,6,8,16}[kv{4,8}][g{n}][-sym|-asym], or FILE.yaml.", show_default="w4a16g64-sym"
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="A recipe's name or FILE.yaml.")] = "gptq",
    data: Annotated[
        str | None,
        typer.Option(help="builtin, wikitext2, ptb, c4, self, or a text/jsonl/parquet file.", show_default="builtin"),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.", show_default="32")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a calibration window.", show_default="512")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Draws the windows, and whatever a method draws.", show_default="0")
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(help="quick, normal or paper: epochs of learned steps, 0.3, 0.5 or all.", show_default="normal"),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="step.field=value; may be repeated.")] = None,
    override: Annotated[
        list[str] | None, typer.Option(help="GLOB=FORMAT, such as '*.down_proj=w8' or 'lm_head=w8'; repeatable.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target", help="llama.cpp, vllm, executorch or onnxruntime: fits scheme, recipe and arithmetic."
        ),
    ] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="On an NVIDIA GPU: fused rounding while learning, for wide models.")
    ] = False,
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into a folder that is a Hugging Face checkpoint.

    Defaults are those shown, unless the recipe names its protocol, as the paper/... recipes do.
    """
    from lowbit.pipeline.quantize import quantize as run

    made = run(
        model, out, scheme, recipe, data, samples, length, seed, device, dtype, set_ or [],
        _pairs(override or []), revision, allow_pickle, trust_remote_code, effort, target, compiled,
    )  # fmt: skip
    result = {
        "out": str(made.out),
        "bits_per_weight": made.bits_per_weight,
        "seconds": made.seconds,
        "peak_memory_bytes": made.peak_memory_bytes,
        "warnings": made.warnings,
    }
    if as_json:
        print_json(result)
        return
    for warning in made.warnings:
        say(f"warning: {warning}")
    print(
        f"{made.out}: {made.bits_per_weight:.3f} bits per weight, {made.seconds:.0f} s, "
        f"peak memory {made.peak_memory_bytes / 1e9:.2f} GB"
    )


app.command()(evaluate)
app.command()(compare)
app.command()(report)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    to: Annotated[str, typer.Option(help="The target: gguf (or llama.cpp), executorch, onnx, gptq, awq, vllm.")],
    out: Annotated[Path | None, typer.Option(help="What to write; by default beside the run folder.")] = None,
    embeddings: Annotated[str, typer.Option(help="Float matrices: auto (loses nothing), f32, f16, q8_0.")] = "auto",
    pre: Annotated[str | None, typer.Option(help="llama.cpp's name of the tokenizer's splitting.")] = None,
    gptq_format: Annotated[
        str, typer.Option(help="gptq's zeros: v1 (minus one), v2 (as they are), auto (v1 if symmetric).")
    ] = "auto",
    context: Annotated[
        int | None, typer.Option(help="Tokens that executorch's cache holds.", show_default="2048, or less")
    ] = None,
    accuracy_level: Annotated[
        int | None,
        typer.Option(help="onnx: 0 multiplies in float32, 4 inputs rounded to 8 bits.", show_default="as evaluated"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a finished run in a runtime's format, rounding nothing again."""
    from lowbit.exporters.api import export as write

    made = write(run, to, out, embeddings, pre, gptq_format, context, accuracy_level)
    for warning in made.warnings:
        say(f"warning: {warning}")
    if as_json:
        print_json({**asdict(made), "out": str(made.out)})
    else:
        print(f"{made.out}: {made.target}, {made.size_bytes / 1e6:.1f} MB")


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="The run folder.")],
    files: Annotated[list[Path], typer.Argument(help="What 'lowbit export' wrote.")],
    logits: Annotated[
        bool, typer.Option(help="Run each, where its runtime is installed, and compare logits.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Compare exports with their run, every value bit for bit; exit code 1 if anything differs."""
    from lowbit.exporters.api import verify as read_back

    found = read_back(run, files, logits)
    if as_json:
        print_json([{**asdict(one), "ok": one.ok} for one in found])
    else:
        rows = table("file", "format", "tensors", "exact", "max difference", "logits")
        for one in found:
            ran = "-" if one.logits is None else f"{one.logits:.2g}"
            row = (one.target, str(one.tensors), str(one.exact), f"{one.max_difference:.3g}", ran)
            rows.add_row(Text(Path(one.path).name), *row)
        Console().print(rows)
    for one in found:
        if not one.ok:
            named = [*one.differs, *one.other, *filter(None, [one.unreadable])]
            if not one.computes_the_same:
                named.append(f"logits by {one.logits:.2g}, of which {one.explained:.2g} is explained")
            say(f"{one.path} differs: {', '.join(named[:5])}")
    if not all(one.ok for one in found):
        raise typer.Exit(1)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt, greedily."""
    from lowbit.checkpoints.resolve import resolve
    from lowbit.evaluation.generate import generate_text

    if tokens < 1:
        raise LowbitError(f"--tokens {tokens} given; at least 1 is needed")
    if not prompt:
        raise LowbitError("--prompt is empty; give some text to continue")
    folder = resolve(model, trust_remote_code=trust_remote_code).folder
    text = generate_text(folder, prompt, tokens, trust_remote_code)
    if as_json:
        print_json({"model": model, "prompt": prompt, "text": text})
    else:
        print(text)


app.command()(inspect)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where the quantized model stays.")] = Path("demo-run"),
    as_json: Json = False,
) -> None:
    """Quantize SmolLM2-135M-Instruct, compare it with its float self, and let both speak."""
    from lowbit.cli.demo import run_demo

    found = run_demo(out)
    if as_json:
        print_json(found)
        return
    rows = table("recipe", "scheme", "bits", "on disk", "perplexity", "seconds")
    for row in found["rows"]:
        size = f"{row['size_bytes'] / 1e6:.0f} MB"
        seconds = "-" if row["seconds"] is None else f"{row['seconds']:.0f}"
        numbers = (f"{row['bits_per_weight']:.3f}", size, f"{row['perplexity']:.2f}", seconds)
        rows.add_row(row["recipe"], row["scheme"], *numbers)
    console = Console()
    console.print(rows)
    for row in found["rows"]:
        console.print(f"{row['recipe']}: {row['text']}", markup=False, highlight=False)
    console.print(f"\nThe quantized model is in {found['out']}; stock transformers loads it.", highlight=False)


def _pairs(settings: list[str]) -> dict[str, str]:
    out = {}
    for setting in settings:
        glob, equals, text = setting.partition("=")
        if not (glob and equals and text):
            raise LowbitError(f"--override {setting}: give GLOB=FORMAT, for example '*.down_proj=w8' or 'lm_head=w8'")
        out[glob] = text
    return out


def guarded(run: Callable[[], int | None]) -> int:
    """Run a command; a person's mistake becomes one line on standard error and exit code 2."""
    try:
        return run() or 0
    except LowbitError as error:
        return _refused(str(error))
    except UsageError as error:
        said = error.format_message().rstrip(".")
        return _refused(f"{said}; 'lowbit --help' and 'lowbit COMMAND --help' say what is allowed")
    except KeyboardInterrupt:
        say("lowbit: stopped; 'quantize' goes on where it was when it is given the same command")
        return 130
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        place = f": {str(error.filename)[:200]}" if error.filename else ""
        return _refused(f"{error.strerror}{place}; {MENDABLE[error.errno]}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # the latter is torch's
            raise
        return _refused(f"out of memory: {str(error)[:200]}; give fewer --samples or a shorter --length")


def _refused(message: str) -> int:
    say(f"lowbit: error: {' '.join(message.split())}")
    return 2


def call(arguments: Sequence[str]) -> int:
    """The ``lowbit`` command with these arguments; gives its exit code."""

    def run() -> int:
        # Not standalone: there typer would print a box of several lines about a wrong option.
        try:
            code = app(list(arguments) or ["--help"], prog_name="lowbit", standalone_mode=False)
        except typer.Abort as error:
            raise KeyboardInterrupt from error
        if code == 130:  # how newer versions of typer tell of a KeyboardInterrupt
            raise KeyboardInterrupt
        return int(code) if isinstance(code, int) else 0

    return guarded(run)


def main() -> None:
    """Entry point of the ``lowbit`` command."""
    # Bars and warnings of the libraries would mix with ours. By environment: importing them takes seconds.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries would stand before our one line
    sys.exit(call(sys.argv[1:]))
