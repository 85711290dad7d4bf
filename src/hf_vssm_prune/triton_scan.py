"""The selective scan for NVIDIA and AMD GPUs, written in Triton.

The state and all products with it are float32 for inputs of any precision; the cases listed in `plain_fallback.py` use
the plain PyTorch function. Rows of channels are read in place, so the parts of a split projection do not have to be
copied. The backward pass recomputes the states from those saved every few steps. Results are reproducible: if several
programs add to the same number, each writes its own part, and the parts are added in a fixed order. Unlike on the CPU,
indices out of range are not detected.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plain_fallback import left_to
from .scan_operator import ScanArguments, scan_operator
from .selective_scan_torch import selective_scan_torch
from .triton_machine import PROGRAMS_THAT_FILL_A_GPU, is_interpreted


SHORTEST_CHUNK = 64


@left_to(selective_scan_torch)
def selective_scan(*args: Any, **kwargs: Any) -> Tensor:
    """For arguments and result, see `hf_vssm_prune.selective_scan.selective_scan`. A path must visit each token
    once."""
    return _selective_scan(*ScanArguments(*args, **kwargs))


def _scan_forward(arguments: ScanArguments) -> Tensor:
    readable = _readable(arguments)
    plan = plan_scan(*_sizes_to_plan(arguments))
    hidden_states = arguments.hidden_states
    if arguments.order is None:
        output = torch.empty_like(hidden_states, memory_format=torch.contiguous_format)
        _walk_forward(readable, plan, output)
        return output
    parts = _empty_parts(arguments)
    _walk_forward(readable._replace(gate=None), plan, parts)
    return _gate_sum(parts, readable.gate, hidden_states.dtype)


def _scan_backward(arguments: ScanArguments, grad_output: Tensor) -> list[Tensor]:
    gradients = _backward(_readable(arguments), grad_output)
    return [gradients[name] for name in arguments._fields if name in gradients]


_selective_scan = scan_operator("triton_selective_scan", _scan_forward, _scan_backward)


class Plan(NamedTuple):
    """How the work is divided.

    Attributes:
        block_channels: channels per program, a power of 2.
        unroll: number of steps whose rows are read together.
        chunk_length: steps per program, a multiple of `unroll`; at least the length if there is only one chunk.
    """

    block_channels: int
    unroll: int
    chunk_length: int

    def chunks(self, length: int) -> int:
        return math.ceil(length / self.chunk_length)


def plan_scan(walks: int, length: int, channels: int, is_backward: bool = False) -> Plan:
    """Uses few channels per program if there would be too few programs otherwise, and then also several chunks.

    Args:
        walks: number of images times number of paths.
        length: length of a path.
        channels: number of channels.
        is_backward: whether it is for the gradients, which need too many registers for more channels.
    """
    if is_interpreted():
        return Plan(64, 2, length + length % 2)
    unroll = 4  # with 8, a program would use all 255 registers of a thread
    is_wide = not is_backward and walks * math.ceil(channels / 16) >= PROGRAMS_THAT_FILL_A_GPU
    block_channels = 16 if is_wide else 8
    programs = walks * math.ceil(channels / block_channels)
    chunks = min(length // SHORTEST_CHUNK, math.ceil(PROGRAMS_THAT_FILL_A_GPU / programs))
    # A path in chunks is walked twice, so three chunks would save little.
    chunk_length = math.ceil(length / chunks) if chunks > 3 else length
    return Plan(block_channels, unroll, math.ceil(chunk_length / unroll) * unroll)


def _sizes_to_plan(arguments: ScanArguments) -> tuple[int, int, int]:
    batch, length, channels = arguments.hidden_states.shape
    return batch * arguments.num_paths(), length, channels


def _readable(arguments: ScanArguments) -> ScanArguments:
    """The arguments with strides that the kernels can read: rows of channels in place, everything else contiguous."""
    with_rows = {"hidden_states", "time_step", "B", "C", "gate"}
    changes = {
        name: tensor if name in with_rows and tensor.stride(-1) == 1 else tensor.contiguous()
        for name, tensor in arguments._asdict().items()
        if tensor is not None
    }
    return arguments._replace(**changes)


def _row_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """The strides of batch and row for each tensor (batch, length, channels)."""
    return tuple(stride for tensor in tensors for stride in ((0, 0) if tensor is None else tensor.stride()[:2]))


def _path_strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """The stride of the batch for each tensor (batch or 1, paths, length)."""
    return tuple(0 if tensor is None or tensor.shape[0] == 1 else tensor.stride(0) for tensor in tensors)


def _blocks(arguments: ScanArguments, plan: Plan) -> dict[str, int]:
    states = arguments.A.shape[-1]
    return {
        "STATES": states,
        "BLOCK_STATES": 2 ** math.ceil(math.log2(states)),
        "BLOCK_CHANNELS": plan.block_channels,
        "UNROLL": plan.unroll,
        # With one warp, sums need no barrier.
        "num_warps": 1,
    }


def _empty_parts(arguments: ScanArguments, *shape: int) -> Tensor:
    """A float32 tensor (batch, paths, *shape), by default (batch, paths, length, channels)."""
    batch, length, channels = arguments.hidden_states.shape
    shape = (batch, arguments.num_paths(), *(shape or (length, channels)))
    return torch.empty(shape, dtype=torch.float32, device=arguments.hidden_states.device)


def _walk_forward(
    arguments: ScanArguments, plan: Plan, output: Tensor, block_states: Tensor | None = None
) -> Tensor | None:
    """Writes `output` and `block_states`; returns the times of the chunks if there are several."""
    from .triton_scan_kernels import carry, scan_forward

    walks, length, channels = _sizes_to_plan(arguments)
    states, chunks = arguments.A.shape[-1], plan.chunks(length)
    grid = (walks, math.ceil(channels / plan.block_channels), chunks)
    blocks = _blocks(arguments, plan)
    sizes = (
        *(arguments.num_paths(), length, channels, plan.chunk_length),
        *_row_strides(arguments.hidden_states, arguments.time_step, arguments.B, arguments.C, arguments.gate),
        *_path_strides(arguments.order, arguments.gaps, arguments.moves),
    )
    with torch.cuda.device_of(output):
        if chunks == 1:
            scan_forward[grid](*arguments, output, None, None, block_states, *sizes, **blocks)
            return None
        chunk_states, chunk_times = (
            _empty_parts(arguments, chunks, states, channels),
            _empty_parts(arguments, chunks, channels),
        )
        scan_forward[grid](*arguments, None, chunk_states, chunk_times, None, *sizes, **blocks)
        carry[grid[:2]](arguments.A, chunk_times, chunk_states, chunks, channels, **blocks, FROM_LAST=False)
        scan_forward[grid](*arguments, output, chunk_states, chunk_times, block_states, *sizes, **blocks)
    return chunk_times


def _gate_sum(parts: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The sum of the parts (batch, paths, length, channels), multiplied by SiLU of the gate."""
    output = torch.empty(parts[:, 0].shape, dtype=dtype, device=parts.device)
    _launch_gate_sum(parts, gate, None, output, None)
    return output


def _launch_gate_sum(
    parts: Tensor, gate: Tensor | None, grad_output: Tensor | None, output: Tensor, grad_gate: Tensor | None
) -> None:
    from .triton_scan_kernels import gate_sum

    batch, paths, length, channels = parts.shape
    tokens, block_channels = 4, 256
    with torch.cuda.device_of(parts):
        # Images and tokens share the first dimension of the grid: the others are limited to 65,535 programs.
        gate_sum[(batch * math.ceil(length / tokens), math.ceil(channels / block_channels))](
            *(parts, gate, grad_output, output, grad_gate, length, channels, *_row_strides(gate)),
            PATHS=paths,
            BLOCK_TOKENS=tokens,
            BLOCK_CHANNELS=block_channels,
        )


def _backward(arguments: ScanArguments, grad_output: Tensor) -> dict[str, Tensor]:
    """The gradients in float32, by argument."""
    from .triton_scan_kernels import carry, scan_backward

    walks, length, channels = _sizes_to_plan(arguments)
    plan = plan_scan(walks, length, channels, is_backward=True)
    states, chunks = arguments.A.shape[-1], plan.chunks(length)

    block_states = _empty_parts(arguments, math.ceil(length / plan.unroll), states, channels)
    parts = _empty_parts(arguments)
    chunk_times = _walk_forward(arguments._replace(gate=None), plan, parts, block_states)
    gradients = {}
    if arguments.gate is None:
        grad_sum = grad_output.float().contiguous()
    else:
        grad_sum, gradients["gate"] = (torch.empty_like(parts[:, 0]) for _ in range(2))
        _launch_gate_sum(parts, arguments.gate, grad_output.contiguous(), grad_sum, gradients["gate"])
    del parts

    grid = (walks, math.ceil(channels / plan.block_channels), chunks)
    blocks = _blocks(arguments, plan)
    inputs = [tensor for name, tensor in arguments._asdict().items() if name != "gate"]
    sizes = (
        *(arguments.num_paths(), length, channels, plan.chunk_length),
        *_row_strides(arguments.hidden_states, arguments.time_step, arguments.B, arguments.C),
        *_path_strides(arguments.order, arguments.gaps, arguments.moves),
    )
    grad_hidden_states, grad_time_step = _empty_parts(arguments), _empty_parts(arguments)
    grad_A, grad_D = _empty_parts(arguments, chunks, states, channels), _empty_parts(arguments, chunks, channels)
    grad_B, grad_C = (_empty_parts(arguments, grid[1], length, states) for _ in range(2))
    grad_hole = None if arguments.hole_time_step is None else torch.empty_like(grad_D)
    outputs = (grad_hidden_states, grad_time_step, grad_A, grad_B, grad_C, grad_D, grad_hole)
    with torch.cuda.device_of(grad_sum):
        chunk_grads = None
        if chunks > 1:
            chunk_grads = torch.empty_like(grad_A)
            nothing = (None,) * len(outputs)
            scan_backward[grid](*inputs, grad_sum, None, chunk_grads, *nothing, *sizes, **blocks)
            carry[grid[:2]](arguments.A, chunk_times, chunk_grads, chunks, channels, **blocks, FROM_LAST=True)
        scan_backward[grid](*inputs, grad_sum, block_states, chunk_grads, *outputs, *sizes, **blocks)
    grad_B = grad_B.sum(2)
    gradients |= {
        "hidden_states": grad_hidden_states.sum(1),
        "time_step": grad_time_step.sum(1),
        "A": grad_A.sum((0, 1, 2)).t(),
        "B": grad_B.sum(1),
        "C": grad_C.sum((1, 2)),
        "D": grad_D.sum((0, 1, 2)),
        "time_step_bias": grad_time_step.sum((0, 1, 2)),
    }
    if grad_hole is not None:
        gradients["hole_time_step"] = grad_hole.sum((0, 1, 2))
    if arguments.direction_B is not None and arguments.moves is not None:
        gradients["direction_B"] = _sum_by_move(grad_B, arguments.moves, arguments.direction_B.shape[0])
    return {name: gradient.contiguous() for name, gradient in gradients.items()}


def _sum_by_move(grad_B: Tensor, moves: Tensor, kinds: int) -> Tensor:
    """Sums the rows of (batch, paths, length, states) by the kind of the step's move. The result is reproducible, and
    in float32 even if products are allowed to use lower precision."""
    return torch.stack([(grad_B * (moves == kind).unsqueeze(-1)).sum((0, 1, 2)) for kind in range(kinds)])
