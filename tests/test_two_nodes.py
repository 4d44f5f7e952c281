"""A job of two nodes: two network namespaces with a cable between them, one process in each, under torchrun."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lowbit
from runs import folder_bytes
from tiny import save_tiny

pytestmark = pytest.mark.heavy  # starts processes that import torch

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *command], capture_output=True, text=True)


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """The names of two namespaces that reach each other, and nothing else."""
    names = [f"lowbit-{os.getpid()}-{node}" for node in range(2)]
    cables = [f"lb{os.getpid() % 10**8}{end}" for end in "ab"]
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip, which makes network namespaces")
    try:
        for name in names:
            if (made := ip("netns", "add", name)).returncode:
                pytest.skip(f"no right to make network namespaces: {made.stderr.strip()[:100]}")
        if (made := ip("link", "add", cables[0], "type", "veth", "peer", "name", cables[1])).returncode:
            pytest.skip(f"no right to make a cable between namespaces: {made.stderr.strip()[:100]}")
        for name, cable, address in zip(names, cables, ADDRESSES, strict=True):
            for command in (
                ["link", "set", cable, "netns", name],
                ["-n", name, "link", "set", cable, "name", "cable"],
                ["-n", name, "address", "add", f"{address}/24", "dev", "cable"],
                ["-n", name, "link", "set", "cable", "up"],
                ["-n", name, "link", "set", "lo", "up"],
            ):
                assert not (done := ip(*command)).returncode, done.stderr
        yield names
    finally:
        ip("link", "delete", cables[0])
        for name in names:
            ip("netns", "delete", name)


def test_two_nodes_give_the_bytes_of_one_process(nodes: list[str], tmp_path: Path) -> None:
    model, out = tmp_path / "model", tmp_path / "two"
    save_tiny(model, "llama", num_hidden_layers=2)
    text = str(model / "calib.txt")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LOWBIT_TIMEOUT": "300", "GLOO_SOCKET_IFNAME": "cable"}
    processes = []
    for rank, node in enumerate(nodes):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(rank)]
        torchrun += ["--nproc-per-node", "1", "--master-addr", ADDRESSES[0], "--master-port", "29511"]
        quantize = ["-m", "lowbit", "quantize", str(model), "--out", str(out), "--scheme", "w4a8", "--recipe", "gptq"]
        sizes = ["--data", text, "--samples", "12", "--length", "16"]
        command = ["ip", "netns", "exec", node, *torchrun, *quantize, *sizes]
        processes.append(subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE))
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    lowbit.quantize(str(model), tmp_path / "one", scheme="w4a8", recipe="gptq", data=text, samples=12, length=16)
    assert folder_bytes(out) == folder_bytes(tmp_path / "one")
