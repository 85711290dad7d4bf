"""Runs programs in separate processes, like a user, but without the seconds it takes to import torch and transformers:
each process is a fork of this one, in which everything is already imported. Tests of the start itself (imports, and the
environment before them) need a fresh process."""

import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from conftest import PATIENCE
from ports import free_port


FORK = multiprocessing.get_context("fork")


class Forked:
    """Like `subprocess.Popen([sys.executable, *command], env=environment)`, with its output captured.

    Args:
        command: a script, `-m` and a module, or `-c` and a program, followed by arguments.
        environment: environment variables; None: those of this process.
        prepare: called first in the new process, for settings that libraries read when they are imported.
    """

    def __init__(
        self,
        *command: str | Path,
        environment: Mapping[str, str] | None = None,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        self.words = [str(word) for word in command]
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("stdout", "stderr")]
        arguments = (self.words, dict(os.environ if environment is None else environment), self.files, prepare)
        self.process = FORK.Process(target=_run, args=arguments)
        self.process.start()

    def wait(self) -> subprocess.CompletedProcess:
        """Waits for the process to end and returns the same as `subprocess.run`."""
        self.process.join(PATIENCE)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.words, PATIENCE)
        with self.folder:
            output, errors = (file.read_text() for file in self.files)
        return subprocess.CompletedProcess(self.words, self.process.exitcode, output, errors)


def run_forked(*command: str | Path, **options) -> subprocess.CompletedProcess:
    """Starts a `Forked` and waits for it to end."""
    return Forked(*command, **options).wait()


def start_ranks(*command: str | Path) -> list[Forked]:
    """Starts a program on two processes with one thread each, as a launcher would."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    environment = {**os.environ, **shared, "OMP_NUM_THREADS": "1"}
    return [Forked(*command, environment={**environment, "RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]


def _run(words: list[str], environment: dict[str, str], files: list[Path], prepare: Callable[[], None]) -> None:
    """Runs in the new process. `multiprocessing` converts exceptions to its exit status, as Python does."""
    for number, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = os.fdopen(os.open(os.devnull, os.O_RDONLY))
    sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
    logging.root.handlers.clear()  # pytest's
    prepare()
    os.environ.clear()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(sys.modules["__main__"]))
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
