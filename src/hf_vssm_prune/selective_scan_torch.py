"""The pruning-aware selective scan in plain PyTorch: the mathematics that every kernel is checked against.

For one direction, over the tokens that are left (Mamba, arXiv 2312.00752, eq. 2; ToP, arXiv 2409.18962):

    h_i = exp((time_step_i + e_i) A) * h_{i-1} + time_step_i B_i u_i
    y_i = C_i h_i + D u_i

`e_i` is the time that passes in the hole before token i, where tokens were dropped: the state decays across the hole
and nothing enters it. Without holes e_i = 0 and this is the scan of a dense model.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .function_transforms import is_transformed


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
    """The reference that every kernel is checked against; arguments and result as in `selective_scan`."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)
    u, A, B, C, D = (tensor.to(dtype) for tensor in (hidden_states, A, B, C, D))
    time_step = F.softplus(time_step.to(dtype) + time_step_bias.to(dtype))
    A = A.t().contiguous()

    # Everything below has the layout (batch, paths, length, ...); a path axis of 1 is shared by all paths.
    u = u.unsqueeze(1) if order is None else gather_along_paths(u, order)
    B = B.unsqueeze(1)
    if direction_B is not None and moves is not None:
        B = B + direction_B.to(dtype)[moves.long()]
    time_step = time_step.unsqueeze(1)
    steps = Steps(time_step, time_step * u, B, C.unsqueeze(1))
    if _may_compute_in_place(*steps, A, gaps, hole_time_step):
        y = _recurrence_in_place(steps, A, gaps, hole_time_step)
    else:
        steps = steps._replace(decay_step=decay_steps(time_step, gaps, hole_time_step))
        y = (_exported_recurrence if is_exporting() else _recurrence)(steps, A)
    y = torch.addcmul(y, u, D)

    output = y.squeeze(1) if order is None else scatter_along_paths(y, order)
    if gate is not None:
        output = output * F.silu(gate.to(dtype))
    return output.to(hidden_states.dtype)


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
    for step in zip(*(tensor.unbind(2) for tensor in steps), strict=True):
        state, output = _step(state, Steps(*step), A)
        outputs.append(output)
    return torch.stack(outputs, dim=2)


def _exported_recurrence(steps: Steps, A: Tensor) -> Tensor:
    """As `_recurrence`: in an exported program one loop (in ONNX one `Scan`), not a copy of its body for each token."""
    # torch calls it a prototype, and models that are not exported do without it.
    from torch._higher_order_ops.scan import scan

    batch, paths, _, channels = steps.input.shape

    def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        state, output = _step(state, Steps(*token), A)
        # AOTInductor finds the size of a dynamic batch only if the loop's body names it.
        return state, output.view(batch, paths, channels)

    _, outputs = scan(step, _first_state(steps, A), tuple(tensor.movedim(2, 0) for tensor in steps), dim=0)
    return outputs.movedim(0, 2)


# A state has its channels last: a row of them is long enough for the processor's vectors, one of states is not. So has
# A here: (state_size, channels).


def _first_state(steps: Steps, A: Tensor) -> Tensor:
    batch, paths, _, channels = steps.input.shape
    return steps.input.new_zeros(batch, paths, A.shape[0], channels)


def _step(state: Tensor, step: Steps, A: Tensor) -> tuple[Tensor, Tensor]:
    """The state (batch, paths, state_size, channels) after one token, and the output (batch, paths, channels)."""
    decay = torch.exp(step.decay_step.unsqueeze(-2) * A)
    state = torch.addcmul(decay * state, step.input.unsqueeze(-2), step.B.unsqueeze(-1))
    return state, (state * step.C.unsqueeze(-1)).sum(-2)


# Entries of exp(time_step A) that are computed at once: they are to stay in the processor's cache until they are used.
_CHUNK_ENTRIES = 2**18
# Up to this gap the decay across a hole is multiplied out, which is cheaper than another exp.
_LARGEST_POWER = 6


def _may_compute_in_place(*tensors: Tensor | None) -> bool:
    """Whether nobody asks for more than the values, and looking at the gaps waits for no device."""
    given = [tensor for tensor in tensors if tensor is not None]
    if torch.compiler.is_compiling() or is_exporting() or is_transformed() or given[0].device.type != "cpu":
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given))


def _recurrence_in_place(steps: Steps, A: Tensor, gaps: Tensor | None, hole_time_step: Tensor | None) -> Tensor:
    """What `_recurrence` computes, several times as fast: exp(time_step A) is computed once for all paths, and what a
    hole adds to the decay for the paths that have one. `steps.decay_step` is the time step, without holes."""
    batch, paths, length, channels = steps.input.shape
    state = _first_state(steps, A)
    images = state.flatten(0, 1)  # one for each path of each sample
    time_steps = steps.decay_step.squeeze(1)
    inputs, Bs = steps.input.unsqueeze(-2).unbind(2), steps.B.unsqueeze(-1).unbind(2)
    Cs = steps.C.expand(batch, paths, -1, -1).flatten(0, 1).unsqueeze(-2).unbind(1)
    outputs = state.new_empty(length, batch * paths, 1, channels)
    holes = _holes_by_step(gaps, batch, paths, length)
    hole_decays: dict[int, Tensor] = {}  # by gap
    chunk = max(1, _CHUNK_ENTRIES // max(1, batch * A.numel()))
    for first in range(0, length, chunk):
        decays = (time_steps[:, first : first + chunk].unsqueeze(-2) * A).exp_().unsqueeze(1).unbind(2)
        for step, decay in enumerate(decays, start=first):
            for image, gap in holes[step]:
                sample = image // paths
                if hole_time_step is not None:
                    if gap not in hole_decays:
                        hole_decays[gap] = ((gap - 1) * hole_time_step * A).exp_()
                    images[image].mul_(hole_decays[gap])
                elif gap <= _LARGEST_POWER:
                    for _ in range(1, gap):
                        images[image].mul_(decay[sample, 0])
                else:
                    images[image].mul_(((gap - 1) * time_steps[sample, step] * A).exp_())
            state.mul_(decay).addcmul_(inputs[step], Bs[step])
            torch.bmm(Cs[step], images, out=outputs[step])
    return outputs.view(length, batch, paths, channels).permute(1, 2, 0, 3)


def _holes_by_step(gaps: Tensor | None, batch: int, paths: int, length: int) -> list[list[tuple[int, int]]]:
    """For each step the paths that have a hole before it, counted through all samples, and the gaps."""
    holes: list[list[tuple[int, int]]] = [[] for _ in range(length)]
    if gaps is not None:
        gaps = gaps.expand(batch, paths, length).flatten(0, 1)
        image, step = (gaps > 1).nonzero(as_tuple=True)
        for hole in zip(step.tolist(), image.tolist(), gaps[image, step].tolist(), strict=True):
            holes[hole[0]].append(hole[1:])
    return holes


def is_exporting() -> bool:
    """Whether `torch.export` is tracing; False with torch before 2.7, which does not say."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def gather_along_paths(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (batch, length, channels) in the order of each path: (batch, paths, length, channels)."""
    batch, length, _ = tokens.shape
    rows = tokens.flatten(0, 1).index_select(0, _rows(order, batch, length))
    return rows.unflatten(0, (batch, *order.shape[1:]))


def scatter_along_paths(steps: Tensor, order: Tensor) -> Tensor:
    """Sum over paths of (batch, paths, length, channels), each step's row at the token it visited."""
    batch, _, length, channels = steps.shape
    if is_exporting():
        # onnxruntime adds rows to one place in several threads at once, and loses some of them.
        visits = order.argsort(dim=-1).expand(batch, -1, -1)
        return steps.gather(2, visits.unsqueeze(-1).expand(-1, -1, -1, channels)).sum(1)
    tokens = steps.new_zeros(batch * length, channels)
    return tokens.index_add(0, _rows(order, batch, length), steps.flatten(0, 2)).unflatten(0, (batch, length))


def _rows(order: Tensor, batch: int, length: int) -> Tensor:
    """Tokens that paths visit as rows of a batch's tokens, one sample's behind the other's; one axis. Whole rows are
    copied faster than PyTorch gathers single entries."""
    first = torch.arange(0, batch * length, length, device=order.device)
    return (order.long() + first.view(-1, 1, 1)).flatten()
