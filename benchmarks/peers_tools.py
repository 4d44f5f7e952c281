"""Other quantization tools: each in an environment of its own, started on given tokens, its result as a folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lowbit.checkpoints.companions import CONFIG, companions, copy_companion
from lowbit.quant.integer import integer
from lowbit.quant.scheme_names import parse_scheme
from rows import ROOT, cpu_seconds, digest

BUILD = ROOT / "build" / "peers"
HERE = Path(__file__).parent
JOB = HERE / "peers_job.py"
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}  # all that a driver reads is on this machine
MADE = "made.json"  # beside a driver's result, written last


@dataclass(frozen=True)
class Tool:
    """A package with a driver, ``peers_DRIVER.py``.

    Attributes:
        package, version: as the registry has them. One environment cannot hold all tools: llm-compressor 0.14 refuses
            AutoRound 0.16.
        driver: runs in the environment; imports the package and not ``lowbit``.
    """

    package: str
    version: str
    driver: str

    @property
    def script(self) -> Path:
        """The driver's file."""
        return HERE / f"peers_{self.driver}.py"

    @property
    def code(self) -> str:
        """A digest of what makes a result, but for the package itself."""
        return digest([self.script, JOB])

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return BUILD / f"{self.package}-{self.version}" / "bin" / "python"

    def make_environment(self) -> None:
        """Install the package beside the torch release that ``lowbit`` runs on here; what is there stays."""
        if self._versions() is not None:
            return
        pinned = f"torch=={torch_release()}"
        print(f"installing {self.package} {self.version} into {self.python.parents[1]}", flush=True)
        venv.create(self.python.parents[1], with_pip=True, clear=True)
        for packages in ([pinned], [pinned, f"{self.package}=={self.version}"]):
            self._pip(packages)

    def check(self) -> dict[str, str]:
        """Versions in the environment; ends the program where it is missing or not as it should be."""
        found = self._versions()
        if found is None:
            raise SystemExit(f"no environment for {self.package} {self.version}: add --make-environment")
        if (release := found["torch"].partition("+")[0]) != torch_release():
            raise SystemExit(
                f"{self.python.parents[1]} has torch {release}, lowbit runs on {torch_release()}: delete the folder "
                "and add --make-environment"
            )
        return found

    def _pip(self, packages: list[str]) -> None:
        command = [str(self.python), "-m", "pip", "install", "--progress-bar", "off", *packages]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")

    def _versions(self) -> dict[str, str] | None:
        """Of the packages that figures depend on, or ``None`` where one is not installed."""
        if not self.python.exists():
            return None
        names = [self.package, "torch", "transformers", "compressed-tensors"]
        ask = (
            "import importlib.metadata as m, json, sys\n"
            "have = {d.metadata['Name'].lower().replace('_', '-'): d.version for d in m.distributions()}\n"
            "print(json.dumps({name: have[name] for name in sys.argv[1:] if name in have}))"
        )
        done = subprocess.run([str(self.python), "-c", ask, *names], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{self.python}: {done.stderr}")
        found: dict[str, str] = json.loads(done.stdout)
        return found if found.get(self.package) == self.version and "torch" in found else None


TOOLS = {
    "autoround": Tool("auto-round", "0.16.1", "autoround"),
    "llmcompressor": Tool("llmcompressor", "0.14.0.1", "llmcompressor"),
}


@dataclass(frozen=True)
class Peer:
    """A method of a tool.

    Attributes:
        tool: a key of ``TOOLS``.
        method: as its driver knows it.
        learns: whether it takes optimisation steps.
    """

    tool: str
    method: str
    learns: bool = False


PEERS = {
    "AutoRound": Peer("autoround", "bfloat16", learns=True),
    "AutoRound, float32": Peer("autoround", "float32", learns=True),
    "llm-compressor GPTQ": Peer("llmcompressor", "gptq"),
    "llm-compressor AWQ": Peer("llmcompressor", "awq"),
}


def torch_release() -> str:
    """The release of torch here, without the build that it is.

    >>> torch_release().count(".")
    2
    """
    return torch.__version__.partition("+")[0]


def one_thread() -> dict[str, str]:
    """Environment variables of processes that compute on one thread."""
    return dict.fromkeys(THREADS, "1")


def quantize(peer: Peer, scheme: str, seed: int, steps: int, model: Path, tokens: Path, out: Path) -> dict[str, Any]:
    """Quantize ``model`` into ``out``, a folder of floats that ``lowbit compare`` reads.

    A folder that a driver has finished is left as it is, so that hours of work survive an evaluation that fails.

    Args:
        peer, scheme, seed, steps: the quantization.
        model: the float model's folder.
        tokens: file with ``ids``.
        out: is made, or made again where it is not finished.

    Returns:
        ``cpu_seconds`` of the driver's process, ``bits_per_weight`` and ``versions``.
    """
    tool = TOOLS[peer.tool]
    made = out / MADE
    if made.exists():
        done: dict[str, Any] = json.loads(made.read_text())
        return done
    versions = tool.check()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in (CONFIG, *companions(model, code=False)):
        copy_companion(model, out, name)
    weight = integer(parse_scheme(scheme).weight, "a table of integer schemes")
    job = {
        "method": peer.method,
        "model": str(model),
        "tokens": str(tokens),
        "out": str(out),
        "bits": weight.bits,
        "group": weight.group,
        "symmetric": weight.symmetric,
        "seed": seed,
        "steps": steps,
    }
    _, seconds = cpu_seconds(lambda: _drive(tool, job, out))
    row = {"cpu_seconds": seconds, "bits_per_weight": weight.bits_per_value(weight.group or 1), "versions": versions}
    made.write_text(json.dumps(row))
    return row


def _drive(tool: Tool, job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run a driver in ``out``, where it may leave what it likes; ends the program where it fails."""
    path = out / "job.json"
    path.write_text(json.dumps(job))
    command = [str(tool.python), str(tool.script), str(path)]
    env = {**os.environ, **one_thread(), **OFFLINE}
    with (out / "driver.log").open("w") as log:
        code = subprocess.run(command, cwd=out, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    if code or not (out / "model.safetensors").exists():
        tail = "\n".join((out / "driver.log").read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)} ended with {code}:\n{tail}")
    return job
