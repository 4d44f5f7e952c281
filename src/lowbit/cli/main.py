"""The command line: the ``lowbit`` command, its subcommands, and how it fails.

Results go to standard output, everything else to standard error. A mistake ends in one line and exit code 2.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.catalog import recipes, schemes
from lowbit.cli.console import Device, DType, Json, Model, Pickle, Remote, Revision, print_json
from lowbit.cli.demo import demo
from lowbit.cli.export import export, verify
from lowbit.cli.inspect import inspect
from lowbit.cli.measure import compare, evaluate, report
from lowbit.errors import LowbitError, check_least
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
    rich_markup_mode=None,  # help texts contain [brackets], which rich would take for markup
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from lowbit.runs.versions import versions

        print(f"lowbit {versions()['lowbit']}")
        raise typer.Exit


@app.callback()
def lowbit(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Make large language models small enough for phones, laptops and single GPUs, and keep them good."""


@app.command()
def quantize(
    model: Model,
    out: Annotated[Path, typer.Option(help="The run folder: new, empty, or of this same run, which is resumed.")],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w{2..8}a{4,6,8,16}[kv{4,8}][g{n}][-sym|-asym], or FILE.yaml; explained by 'lowbit schemes'.",
            show_default="w4a16g64-sym",
        ),
    ] = None,
    recipe: Annotated[str, typer.Option(help="A name listed by 'lowbit recipes', or FILE.yaml.")] = "gptq",
    data: Annotated[
        str | None,
        typer.Option(
            help="Calibration text: builtin, wikitext2, ptb, c4, self, or a text/jsonl/parquet file.",
            show_default="builtin",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.", show_default="32")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a calibration window.", show_default="512")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the windows and of the methods.", show_default="0")
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="Training budget: quick, normal or paper, 0.3, 0.5 or all of a recipe's epochs.",
            show_default="normal",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="An option of a step, as step.field=value; repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(help="Another format for modules: GLOB=FORMAT, such as '*.down_proj=w8'; repeatable."),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="Target runtime: llama.cpp, vllm, executorch or onnxruntime; its arithmetic is simulated.",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="On an NVIDIA GPU: fused fake quantization in training, for wide models."),
    ] = False,
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into a folder that is a Hugging Face checkpoint.

    Defaults are those shown, unless the recipe has a protocol of its own, as the paper/... recipes do.
    """
    from lowbit.pipeline.quantize import quantize as run

    made = run(
        model,
        out,
        scheme=scheme,
        recipe=recipe,
        data=data,
        samples=samples,
        length=length,
        seed=seed,
        device=device,
        dtype=dtype,
        settings=set_ or [],
        overrides=_pairs(override or []),
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        effort=effort,
        target=target,
        compiled=compiled,
    )
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
app.command()(export)
app.command()(verify)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 64,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Continue a prompt with the most likely tokens."""
    from lowbit.checkpoints.resolve import resolve
    from lowbit.evaluation.generate import generate_text

    check_least("--tokens", tokens, 1, "give how many tokens may follow the prompt")
    if not prompt:
        raise LowbitError("--prompt is empty; give some text to continue")
    folder = resolve(model, trust_remote_code=trust_remote_code).folder
    text = generate_text(folder, prompt, tokens, trust_remote_code)
    if as_json:
        print_json({"model": model, "prompt": prompt, "text": text})
    else:
        print(text)


app.command()(inspect)
app.command()(recipes)
app.command()(schemes)
app.command()(demo)


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
