"""The code of an earlier checkout and that of this one: PlainMamba in plain PyTorch, as without the package, and
the C++ kernels.

Processes of the two take turns. CPU times are compared, since other programs on the machine affect these less.
"""

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarking.earlier_kernels_worker import IMAGES, KERNELS, STEPS
from benchmarking.measuring import Group
from benchmarking.workers import Worker, started
from hf_vssm_prune.pruning_methods import PAPERS_METHOD


BEFORE, AFTER = "before", "after"


def earlier_section(options: argparse.Namespace) -> list[Group]:
    """A forward pass, dense and pruned."""
    groups = []
    for batch in options.batch_sizes:
        model = [options.preset, str(options.flops_reduction), PAPERS_METHOD, str(batch), str(options.threads)]
        with started("earlier_worker.py", model, environments(options)) as workers:
            title = f"PlainMamba {options.preset} in plain PyTorch, CPU time of a forward, batch {batch}"
            groups.append(compare(title, workers, ["dense", "pruned"], options.seconds, images=batch))
    return groups


def earlier_kernels_section(options: argparse.Namespace) -> list[Group]:
    """Forward and backward of each kernel, and training steps of small models of two families."""
    groups = []
    for batch in options.batch_sizes:
        with started("earlier_kernels_worker.py", [str(batch), str(options.threads)], environments(options)) as workers:
            title = f"kernels in float32, CPU time, batch {batch}"
            groups.append(compare(title, workers, list(KERNELS), options.seconds))
    with started("earlier_kernels_worker.py", [str(IMAGES), str(options.threads)], environments(options)) as workers:
        title = f"models of width 128 with 12 layers, CPU time of a training step, batch {IMAGES}"
        vim, plainmamba = STEPS
        families = {f"{vim} / {plainmamba}": (1.0, f"{vim}, {AFTER}", f"{plainmamba}, {AFTER}")}
        groups.append(compare(title, workers, list(STEPS), options.seconds, IMAGES, families))
    return groups


def environments(options: argparse.Namespace) -> list[Mapping[str, str]]:
    here = Path(__file__).parents[2]
    sources = [str((checkout / "src").resolve()) for checkout in (options.earlier, here)]
    return [{**os.environ, "PYTHONPATH": path} for path in sources]


def compare(
    title: str,
    workers: Sequence[Worker],
    cases: Sequence[str],
    seconds: float,
    images: int = 0,
    more_ratios: Mapping[str, tuple[float, str, str]] | None = None,
) -> Group:
    ratios = {f"{case}: {BEFORE} / {AFTER}": (1.0, f"{case}, {BEFORE}", f"{case}, {AFTER}") for case in cases}
    group = Group(title, in_turns(workers, cases, seconds), {**ratios, **(more_ratios or {})}, images)
    print("\n" + group.tables(), flush=True)
    return group


def in_turns(workers: Sequence[Worker], cases: Sequence[str], seconds: float) -> dict[str, list[float]]:
    """The CPU times of all cases in both processes, after one run of each that is not counted; at least three."""
    times: dict[str, list[float]] = {f"{case}, {which}": [] for case in cases for which in (BEFORE, AFTER)}
    for case in cases:
        for worker in workers:
            cpu_time(worker, case)
    start = time.perf_counter()
    turns = 0
    while time.perf_counter() - start < seconds or turns < 3:
        for case in cases:
            for which, worker in zip((BEFORE, AFTER), workers, strict=True):
                times[f"{case}, {which}"].append(cpu_time(worker, case))
        turns += 1
    return times


def cpu_time(worker: Worker, case: str) -> float:
    """The CPU time of a case in a process, in seconds.

    Raises:
        RuntimeError: the process ended.
    """
    assert worker.stdin is not None
    assert worker.stdout is not None
    with suppress(BrokenPipeError):  # it ended, as is seen next
        print(case, file=worker.stdin, flush=True)
    if not (answer := worker.stdout.readline()):
        raise RuntimeError("a process of the benchmark ended; its message is above.")
    return float(answer)
