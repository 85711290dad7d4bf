"""The pruning-aware selective scan in plain PyTorch: the mathematics that every kernel is checked against.

For one direction, over the tokens that are left (Mamba, arXiv 2312.00752, eq. 2; ToP, arXiv 2409.18962):

    h_i = exp((time_step_i + e_i) A) * h_{i-1} + time_step_i B_i u_i
    y_i = C_i h_i + D u_i

`e_i` is the time that passes in the hole before token i, where tokens were dropped: the state decays across the hole
and nothing enters it. Without holes e_i = 0 and this is the scan of a dense model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


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

    # Everything below has the layout (batch, paths, length, ...); a path axis of 1 is shared by all paths.
    u = u.unsqueeze(1) if order is None else gather_along_paths(u, order)
    B = B.unsqueeze(1)
    if direction_B is not None and moves is not None:
        B = B + direction_B.to(dtype)[moves.long()]
    decay_step = decay_steps(time_step.unsqueeze(1), gaps, hole_time_step)
    recurrence = _exported_recurrence if is_exporting() else _recurrence
    y = recurrence(decay_step, time_step.unsqueeze(1) * u, A, B, C.unsqueeze(1)) + D * u

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


def _recurrence(decay_step: Tensor, input: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """h_i = exp(decay_step_i A) h_{i-1} + input_i B_i; y_i = C_i h_i. `input` is time_step * u."""
    batch, paths, length, channels = input.shape
    state = input.new_zeros(batch, paths, channels, A.shape[-1])
    outputs = []
    for token in range(length):
        state, output = _step(state, decay_step[:, :, token], input[:, :, token], A, B[:, :, token], C[:, :, token])
        outputs.append(output)
    return torch.stack(outputs, dim=2)


def _exported_recurrence(decay_step: Tensor, input: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """As `_recurrence`: in an exported program one loop (in ONNX one `Scan`), not a copy of its body for each token."""
    # torch calls it a prototype, and models that are not exported do without it.
    from torch._higher_order_ops.scan import scan

    batch, paths, _, channels = input.shape

    def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        decay_step, input, B, C = token
        state, output = _step(state, decay_step, input, A, B, C)
        # AOTInductor finds the size of a dynamic batch only if the loop's body names it.
        return state, output.view(batch, paths, channels)

    tokens = tuple(tensor.movedim(2, 0) for tensor in (decay_step, input, B, C))
    _, outputs = scan(step, input.new_zeros(batch, paths, channels, A.shape[-1]), tokens, dim=0)
    return outputs.movedim(0, 2)


def _step(state: Tensor, decay_step: Tensor, input: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The state (batch, paths, channels, state_size) after one token, and the output (batch, paths, channels)."""
    state = torch.exp(decay_step.unsqueeze(-1) * A) * state + input.unsqueeze(-1) * B.unsqueeze(-2)
    return state, (state * C.unsqueeze(-2)).sum(-1)


def is_exporting() -> bool:
    """Whether `torch.export` is tracing; False with torch before 2.7, which does not say."""
    return hasattr(torch.compiler, "is_exporting") and torch.compiler.is_exporting()


def gather_along_paths(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (batch, length, channels) in the order of each path: (batch, paths, length, channels)."""
    batch, _, channels = tokens.shape
    order = order.long().expand(batch, -1, -1)
    index = order.flatten(1).unsqueeze(-1).expand(-1, -1, channels)
    return tokens.gather(1, index).unflatten(1, order.shape[1:])


def scatter_along_paths(steps: Tensor, order: Tensor) -> Tensor:
    """Sum over paths of (batch, paths, length, channels), each step's row at the token it visited."""
    batch, _, length, channels = steps.shape
    index = order.long().expand(batch, -1, -1).flatten(1).unsqueeze(-1).expand(-1, -1, channels)
    return steps.new_zeros(batch, length, channels).scatter_add(1, index, steps.flatten(1, 2))
