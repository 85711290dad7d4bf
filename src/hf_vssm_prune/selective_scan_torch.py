"""The pruning-aware selective scan in plain PyTorch: the mathematics that every kernel is checked against.

For one direction, over the remaining tokens (Mamba, arXiv 2312.00752, eq. 2; ToP, arXiv 2409.18962):

    h_i = exp((time_step_i + e_i) A) * h_{i-1} + time_step_i B_i u_i
    y_i = C_i h_i + D u_i

`e_i` is the time that passes in the hole before token i, where tokens were dropped: the state decays across the hole,
and nothing is added to it. Without holes, e_i = 0, and this is the scan of a dense model.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .function_transforms import is_exporting, is_traced, is_transformed
from .scan_paths import gather_along_paths, scatter_along_paths
from .selective_scan_values import scan_values


def selective_scan_torch(
    hidden_states: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    time_step_bias: Tensor,
    gate: Tensor | None = None,
    order: Tensor | None = None,
    gaps: Tensor | None = None,
    hole_time_step: Tensor | None = None,
    direction_B: Tensor | None = None,
    moves: Tensor | None = None,
) -> Tensor:
    """The reference for all kernels; for arguments and result, see `selective_scan`."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    u, time_step, A, B, C, D, bias = (
        tensor.to(dtype) for tensor in (hidden_states, time_step, A, B, C, D, time_step_bias)
    )
    gate = None if gate is None else gate.to(dtype)
    A = A.t().contiguous()
    B = B.unsqueeze(1)
    if direction_B is not None and moves is not None:
        B = B + direction_B.to(dtype)[moves.long()]

    if _wants_values_only(u, time_step, A, B, C, D, bias, gate, gaps, hole_time_step):
        output = scan_values(u, time_step, A, B, C, D, bias, gate, order, gaps, hole_time_step)
    else:
        output = _scan(u, F.softplus(time_step + bias), A, B, C, D, order, gaps, hole_time_step)
        output = output if gate is None else output * F.silu(gate)
    return output.to(hidden_states.dtype)


def _scan(
    u: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    order: Tensor | None,
    gaps: Tensor | None,
    hole_time_step: Tensor | None,
) -> Tensor:
    """The sum of the paths' outputs, (batch, length, channels), before the gate; arguments as in `scan_values`."""
    # All tensors below have the layout (batch, paths, length, ...); a path axis of size 1 is shared by all paths.
    u = u.unsqueeze(1) if order is None else gather_along_paths(u, order)
    time_step = time_step.unsqueeze(1)
    steps = Steps(decay_steps(time_step, gaps, hole_time_step), time_step * u, B, C.unsqueeze(1))
    y = torch.addcmul((_exported_recurrence if is_exporting() else _recurrence)(steps, A), u, D)
    return y.squeeze(1) if order is None else scatter_along_paths(y, order)


def decay_steps(time_step: Tensor, gaps: Tensor | None, hole_time_step: Tensor | None) -> Tensor:
    """time_step_i + e_i: the time over which the state decays before token i enters it."""
    if gaps is None:
        return time_step
    gaps = gaps.unsqueeze(-1).to(time_step.dtype)
    if hole_time_step is None:
        return gaps * time_step
    return time_step + (gaps - 1) * hole_time_step.to(time_step.dtype)


class Steps(NamedTuple):
    """What enters each step, of shape (batch, paths, length, channels or states); a path axis of 1 is shared.

    Attributes:
        decay_step: the time over which the state decays.
        input: time_step * u.
        B, C: the matrices.
    """

    decay_step: Tensor
    input: Tensor
    B: Tensor
    C: Tensor


def _recurrence(steps: Steps, A: Tensor) -> Tensor:
    """h_i = exp(decay_step_i A) h_{i-1} + input_i B_i; y_i = C_i h_i."""
    state, outputs = _first_state(steps, A), []
    for step in zip(*(tensor.unbind(2) for tensor in _spread(steps)), strict=True):
        state = _next_state(state, Steps(*step), A)
        outputs.append((state * step[-1]).sum(-2))
    return torch.stack(outputs, dim=2)


def _exported_recurrence(steps: Steps, A: Tensor) -> Tensor:
    """Like `_recurrence`, but as a single loop in an exported program (in ONNX a single `Scan`), not a copy of its body
    for each token."""
    # torch calls this a prototype; it is needed only for export.
    from torch._higher_order_ops.scan import scan

    batch, paths, _, channels = steps.input.shape

    def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        state = _next_state(state, Steps(*token), A)
        # A product of matrices is one operator, and faster than a product and a sum; under autocast it would be one in
        # half precision. AOTInductor finds the size of a dynamic batch only if the loop's body names it.
        return state, (token[-1] @ state).view(batch, paths, channels)

    tokens = _spread(steps)._replace(C=steps.C.unsqueeze(-2))
    _, outputs = scan(step, _first_state(steps, A), tuple(tensor.movedim(2, 0) for tensor in tokens), dim=0)
    return outputs.movedim(0, 2)


# A state has the shape (batch, paths, state_size, channels): a row of channels is long enough for the processor's
# vector instructions, a row of states is not. A is (state_size, channels), too.


def _first_state(steps: Steps, A: Tensor) -> Tensor:
    batch, paths, _, channels = steps.input.shape
    return steps.input.new_zeros(batch, paths, A.shape[0], channels)


def _spread(steps: Steps) -> Steps:
    """Inserts the state axis that each tensor lacks, so that the loop does not have to."""
    return Steps(
        steps.decay_step.unsqueeze(-2), steps.input.unsqueeze(-2), steps.B.unsqueeze(-1), steps.C.unsqueeze(-1)
    )


def _next_state(state: Tensor, step: Steps, A: Tensor) -> Tensor:
    return torch.exp(step.decay_step * A) * state + step.input * step.B


def _wants_values_only(*tensors: Tensor | None) -> bool:
    """Whether only the values are needed, and reading the gaps does not have to wait for a device."""
    given = [tensor for tensor in tensors if tensor is not None]
    if is_traced() or is_exporting() or is_transformed() or given[0].device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))
