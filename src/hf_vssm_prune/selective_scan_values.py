"""The selective scan in plain PyTorch if only its values are needed: the same as `selective_scan_torch.py`, but several
times as fast.

- exp(time_step A) is computed once for all paths, and the additional decay in a hole only for the paths that have
  holes.
- The state changes in place. Channels are its last axis: a row of them is long enough for the processor's vector
  instructions.
- The computation runs in chunks of samples and steps that fit into the processor's cache, including softplus and gate.
  Buffers are reused. A pass over a tensor of all tokens would read it from memory, which takes longer than computing.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .token_pruning import batch_rows


# Number of entries of the state, and of exp(time_step A), that are processed at a time.
_STATE_ENTRIES = 2**17
_DECAY_ENTRIES = 2**17
# Number of tokens that are gated at a time.
_GATED = 32
# Up to this gap, the decay across a hole is computed by multiplications, which are cheaper than another exp.
_LARGEST_POWER = 6


def scan_values(
    u: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    time_step_bias: Tensor,
    gate: Tensor | None,
    order: Tensor | None,
    gaps: Tensor | None,
    hole_time_step: Tensor | None,
) -> Tensor:
    """The result of `selective_scan`, whose arguments these are, but for `A` of shape (state_size, channels) and `B` of
    shape (batch, paths or 1, length, state_size). All have the same floating-point dtype, and none needs a gradient.
    """
    batch, length, _ = u.shape
    if order is None:
        order = torch.arange(length, device=u.device).view(1, 1, length)
    paths = order.shape[1]
    order, holes = order.expand(batch, -1, -1), gaps if gaps is None else gaps.expand(batch, -1, -1)
    output = torch.empty_like(u, memory_format=torch.contiguous_format)
    samples = max(1, _STATE_ENTRIES // max(1, paths * A.numel()))
    with torch.inference_mode():  # operators start faster
        for first in range(0, batch, samples):
            here = slice(first, first + samples)
            crossings = None if holes is None else _Holes(holes[here], A, hole_time_step)
            by_sample = (u, time_step, B.expand(batch, paths, -1, -1), C, order)
            _scan_samples(A, D, time_step_bias, crossings, output[here], *(tensor[here] for tensor in by_sample))
            if gate is not None:
                for y, z in zip(output[here].split(_GATED, 1), gate[here].split(_GATED, 1), strict=True):
                    y.mul_(F.silu(z))
    return output


def _scan_samples(
    A: Tensor,
    D: Tensor,
    time_step_bias: Tensor,
    holes: "_Holes | None",
    output: Tensor,
    u: Tensor,
    time_step: Tensor,
    B: Tensor,
    C: Tensor,
    order: Tensor,
) -> None:
    """Writes the sum of the outputs of all paths to `output`, which has the shape of `u`."""
    batch, paths, length = order.shape
    states, channels = A.shape
    rows = batch_rows(order, length).view(order.shape).permute(2, 0, 1).flatten()
    visits = u.new_zeros(batch * length).index_add_(0, rows, u.new_ones(rows.shape))
    torch.mul(u, visits.view(batch, length, 1), out=output).mul_(D)

    # From here on, steps are the first axis. A step is (batch, state_size, paths, channels), with 1 for shared axes.
    tokens, A, time_step = u.flatten(0, 1), A.unsqueeze(1), time_step.transpose(0, 1)[:, :, None, None]
    matrices = zip(B.permute(2, 0, 3, 1).unsqueeze(-1).unbind(0), C.transpose(0, 1).unsqueeze(2).unbind(0), strict=True)
    state = u.new_zeros(batch, states, paths, channels)
    state_rows = state.flatten(2)
    state_of_path = [sample.unbind(1) for sample in state.unbind(0)]

    chunk = max(1, min(length, _DECAY_ENTRIES // max(1, batch * A.numel())))
    decays = u.new_empty(chunk, batch, states, 1, channels)
    inputs, outputs = (u.new_empty(chunk, batch, 1, paths, channels) for _ in range(2))
    by_step = [buffer.unbind(0) for buffer in (decays, inputs, outputs.flatten(3))]
    step = 0
    for times, visited in zip(time_step.split(chunk), rows.split(chunk * batch * paths), strict=True):
        here = slice(0, len(times))
        times = F.softplus(times + time_step_bias)
        torch.mul(times, A, out=decays[here]).exp_()
        torch.index_select(tokens, 0, visited, out=inputs[here].flatten(0, 3))
        inputs[here].mul_(times)
        for time, decay, entering, y in zip(times, *(views[here] for views in by_step), strict=True):
            B_step, C_step = next(matrices)
            if holes is not None:
                holes.cross(step, state_of_path, time, decay)
            state.mul_(decay).addcmul_(entering, B_step)
            torch.bmm(C_step, state_rows, out=y)
            step += 1
        output.flatten(0, 1).index_add_(0, visited, outputs[here].flatten(0, 3))


class _Holes:
    """The decay of the states in the holes before the steps.

    Args:
        gaps: shape (batch, paths, length), see `selective_scan`.
        A: shape (state_size, channels).
        hole_time_step: see `selective_scan`.
    """

    def __init__(self, gaps: Tensor, A: Tensor, hole_time_step: Tensor | None) -> None:
        self.A = A
        self.hole_rate = None if hole_time_step is None else hole_time_step.to(A.dtype) * A
        self.decay_by_gap: dict[int, Tensor] = {}
        self.by_step: list[list[tuple[int, int, int]]] = [[] for _ in range(gaps.shape[2])]
        sample, path, step = (gaps > 1).nonzero(as_tuple=True)
        columns = (index.tolist() for index in (step, sample, path, gaps[sample, path, step]))
        for place, *hole in zip(*columns, strict=True):
            self.by_step[place].append((hole[0], hole[1], hole[2]))

    def cross(self, step: int, states: Sequence[Sequence[Tensor]], time: Tensor, decay: Tensor) -> None:
        """Called before a step.

        Args:
            step: its index.
            states: for each sample, the states (state_size, channels) of its paths.
            time: its time steps, shape (batch, 1, 1, channels).
            decay: exp(time A), shape (batch, state_size, 1, channels).
        """
        for sample, path, gap in self.by_step[step]:
            state = states[sample][path]
            if self.hole_rate is not None:
                if gap not in self.decay_by_gap:
                    self.decay_by_gap[gap] = ((gap - 1) * self.hole_rate).exp_()
                state.mul_(self.decay_by_gap[gap])
            elif gap <= _LARGEST_POWER:
                once = decay[sample, :, 0]
                for _ in range(1, gap):
                    state.mul_(once)
            else:
                state.mul_(((gap - 1) * time[sample, 0] * self.A).exp_())
