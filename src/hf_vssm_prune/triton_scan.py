"""The selective scan for NVIDIA and AMD GPUs, written in Triton: no CUDA compiler is needed.

The state and every product with it are float32, whatever the inputs' precision; what `plain_fallback.py` names is left
to the plain PyTorch function. Rows of channels are read where they lie, so the parts of a split projection need no
copy. The gradients recompute the states from a checkpoint every sqrt(length) steps, and are the same from run to run.
Unlike on the CPU, indices out of range are not noticed.

Under TRITON_INTERPRET=1 (set before torch is imported) the kernels run on the CPU, slowly, to be tested.
"""

import functools
import importlib.util
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .plain_fallback import left_to
from .scan_operator import ScanArguments, scan_operator
from .selective_scan_torch import selective_scan_torch


BLOCK_CHANNELS = 32


def unavailable(device_type: str) -> str | None:
    """Why this kernel cannot be used for tensors on `device_type`, or None where it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    is_interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if device_type == "cpu" and not is_interpreted:
        return "it computes on a GPU only, or on the CPU under TRITON_INTERPRET=1"
    if device_type not in ("cpu", "cuda"):
        return "it computes on NVIDIA and AMD GPUs only"
    if device_type == "cpu":
        return None
    return _self_check_on_gpu() if torch.cuda.is_available() else "PyTorch finds no GPU"


@functools.cache
def _self_check_on_gpu() -> str | None:
    # The first forward pass asks, whatever it is part of: a new thread is in no mode, autocast or function transform.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(self_check, "cuda").result()


def self_check(device_type: str) -> str | None:
    """Why the kernels cannot be trusted on this device, or None where they can: Triton compiles them anew for each kind
    of GPU, and this package has been tried on few. Compares a small scan and its gradients with plain PyTorch."""
    batch, paths, length, channels, states = 2, 2, 7, 40, 8
    token, state, path = (batch, length, channels), (batch, length, states), (batch, paths, length)
    shapes = (token, token, (channels, states), state, state, (channels,), (channels,), token)
    random = np.random.default_rng(0)
    floats = [random.random(shape, np.float32) - 1 for shape in (*shapes, (channels,), (3, states))]
    floats[8] = -floats[8]  # time steps of holes are positive
    order = random.random(path).argsort(-1)
    gaps, moves = (random.integers(low, high, path) for low, high in ((1, 9), (0, 3)))
    try:
        results = []
        for scan in (selective_scan, selective_scan_torch):
            inputs = [torch.tensor(values, device=device_type).requires_grad_() for values in floats]
            indices = [torch.tensor(values, device=device_type) for values in (order, gaps, moves)]
            arguments = [*inputs[:8], *indices[:2], *inputs[8:], indices[2]]
            output = scan(*arguments)
            output.square().sum().backward()
            results.append([output.detach(), *(tensor.grad for tensor in inputs)])
    except Exception as error:  # of the compiler, the driver or the launch: there is no end to their kinds
        return f"Triton failed with {type(error).__name__}: {error}"
    errors = [(ours - theirs).abs().max() / theirs.abs().max() for ours, theirs in zip(*results, strict=True)]
    worst = max(float(error) for error in errors)
    return None if worst < 1e-4 else f"Triton's results differ from plain PyTorch's by {worst:.1e}"


@left_to(selective_scan_torch)
def selective_scan(*args: Any, **kwargs: Any) -> Tensor:
    """Arguments and result as in `hf_vssm_prune.selective_scan.selective_scan`; a path visits each token once."""
    return _selective_scan(*ScanArguments(*args, **kwargs))


def _scan_forward(arguments: ScanArguments) -> Tensor:
    output, _ = _forward(_readable(arguments))
    if arguments.gate is not None:
        output *= F.silu(arguments.gate.float())
    return output.to(arguments.hidden_states.dtype)


def _scan_backward(arguments: ScanArguments, grad_output: Tensor) -> list[Tensor]:
    gradients = _backward(_readable(arguments), grad_output)
    return [gradients[name] for name in arguments._fields if name in gradients]


_selective_scan = scan_operator("triton_selective_scan", _scan_forward, _scan_backward)


def _readable(arguments: ScanArguments) -> ScanArguments:
    """With strides that the kernels can read: rows of channels where they lie, the rest contiguous."""
    with_rows = {"hidden_states", "time_step", "B", "C"}
    changes = {
        name: tensor if name in with_rows and tensor.stride(-1) == 1 else tensor.contiguous()
        for name, tensor in arguments._asdict().items()
        if tensor is not None and name != "gate"
    }
    return arguments._replace(**changes)


def _tensors(arguments: ScanArguments) -> tuple[Tensor | None, ...]:
    """What the kernels read, in the order of their parameters."""
    return tuple(tensor for name, tensor in arguments._asdict().items() if name != "gate")


def _sizes(arguments: ScanArguments) -> tuple[int, ...]:
    """Length, channels, chunk length and strides, in the order of the kernels' parameters."""
    _, length, channels = arguments.hidden_states.shape
    rows = (arguments.hidden_states, arguments.time_step, arguments.B, arguments.C)
    paths = (arguments.order, arguments.gaps, arguments.moves)
    return (
        *(length, channels, _chunk_length(length)),
        *(stride for tensor in rows for stride in tensor.stride()[:2]),
        *(0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0) for tensor in paths),
    )


def _blocks(arguments: ScanArguments) -> dict[str, int]:
    states = arguments.A.shape[-1]
    return {
        "STATES": states,
        "BLOCK_STATES": 2 ** math.ceil(math.log2(states)),
        "BLOCK_CHANNELS": BLOCK_CHANNELS,
        # One warp: sums over the channels need no barrier.
        "num_warps": 1,
    }


def _chunk_length(length: int) -> int:
    """Makes the checkpoints as many as the states of one chunk, which keeps the memory for both smallest."""
    return math.ceil(math.sqrt(length))


def _forward(arguments: ScanArguments, checkpoints: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    from .triton_scan_kernels import scan_forward

    hidden_states = arguments.hidden_states
    batch, _, channels = hidden_states.shape
    output = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
    grid = (batch, math.ceil(channels / BLOCK_CHANNELS))
    with torch.cuda.device_of(hidden_states):
        scan_forward[grid](
            *_tensors(arguments),
            *(output, checkpoints),
            *_sizes(arguments),
            PATHS=arguments.num_paths(),
            **_blocks(arguments),
        )
    return output, checkpoints


def _backward(arguments: ScanArguments, grad_output: Tensor) -> dict[str, Tensor]:
    """The gradients in float32, by argument."""
    from .triton_scan_kernels import scan_backward

    batch, length, channels = arguments.hidden_states.shape
    states, paths = arguments.A.shape[-1], arguments.num_paths()
    blocks = math.ceil(channels / BLOCK_CHANNELS)
    chunk_length = _chunk_length(length)

    def empty(*shape: int) -> Tensor:
        return torch.empty(batch, paths, *shape, dtype=torch.float32, device=grad_output.device)

    checkpoints = empty(math.ceil(length / chunk_length), states, channels)
    output, _ = _forward(arguments, checkpoints)
    grad_output = grad_output.float().contiguous()
    grad_gate = None
    if arguments.gate is not None:
        gate = arguments.gate.float()
        grad_gate = torch.ops.aten.silu_backward(grad_output * output, gate)
        grad_output = grad_output * F.silu(gate)

    grad_hidden_states, grad_time_step = empty(length, channels), empty(length, channels)
    grad_A, grad_D = empty(states, channels), empty(channels)
    grad_B, grad_C = empty(blocks, length, states), empty(blocks, length, states)
    grad_hole_time_step = None if arguments.hole_time_step is None else empty(channels)
    with torch.cuda.device_of(grad_output):
        scan_backward[(batch, paths, blocks)](
            *_tensors(arguments),
            *(grad_output, checkpoints, empty(chunk_length, states, channels)),
            *(grad_hidden_states, grad_time_step, grad_A, grad_B, grad_C, grad_D, grad_hole_time_step),
            *_sizes(arguments),
            **_blocks(arguments),
        )
    grad_B = grad_B.sum(2)
    gradients = {
        "hidden_states": grad_hidden_states.sum(1),
        "time_step": grad_time_step.sum(1),
        "A": grad_A.sum((0, 1)).t(),
        "B": grad_B.sum(1),
        "C": grad_C.sum((1, 2)),
        "D": grad_D.sum((0, 1)),
        "time_step_bias": grad_time_step.sum((0, 1, 2)),
    }
    if grad_gate is not None:
        gradients["gate"] = grad_gate
    if grad_hole_time_step is not None:
        gradients["hole_time_step"] = grad_hole_time_step.sum((0, 1))
    if arguments.direction_B is not None and arguments.moves is not None:
        gradients["direction_B"] = _sum_by_move(grad_B, arguments.moves, arguments.direction_B.shape[0])
    return {name: gradient.contiguous() for name, gradient in gradients.items()}


def _sum_by_move(grad_B: Tensor, moves: Tensor, kinds: int) -> Tensor:
    """Rows of (batch, paths, length, states), summed by the kind of the step's move: reproducible, and in float32
    where products are allowed to be less."""
    return torch.stack([(grad_B * (moves == kind).unsqueeze(-1)).sum((0, 1, 2)) for kind in range(kinds)])
