"""A mixer's results for its tokens, which pruning methods can use: its output, and the scans' time steps, B and C.

All of these exist after a mixer has run; nothing else is computed until a method asks for it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .precision import at_least_float32


class ScanInputs(NamedTuple):
    """One scan's time steps, B and C, as `selective_scan` was given them, without gradient.

    Attributes:
        time_step: time steps before bias and softplus, shape (batch, tokens, channels). Row t belongs to step t of
            every path.
        time_step_bias: shape (channels,).
        B, C: shape (batch, tokens, state_size).
        reversed: the rows were computed from the tokens in reverse order, and visit them in this order (Vim's second
            scan).
        order, direction_B, moves: for a scan along several paths, see `selective_scan`; its rows were computed from the
            tokens in raster order. None: a single path, which visits the token that a row was computed from.
    """

    time_step: Tensor
    time_step_bias: Tensor
    B: Tensor
    C: Tensor
    reversed: bool = False
    order: Tensor | None = None
    direction_B: Tensor | None = None
    moves: Tensor | None = None

    def detach(self) -> "ScanInputs":
        """Without gradient. Parameters are copied, because sharded or offloaded ones exist only during the mixer's
        call."""
        return self._replace(
            time_step=self.time_step.detach(),
            time_step_bias=self.time_step_bias.detach().clone(),
            B=self.B.detach(),
            C=self.C.detach(),
            direction_B=None if self.direction_B is None else self.direction_B.detach().clone(),
        )


class MixerOutput(NamedTuple):
    """A mixer's results, in raster order, without gradient.

    Attributes:
        gated: the output y of the scans, gated, before the output projection, shape (batch, tokens, channels).
        projected: the mixer's result, shape (batch, tokens, hidden).
        scans: for PlainMamba, one scan along four paths; for Vim, the forward and the backward scan.
        backward_gated: the backward scan's part of `gated`, of the same shape. None: there is no such scan.
    """

    gated: Tensor
    projected: Tensor
    scans: tuple[ScanInputs, ...]
    backward_gated: Tensor | None = None

    def detach(self) -> "MixerOutput":
        return MixerOutput(
            self.gated.detach(),
            self.projected.detach(),
            tuple(scan.detach() for scan in self.scans),
            None if self.backward_gated is None else self.backward_gated.detach(),
        )


def token_influence(scans: Sequence[ScanInputs]) -> Tensor:
    """How much each direction can carry from a token to its output: (batch, directions, tokens).

    This is step size · ‖B‖ · ‖C‖ at the step in which the direction visits the token: the token is multiplied by the
    first two when it enters the state, and the state by the last for the output. The step size is the mean over
    channels; the norms are Euclidean.
    """
    influences = []
    for scan in scans:
        B = at_least_float32(scan.B).unsqueeze(1)
        if scan.direction_B is not None:
            B = B + at_least_float32(scan.direction_B)[scan.moves]
        C = at_least_float32(scan.C).unsqueeze(1)
        influences.append(_visited(scan, _steps(scan).unsqueeze(1) * B.norm(dim=-1) * C.norm(dim=-1)))
    return torch.cat(influences, dim=1)


def own_inputs(scans: Sequence[ScanInputs]) -> tuple[Tensor, Tensor]:
    """What the scans computed from each token itself: step sizes, averaged over channels (batch, scans, tokens), and B
    (batch, scans, tokens, state_size), without `direction_B`, which belongs to a path."""
    steps = [_steps(scan).flip(-1) if scan.reversed else _steps(scan) for scan in scans]
    B = [at_least_float32(scan.B.flip(1) if scan.reversed else scan.B) for scan in scans]
    return torch.stack(steps, dim=1), torch.stack(B, dim=1)


def _steps(scan: ScanInputs) -> Tensor:
    """Step sizes, averaged over channels (batch, steps)."""
    return F.softplus(at_least_float32(scan.time_step) + at_least_float32(scan.time_step_bias)).mean(-1)


def _visited(scan: ScanInputs, steps: Tensor) -> Tensor:
    """Converts values per step (batch, paths or 1, steps) to values of the visited tokens (batch, paths, tokens)."""
    if scan.order is None:
        return steps.flip(-1) if scan.reversed else steps
    order = scan.order.long().expand(steps.shape[0], -1, -1)
    return torch.zeros_like(order, dtype=steps.dtype).scatter(-1, order, steps.expand_as(order))
