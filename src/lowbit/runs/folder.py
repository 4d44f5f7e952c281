"""The run folder: its layout, and which process may work on it. ``reading.py`` reads what it holds.

It is a Hugging Face checkpoint in the ``compressed-tensors`` format, plus a manifest:

=============================== ================================================================================
``block-00007.safetensors``     decoder layer 7: packed linears, norms, biases, runtime ops, a prefix
``model-rest.safetensors``      embeddings, final norm, head
``model-carried.safetensors``   tensors that come along as they are, if there are any; see ``carried.py``
``model.safetensors.index.json`` the file of each tensor
``config.json``, tokenizer      as in the source, plus ``quantization_config``
``README.md``                   the model card
``lowbit-observed.safetensors`` each channel's largest activation, and pictures of learned matrices, for the report
``lowbit-evaluations.json``     results of ``lowbit evaluate`` on the finished run, if any
``lowbit-timing.json``          seconds and memory per block; the only file that differs between equal runs
``lowbit.json``                 the manifest, written last: a folder with a manifest is finished
``.run/``                       during the run: its lock and identity, locks of claimed blocks, its prefix, and each
                                block's notes and pictures
=============================== ================================================================================

Shards are the only state of a run, except for ``tune``, which keeps its own in ``.run/``. A resumed run replays the
finished shards and continues. One process at a time works on a folder, see ``claimed``, unless blocks are claimed one
by one: ``join_folder``.
"""

from __future__ import annotations

import fnmatch
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from lowbit.checkpoints.companions import CONFIG
from lowbit.checkpoints.json_file import read_json
from lowbit.checkpoints.lock import Locked, Owner, hold, holder
from lowbit.checkpoints.partial import is_partial, remove, sweep
from lowbit.checkpoints.safetensors_folder import Checkpoint
from lowbit.checkpoints.shards import INDEX
from lowbit.checkpoints.tokenizer import TOKENIZER_FILES
from lowbit.checkpoints.writing import write_index, write_json
from lowbit.errors import LowbitError
from lowbit.runs.carried import CARRIED
from lowbit.runs.manifest import MANIFEST, Identity, Manifest, manifest_of

TIMING, RUN, IDENTITY, LOCK = "lowbit-timing.json", ".run", "identity.json", "lock"
FIRST = f"{RUN}/first"  # what the steps before ``tune`` made
# Locks of the blocks that processes quantize independently, and one of each such process for as long as it is there.
CLAIMS, PRESENT = f"{RUN}/claims", "process-"
REST = "model-rest.safetensors"
_DERIVED = ("fingerprint", "source_files", "versions.")  # differ as a consequence of other settings
# What file managers leave in any folder that they show: a folder with nothing else is empty.
_LITTER = {".DS_Store", "Thumbs.db", "desktop.ini", ".directory", ".localized"}
# Two processes started at once: the one that comes second waits so long for the other to say who it is.
_WAIT, _TRIES = 0.5, 20  # seconds
State = Literal["new", "running", "finished"]


class InUse(LowbitError):
    """Another process works on a run folder; ``who`` names it."""

    def __init__(self, out: Path, owner: Owner | None) -> None:
        self.who = "another process" if owner is None else f"{owner} (since {_clock(owner.started)})"
        super().__init__(
            f"--out {out} is in use by {self.who}: wait until it ends, stop it, or choose another folder"
        )


def block_file(index: int) -> str:
    """The shard of decoder layer ``index``.

    >>> block_file(7)
    'block-00007.safetensors'
    """
    return f"block-{index:05d}.safetensors"


def notes_file(index: int) -> str:
    """The file for layer ``index``'s notes, seconds and memory during a run, relative to the folder."""
    return f"{RUN}/block-{index:05d}.json"


def pictures_file(index: int) -> str:
    """The file for layer ``index``'s pictures for the report during a run, if there are any."""
    return f"{RUN}/block-{index:05d}.safetensors"


def look(out: Path, identity: Identity) -> State:
    """The state of ``out`` for a run: new, the same run unfinished, or finished. Nothing is written.

    Raises:
        LowbitError: the folder holds another run or other files, or files of a finished run are missing.
    """
    try:
        if out.exists() and not out.is_dir():
            raise LowbitError(f"--out {out} is a file; give a folder that is new, empty or of the same run")
        running = out / RUN / IDENTITY
        if (manifest := manifest_of(out)) is not None:
            _check_same_run(out, asdict(manifest.identity), identity)
            if (lost := first_missing(out, manifest)) is not None:
                raise LowbitError(f"--out {out} lacks {lost} of its finished run: delete the folder and run again")
            return "finished"
        if running.exists():
            _check_same_run(out, read_json(running), identity)
            return "running"
        if out.exists() and any(entry.name not in (RUN, *_LITTER) for entry in out.iterdir()):
            raise LowbitError(f"--out {out} exists and is not a lowbit run; give a folder that is new or empty")
    except OSError as error:
        raise _unusable(out, error) from error
    return "new"


def first_missing(folder: Path, manifest: Manifest) -> str | None:
    """The first file of a finished run that is needed and not there: a shard, the index, the config, a tokenizer's.

    Everything else is for readers and reports. A tokenizer's other files (its config, merges) are missed when it is
    loaded, by what needs it.
    """
    shards = (name for name in manifest.files if name.endswith(".safetensors") and not name.startswith("lowbit-"))
    tokenizer = (name for name in manifest.files if any(fnmatch.fnmatch(name, glob) for glob in TOKENIZER_FILES))
    needed = (INDEX, CONFIG, *shards, *tokenizer)
    return next((name for name in needed if not (folder / name).is_file()), None)


def refuse_in_use(out: Path) -> None:
    """Refuse a folder on which another process is at work, before any work of one's own.

    Raises:
        LowbitError: a living process holds the folder's lock; it is named.
    """
    for lock in (out / RUN / LOCK, *_claims(out)):
        if (owner := holder(lock)) is not None:
            raise InUse(out, owner)


def _claims(out: Path) -> list[Path]:
    """The locks of blocks that processes may be at work on, and of these processes themselves."""
    try:
        return sorted((out / CLAIMS).iterdir())
    except OSError:  # no folder, or none that can be one: what is made of it later says so
        return []


def join_folder(out: Path, identity: Identity, check_new: Callable[[], None], stay: ExitStack) -> State:
    """Prepare ``out`` for several processes that claim blocks of one run: its state, as seen under the lock.

    This process is then seen to be there whether it holds a block or not: in its pass through the float model it
    holds none, and a process that had the folder for itself would write the same files.

    Args:
        out: the run folder.
        identity: the run.
        check_new: called before anything is written to a new folder.
        stay: keeps the lock that says so.

    Raises:
        InUse: another process has the folder for itself.
        LowbitError: it holds another run, or cannot be written.
    """
    with _locked(out):
        state = look(out, identity)
        if state == "new":
            check_new()
        if state != "finished":
            for folder in (out, out / RUN):
                sweep(folder)
            begin(out, identity)
            (out / CLAIMS).mkdir(exist_ok=True)
            for lock in (out / CLAIMS).glob(f"{PRESENT}*"):
                if holder(lock) is None:
                    lock.unlink(missing_ok=True)  # of a process that was killed; new ones come under the lock
            stay.enter_context(hold(out / CLAIMS / f"{PRESENT}{uuid4().hex}"))
    return state


@contextmanager
def claimed(out: Path, identity: Identity, joined: bool = False) -> Iterator[State]:
    """Within the context ``out`` belongs to this process and the run: its state, as seen under the lock.

    What a killed process left half-written is deleted. The lock ends with the context, whatever ends it; a folder in
    which nothing was written is as it was before.

    Args:
        out: the run folder.
        identity: the run.
        joined: this process has joined the folder. Others that have may be there too, as long as they hold no block.

    Raises:
        LowbitError: another process works on the folder, it holds another run, or it cannot be written.
    """
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        with _locked(out):
            state = look(out, identity)
            for lock in _claims(out):
                if not (joined and lock.name.startswith(PRESENT)) and (owner := holder(lock)) is not None:
                    raise InUse(out, owner)
            if state != "finished":
                for leftover in filter(is_partial, [*out.iterdir(), *(out / RUN).iterdir()]):
                    remove(leftover)
            yield state
    finally:
        if (out / MANIFEST).exists():
            shutil.rmtree(out / RUN, ignore_errors=True)
        with suppress(OSError):
            for folder in (out / RUN, *missing):
                folder.rmdir()  # only if nothing is in it


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of ``out``, making the folder."""
    with ExitStack() as stack:
        try:
            for _ in range(_TRIES):
                (out / RUN).mkdir(parents=True, exist_ok=True)
                with suppress(FileNotFoundError):  # a process that has just finished removed ``.run``
                    stack.enter_context(hold(out / RUN / LOCK, wait=_WAIT))
                    break
            else:
                raise InUse(out, None)
        except Locked as error:
            raise InUse(out, error.owner) from error
        except OSError as error:
            raise _unusable(out, error) from error
        yield


def begin(out: Path, identity: Identity) -> None:
    """Write down in the claimed folder which run it holds, unless that is known."""
    if not (out / RUN / IDENTITY).exists():
        write_json(out / RUN / IDENTITY, asdict(identity))


def _clock(seconds: float) -> str:
    """Local date and time of seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))


def _unusable(out: Path, error: OSError) -> LowbitError:
    return LowbitError(f"cannot use --out {out}: {error.strerror or error}; choose a folder you may write")


def _check_same_run(out: Path, stored: Mapping[str, Any], identity: Identity) -> None:
    """Refuse a run that differs; the user's settings are named before digests and versions derived from them."""
    requested, existing = flatten(asdict(identity)), flatten(stored)
    names = [name for name in {**existing, **requested} if existing.get(name) != requested.get(name)]
    if names:
        first, *others = sorted(names, key=lambda n: (n.endswith("hash"), n.startswith(_DERIVED), n.count("."), n))
        more = f" ({', '.join(others)[:100]} too)" if others else ""
        raise LowbitError(
            f"--out {out} holds another run: its {first} is {_short(existing.get(first))}, this one's "
            f"{_short(requested.get(first))}{more}; choose another folder, or delete that one"
        )


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by path: ``{"data.length": 512, "recipe.steps.0.gptq.damping": 0.01, ...}``."""
    items = content.items() if isinstance(content, Mapping) else enumerate(content)
    out: dict[str, Any] = {}
    for key, value in items:
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping | list) else {f"{prefix}{key}": value}
    return out


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def write_folder_index(folder: Path, layers: int) -> None:
    """Write the index of all shards, from their actual content."""
    others = [CARRIED] if (folder / CARRIED).is_file() else []
    files = [*(block_file(i) for i in range(layers)), REST, *others]
    shards = {file: Checkpoint(folder, [file]).names for file in files}
    write_index(folder, shards)
