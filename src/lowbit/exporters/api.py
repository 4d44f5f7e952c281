"""``lowbit.export`` and ``lowbit.verify``: a run folder in other formats, and its comparison with each export."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lowbit.checkpoints.partial import flush, partial_of, remove, sweep
from lowbit.checkpoints.positions import positions_of
from lowbit.checkpoints.resolve import load_tokenizer
from lowbit.data.tokenization import encode
from lowbit.errors import LowbitError, MissingExtra
from lowbit.exporters import EXPORTERS, exporter_of, target_name, target_of
from lowbit.exporters.fit import check
from lowbit.exporters.run import Run, open_run
from lowbit.exporters.stock import verify_stock
from lowbit.exporters.target import Exporter, Options
from lowbit.exporters.verify import Verified, run_one, verify_one
from lowbit.models.build import text_config
from lowbit.models.families import architecture_of
from lowbit.paths import user_path
from lowbit.quant.runtimes import RUNTIMES, simulates
from lowbit.runs.load import load
from lowbit.torch_state import own_torch_state

# The text on which logits are compared; built in, so that it needs no download.
TEXT = (
    "A map is smaller than the country it shows, and that is why people carry it. Whoever draws one must choose: the "
    "rivers stay, the fences go, and a road that bends a little becomes straight. The traveller does not mind, as "
    "long as every turn is still where the map says it is."
)


@dataclass(frozen=True)
class Exported:
    """What ``export`` wrote.

    Attributes:
        out: the file or folder.
        target: its format.
        size_bytes: its size on disk.
        warnings: differences between the export and the run.
    """

    out: Path
    target: str
    size_bytes: int
    warnings: list[str]


@own_torch_state
def export(
    folder: str | Path,
    to: str,
    *,
    out: str | Path | None = None,
    embeddings: str = "auto",
    pre: str | None = None,
    gptq_format: str = "auto",
    context: int | None = None,
    accuracy_level: int | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a finished run in the format of a runtime; its codes are reused, nothing is quantized again.

    Args:
        folder: the run folder.
        to: ``gguf`` (or ``llama.cpp``), ``executorch``, ``onnx`` (or ``onnxruntime``), ``gptq``, ``awq``,
            ``vllm`` or ``gemma``.
        out: the path to write, which must not exist; by default next to the run, named after it and the target.
        embeddings: gguf only, type of float matrices: ``auto`` (the smallest lossless type), ``f32``,
            ``f16`` or ``q8_0``.
        pre: gguf only, llama.cpp's name of the pre-tokenizer, where it cannot be detected.
        gptq_format: gptq only, zero points minus one (``v1``) or as they are (``v2``); ``auto``: v1 if symmetric.
        context: executorch only, capacity of the KV cache in tokens: by default 2048, or the model's positions.
        accuracy_level: onnx only, 0 multiplies in float32, 4 with inputs quantized to 8 bits, which is faster; by
            default 4 if the run's target is onnxruntime, else 0.
        trust_remote_code: permit the config's own code, for a model type that ``transformers`` does not have.

    Raises:
        LowbitError: the folder is not a finished run, the target does not support it, or an option is another
            target's; nothing is written.
    """
    folder, target = user_path(folder), target_name(to)
    exporter = exporter_of(target)
    options = Options(embeddings.lower(), pre, gptq_format.lower(), context, accuracy_level)
    _refuse_unread(exporter, target, options)
    run = open_run(folder, trust_remote_code)
    if not exporter.text_models:
        _refuse_parts(run, target)
    check(target, exporter.misfit, run.subject)
    name = folder.resolve().name
    default = folder.resolve().parent / (f"{name}{exporter.suffix}" if exporter.suffix else f"{name}-{target}")
    final = user_path(out) if out is not None else default
    _refuse_existing(final)
    if exporter.suffix and final.suffix != exporter.suffix:
        raise LowbitError(f"--out {final} given; a {target} export is a file that ends in {exporter.suffix}")
    partial = partial_of(final)
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        sweep(final.parent, final.name)
        warnings = exporter.write(run, partial, options)
        warnings += [line] if (line := exporter.left_out(run)) is not None else []
        for file in _files(partial):
            flush(file)
        _refuse_existing(final)  # another process may have exported to the same path meanwhile
        os.rename(partial, final)
    except OSError as error:
        _refuse_existing(final)
        raise LowbitError(f"cannot write {final}: {error.strerror or error}; choose another --out") from error
    finally:
        with suppress(OSError):
            remove(partial)
    return Exported(final, target, sum(file.stat().st_size for file in _files(final)), warnings)


def _refuse_unread(exporter: Exporter, target: str, options: Options) -> None:
    """Refuse an option of another target, which would change nothing."""
    for name in exporter.unread(options):
        owners = []
        for other in EXPORTERS:
            with suppress(MissingExtra):  # a target whose package is not installed
                owners += [other] if name in exporter_of(other).options else []
        of = f"an option of {' and '.join(owners)}" if owners else "an option of another target"
        raise LowbitError(
            f"--{name.replace('_', '-')} {getattr(options, name)} given: it is {of}, and the target is {target}; "
            "leave it out"
        )


def _refuse_parts(run: Run, target: str) -> None:
    """Refuse a model with other parts than its text model: targets have no place for them."""
    if architecture_of(run.subject.config).text_model:
        raise LowbitError(
            f"{target} exports hold a text model alone, and {run.folder} is a {run.subject.config.architectures[0]} "
            "with other parts: load the run folder itself, which transformers and vLLM read, or export to gguf"
        )


def _refuse_existing(final: Path) -> None:
    if final.exists():
        raise LowbitError(f"--out {final} exists: name another, or delete it")


@own_torch_state
def verify(
    folder: str | Path, files: Sequence[str | Path] = (), *, logits: bool = True, trust_remote_code: bool = False
) -> list[Verified]:
    """Compare exports with their run, every value bit for bit; see ``Verified.ok``.

    Args:
        folder: the run folder.
        files: what ``export`` wrote; without any, stock ``transformers`` loads the run folder itself in a fresh
            process, and its logits are compared.
        logits: run each export in its runtime, where that is installed, and compare its logits with the
            simulation's on a built-in text. This needs memory for the whole model in float32.
        trust_remote_code: permit code of the model's own, for a run that was made with it.

    Raises:
        LowbitError: the folder is not a finished run, or a path is not an export.
    """
    run = open_run(user_path(folder), trust_remote_code)
    if not files:
        return [verify_stock(run, _text_ids(run, trust_remote_code), trust_remote_code)]
    ids = _text_ids(run, trust_remote_code) if logits else torch.empty(0)
    # Files for one runtime share the logits of the first pass.
    simulated = functools.lru_cache(maxsize=1)(lambda runtime, _: _simulated(run, ids, runtime, trust_remote_code))
    results = []
    for path in map(user_path, files):
        target = target_of(path)
        exporter = exporter_of(target)
        result = verify_one(run, path, target, exporter)
        results.append(run_one(result, exporter, ids, simulated) if logits else result)
    return results


def _text_ids(run: Run, trust_remote_code: bool) -> Tensor:
    """Token ids of ``TEXT``, at least one and at most as many as the model has positions."""
    config = text_config(run.subject.config)
    ids = torch.tensor(encode(load_tokenizer(run.folder, trust_remote_code), TEXT, special_tokens=True))
    return ids[ids < config.vocab_size][: positions_of(config)]


def _simulated(run: Run, ids: Tensor, runtime: str | None, trust_remote_code: bool) -> Tensor:
    """The run's logits with a runtime's inputs, if these are known; with those that the scheme states, if any."""
    if run.subject.act is not None:
        runtime = None
    elif runtime in RUNTIMES and not all(simulates(runtime, format) for format in run.subject.weights.values()):
        runtime = "float"  # such as NVFP4 in llama.cpp; the tolerance covers its 8-bit inputs
    with torch.no_grad():
        model = load(run.folder, target=runtime, trust_remote_code=trust_remote_code)
        return model(ids[None]).logits[0].float()


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.iterdir() if file.is_file())
