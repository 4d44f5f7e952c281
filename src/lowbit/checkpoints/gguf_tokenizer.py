"""The tokenizer of a ``.gguf`` file, in the folder that the file is converted to.

A file without one that transformers can use gives a folder without one, and ``NO_TOKENIZER`` with the reason and the
versions that found it: other versions try again. A failure that passes, as of a full disk or a package that is not
installed, says nothing of the file and is an error.
"""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tokenizers
import transformers
from transformers import AutoTokenizer

from lowbit.checkpoints.gguf_layout import copy_keys
from lowbit.errors import LowbitError, one_line, panics_as_errors
from lowbit.progress import say

NO_TOKENIZER = "no-tokenizer.txt"  # in a converted folder without one: the reason, and in its last line the versions
_NAMES = ("ENOSPC", "EDQUOT", "EFBIG", "EIO", "EMFILE", "ENFILE", "ENOMEM", "EACCES", "EPERM", "EROFS", "EAGAIN")
_NOT_OF_THE_FILE = frozenset(getattr(errno, name) for name in _NAMES if hasattr(errno, name))
_OF_THE_SYSTEM = re.compile(r"\(os error ([0-9]+)\)")  # how the tokenizers library writes an errno


def write_tokenizer(path: Path, target: Path) -> None:
    """Save the file's tokenizer, chat template included, or why there is none.

    Args:
        path: the ``.gguf`` file.
        target: the folder that it is converted to.

    Raises:
        LowbitError: memory, the disk or an installed package do not suffice; what to do about it.
        OSError: the disk cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        keys = Path(temporary).resolve() / path.name
        copy_keys(path, keys)
        try:
            with panics_as_errors():
                # An absolute file name takes precedence over the folder, so that no tokenizer there is used.
                tokenizer = AutoTokenizer.from_pretrained(target, gguf_file=str(keys), local_files_only=True)
        except Exception as error:  # the tokenizers library raises nothing narrower
            _without_tokenizer(path, target, error)
            return
    # The tokenizer stores its arguments and would write this one into tokenizer_config.json.
    tokenizer.init_kwargs.pop("local_files_only", None)
    with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
        try:
            with panics_as_errors():
                tokenizer.save_pretrained(temporary)
        except OSError:
            raise  # a full disk is no fault of the file
        except Exception as error:
            _without_tokenizer(path, target, error)
        else:
            _move(Path(temporary), target)
            (target / NO_TOKENIZER).unlink(missing_ok=True)


def lacks_tokenizer(folder: Path) -> bool:
    """Whether a converted folder has no tokenizer, as other versions than the installed ones have found."""
    try:
        lines = (folder / NO_TOKENIZER).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False  # it has one
    return _versions() not in lines[1:]


def why_none(folder: Path) -> str | None:
    """Why a converted folder has no tokenizer; ``None`` for any other folder."""
    file = folder / NO_TOKENIZER
    return file.read_text(encoding="utf-8", errors="replace").splitlines()[0][:400] if file.is_file() else None


def _versions() -> str:
    return f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}"


def _move(source: Path, target: Path) -> None:
    """Put every file of a folder beside ``target`` into it, each at once: another process may read there."""
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)


def _without_tokenizer(path: Path, target: Path, error: BaseException) -> None:
    """Note that the file has no tokenizer, unless the failure passes."""
    if advice := _advice(error):
        raise LowbitError(f"cannot convert the tokenizer of {path.name} ({one_line(error)}): {advice}") from error
    reason = f"{path.name} has no tokenizer that transformers can use ({one_line(error)})"
    text = f"{reason}\n{_versions()}\n"
    (target / NO_TOKENIZER).write_text(text, encoding="utf-8", errors="backslashreplace")
    say(f"{reason}; the converted folder has none")


def _advice(error: BaseException) -> str:
    """What to do about a failure that is not the file's; empty for one that is."""
    for one in _chain(error):
        number = one.errno if isinstance(one, OSError) else None
        if (found := _OF_THE_SYSTEM.search(str(one))) is not None:
            number = int(found[1])
        if number in _NOT_OF_THE_FILE:
            return "free some space, or set LOWBIT_CACHE to a folder that can be written, and run it again"
        if isinstance(one, MemoryError):
            return "free some memory and run it again"
    if any(isinstance(one, ImportError) for one in _chain(error, handled=False)):
        return "install the package that it needs and run it again"
    return ""


def _chain(error: BaseException, handled: bool = True) -> Iterator[BaseException]:
    """An error and what it comes from; ``handled``: also what was being handled when it was raised."""
    found: BaseException | None = error
    seen: set[int] = set()
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or (found.__context__ if handled and not found.__suppress_context__ else None)
