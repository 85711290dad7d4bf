"""A process of `peers.py`: computes another project's scan for each line that it reads, and answers `done`.

It runs with that project's packages, perhaps another PyTorch, and without this repository's.
"""

import ctypes
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np


Arguments = dict[str, np.ndarray]
# A scan takes nothing, and returns (batch, length, channels).
Scan = Callable[[], np.ndarray]


def with_mambapy(arguments: Arguments, threads: int) -> Scan:
    return in_torch(
        arguments, threads, lambda decay, entering: importlib.import_module("mambapy.pscan").pscan(decay, entering)
    )


def with_associative_scan(arguments: Arguments, threads: int) -> Scan:
    import torch
    from torch._higher_order_ops.associative_scan import associative_scan

    def combine(left: tuple, right: tuple) -> tuple:
        return left[0] * right[0], right[0] * left[1] + right[1]

    def states(decay: torch.Tensor, entering: torch.Tensor) -> torch.Tensor:
        return associative_scan(combine, (decay, entering), dim=1, combine_mode="generic")[1]

    return in_torch(arguments, threads, states, torch.compile)


def in_torch(arguments: Arguments, threads: int, states: Callable, compile_it: Callable = lambda scan: scan) -> Scan:
    """A scan from a function of decays and inputs (batch, length, channels, states) to the states."""
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(threads)
    u, step, A, B, C, bias = (
        torch.from_numpy(arguments[name]) for name in ("hidden_states", "time_step", "A", "B", "C", "time_step_bias")
    )

    @compile_it
    def scan() -> torch.Tensor:
        time_step = F.softplus(step + bias)
        decay = torch.exp(time_step.unsqueeze(-1) * A)
        entering = (time_step * u).unsqueeze(-1) * B.unsqueeze(2)
        return (states(decay, entering) @ C.unsqueeze(-1)).squeeze(-1)

    return torch.no_grad()(lambda: scan().numpy())


def with_ipex(arguments: Arguments, threads: int) -> Scan:
    import torch

    importlib.import_module("intel_extension_for_pytorch")
    torch.set_num_threads(threads)
    u, step, B, C = (
        torch.from_numpy(arguments[name]).transpose(1, 2).contiguous()
        for name in ("hidden_states", "time_step", "B", "C")
    )
    A, D, bias = (torch.from_numpy(arguments[name]) for name in ("A", "D", "time_step_bias"))

    @torch.no_grad()
    def scan() -> np.ndarray:
        # It changes the time step in place, so it gets a copy.
        y = torch.ops.torch_ipex.selective_scan_fn(u, step.clone(), A, B, C, D, None, bias, True, False)
        return (y[0] if isinstance(y, (tuple, list)) else y).transpose(1, 2).numpy()

    return scan


def with_ggml(arguments: Arguments, threads: int) -> Scan:
    """With every channel as a head of width 1, as llama.cpp does for Mamba-1. ggml names its axes from the last."""
    import ggml

    (batch, length, channels), states = arguments["hidden_states"].shape, arguments["A"].shape[1]
    values = {
        "state": ((states, 1, channels, batch), np.zeros(batch * channels * states, np.float32)),
        "u": ((1, channels, length, batch), arguments["hidden_states"]),
        "time_step": ((channels, length, batch), arguments["time_step"] + arguments["time_step_bias"]),
        "A": ((states, channels), arguments["A"]),
        "B": ((states, 1, length, batch), arguments["B"]),
        "C": ((states, 1, length, batch), arguments["C"]),
    }
    numbers = sum(array.size for _, array in values.values()) + batch * channels * (length + states)
    context = ggml.ggml_init(ggml.ggml_init_params(mem_size=8 * numbers + 2**24, mem_buffer=None, no_alloc=False))
    tensors = []
    for shape, array in values.values():
        padded = (*shape, *[1] * (4 - len(shape)))
        tensor = ggml.ggml_new_tensor_4d(context, ggml.GGML_TYPE_F32, *padded)
        ctypes.memmove(ggml.ggml_get_data(tensor), np.ascontiguousarray(array, np.float32).ctypes.data, array.size * 4)
        tensors.append(tensor)
    ids = ggml.ggml_new_tensor_1d(context, ggml.GGML_TYPE_I32, batch)
    sequences = np.arange(batch, dtype=np.int32)
    ctypes.memmove(ggml.ggml_get_data(ids), sequences.ctypes.data, sequences.nbytes)
    output = ggml.ggml_ssm_scan(context, *tensors, ids)
    graph = ggml.ggml_new_graph(context)
    ggml.ggml_build_forward_expand(graph, output)

    def scan() -> np.ndarray:
        if ggml.ggml_graph_compute_with_ctx(context, graph, threads) != 0:
            raise SystemExit("ggml failed")
        pointer = ctypes.cast(ggml.ggml_get_data(output), ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(pointer, (batch * length * channels,)).reshape(batch, length, channels)

    return scan


class Peer(NamedTuple):
    """Another project.

    Attributes:
        scan: Prepares its scan from the arguments and the number of threads.
        requirements: What pip installs.
        alone: Whether it is installed without its own requirements, which are here already.
    """

    scan: Callable[[Arguments, int], Scan]
    requirements: tuple[str, ...] = ()
    alone: bool = False


PEERS = {
    "mambapy's pscan": Peer(with_mambapy, ("mambapy==1.2.0",), alone=True),
    "torch's associative_scan, compiled": Peer(with_associative_scan),
    "ggml's SSM_SCAN": Peer(with_ggml, ("ggml-python==0.0.45",)),
    "intel-extension-for-pytorch": Peer(with_ipex, ("intel-extension-for-pytorch==2.8.0", "torch==2.8.0", "numpy")),
}


def main(name: str, file: str, threads: str) -> None:
    with np.load(file) as stored:
        scan = PEERS[name].scan(dict(stored), int(threads))
    result = Path(file).with_name("result.npy")
    result.unlink(missing_ok=True)
    for _ in sys.stdin:
        y = scan()
        if not result.exists():
            np.save(result, y)
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
