"""Processes that do a piece of work for each line that they read, and answer `done`."""

import subprocess
from collections.abc import Sequence


Worker = subprocess.Popen[str]


def run_all(workers: Sequence[Worker], work: str) -> None:
    """Runs the same work in all processes at once.

    Raises:
        RuntimeError: one of them ended.
    """
    try:
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(work + "\n")
            worker.stdin.flush()
    except BrokenPipeError:
        pass  # it ended, as is seen next
    for worker in workers:
        assert worker.stdout is not None
        if worker.stdout.readline() != "done\n":
            raise RuntimeError("a process of the benchmark ended; its message is above.")
