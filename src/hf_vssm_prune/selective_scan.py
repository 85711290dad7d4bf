"""The pruning-aware selective scan, computed by the selected kernel. For its mathematics, see
`selective_scan_torch.py`."""

from torch import Tensor

from .kernel_choice import kernel_for
from .selective_scan_torch import selective_scan_torch


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
    """Scans a sequence along one or several paths, sums the outputs of the paths and gates the sum.

    Step t of path k reads u from token `order[k, t]` and writes y to it, whereas its time step, B and C are those of
    token t: PlainMamba's published weights expect that only u is permuted. All computations with the state are in
    float32 (in float64 if the input is float64), regardless of the precision of the input.

    Args:
        hidden_states: u, shape (batch, length, channels).
        time_step: time steps before bias and softplus, shape (batch, length, channels).
        A: continuous-time decay, negative, shape (channels, state_size).
        B: input matrix, shape (batch, length, state_size).
        C: output matrix, shape (batch, length, state_size).
        D: skip connection, shape (channels,).
        time_step_bias: added to `time_step` before the softplus, shape (channels,).
        gate: z; the result is multiplied by SiLU(z), shape (batch, length, channels). None: no gate.
        order: for each path, the token visited at each step, integers of shape (batch or 1, paths, length). Each path
            visits every token once. None: one path that visits the tokens in their order.
        gaps: for each path, the distance of each step from the previous one on the full path, integers >= 1 of shape
            (batch or 1, paths, length); 1 if nothing was dropped in between. None: no holes (`none` alignment).
        hole_time_step: step size of a dropped token, shape (channels,), already positive (`zero_input` alignment: e_i =
            (gap_i - 1) * hole_time_step). None: a dropped token has the step size of the token after the hole (`repeat`
            alignment: e_i = (gap_i - 1) * time_step_i).
        direction_B: added to B for each kind of move, shape (moves, state_size). Needs `moves`.
        moves: for each path and step, the row of `direction_B`, integers of shape (batch or 1, paths, length).
        backend: `torch` (`selective_scan_torch`), the name of a kernel in `hf_vssm_prune.kernels`, or `auto`: the
            fastest one that works on the tensors' device. In an exported program, `auto` is `torch`, so that the
            program runs without this package.

    Returns:
        (batch, length, channels), in the dtype of `hidden_states`.

    Raises:
        ValueError: the backend is unknown, or only one of `direction_B` and `moves` is given.
        ImportError: the backend is known but cannot be used here; the message says why.
    """
    if (direction_B is None) != (moves is None):
        raise ValueError("`direction_B` and `moves` must be given together: one was given without the other.")
    scan = kernel_for("selective_scan", backend, hidden_states) or selective_scan_torch
    return scan(
        hidden_states, time_step, A, B, C, D, time_step_bias, gate, order, gaps, hole_time_step, direction_B, moves
    )
