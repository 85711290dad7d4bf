"""Checks this package on a GPU: correctness, speed and memory, in about ten minutes and without a network.

    python scripts/gpu_check.py --output_dir gpu_check
    python scripts/gpu_check.py --output_dir rehearsal --device cpu --small      # interpreted kernels, tiny models

Each part is a process with its own time limit, so that a part that fails or hangs does not affect the others, and its
results so far are kept. Parts that measure time run alone, after all others, which run at the same time.
`results.json` has all figures, `gpu_check.md` presents them as a page, and `log.<part>.txt` has the output of a part.

A new machine may lack the package's dependencies (pyproject.toml): bring wheels, and install them with `--no-index`.
`--mamba_ssm` names an unpacked source of mamba-ssm, whose scan is built for this GPU while the first parts run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from hf_vssm_prune.families import FAMILIES  # first: it chooses how idle threads wait, which torch reads when loaded


# isort: split
import torch
from gpu_checking.distribution import check_distribution
from gpu_checking.golden import check_golden_cases
from gpu_checking.kernels import NAMES, TIMED, check_kernel, compile_kernels, time_kernels
from gpu_checking.machine import describe, start_building
from gpu_checking.models import MODELS_BY_DTYPE, compile_models, time_compiled_models, time_models
from gpu_checking.report import Report
from gpu_checking.training import MODELS as MODELS_TO_TRAIN
from gpu_checking.training import compile_training, time_training

from hf_vssm_prune.training.atomic_files import write_json, write_text


class Part(NamedTuple):
    """A part of the check."""

    answer: Callable[[argparse.Namespace, Report], None]
    seconds: int  # time limit
    alone: bool  # because it measures time


# On a new machine, a process compiles dozens of kernels one after another, each of which takes seconds. Therefore many
# processes compile them during the checks, and the timed parts find them in Triton's cache.
COMPILING: dict[str, Callable[[argparse.Namespace, Report], None]] = {
    **{
        f"{family} {preset} in {NAMES[dtype]}": partial(compile_models, family, preset, dtype)
        for dtype, models in MODELS_BY_DTYPE.items()
        for family, preset in models
    },
    **{f"training {family} {preset}": partial(compile_training, family, preset) for family, preset in MODELS_TO_TRAIN},
    **{what: partial(compile_kernels, what) for what in TIMED},
}
PARTS = {
    "machine": Part(describe, 60, False),
    **{f"kernels in {name}": Part(partial(check_kernel, "triton", dtype), 200, False) for dtype, name in NAMES.items()},
    **{f"golden cases of {family}": Part(partial(check_golden_cases, family), 200, False) for family in FAMILIES},
    "distribution": Part(check_distribution, 150, False),
    **{f"compiling {what}": Part(compile_it, 200, False) for what, compile_it in COMPILING.items()},
    "models": Part(time_models, 150, True),
    "training": Part(time_training, 90, True),
    "scans": Part(partial(time_kernels, "scans"), 60, True),
    "convolutions": Part(partial(time_kernels, "convolutions"), 60, True),
    "mamba-ssm": Part(partial(check_kernel, "mamba_ssm", torch.float32), 30, True),  # when it is built
    "compiled models": Part(time_compiled_models, 120, True),
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.part is not None:
        PARTS[options.part].answer(options, Report(report_file(options.part, options)))
        return 0
    options.output_dir.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + options.seconds
    building = start_building(options)
    results: dict[str, dict[str, Any]] = {}
    together = [name for name in options.parts if not PARTS[name].alone]
    with ThreadPoolExecutor(max(1, len(together))) as threads:
        of_parts = threads.map(lambda name: run_part(name, end, len(together), options), together)
        for name, result in zip(together, of_parts, strict=True):
            keep(name, result, results, options)
    for name in options.parts:
        if PARTS[name].alone:
            keep(name, run_part(name, end, 1, options), results, options)
    if building is not None:
        building.kill()
    return 0 if all(result["status"] == "ok" for result in results.values()) else 1


def keep(name: str, result: dict[str, Any], results: dict[str, dict[str, Any]], options: argparse.Namespace) -> None:
    print(f"{name}: {result['status']}, {result['seconds']:.0f} s", flush=True)
    results[name] = result
    write_json(results, options.output_dir / "results.json")
    write_text(page(results), options.output_dir / "gpu_check.md")


def report_file(name: str, options: argparse.Namespace) -> Path:
    return options.output_dir / f".{name}.json"


def run_part(name: str, end: float, beside: int, options: argparse.Namespace) -> dict[str, Any]:
    """Runs a part in its own process, one of `beside` at the same time. Returns its report, its status ("ok", "wrong",
    "failed", "too slow", "no time left") and the seconds that it took."""
    start = time.perf_counter()
    seconds = min(PARTS[name].seconds * options.patience, end - start)
    if seconds <= 1:
        return {"status": "no time left", "seconds": 0.0}
    file = report_file(name, options)
    file.unlink(missing_ok=True)  # of a check that was killed
    command = [sys.executable, __file__, "--part", name, "--output_dir", str(options.output_dir)]
    command += ["--device", options.device, *(["--small"] if options.small else [])]
    for option in ("golden", "mamba_ssm"):
        if (folder := getattr(options, option)) is not None:
            command += [f"--{option}", str(folder)]
    environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // beside)), **os.environ}
    if options.device == "cpu":
        environment["TRITON_INTERPRET"] = "1"
    with (options.output_dir / f"log.{name}.txt").open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            status = "ok" if process.wait(timeout=seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "too slow"
        finally:
            if process.poll() is None:  # it is too slow, or Ctrl-C stopped this process
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    result: dict[str, Any] = {"status": status, "seconds": round(time.perf_counter() - start, 1)}
    if file.exists():
        report = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        result |= report | ({"status": "wrong"} if report["wrong"] else {})
    return result


def page(results: dict[str, dict[str, Any]]) -> str:
    """All results as Markdown."""
    lines = ["# GPU check", "", "| part | status | seconds |", "| --- | --- | ---: |"]
    lines += [f"| {name} | {result['status']} | {result['seconds']:.0f} |" for name, result in results.items()]
    for name, result in results.items():
        lines += ["", f"## {name[0].upper()}{name[1:]}", "", *result.get("lines", [])]
        lines += [f"- **wrong**: {wrong}" for wrong in result.get("wrong", [])]
        for table in result.get("tables", []):
            lines += ["", f"### {table['title']}", "", f"| {' | '.join(table['columns'])} |"]
            lines += [f"|{' --- |' * len(table['columns'])}"]
            lines += [f"| {' | '.join(map(str, row))} |" for row in table["rows"]]
    return "\n".join(lines) + "\n"


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="default: %(default)s")
    parser.add_argument("--small", action="store_true", help="tiny models and few cases, for a rehearsal")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="parts to run (default: all)")
    parser.add_argument("--seconds", type=float, default=570, help="time limit for everything (default: %(default)s)")
    parser.add_argument("--patience", type=float, default=1, help="factor for the parts' limits (default: %(default)s)")
    parser.add_argument("--golden", type=Path, help="folder of the golden cases (without it, they are skipped)")
    parser.add_argument(
        "--mamba_ssm", type=Path, help="folder of mamba-ssm's unpacked source, whose scan is built and compared"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # for the process of a part
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
