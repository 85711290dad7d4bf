"""The selective scan in plain PyTorch if only its values are needed: the same as `selective_scan_torch.py`, but several
times as fast.

- exp(time_step A) is computed once for all paths, and the additional decay in a hole only for the paths that have
holes. - The state changes in place. Channels are its last axis: a row of them is long enough for the processor's vector
instructions. - The computation runs in chunks of samples and steps that fit into the processor's cache. Buffers are
reused, since allocating new memory costs more than writing to it.
"""

import torch
from torch import Tensor

from .token_pruning import batch_rows


# Number of entries of the state, and of exp(time_step A), that are processed at a time.
_STATE_ENTRIES = 2**17
_DECAY_ENTRIES = 2**17
# Up to this gap, the decay across a hole is computed by multiplications, which are cheaper than another exp.
_LARGEST_POWER = 6


def scan_values(
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
    """The sum of the paths' outputs, (batch, length, channels), before the gate.

    All arguments have the same floating-point dtype, and none needs a gradient. `time_step` is after bias and softplus,
    `A` has the shape (state_size, channels), `B` (batch, paths or 1, length, state_size); the others are as in
    `selective_scan`.
    """
    batch, length, _ = u.shape
    if order is None:
        order = torch.arange(length, device=u.device).view(1, 1, length)
    paths = order.shape[1]
    by_sample = (u, time_step, B.expand(batch, paths, -1, -1), C, order.expand(batch, -1, -1))
    holes = gaps if gaps is None else gaps.expand(batch, -1, -1)
    output = u.new_zeros(u.shape)
    samples = max(1, _STATE_ENTRIES // max(1, paths * A.numel()))
    for first in range(0, batch, samples):
        here = slice(first, first + samples)
        crossings = None if holes is None else _Holes(holes[here], time_step[here], hole_time_step, A)
        _scan_samples(A, D, crossings, output[here], *(tensor[here] for tensor in by_sample))
    return output


def _scan_samples(
    A: Tensor,
    D: Tensor,
    holes: "_Holes | None",
    output: Tensor,
    u: Tensor,
    time_step: Tensor,
    B: Tensor,
    C: Tensor,
    order: Tensor,
) -> None:
    """Adds the outputs of all paths to `output`, zeros of the shape of `u`."""
    batch, paths, length = order.shape
    states, channels = A.shape
    # From here on, steps are the first axis. A step is (batch, state_size, paths, channels), with 1 for shared axes.
    rows = batch_rows(order, length).view(order.shape).permute(2, 0, 1).flatten(1)
    tokens, time_step = u.flatten(0, 1), time_step.transpose(0, 1).unsqueeze(2)
    Bs = B.permute(2, 0, 3, 1).unsqueeze(-1).unbind(0)
    Cs = C.transpose(0, 1).unsqueeze(2).unbind(0)
    state = u.new_zeros(batch, states, paths, channels)
    state_rows = state.flatten(2)
    state_of_path = [sample.split(1, dim=1) for sample in state.unbind(0)]

    chunk = max(1, min(length, _DECAY_ENTRIES // max(1, batch * A.numel())))
    decays = u.new_empty(chunk, batch, states, 1, channels)
    visited, inputs, outputs = (u.new_empty(chunk, batch, paths, channels) for _ in range(3))
    buffers = (decays, inputs.unsqueeze(2), outputs.view(chunk, batch, 1, paths * channels))
    by_step = [buffer.unbind(0) for buffer in buffers]
    for first in range(0, length, chunk):
        here = slice(first, min(first + chunk, length))
        steps = slice(0, here.stop - first)
        torch.mul(time_step[here].unsqueeze(2), A.unsqueeze(1), out=decays[steps]).exp_()
        torch.index_select(tokens, 0, rows[here].flatten(), out=visited[steps].flatten(0, 2))
        torch.mul(visited[steps], time_step[here], out=inputs[steps])
        for step, decay, entering, y in zip(range(first, here.stop), *by_step):  # noqa: B905 - the last chunk is short
            if holes is not None:
                holes.cross(step, state_of_path, decay)
            state.mul_(decay).addcmul_(entering, Bs[step])
            torch.bmm(Cs[step], state_rows, out=y)
        outputs[steps].addcmul_(visited[steps], D)
        output.flatten(0, 1).index_add_(0, rows[here].flatten(), outputs[steps].flatten(0, 2))


class _Holes:
    """The decay of the states in the holes before the steps.

    Args:
        gaps: shape (batch, paths, length), see `selective_scan`.
        time_step: shape (batch, length, channels).
        hole_time_step: see `selective_scan`.
        A: shape (state_size, channels).
    """

    def __init__(self, gaps: Tensor, time_step: Tensor, hole_time_step: Tensor | None, A: Tensor) -> None:
        self.time_step, self.A = time_step, A.unsqueeze(1)
        self.hole_rate = None if hole_time_step is None else hole_time_step.to(A.dtype) * self.A
        self.decay_by_gap: dict[int, Tensor] = {}
        self.by_step: list[list[tuple[int, int, int]]] = [[] for _ in range(gaps.shape[2])]
        sample, path, step = (gaps > 1).nonzero(as_tuple=True)
        columns = (index.tolist() for index in (step, sample, path, gaps[sample, path, step]))
        for place, *hole in zip(*columns, strict=True):
            self.by_step[place].append((hole[0], hole[1], hole[2]))

    def cross(self, step: int, states: list[tuple[Tensor, ...]], decay: Tensor) -> None:
        """Called before a step with the state of each sample and path (state_size, 1, channels), and the decay of the
        step itself for all paths (batch, state_size, 1, channels)."""
        for sample, path, gap in self.by_step[step]:
            state = states[sample][path]
            if self.hole_rate is not None:
                if gap not in self.decay_by_gap:
                    self.decay_by_gap[gap] = ((gap - 1) * self.hole_rate).exp_()
                state.mul_(self.decay_by_gap[gap])
            elif gap <= _LARGEST_POWER:
                once = decay.select(0, sample)
                for _ in range(1, gap):
                    state.mul_(once)
            else:
                state.mul_(((gap - 1) * self.time_step[sample, step] * self.A).exp_())
