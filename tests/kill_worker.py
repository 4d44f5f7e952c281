"""A process of a job that is started by forking a server which has imported everything: a tenth of torchrun's time.

No launcher stands by: the other processes have to notice by themselves that one is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
from collections.abc import Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

SERVER = ["torch.distributed", "lowbit.cli.main", "lowbit.pipeline.quantize", "kill_worker"]


def run(rank: int, size: int, port: int, arguments: Sequence[str], errors: Path, timeout: float) -> None:
    """The ``lowbit`` command in one process; what it says goes into a file."""
    from lowbit.cli.main import main

    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"LOWBIT_TIMEOUT": str(timeout)}
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.argv = ["lowbit", *arguments]
    main()


def server() -> ForkServerContext:
    """What makes processes; one for a test session."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SERVER)
    return context


def free_port() -> int:
    """A port that nothing listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def job(size: int, arguments: Sequence[str], folder: Path, timeout: float = 60) -> list[ForkServerProcess]:
    """The processes of a job, started; process ``rank`` writes ``folder/rank.txt``."""
    port, context = free_port(), server()
    folder.mkdir(parents=True, exist_ok=True)
    processes = []
    for rank in range(size):
        given = (rank, size, port, list(arguments), folder / f"{rank}.txt", timeout)
        processes.append(context.Process(target=run, args=given, daemon=True))
    for process in processes:
        process.start()
    return processes
