"""The error of a job that lost a process."""

from __future__ import annotations

from lowbit.errors import LowbitError


class Lost(LowbitError):
    """Another process of the job has ended, or has not answered in time."""

    def __init__(self) -> None:
        super().__init__(
            "another process of this job ended, or did not answer in time; finished blocks are kept: the same "
            "command resumes, with any number of processes"
        )
