"""The pruning-aware selective scan: its mathematics in plain PyTorch, and the choice of a kernel.

For one direction, over the tokens that are left (Mamba, arXiv 2312.00752, eq. 2; ToP, arXiv 2409.18962):

    h_i = exp((time_step_i + e_i) A) * h_{i-1} + time_step_i B_i u_i
    y_i = C_i h_i + D u_i

`e_i` is the time that passes in the hole before token i, where tokens were dropped: the state decays across the hole
and nothing enters it. Without holes e_i = 0 and this is the scan of a dense model.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .documentation import see


try:
    from hf_vssm_prune.kernels import choose_kernel
except ImportError:  # as Hub code, where the package is not installed, plain PyTorch remains

    def choose_kernel(operation: str, backend: str, device_type: str) -> Callable[..., Tensor] | None:
        if backend not in ("auto", "torch"):
            raise ImportError(
                f"backend {backend!r} needs the hf_vssm_prune package, which is not installed. "
                f"{see('backend-cannot-be-used')}"
            )
        return None


def selective_scan(
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
    backend: str = "auto",
) -> Tensor:
    """Scan a sequence along one or several paths, sum the paths' outputs and gate the sum.

    Step t of path k reads u from token `order[k, t]` and writes y to it, while its time step, B and C are those of
    token t: in PlainMamba's published weights only u is permuted. Every product with the state is made in float32
    (float64 when the input is), whatever the input's precision.

    Args:
        hidden_states: u, shape (batch, length, channels).
        time_step: time steps before bias and softplus, shape (batch, length, channels).
        A: continuous-time decay, negative, shape (channels, state_size).
        B: input matrix, shape (batch, length, state_size).
        C: output matrix, shape (batch, length, state_size).
        D: skip connection, shape (channels,).
        time_step_bias: added to `time_step` before the softplus, shape (channels,).
        gate: z; the result is multiplied by SiLU(z), shape (batch, length, channels). None: no gate.
        order: for each path, the token visited at each step, integers of shape (batch or 1, paths, length). None: one
            path that visits the tokens as they come.
        gaps: for each path, the distance of each step from the one before it on the full path, integers >= 1 of shape
            (batch or 1, paths, length); 1 where nothing was dropped in between. None: no holes (`none` alignment).
        hole_time_step: step size of a dropped token, shape (channels,), already positive (`zero_input` alignment:
            e_i = (gap_i - 1) * hole_time_step). None: a hole repeats the step of the token behind it (`repeat`
            alignment: e_i = (gap_i - 1) * time_step_i).
        direction_B: what each kind of move adds to B, shape (moves, state_size). Needs `moves`.
        moves: for each path and step the row of `direction_B`, integers of shape (batch or 1, paths, length).
        backend: `torch` (this file's), the name of a kernel in `hf_vssm_prune.kernels`, or `auto`: the fastest that
            works on the tensors' device, and `torch` in an exported program, which so runs without this package.

    Returns:
        (batch, length, channels), in the dtype of `hidden_states`.

    Raises:
        ValueError: the backend is unknown, or `direction_B` comes without `moves` (or the reverse).
        ImportError: the backend is known but cannot be used here; the message says why.
    """
    if (direction_B is None) != (moves is None):
        raise ValueError("`direction_B` and `moves` go together: one was given without the other.")
    scan = kernel_for("selective_scan", backend, hidden_states) or selective_scan_torch
    return scan(
        hidden_states, time_step, A, B, C, D, time_step_bias, gate, order, gaps, hole_time_step, direction_B, moves
    )


def kernel_for(operation: str, backend: str, tensor: Tensor) -> Callable[..., Tensor] | None:
    """As `kernels.choose_kernel`, where a tensor is; what is exported is plain PyTorch, unless a kernel is named."""
    backend = "torch" if backend == "auto" and is_exporting() else backend
    return choose_kernel(operation, backend, tensor.device.type)


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
    u = u.unsqueeze(1) if order is None else visit(u, order)
    B = B.unsqueeze(1)
    if direction_B is not None and moves is not None:
        B = B + direction_B.to(dtype)[moves.long()]
    decay_step = decay_steps(time_step.unsqueeze(1), gaps, hole_time_step)
    recurrence = _exported_recurrence if is_exporting() else _recurrence
    y = recurrence(decay_step, time_step.unsqueeze(1) * u, A, B, C.unsqueeze(1)) + D * u

    output = y.squeeze(1) if order is None else return_to_tokens(y, order)
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


def visit(tokens: Tensor, order: Tensor) -> Tensor:
    """Tokens (batch, length, channels) in the order of each path: (batch, paths, length, channels)."""
    batch, _, channels = tokens.shape
    order = order.long().expand(batch, -1, -1)
    index = order.flatten(1).unsqueeze(-1).expand(-1, -1, channels)
    return tokens.gather(1, index).unflatten(1, order.shape[1:])


def return_to_tokens(steps: Tensor, order: Tensor) -> Tensor:
    """Sum over paths of (batch, paths, length, channels), each step's row at the token it visited."""
    batch, _, length, channels = steps.shape
    index = order.long().expand(batch, -1, -1).flatten(1).unsqueeze(-1).expand(-1, -1, channels)
    return steps.new_zeros(batch, length, channels).scatter_add(1, index, steps.flatten(1, 2))
