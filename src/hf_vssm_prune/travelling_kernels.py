"""The kernels that are copied with a model as Hub code, for machines without this package: those for GPUs. On a CPU,
such models use plain PyTorch."""

from collections.abc import Callable
from types import SimpleNamespace

import torch
from torch import Tensor

from .documentation import see
from .kernel_table import ON_GPU, choose_name
from .mamba_ssm_scan import selective_scan as scan_by_mamba_ssm
from .mamba_ssm_scan import unavailable as mamba_ssm_unavailable
from .triton_backend import causal_conv1d, depthwise_conv2d
from .triton_backend import selective_scan as scan_by_triton
from .triton_backend import unavailable as triton_unavailable


KERNELS = {
    "triton": SimpleNamespace(
        unavailable=triton_unavailable,
        selective_scan=scan_by_triton,
        depthwise_conv2d=depthwise_conv2d,
        causal_conv1d=causal_conv1d,
    ),
    "mamba_ssm": SimpleNamespace(unavailable=mamba_ssm_unavailable, selective_scan=scan_by_mamba_ssm),
}
AUTO: dict[str, tuple[str, ...]] = {"cpu": (), "cuda": ON_GPU}


def choose_kernel(operation: str, backend: str, device_type: str) -> Callable[..., Tensor] | None:
    """Like `hf_vssm_prune.kernels.choose_kernel`."""
    if backend not in ("auto", "torch", *KERNELS):
        raise ImportError(
            f"backend {backend!r} needs the hf_vssm_prune package, which is not installed. "
            f"{see('backend-cannot-be-used')}"
        )
    name = _choose_name(operation, backend, device_type)
    return None if name == "torch" else getattr(KERNELS[name], operation)


@torch.compiler.assume_constant_result
def _choose_name(operation: str, backend: str, device_type: str) -> str:
    return choose_name(KERNELS, AUTO, operation, backend, device_type)
