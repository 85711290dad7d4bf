"""Our scan next to those of other projects: one direction, without gate and skip connection, which some of them lack.

Each project is installed into a folder of its own and runs in a process of its own, because it may need another version
of PyTorch. The processes take turns. What cannot be installed or does not compute the same is named and left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarking.measuring import Case, Group, take_turns
from benchmarking.peer_worker import PEERS, Peer
from benchmarking.scan import one_direction, scan_inputs
from benchmarking.workers import run_all, started
from hf_vssm_prune.selective_scan import selective_scan


OURS = "ours"
TOLERANCE = 1e-4  # of the largest value


def peers_section(options: argparse.Namespace) -> list[Group]:
    return [group for batch in options.batch_sizes if (group := compare(batch, options)) is not None]


def compare(batch: int, options: argparse.Namespace) -> Group | None:
    inputs = one_direction(scan_inputs(batch))
    inputs |= {"gate": None, "D": torch.zeros_like(inputs["D"])}
    expected = selective_scan(**inputs).numpy()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        arguments = Path(folder, "arguments.npz")
        np.savez(arguments, **{name: tensor.numpy() for name, tensor in inputs.items() if tensor is not None})
        cases: dict[str, Case] = {OURS: partial(selective_scan, **inputs)}
        for name in PEERS:
            try:
                cases[name] = checked_case(name, arguments, expected, options, stack)
            except (subprocess.CalledProcessError, RuntimeError) as error:
                print(f"{name} is left out: {error}", flush=True)
        if len(cases) == 1:
            return None
        ratios = {f"{name} / ours": (1.0, name, OURS) for name in cases if name != OURS}
        title = f"Scan, forward, one direction, batch {batch}, {options.threads} threads, other projects"
        return take_turns(title, cases, ratios, options)


def checked_case(
    name: str, arguments: Path, expected: np.ndarray, options: argparse.Namespace, stack: ExitStack
) -> Case:
    """A project's scan, in a process that `stack` ends.

    Raises:
        subprocess.CalledProcessError: the project cannot be installed.
        RuntimeError: its process ended, or its results are not ours.
    """
    target = installed(name, PEERS[name], options.peers)
    environment = {**os.environ, "PYTHONPATH": str(target.resolve()), "OMP_NUM_THREADS": str(options.threads)}
    of_worker = [name, str(arguments), str(options.threads)]
    scan = partial(run_all, stack.enter_context(started("peer_worker.py", of_worker, [environment])), "scan")
    scan()
    result = np.load(arguments.with_name("result.npy"))
    difference = np.abs(result - expected).max() / np.abs(expected).max()
    if not difference <= TOLERANCE:
        raise RuntimeError(f"its results differ from ours by {difference:.1e} of the largest")
    return scan


def installed(name: str, peer: Peer, folder: Path) -> Path:
    """The folder with a project's packages; installs them if they are not there yet."""
    target = folder / name.split("'")[0].replace(" ", "-")
    stamp = target / ".installed"
    if peer.requirements and not stamp.exists():
        print(f"Installing {', '.join(peer.requirements)} into {target}.", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--upgrade", "--target", str(target)]
        subprocess.run([*command, *(["--no-deps"] if peer.alone else []), *peer.requirements], check=True)
        stamp.touch()
    return target
