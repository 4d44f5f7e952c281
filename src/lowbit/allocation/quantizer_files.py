"""Files of a target's own quantizer beside the sizes of a frontier: of llama.cpp's, from the same calibration text.

They are made from a float file with an importance matrix, and measured as runs are: the values of a file's tensors,
with float inputs. What is finished in the folder stays, so that an interrupted frontier goes on; what was made from
another model or text, or by other versions, is made anew.
"""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lowbit.allocation.frontier import QuantizerFile
from lowbit.checkpoints.companions import CONFIG, companions, copy_companion
from lowbit.checkpoints.gguf_reader import ShardWriter
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.partial import commit, partial_of, remove
from lowbit.checkpoints.pypi import sha256_of
from lowbit.checkpoints.writing import write_json
from lowbit.data.text import Data, corpora
from lowbit.errors import LowbitError
from lowbit.evaluation.compare import compare
from lowbit.exporters.float_run import float_run
from lowbit.exporters.gguf_architectures.text_models import text_model
from lowbit.exporters.run import Run
from lowbit.exporters.target import Options
from lowbit.pipeline.imatrix import imatrix
from lowbit.pipeline.opened import Opened
from lowbit.pipeline.request import model_name
from lowbit.progress import say
from lowbit.runs.versions import versions

FOLDER, MATRIX, FLOAT, MEASURED = "quantizer", "imatrix.gguf", "float.gguf", "measured.json"
KINDS = ("Q2_K", "Q3_K_M", "Q4_0", "IQ4_NL", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class QuantizerText:
    """Texts of a comparison and of the importance matrix, arguments as for ``compare`` and ``imatrix``."""

    measured: Sequence[str]
    window: int
    tokens: int
    data: Data | None
    samples: int | None
    length: int | None
    seed: int


def available(target: str) -> bool:
    """Whether a target has a quantizer of its own on this machine."""
    return target == "llama.cpp" and find_spec("llama_cpp") is not None


def quantizer_files(
    model: str, opened: Opened, out: Path, text: QuantizerText, pre: str | None, permits: dict[str, Any]
) -> list[QuantizerFile]:
    """llama.cpp's files of a model by ascending size, made in ``out`` and measured.

    Args:
        model, opened: the float model, as given and open.
        out: the frontier's folder; ``out/quantizer`` is made.
        text: what the matrix is made from and files are measured on.
        pre: llama.cpp's name of the pre-tokenizer.
        permits: ``revision``, ``allow_pickle`` and ``trust_remote_code`` of ``compare``.

    Raises:
        LowbitError: llama.cpp does not take the model.
    """
    folder = out / FOLDER
    folder.mkdir(exist_ok=True)
    trusted = bool(permits["trust_remote_code"])
    source = float_run(opened.source.folder, opened.config, opened.checkpoint, model_name(model))
    key = _key(opened, text, pre)
    done = _finished(folder, key)
    for kind in KINDS:
        file = folder / f"{kind}.gguf"
        if kind in done and file.is_file():
            continue
        if not file.is_file():
            _make(model, source, folder, kind, text, pre, permits)
        perplexity, kl = _measured(model, source, file, text, permits, trusted)
        done[kind] = {"perplexity": perplexity, "kl": kl}
        write_json(folder / MEASURED, {"key": key, "files": done})
    (folder / FLOAT).unlink(missing_ok=True)
    files = {kind: folder / f"{kind}.gguf" for kind in KINDS}
    made = [QuantizerFile(kind, file.stat().st_size, **done[kind], file=str(file)) for kind, file in files.items()]
    return sorted(made, key=lambda one: one.size_bytes)


def _key(opened: Opened, text: QuantizerText, pre: str | None) -> dict[str, Any]:
    """What files and figures depend on."""
    data = None if text.data is None else [_identity(str(corpus)) for corpus in corpora(text.data)]
    drawn = {"data": data, "samples": text.samples, "length": text.length, "seed": text.seed}
    measured = {"text": list(map(_identity, text.measured)), "window": text.window, "tokens": text.tokens}
    made_by = {**versions(), "llama-cpp-python": version("llama-cpp-python")}
    return {"fingerprint": opened.source.identity, "versions": made_by, "pre": pre, **drawn, "measured": measured}


def _identity(text: str) -> str:
    """A text's name, and of a file the digest of what it holds."""
    return f"{text} {sha256_of(Path(text))}" if Path(text).is_file() else text


def _finished(folder: Path, key: dict[str, Any]) -> dict[str, Any]:
    """Figures of an earlier call by kind; files that were made from anything else are removed first."""
    known: dict[str, Any] = read_json(folder / MEASURED) if (folder / MEASURED).is_file() else {}
    if known.get("key") == key:
        return dict(known["files"])
    for name in (MEASURED, MATRIX, FLOAT, *(f"{kind}.gguf" for kind in KINDS)):
        (folder / name).unlink(missing_ok=True)
    write_json(folder / MEASURED, {"key": key, "files": {}})
    return {}


def _make(
    model: str, source: Run, folder: Path, kind: str, text: QuantizerText, pre: str | None, permits: dict[str, Any]
) -> None:
    """A file of llama.cpp's quantizer, and before the first one the matrix and the float file."""
    from lowbit.exporters import gguf
    from lowbit.exporters.imatrix import tensor_means
    from lowbit.exporters.llamacpp_quantizer import quantize_file

    matrix, plain = folder / MATRIX, folder / FLOAT
    if not matrix.is_file():
        say(shlex.join(["lowbit", "imatrix", model, "--out", str(matrix)]))
        drawn: dict[str, Any] = {"samples": text.samples, "length": text.length, "seed": text.seed}
        imatrix(model, matrix, data=text.data, **drawn, **permits)
    if not plain.is_file():
        partial = partial_of(plain)
        try:
            gguf.write(source, partial, Options(embeddings="f32", pre=pre))
            commit(partial, plain)
        except OSError as error:
            raise LowbitError(f"cannot write {plain}: {error.strerror or error}; free some space there") from error
        finally:
            remove(partial)
    file = folder / f"{kind}.gguf"
    say(shlex.join(["llama-quantize", "--imatrix", str(matrix), str(plain), str(file), kind]))
    quantize_file(plain, file, kind, tensor_means(matrix))


def _measured(
    model: str, source: Run, file: Path, text: QuantizerText, permits: dict[str, Any], trusted: bool
) -> tuple[dict[str, float], dict[str, float]]:
    """Perplexity and divergence by text, of the values that a file's tensors stand for."""
    from lowbit.exporters.gguf_model import architecture
    from lowbit.exporters.gguf_readback import read

    # Norms, kernels and the like have another form in the file, and are floats there: their values are the model's.
    changed = tuple(architecture(text_model(source.subject.config)).values)
    names = set(source.floats)
    with tempfile.TemporaryDirectory(dir=file.parent) as name:
        folder = Path(name)
        for companion in (CONFIG, *companions(source.folder, trusted)):
            copy_companion(source.folder, folder, companion)
        writer = ShardWriter(folder)
        for parameter, value in read(source, file):
            if parameter in names:  # else a divisor of rotary frequencies
                writer.add(parameter, source.tensor(parameter).float() if parameter.endswith(changed) else value)
        writer.close()
        told = compare(model, [folder], data=list(text.measured), length=text.window, tokens=text.tokens, **permits)
    rows = {name: one["runs"][0] for name, one in told.texts.items()}
    perplexity = {name: row["perplexity"] for name, row in rows.items()}
    return perplexity, {name: row["kl_mean"] for name, row in rows.items()}
