"""Which kernel computes an operator, where the package brings any."""

from collections.abc import Callable

from torch import Tensor

from .function_transforms import is_exporting


try:
    from hf_vssm_prune.kernels import choose_kernel
except ImportError:  # as Hub code, where the package is not installed: what travels with the model
    from .travelling_kernels import choose_kernel


def kernel_for(operation: str, backend: str, tensor: Tensor) -> Callable[..., Tensor] | None:
    """As `kernels.choose_kernel`, where a tensor is; what is exported is plain PyTorch, unless a kernel is named."""
    backend = "torch" if backend == "auto" and is_exporting() else backend
    return choose_kernel(operation, backend, tensor.device.type)
