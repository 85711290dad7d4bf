"""Our scan next to those of other projects: one direction, without gate and skip connection, which some of them lack.

Each project is installed into a folder of its own and runs in a process of its own, because it may need another version
of PyTorch. The processes take turns. What cannot be installed or does not compute the same is named and left out.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarking.measuring import Case, Group, take_turns
from benchmarking.scan import one_direction, scan_inputs
from benchmarking.workers import Worker, run_all
from hf_vssm_prune.selective_scan import selective_scan


class Peer(NamedTuple):
    """A project.

    Attributes:
        requirements: what pip installs.
        alone: without the requirements of these, which are here already.
    """

    requirements: tuple[str, ...]
    alone: bool = False


OURS = "ours"
PEERS = {
    "mambapy's pscan": Peer(("mambapy==1.2.0",), alone=True),
    "torch's associative_scan, compiled": Peer(()),
    "ggml's SSM_SCAN": Peer(("ggml-python==0.0.45",)),
    "intel-extension-for-pytorch": Peer(("intel-extension-for-pytorch==2.8.0", "torch==2.8.0", "numpy")),
}
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
        for name, peer in PEERS.items():
            try:
                target = installed(name, peer, options.peers)
                worker = stack.enter_context(started(name, target, arguments, options.threads))
                result = np.load(arguments.with_name("result.npy"))
            except (subprocess.CalledProcessError, RuntimeError) as error:
                print(f"{name} is left out: {error}", flush=True)
                continue
            error = np.abs(result - expected).max() / np.abs(expected).max()
            if not error <= TOLERANCE:
                print(f"{name} is left out: its results differ from ours by {error:.1e} of the largest", flush=True)
                continue
            cases[name] = partial(run_all, [worker], "scan")
        if len(cases) == 1:
            return None
        ratios = {f"{name} / ours": (1.0, name, OURS) for name in cases if name != OURS}
        title = f"Scan, forward, one direction, batch {batch}, {options.threads} threads, other projects"
        return take_turns(title, cases, ratios, options)


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


@contextmanager
def started(name: str, target: Path, arguments: Path, threads: int) -> Iterator[Worker]:
    """A project's process, after its first result, which is in `result.npy` next to the arguments.

    Raises:
        RuntimeError: it ended before; its message is on standard error.
    """
    environment = {**os.environ, "PYTHONPATH": str(target.resolve()), "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, str(Path(__file__).with_name("peer_worker.py")), name, str(arguments), str(threads)]
    worker = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        run_all([worker], "scan")
        yield worker
    finally:
        worker.communicate()  # closes its standard input, at which it ends
