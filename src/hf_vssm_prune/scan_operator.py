"""The common part of the scan kernels: the arguments as one tuple, their checks, and the operator."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from .kernel_operator import check_tensors, kernel_operator
from .selective_scan_torch import selective_scan_torch


class ScanArguments(NamedTuple):
    """The arguments of `hf_vssm_prune.selective_scan.selective_scan`, in the same order."""

    hidden_states: Tensor
    time_step: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    time_step_bias: Tensor
    gate: Tensor | None = None
    order: Tensor | None = None
    gaps: Tensor | None = None
    hole_time_step: Tensor | None = None
    direction_B: Tensor | None = None
    moves: Tensor | None = None

    def num_paths(self) -> int:
        return 1 if self.order is None else self.order.shape[1]

    def check(self) -> None:
        """Checks that the shapes fit together and that all tensors are on one device.

        Raises:
            ValueError: a tensor does not fit; the message names it.
        """
        batch, length, channels = self.hidden_states.shape
        states = self.A.shape[-1]
        by_token, by_state, by_channel = [(batch, length, channels)], [(batch, length, states)], [(channels,)]
        by_path = [(batch, self.num_paths(), length), (1, self.num_paths(), length)]
        move_kinds = 0 if self.direction_B is None else self.direction_B.shape[0]
        shapes: dict[str, Sequence[tuple[int, ...]]] = {
            "hidden_states": by_token,
            "time_step": by_token,
            "A": [(channels, states)],
            "B": by_state,
            "C": by_state,
            "D": by_channel,
            "time_step_bias": by_channel,
            "gate": by_token,
            "order": by_path,
            "gaps": by_path,
            "hole_time_step": by_channel,
            "direction_B": [(move_kinds, states)],
            "moves": by_path,
        }
        check_tensors(self, shapes)


def scan_operator(
    name: str,
    forward: Callable[[ScanArguments], Tensor],
    backward: Callable[[ScanArguments, Tensor], Sequence[Tensor]],
    device_types: str | None = None,
) -> Callable[..., Tensor]:
    """A scan as a PyTorch operator; for arguments and result, see `kernel_operator`."""
    return kernel_operator(name, ScanArguments, selective_scan_torch, forward, backward, device_types)


def to_float32(tensor: Tensor | None) -> Tensor | None:
    """Converts floating-point tensors to float32; indices and None are returned unchanged."""
    return tensor.float() if tensor is not None and tensor.is_floating_point() else tensor
