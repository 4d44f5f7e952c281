"""A process of a job that is started by forking a server which has imported everything: a tenth of torchrun's time.

No launcher stands by: the other processes have to notice by themselves that one is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

SERVER = ["torch.distributed", "lowbit.cli.main", "lowbit.pipeline.quantize", "forked_job"]


def run(arguments: Sequence[str], folder: Path, environment: Mapping[str, str]) -> None:
    """The ``lowbit`` command in one process; what it says and prints goes into files."""
    from lowbit.cli.main import main

    os.environ |= environment
    for number, kind in ((1, "out"), (2, "txt")):
        with (folder / f"{environment['RANK']}.{kind}").open("w") as file:
            os.dup2(file.fileno(), number)
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


def job(
    commands: Sequence[Sequence[str]], folder: Path, timeout: float = 600, **environment: str
) -> list[ForkServerProcess]:
    """The processes of a job, started.

    Args:
        commands: the arguments of ``lowbit``, for each process.
        folder: where process ``rank`` writes ``rank.txt``, what it says, and ``rank.out``, what it prints.
        timeout: ``LOWBIT_TIMEOUT``.
        environment: more variables.
    """
    world = {"WORLD_SIZE": str(len(commands)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    world |= {"LOWBIT_TIMEOUT": str(timeout), **environment}
    folder.mkdir(parents=True, exist_ok=True)
    context, processes = server(), []
    for rank, arguments in enumerate(commands):
        given = (list(arguments), folder, {**world, "RANK": str(rank)})
        processes.append(context.Process(target=run, args=given, daemon=True))
    for process in processes:
        process.start()
    return processes


def ended(processes: Sequence[ForkServerProcess], seconds: float) -> list[int | None]:
    """Exit codes of all processes; ``None``: it has not ended in time, and is stopped."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.1, until - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
            process.join()
    return codes


def errors_of(folder: Path) -> list[str]:
    """Errors and tracebacks of all processes, without what torch says of its own."""
    lines = [line for file in sorted(folder.glob("*.txt")) for line in file.read_text().splitlines()]
    return [line for line in lines if line.startswith(("lowbit: ", "Traceback", "  File "))]
