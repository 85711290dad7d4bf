"""Baselines for the scan."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_vssm_prune.grid_convolution import depthwise_conv2d_torch
from hf_vssm_prune.kernels import KERNELS


def reference_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, z: Tensor | None
) -> Tensor:
    """One direction with the algorithm of mamba-ssm's `selective_scan_ref`: first exp(ΔA) and ΔBu for the whole
    sequence, each (batch, channels, length, state_size), then a loop. Inputs are (batch, channels, length); B and C are
    (batch, state_size, length)."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    entering = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state = A.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for step in range(u.shape[2]):
        state = decay[:, :, step] * state + entering[:, :, step]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, step]))
    y = torch.stack(outputs, dim=2) + u * D[:, None]
    return y if z is None else y * F.silu(z)


def time_major_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, z: Tensor | None
) -> Tensor:
    """The fastest loop in plain PyTorch that we know: in place, with time as the first axis so that each step is
    contiguous. u, delta and z are (length, batch, channels); B and C (length, batch, state_size). No gradients."""
    delta = F.softplus(delta + delta_bias)
    decay = (delta.unsqueeze(-1) * A).exp_()
    states = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    for step in range(1, len(u)):
        states[step].addcmul_(decay[step], states[step - 1])
    y = torch.matmul(states, C.unsqueeze(-1)).squeeze(-1) + u * D
    return y if z is None else y * F.silu(z)


def reference_kernel() -> SimpleNamespace:
    """A kernel for `scan_backend` that computes dense models like the published code without CUDA."""

    def scan(u, delta, A, B, C, D, bias, gate, order, gaps, hole_time_step, direction_B, moves) -> Tensor:
        if gaps is not None:
            raise ValueError("the reference does not support holes.")
        delta, C = delta.transpose(1, 2), C.transpose(1, 2)
        total = 0
        for path in range(1 if order is None else order.shape[1]):
            visited = u if order is None else u[:, order[0, path]]
            B_path = B if direction_B is None else B + direction_B[moves[0, path]]
            y = reference_scan(visited.transpose(1, 2), delta, A, B_path.transpose(1, 2), C, D, bias, None)
            y = y.transpose(1, 2)
            total = total + (y if order is None else y[:, order[0, path].argsort()])
        return total if gate is None else total * F.silu(gate)

    return SimpleNamespace(
        unavailable=lambda device_type: None, selective_scan=scan, depthwise_conv2d=depthwise_conv2d_torch
    )


@contextmanager
def registered(name: str, kernel: Any) -> Iterator[None]:
    KERNELS[name] = kernel
    try:
        yield
    finally:
        del KERNELS[name]
