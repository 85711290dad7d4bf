"""Chooses the kernel for an operator, if the package has any."""

from collections.abc import Callable

from torch import Tensor

from .function_transforms import is_exporting


try:
    from hf_vssm_prune.kernels import choose_kernel
except ImportError:  # code from the Hub without the package: use the kernels that were copied with the model
    from .travelling_kernels import choose_kernel


def kernel_for(operation: str, backend: str, tensor: Tensor) -> Callable[..., Tensor] | None:
    """Calls `kernels.choose_kernel` for a tensor's device. Exported programs use plain PyTorch unless a kernel is
    named."""
    backend = "torch" if backend == "auto" and is_exporting() else backend
    return choose_kernel(operation, backend, tensor.device.type)
