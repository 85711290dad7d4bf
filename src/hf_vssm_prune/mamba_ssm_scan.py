"""The selective scan with the CUDA kernel of the mamba-ssm package, if the user has installed it.

That kernel does not support holes or paths. If its time step is replaced with the decay step d_i = time_step_i + e_i,
its state is

    h_i = exp(d_i A) * h_{i-1} + d_i B_i u'_i        with        u'_i = u_i time_step_i / d_i

which is the same as ours; D u is added separately, because u' differs from u. Paths are scanned as additional images in
the batch.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .plain_fallback import DifferentiatedOnce, left_to
from .scan_operator import ScanArguments, to_float32
from .scan_paths import gather_along_paths, scatter_along_paths
from .selective_scan_torch import decay_steps, selective_scan_torch


# Imported by name, because transformers requires all packages that a Hub repository's code imports.
INTERFACE = "mamba_ssm.ops.selective_scan_interface"


def unavailable(device_type: str) -> str | None:
    """The reason why this kernel cannot be used for tensors on `device_type`; None if it can."""
    if device_type != "cuda":
        return "it runs on NVIDIA and AMD GPUs only"
    if importlib.util.find_spec("mamba_ssm") is None:
        return "the mamba-ssm package is not installed: pip install mamba-ssm"
    try:
        importlib.import_module(INTERFACE)
    except Exception as error:  # it imports Triton and compiled code, which raise many types
        return f"the mamba-ssm package cannot be imported: {type(error).__name__}: {error}"
    return None


@left_to(selective_scan_torch)
def selective_scan(*args: Any, **kwargs: Any) -> Tensor:
    """For arguments and result, see `hf_vssm_prune.selective_scan.selective_scan`."""
    selective_scan_fn = importlib.import_module(INTERFACE).selective_scan_fn
    arguments = ScanArguments(*args, **kwargs)
    arguments.check()
    if arguments.hidden_states.numel() == 0:
        return selective_scan_torch(*arguments)
    return scan_with(selective_scan_fn, arguments)


def scan_with(mamba_scan: Callable[..., Tensor], arguments: ScanArguments) -> Tensor:
    """Computes the scan with a function that has the arguments of mamba-ssm's `selective_scan_fn`: u and delta (batch,
    channels, length), A (channels, state_size), B and C (batch, state_size, length), all float32."""
    dtype = arguments.hidden_states.dtype
    a = ScanArguments(*map(to_float32, arguments))  # type: ignore[arg-type]
    paths = (len(a.hidden_states), a.num_paths())

    u = a.hidden_states.unsqueeze(1) if a.order is None else gather_along_paths(a.hidden_states, a.order)
    time_step = F.softplus(a.time_step + a.time_step_bias).unsqueeze(1)
    steps = decay_steps(time_step, a.gaps, a.hole_time_step)
    # 0 / 0, without decay and input, should be 0.
    entering = u * (time_step / steps.clamp(min=torch.finfo(steps.dtype).tiny))
    B = a.B.unsqueeze(1)
    if a.direction_B is not None and a.moves is not None:
        B = B + a.direction_B[a.moves.long()]

    def as_images(tokens: Tensor) -> Tensor:
        return tokens.expand(*paths, -1, -1).flatten(0, 1).transpose(1, 2).contiguous()

    y = mamba_scan(as_images(entering), as_images(steps), a.A, as_images(B), as_images(a.C.unsqueeze(1)))
    if not torch.compiler.is_compiling():
        y = DifferentiatedOnce.apply(y, "mamba_ssm")
    y = y.transpose(1, 2).unflatten(0, paths) + a.D * u
    output = y.squeeze(1) if a.order is None else scatter_along_paths(y, a.order)
    if a.gate is not None:
        output = output * F.silu(a.gate)
    return output.to(dtype)
