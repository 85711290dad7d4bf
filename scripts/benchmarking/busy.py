"""Waiting threads: the same work on an idle machine, and next to a busy process.

Torch reads how threads wait when it is loaded, so each setting is tested in its own processes, which are started once
and run alternately.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

from benchmarking.measuring import Case, Group, take_turns
from benchmarking.workers import Worker, run_all, started
from hf_vssm_prune.environment import PATIENT_THREADS, WAITING


BATCH = 32
# The small PlainMamba used for photographs: width 96, 12 layers, 196 tokens.
DEFAULT, CHOSEN, ONE_THREAD, PROCESSES = "torch's default", "as the commands choose", "one thread", "processes of one"
WAYS: dict[str, dict[str, str]] = {
    DEFAULT: {},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in (100, 1000, 10000)},
    CHOSEN: PATIENT_THREADS,
    ONE_THREAD: {"OMP_NUM_THREADS": "1"},
}
BUSY = "while True: pass"


def busy_section(options: argparse.Namespace) -> list[Group]:
    """A forward pass of one image and a training step, on an idle machine and next to a busy process with one
    thread."""
    threads = options.threads
    groups = []
    with ExitStack() as stack:
        workers = {name: stack.enter_context(waiting([way], threads, BATCH)) for name, way in WAYS.items()}
        halves = [WAYS[ONE_THREAD]] * threads
        workers[PROCESSES] = stack.enter_context(waiting(halves, threads, BATCH // threads))
        for work, names in (("forward", list(WAYS)), ("step", list(workers))):
            for neighbour in ("quiet", "beside a busy process"):
                cases: dict[str, Case] = {name: partial(run_all, workers[name], work) for name in names}
                ratios = {f"{DEFAULT} / {name}": (1.0, DEFAULT, name) for name in names if name != DEFAULT}
                title = (
                    f"small PlainMamba, {'forward, batch 1' if work == 'forward' else f'training step, batch {BATCH}'}"
                )
                with busy_process() if neighbour != "quiet" else ExitStack():
                    groups.append(take_turns(f"{title}, {threads} threads, {neighbour}", cases, ratios, options))
    return groups


def waiting(ways: Sequence[dict[str, str]], threads: int, batch: int) -> AbstractContextManager[list[Worker]]:
    """Processes that wait for work, each with its own environment variables in addition to this process's."""
    inherited = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
    inherited |= {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return started("busy_worker.py", [str(batch)], [inherited | way for way in ways])


@contextmanager
def busy_process() -> Iterator[None]:
    process = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()
