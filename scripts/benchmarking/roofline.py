"""How close the fused scan comes to the peak performance of a core."""

import argparse
import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from benchmarking.measuring import Case, Group, take_turns, with_threads
from benchmarking.scan import CHANNELS, LENGTH, STATES, scan_inputs
from hf_vssm_prune.kernels import build
from hf_vssm_prune.selective_scan import selective_scan


# Multiply-adds of the fused operation per token and channel; a single addition or multiplication counts as one. For
# each state: 6 for exp(ΔA), and 3 for each of four paths (two for the state and one for the output). In addition: 20
# for the softplus, 12 for the gate's SiLU, 8 for Δu and Du of four paths.
SCAN_MULTIPLY_ADDS = STATES * (6 + 4 * 3) + 20 + 12 + 8


@torch.no_grad()
def roofline_section(options: argparse.Namespace) -> list[Group]:
    """One core: the fused scan compared with its minimum multiply-adds and its minimum memory traffic."""
    with tempfile.TemporaryDirectory() as folder:
        multiply_adds = load_multiply_adds(Path(folder))
        count = SCAN_MULTIPLY_ADDS * LENGTH * CHANNELS
        # u, time step and gate are read and the result is written, which is as much as copying two tensors.
        floats = 2 * LENGTH * CHANNELS
        source, target = torch.randn(floats), torch.empty(floats)
        cases: dict[str, Case] = {
            "scan": with_threads(1, partial(selective_scan, **scan_inputs(1))),
            "its multiply-adds alone": partial(multiply_adds, count),
            "its memory traffic alone": with_threads(1, lambda: target.copy_(source)),
        }
        ratios = {
            "share of the roofline: its multiply-adds / the scan": (1.0, "its multiply-adds alone", "scan"),
            "its memory traffic / the scan": (1.0, "its memory traffic alone", "scan"),
        }
        group = take_turns("Roofline of the scan, four directions, batch 1, one thread", cases, ratios, options)
    fastest = {name: min(runs) for name, runs in group.seconds.items()}
    print(
        f"One core: {2 * count / fastest['its multiply-adds alone'] / 1e9:.0f} GFLOP/s, "
        f"copying {8 * floats / fastest['its memory traffic alone'] / 1e9:.0f} GB/s, read and written.\n",
        flush=True,
    )
    return [group]


def load_multiply_adds(folder: Path) -> Callable[[int], None]:
    """The function of `fma_peak.cpp`, compiled for this processor."""
    library = folder / "fma_peak.so"
    flags = (*build.FLAGS, *build.VARIANTS[build.best_variant()], f"-I{build.SOURCE_DIRECTORY}")
    source = Path(__file__).with_name("fma_peak.cpp")
    subprocess.run([*build.find_compiler(), *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).multiply_adds
    function.argtypes, function.restype = (ctypes.c_int64,), None
    return function
