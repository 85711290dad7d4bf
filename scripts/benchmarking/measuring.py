"""Runs cases alternately, and reports their times and the machine."""

import argparse
import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm.auto import tqdm

from hf_vssm_prune.environment import WAITING
from hf_vssm_prune.kernels import available


Case = Callable[[], object]


@dataclass
class Group:
    """Cases that were run alternately.

    Attributes:
        title: what was computed.
        seconds: the times of each case, in order.
        ratios: the two cases compared, by name, with a factor: (factor, slower, faster).
        images: number of images processed in a run of a case; 0: not applicable.
    """

    title: str
    seconds: dict[str, list[float]]
    ratios: dict[str, tuple[float, str, str]] = field(default_factory=dict)
    images: int = 0

    def ratio(self, name: str) -> tuple[float, float]:
        """The ratio of the minimum times, and the median of the ratios of individual turns."""
        factor, slower, faster = self.ratios[name]
        turns = zip(self.seconds[slower], self.seconds[faster], strict=True)
        fastest = min(self.seconds[slower]) / min(self.seconds[faster])
        return factor * fastest, factor * statistics.median(a / b for a, b in turns)

    def tables(self) -> str:
        head, rule = "| case | fastest ms | median ms |", "| --- | ---: | ---: |"
        if self.images:
            head, rule = f"{head} images/s |", f"{rule} ---: |"
        lines = [f"### {self.title}", "", head, rule]
        for name, runs in self.seconds.items():
            row = f"| {name} | {1e3 * min(runs):.3g} | {1e3 * statistics.median(runs):.3g} |"
            lines.append(f"{row} {self.images / min(runs):.3g} |" if self.images else row)
        if self.ratios:
            lines += ["", "| ratio | of the fastest | median |", "| --- | ---: | ---: |"]
            lines += ["| {} | {:.2f} | {:.2f} |".format(name, *self.ratio(name)) for name in self.ratios]
        return "\n".join(lines) + "\n"


# A case that takes fewer seconds than this is first run once unmeasured in each turn, so that the cache contains its
# inputs, as in a model, instead of those of the previous case.
COLD_BELOW = 0.02


def take_turns(
    title: str,
    cases: dict[str, Case],
    ratios: dict[str, tuple[float, str, str]],
    options: argparse.Namespace,
    images: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Group:
    """Runs all cases alternately until the time is used up, at least three times. `clock` measures the cases."""
    torch.set_default_device(None)  # its overhead in each call would be measured
    for case in cases.values():
        case()
    wait(options.device)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    first_runs = next(iter(seconds.values()))
    start = time.perf_counter()
    with tqdm(total=round(options.seconds), desc=title, unit="s", bar_format="{desc}: {n:.0f}/{total} s") as progress:
        while (elapsed := time.perf_counter() - start) < options.seconds or len(first_runs) < 3:
            for name, case in cases.items():
                if seconds[name] and seconds[name][-1] < COLD_BELOW:
                    case()
                    wait(options.device)
                before = clock()
                case()
                wait(options.device)
                seconds[name].append(clock() - before)
            progress.n = min(elapsed, options.seconds)
            progress.refresh()
    make_tensors_on(options.device)
    group = Group(title, seconds, ratios, images)
    print("\n" + group.tables(), flush=True)
    return group


def make_tensors_on(device: str) -> None:
    torch.set_default_device(None if torch.device(device).type == "cpu" else device)


def wait(device: str) -> None:
    """Waits until a GPU has finished its work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def with_threads(threads: int, case: Case) -> Case:
    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        case()
        torch.set_num_threads(before)

    return run


def growth(case: Case) -> str:
    """The peak growth of memory during a run: the GPU's, or the process's if the system reports it (Linux)."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        case()
        return f"the GPU's memory grows by {(torch.cuda.max_memory_allocated() - allocated) / 2**20:.0f} MiB"
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return "the system does not tell how far the process grows"
    ctypes.CDLL(None).malloc_trim(0)  # return memory freed by earlier runs to the system, so that it is counted again
    reset.write_text("5")  # reset the peak to the memory in use
    before = memory_in_use("VmRSS")
    case()
    return f"the process grows by {(memory_in_use('VmHWM') - before) / 2**10:.0f} MiB"


def memory_in_use(name: str) -> int:
    """A value from /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def describe_machine(device: str) -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    a = torch.randn(1024, 1024)
    runs = []
    for _ in range(10):
        before = time.perf_counter()
        a @ a
        wait(device)
        runs.append(time.perf_counter() - before)
    return {
        "processor": processor,
        "threads": str(torch.get_num_threads()),
        "idle threads": " ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ) or "default",
        "torch": torch.__version__,
        "kernels": ", ".join(name for name, state in available().items() if state == "available") or "none",
        "matrix products": f"{2 * 1024**3 / min(runs) / 1e9:.0f} GFLOP/s",
    }
