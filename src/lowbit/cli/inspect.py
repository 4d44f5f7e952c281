"""``lowbit inspect``: sizes and estimates of a model; the layer sensitivity of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from lowbit.cli.console import (
    Device,
    DType,
    Json,
    Model,
    Pickle,
    Remote,
    Revision,
    place_of,
    print_json,
    refuse_unused,
    table,
)
from lowbit.errors import LowbitError, canonical, check_least
from lowbit.paths import user_path

if TYPE_CHECKING:
    from lowbit.analysis.diagnose import Diagnosis
    from lowbit.analysis.mixed_precision import Proposal
    from lowbit.pipeline.machine import Machine

# What options stand for that are not given; they are None until it is known that they apply.
SCHEME, RECIPE, EFFORT, NETWORK, DATA, BITS = "w4a16g64-sym", "gptq", "normal", "1G", "builtin", "3,4,5,6,8"
SHOWN = 10  # rows of a ranking; --json has all of them


def inspect(
    model: Model,
    scheme: Annotated[
        str | None, typer.Option(help="A MODEL: the scheme to estimate for.", show_default=SCHEME)
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A MODEL: the recipe to estimate for.", show_default=RECIPE)
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help="Windows of calibration, or of the measurement.", show_default="quantize's; 2 with --float"
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Tokens in a window.", show_default="512, or fewer; 128 with --float"),
    ] = None,
    exact: Annotated[
        str | None, typer.Option("--float", help="A run: its float model; measures KL divergence.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="With --float: builtin, wikitext2, ptb, c4, or a file.", show_default=DATA)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="With --float: draws the windows.", show_default="0")] = None,
    budget: Annotated[
        float | None, typer.Option(help="A run: propose overrides for this many bits per weight, such as 4.5.")
    ] = None,
    bits: Annotated[
        str | None, typer.Option(help="With --budget: the widths to choose among.", show_default=BITS)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="With --budget: write FILE.yaml for 'quantize --scheme'.")
    ] = None,
    effort: Annotated[
        str | None, typer.Option(help="A MODEL: quick, normal or paper, as for 'quantize'.", show_default=EFFORT)
    ] = None,
    config_only: Annotated[
        bool,
        typer.Option("--config-only", help="A MODEL: plan from its config.json; no weights are fetched or read."),
    ] = False,
    ranks: Annotated[
        int | None, typer.Option(help="A MODEL: processes that torchrun is to start.", show_default="1")
    ] = None,
    device_memory: Annotated[
        str | None, typer.Option(help="A MODEL: each rank has a device with so much memory, such as 80GB.")
    ] = None,
    host_memory: Annotated[str | None, typer.Option(help="A MODEL: what each rank may take of its host.")] = None,
    flops: Annotated[
        str | None,
        typer.Option(help="A MODEL: operations a second of a large product in --dtype, such as 400T; not measured."),
    ] = None,
    bandwidth: Annotated[
        str | None, typer.Option(help="A MODEL: bytes a second of the device's memory, such as 3T.")
    ] = None,
    network: Annotated[
        str | None, typer.Option(help="A MODEL: bytes a second between ranks.", show_default=NETWORK)
    ] = None,
    device: Device = "cpu",
    dtype: DType = "float32",
    revision: Revision = None,
    allow_pickle: Pickle = False,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Show sizes and estimated cost; for a run, layer sensitivity.

    For a run folder: the most sensitive layers, and with --budget a mixed-precision proposal.
    """
    from lowbit.pipeline.inspect import inspect_model
    from lowbit.runs.manifest import manifest_of

    folder = user_path(model)
    manifest = manifest_of(folder) if folder.is_dir() else None
    is_run = manifest is not None
    if not is_run and (budget is not None or exact is not None or out is not None):
        raise LowbitError(f"--float, --budget and --out are for a finished run folder, which {model} is not")
    if is_run:
        of_model = {
            "scheme": scheme,
            "recipe": recipe,
            "effort": effort,
            "config-only": config_only or None,
            "ranks": ranks,
            "device-memory": device_memory,
            "host-memory": host_memory,
            "flops": flops,
            "bandwidth": bandwidth,
            "network": network,
        }
        refuse_unused(of_model, f"is for a model, and {model} is a run folder: name the model")
        if exact is None:
            of_text = {"data": data, "samples": samples, "length": length, "seed": seed}
            refuse_unused(of_text, "is for a measurement: give --float too")
        if budget is None:
            refuse_unused({"bits": bits}, "is for a proposal: give --budget too")
    else:
        refuse_unused(
            {"data": data, "seed": seed, "bits": bits},
            f"is for a finished run folder, which {model} is not: name one",
        )
    # Of a run, the dtype is that in which its divergence is measured: there is nothing to plan.
    planned = "float32" if is_run else dtype
    facts = inspect_model(
        model,
        SCHEME if scheme is None else scheme,
        RECIPE if recipe is None else recipe,
        samples=samples,
        length=length,
        revision=revision,
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
        effort=EFFORT if effort is None else effort,
        config_only=config_only,
        machine=machine_of(
            1 if ranks is None else ranks,
            device_memory,
            host_memory,
            flops,
            bandwidth,
            NETWORK if network is None else network,
            planned,
        ),
    )
    diagnosis = None
    # A run that keeps its source's codes has measured nothing.
    measured = manifest is not None and any(row.sensitivity for row in manifest.blocks)
    if measured or budget is not None or exact is not None or out is not None:
        from lowbit.analysis.diagnose import diagnose

        diagnosis = diagnose(
            model,
            exact=exact,
            data=DATA if data is None else data,
            samples=2 if samples is None else samples,
            length=128 if length is None else length,
            seed=0 if seed is None else seed,
            budget=budget,
            bits=_widths(BITS if bits is None else bits),
            out=out,
            **place_of(device, dtype, revision, allow_pickle, trust_remote_code),
        )
    if as_json:
        print_json(facts if diagnosis is None else {**facts, "diagnosis": diagnosis.to_dict()})
        return
    _show_facts(facts)
    if diagnosis is not None:
        _show(diagnosis, out)


def machine_of(
    ranks: int,
    device_memory: str | None,
    host_memory: str | None,
    flops: str | None,
    bandwidth: str | None,
    network: str,
    dtype: str,
) -> Machine:
    """The machine that the options describe."""
    from lowbit.allocation.size import bytes_in
    from lowbit.models.device import DTYPES
    from lowbit.pipeline.machine import Machine, rate_in, stated_rates

    check_least("--ranks", ranks, 1, "give the number of processes")
    if (flops is None) != (bandwidth is None):
        given, missing = ("--flops", "--bandwidth") if bandwidth is None else ("--bandwidth", "--flops")
        raise LowbitError(f"{given} given without {missing}: a time needs both; give both, or neither")
    dtype = canonical("dtype", dtype, DTYPES)
    if dtype != "float32" and device_memory is None:
        raise LowbitError(f"--dtype {dtype} given, which is for a device: give --device-memory, or leave it out")
    between, rates = rate_in(network, "--network"), None
    if flops is not None and bandwidth is not None:
        rates = stated_rates(rate_in(flops, "--flops"), rate_in(bandwidth, "--bandwidth"), between)
    return Machine(
        rates=rates,
        host_memory=None if host_memory is None else bytes_in(host_memory, "--host-memory"),
        device_memory=None if device_memory is None else bytes_in(device_memory, "--device-memory"),
        value_bytes=DTYPES[dtype].itemsize,
        ranks=ranks,
        network=between,
    )


def _widths(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise LowbitError(f"--bits '{text}' given; give widths separated by commas, such as 4,5,8") from None


def _show_facts(facts: dict[str, Any]) -> None:
    rows = table("", "")
    for key, value in facts.items():
        if isinstance(value, dict):
            text = "\n".join(f"{name}  {_number(own)}" for name, own in value.items())
            rows.add_row(key, Text(text))
        elif key != "kinds":
            rows.add_row(key, Text(_number(value)))
    for kind in facts["kinds"]:
        kept = [f"experts in float: {', '.join(kind['kept'])}"] if kind["kept"] else []
        text = "\n".join([kind["mixer"], "", *kind["linears"], *kept, "", *(kind["edges"] or ["no edges"])])
        rows.add_row(f"layers {kind['layers']}", Text(text))
    Console().print(rows)


def _number(value: Any) -> str:
    return f"{value:,}" if type(value) in (int, float) and abs(value) >= 1000 else str(value)


def _show(diagnosis: Diagnosis, out: Path | None) -> None:
    """Print the most sensitive blocks and linears, then the proposal."""
    console = Console()
    linears = table("linear", "format", "sensitivity", "gain at 8 bits")
    linears.title = f"Most sensitive linears of {len(diagnosis.linears)}: {diagnosis.measure}, each alone"
    for row in diagnosis.linears[:SHOWN]:
        sign = "" if row["measured"] else "~"
        figures = (f"{sign}{row['sensitivity']:.3g}", f"{sign}{row['gain']:.3g}")
        linears.add_row(Text(row["linear"]), row["format"], *figures)
    blocks = table("block", "sensitivity", "gain at 8 bits")
    blocks.title = f"Most sensitive blocks of {len(diagnosis.blocks)}"
    for row in diagnosis.blocks[:SHOWN]:
        blocks.add_row(str(row["block"]), f"{row['sensitivity']:.3g}", f"{row['gain']:.3g}")
    console.print(blocks)
    console.print(linears)
    if diagnosis.proposal is not None:
        _show_proposal(console, diagnosis.proposal, out)


def _show_proposal(console: Console, proposal: Proposal, out: Path | None) -> None:
    rows = table("proposed", "from", "to")
    for change in proposal.changes:
        rows.add_row("\n".join(change["linears"]), "\n".join(change["from"]), change["to"])
    console.print(rows)
    console.print(
        f"{proposal.bits_per_weight:.4f} bits per weight; sum of sensitivities: {proposal.sensitivity_now:.4g} now, "
        f"{proposal.sensitivity_proposed:.4g} predicted",
        highlight=False,
    )
    if proposal.transformers is not None:
        console.print(f"stock transformers cannot run it: {proposal.transformers}", highlight=False)
    if out is not None:
        console.print(f"written: quantize --scheme {out}", markup=False, highlight=False, soft_wrap=True)
