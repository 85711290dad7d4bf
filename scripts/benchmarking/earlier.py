"""PlainMamba in plain PyTorch, as it runs without the package, with the code of an earlier checkout and with this one.

Processes of the two take turns. CPU times are compared, since other programs on the machine affect these less.
"""

import argparse
import os
import time
from pathlib import Path

from benchmarking.measuring import Group
from benchmarking.workers import Worker, started
from hf_vssm_prune.pruning_methods import PAPERS_METHOD


BEFORE, AFTER = "before", "after"


def earlier_section(options: argparse.Namespace) -> list[Group]:
    """A forward pass, dense and pruned."""
    here = Path(__file__).parents[2]
    sources = [str((checkout / "src").resolve()) for checkout in (options.earlier, here)]
    environments = [{**os.environ, "PYTHONPATH": path} for path in sources]
    groups = []
    for batch in options.batch_sizes:
        model = [options.preset, str(options.flops_reduction), PAPERS_METHOD, str(batch), str(options.threads)]
        with started("earlier_worker.py", model, environments) as workers:
            for name in ("dense", "pruned"):
                title = f"PlainMamba {options.preset} in plain PyTorch, {name}, CPU time of a forward, batch {batch}"
                seconds = in_turns(workers, name, options.seconds)
                groups.append(Group(title, seconds, {f"{BEFORE} / {AFTER}": (1.0, BEFORE, AFTER)}, images=batch))
                print("\n" + groups[-1].tables(), flush=True)
    return groups


def in_turns(workers: list[Worker], model: str, seconds: float) -> dict[str, list[float]]:
    """The CPU times of both processes, after one run that is not counted; at least three of each."""
    times: dict[str, list[float]] = {BEFORE: [], AFTER: []}
    for worker in workers:
        cpu_time(worker, model)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(times[AFTER]) < 3:
        for name, worker in zip(times, workers, strict=True):
            times[name].append(cpu_time(worker, model))
    return times


def cpu_time(worker: Worker, model: str) -> float:
    """The CPU time of a forward pass in a process, in seconds.

    Raises:
        RuntimeError: the process ended.
    """
    assert worker.stdin is not None
    assert worker.stdout is not None
    print(model, file=worker.stdin, flush=True)
    if not (answer := worker.stdout.readline()):
        raise RuntimeError("a process of the benchmark ended; its message is above.")
    return float(answer)
