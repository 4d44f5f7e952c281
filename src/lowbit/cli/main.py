"""The ``lowbit`` command: its subcommands and error handling.

Results go to standard output, everything else to standard error. A user error is one line and exit code 2.
"""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli.catalog import recipes, schemes
from lowbit.cli.compare import compare
from lowbit.cli.console import BosOption, Device, DType, Json, Model, Pickle, Remote, Revision, bos_of, print_json
from lowbit.cli.demo import demo
from lowbit.cli.export import export, verify
from lowbit.cli.fit import fit
from lowbit.cli.imatrix import imatrix
from lowbit.cli.inspect import inspect
from lowbit.cli.job import check_command, ended, in_job, told
from lowbit.cli.measure import evaluate, report
from lowbit.cli.merge import merge
from lowbit.distributed.errors import Lost
from lowbit.distributed.world import launched
from lowbit.errors import LowbitError, check_least
from lowbit.progress import say

_SPACE, _RIGHTS = "free some space or choose another folder", "fix its permissions or choose another path"
_KIND = "a file is where a folder should be, or a folder where a file should: give another path"
MENDABLE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _RIGHTS),
    errno.ENAMETOOLONG: "give a shorter one",
    **dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), _KIND),
}
# Depending on its version, typer vendors click or uses the installed one; this is the class in both cases.
UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # help texts contain [brackets], which rich would read as markup
)


def _print_version(requested: bool) -> None:
    if requested:
        from lowbit.cli.version import version_lines

        print("\n".join(version_lines()))
        raise typer.Exit


@app.callback()
def lowbit(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show versions of lowbit and of what it uses, and exit.",
            callback=_print_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    """Make large language models small enough for phones, laptops and single GPUs, and keep them good."""


@app.command()
def quantize(
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The run folder: new, empty, or an unfinished one, which is resumed.")
    ],
    scheme: Annotated[
        str | None,
        typer.Option(
            help="w{2..8}a{4,6,8,16,fp8}[kv{4,8}[h]][g{n}][-sym|-asym|-sym-asym][-static[n]], another name of "
            "'lowbit schemes', or FILE.yaml.",
            show_default="w4a16g64-sym",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="A name listed by 'lowbit recipes', or FILE.yaml.",
            show_default="gptq; with --target and no --scheme by the model's size",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Text: builtin (a mixture), builtin:KIND (wiki, c4, code, technical, multilingual, tiny), "
            "wikitext2, ptb, c4, self, or a text, jsonl, json or parquet file; repeatable.",
            show_default="builtin",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Calibration windows; 128 for a recipe that learns, unless --effort paper.", show_default="32"
        ),
    ] = None,
    length: Annotated[int | None, typer.Option(help="Tokens in a calibration window.", show_default="512")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the windows and of the methods.", show_default="0")
    ] = None,
    bos: BosOption = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            help="Tokens in front of every text whose keys and values stay float: none, auto (those that make hidden "
            "states massive), text, or ids such as 13,1. The run then needs lowbit.load.",
            show_default="none",
        ),
    ] = None,
    effort: Annotated[
        str | None,
        typer.Option(
            help="Training budget: quick or normal, 0.3 or 0.5 of a recipe's epochs at 28 windows, or paper, all.",
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
    input_range: Annotated[
        str | None,
        typer.Option(
            help="Range of static inputs (schemes with -static, nvfp4): mse, min-max or a percentile, such as 99.99.",
            show_default="mse",
        ),
    ] = None,
    imatrix_: Annotated[
        Path | None,
        typer.Option(
            "--imatrix",
            help="llama.cpp's importance matrix, a .gguf file: weights columns in searches of scales (gptq.search).",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    compiled: Annotated[
        bool,
        typer.Option("--compile", help="On an NVIDIA GPU: fused fake quantization in training, for wide models."),
    ] = False,
    merge_only: Annotated[
        bool, typer.Option("--merge-only", help="Only what folds into the weights: no operation stays at run time.")
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep", help="MODEL is quantized already: its codes become the run, without rounding or calibration."
        ),
    ] = False,
    expert_tokens: Annotated[
        int, typer.Option(help="Mixtures: an expert that fewer tokens reach is quantized without calibration data.")
    ] = 64,
    all_experts: Annotated[
        bool, typer.Option("--all-experts", help="Mixtures: every expert's statistics are from all tokens.")
    ] = False,
    claim: Annotated[
        bool,
        typer.Option(
            "--claim",
            help="Processes started with the same command, on machines that share --out, take blocks in turn; for "
            "recipes whose blocks do not depend on each other.",
        ),
    ] = False,
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL into a folder that is a Hugging Face checkpoint.

    Options take the defaults shown unless the recipe has its own protocol, as the paper/... recipes do. Processes
    that torchrun starts (torchrun --nproc-per-node N -m lowbit quantize ...) share the work, on CPUs.
    """
    from lowbit.pipeline.quantize import quantize as run

    run_result = run(
        model,
        out,
        scheme=scheme,
        recipe=recipe,
        data=data or None,
        samples=samples,
        length=length,
        seed=seed,
        bos=bos_of(bos) if bos else None,
        prefix=prefix,
        device=device,
        dtype=dtype,
        settings=set_ or [],
        overrides=_pairs(override or []),
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        effort=effort,
        target=target,
        merge_only=merge_only,
        input_range=input_range,
        imatrix=imatrix_,
        compiled=compiled,
        keep=keep,
        expert_tokens=expert_tokens,
        all_experts=all_experts,
        claim=claim,
    )
    result = {
        "out": str(run_result.out),
        "bits_per_weight": run_result.bits_per_weight,
        "seconds": run_result.seconds,
        "peak_memory_bytes": run_result.peak_memory_bytes,
        "warnings": run_result.warnings,
    }
    if as_json:
        print_json(result)
        return
    for warning in run_result.warnings:
        say(f"warning: {warning}")
    print(
        f"{run_result.out}: {run_result.bits_per_weight:.3f} bits per weight, {run_result.seconds:.0f} s, "
        f"peak memory {run_result.peak_memory_bytes / 1e9:.2f} GB"
    )


app.command()(fit)
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

    check_least("--tokens", tokens, 1, "give the number of tokens to generate")
    if not prompt:
        raise LowbitError("--prompt is empty; give some text to continue")
    folder = resolve(model, trust_remote_code=trust_remote_code).folder
    text = generate_text(folder, prompt, tokens, trust_remote_code)
    if as_json:
        print_json({"model": model, "prompt": prompt, "text": text})
    else:
        print(text)


app.command()(imatrix)
app.command()(merge)
app.command()(inspect)
app.command()(recipes)
app.command()(schemes)
app.command()(demo)


def _pairs(settings: list[str]) -> dict[str, str]:
    overrides = {}
    for setting in settings:
        glob, equals, text = setting.partition("=")
        if not (glob and equals and text):
            raise LowbitError(f"--override {setting}: give GLOB=FORMAT, for example '*.down_proj=w8' or 'lm_head=w8'")
        overrides[glob] = text
    return overrides


def guarded(run: Callable[[], int | None]) -> int:
    """Run a command; a user error becomes one line on standard error and exit code 2."""
    try:
        return run() or 0
    except LowbitError as error:
        return _fail(str(error))
    except UsageError as error:
        message = error.format_message().rstrip(".")
        return _fail(f"{message}; 'lowbit --help' and 'lowbit COMMAND --help' list what is allowed")
    except KeyboardInterrupt:
        if ended():
            return _fail(str(Lost()))
        if told():
            say("lowbit: stopped; repeat the same 'quantize' or 'fit' command to resume")
        return 130
    except OSError as error:
        if error.errno not in MENDABLE:
            raise
        path = f": {str(error.filename)[:200]}" if error.filename else ""
        return _fail(f"{error.strerror}{path}; {MENDABLE[error.errno]}")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError":  # the latter is torch's
            raise
        return _fail(f"out of memory: {str(error)[:200]}; give fewer --samples or a shorter --length")


def _fail(message: str) -> int:
    if told():
        say(f"lowbit: error: {' '.join(message.split())}")
    return 2


def call(arguments: Sequence[str]) -> int:
    """Run the ``lowbit`` command with these arguments and return its exit code."""

    def run() -> int:
        check_command(arguments)
        # In standalone mode, typer would print a box of several lines about a wrong option.
        try:
            code = app(list(arguments) or ["--help"], prog_name="lowbit", standalone_mode=False)
        except typer.Abort as error:
            raise KeyboardInterrupt from error
        if code == 130:  # newer versions of typer report a KeyboardInterrupt so
            raise KeyboardInterrupt
        return int(code) if isinstance(code, int) else 0

    return guarded(run)


def main() -> None:
    """Entry point of the ``lowbit`` command."""
    # A console that lacks a character shows its code instead of ending the command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # Silence the libraries' bars and warnings; by environment, because importing them takes seconds.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its retries would precede our one line
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its sockets show their stack beside our one line
    # Where torchao is installed, transformers imports it: it tells of builds for GPUs that are absent.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    world = launched()
    sys.exit(call(sys.argv[1:]) if world.size == 1 else in_job(world, lambda: call(sys.argv[1:])))
