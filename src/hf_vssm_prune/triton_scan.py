"""The selective scan for NVIDIA and AMD GPUs, written in Triton.

The state and every product with it are float32, whatever the inputs' precision; what `plain_fallback.py` names is left
to the plain PyTorch function. Rows of channels are read where they lie, so the parts of a split projection need no
copy. The gradients recompute the states from a checkpoint every sqrt(length) steps, and are the same from run to run.
Unlike on the CPU, indices out of range are not noticed.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain_fallback import left_to
from .scan_operator import ScanArguments, scan_operator
from .selective_scan_torch import selective_scan_torch


BLOCK_CHANNELS = 32


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
