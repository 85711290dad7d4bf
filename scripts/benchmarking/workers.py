"""Processes that do a piece of work for each line that they read, and answer `done`."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


Worker = subprocess.Popen[str]


@contextmanager
def started(script: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]]) -> Iterator[list[Worker]]:
    """Processes of a script of this folder, one for each environment, which wait for work until they are no longer
    needed."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    workers = [
        subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for environment in environments
    ]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.communicate()  # closes its standard input, which ends it


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
