"""What makes two models the same: digests over all bytes of their files.

A model is its weights and its config (``fingerprint``); what is made from it also depends on the files that come
along, the tokenizer above all (``companions_digest``). Both are digests of files, by name: the same tensors in other
shards are another model. Any changed byte counts, so resumed runs and stored results never mix two models.

Hashing reads every byte: SHA-256 takes 0.8 s of one CPU core for each GB where the CPU has instructions for it
(BLAKE2b takes 1.6 s there, and is the faster one elsewhere). The digest of a large file is therefore kept in the
cache, with the file's place, size and times; a second start reads no weights. The cache only saves time: where it
cannot be written or read, files are hashed each time, and an entry counts only for a file that nothing has touched
since.

Rejected: the first and last MiB of each shard, which miss a fine-tune of some layers, and the tensors' values without
their layout on disk, which would read every shard through another library to accept models that nobody splits anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from lowbit.checkpoints.companions import CONFIG, GENERATION, code_files, companions
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.pypi import cache_dir, sha256_of
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.shards import weight_index
from lowbit.errors import LowbitError

KEPT_FROM = 1 << 20  # bytes; hashing a smaller file takes about as long as looking it up
# A second write within a file system's tick (up to 2 s on FAT) can leave size and times as they were.
RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class Stamp:
    """What changes with a file: its place on the device, its size in bytes, and its times in nanoseconds."""

    device: int
    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of an existing file; links are followed."""
        status = path.stat()
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_digest(path: Path, cache: Path | None = None) -> str:
    """SHA-256 in hex of a file's bytes, read in chunks, or from the cache if the file has not changed since.

    ``cache`` replaces ``cache_dir()``. Raises ``LowbitError`` for a file that cannot be read.
    """
    try:
        stamp = Stamp.of(path)
        entry = _entry(path, cache) if stamp.size >= KEPT_FROM else None
        if entry is not None and (known := _recall(entry, stamp)) is not None:
            return known
        began = time.time_ns()
        digest = sha256_of(path)
        settled = began - max(stamp.modified_ns, stamp.changed_ns) > RACY_NS
        if entry is not None and settled and Stamp.of(path) == stamp:
            _remember(entry, stamp, digest)
    except OSError as error:
        raise LowbitError(f"cannot read {path}: {error.strerror or error}") from error
    return digest


def fingerprint(folder: Path) -> str:
    """SHA-256 in hex over the names and bytes of ``config.json``, the weight files, their index, and code of its own.

    Code counts where the config names some (``auto_map``): it may define the function. The generation config, the
    tokenizer and everything else in the folder do not. Raises ``LowbitError`` for a folder that is not a checkpoint.
    """
    config = folder / CONFIG
    if not config.is_file():
        raise LowbitError(f"{folder} has no {CONFIG}, so it is not a model folder")
    files = [config, *Checkpoint(folder).files]
    if (index := weight_index(folder)) is not None:
        files.append(index)
    if read_json(config).get("auto_map"):
        files += [folder / name for name in code_files(folder)]
    return digest_of({path.relative_to(folder).as_posix(): path for path in files})


def companions_digest(folder: Path) -> str:
    """SHA-256 in hex over the names and bytes of all files that come along, with code."""
    return digest_of({name: folder / name for name in companions(folder, code=True)})


def tokenizer_digest(folder: Path) -> str:
    """The same without the generation config: what a text's tokens may depend on."""
    names = [name for name in companions(folder, code=True) if name != GENERATION]
    return digest_of({name: folder / name for name in names})


def digest_of(files: dict[str, Path]) -> str:
    """SHA-256 in hex over files by name, whatever their order."""
    lines = [f"{name} {file_digest(path)}" for name, path in sorted(files.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _entry(path: Path, cache: Path | None) -> Path | None:
    """The cache's file for the digest of ``path``: one for each absolute path, so that the cache stays small."""
    try:
        root = cache or cache_dir()
    except (OSError, RuntimeError, LowbitError):  # no home folder
        return None
    name = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()
    return root / "digests" / f"{name}.json"


def _recall(entry: Path, stamp: Stamp) -> str | None:
    """The kept digest of a file with that stamp; ``None`` for anything else, an unreadable entry included."""
    try:
        content = json.loads(entry.read_text(encoding="utf-8"))
        digest = content["sha256"] if content["stamp"] == asdict(stamp) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return digest if isinstance(digest, str) and len(digest) == 64 else None


def _remember(entry: Path, stamp: Stamp, digest: str) -> None:
    """Keep a digest. Each process writes a file of its own and renames it; failures cost time only."""
    content = json.dumps({"stamp": asdict(stamp), "sha256": digest})
    with suppress(OSError):
        entry.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=entry.parent)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(content)
            os.replace(name, entry)
        except OSError:
            os.unlink(name)
