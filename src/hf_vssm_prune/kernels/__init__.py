"""Fast kernels, one file each. Those here stay with the package; those in its root are copied with models
(`travelling_kernels.py`). Each computes the same as the plain PyTorch functions in the package's root, and is tested
against them.

A kernel is a module with two parts: `unavailable(device_type)`, which returns the reason why the kernel cannot be used
for tensors on such a device, or None if it can; and one function for each operation that it speeds up
(`selective_scan`, `depthwise_conv2d`, `causal_conv1d`), with the arguments of its plain counterpart.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from hf_vssm_prune import mamba_ssm_scan, triton_backend
from hf_vssm_prune.kernel_table import ON_GPU, choose_name
from hf_vssm_prune.kernels import cpu


KERNELS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton_backend, "mamba_ssm": mamba_ssm_scan}

# For each device type, the kernels that `auto` tries, in this order.
AUTO = {"cpu": ("cpu",), "cuda": ON_GPU}


def available() -> dict[str, str]:
    """For each kernel and device type, `"available"` or the reason why it is not, under the key `"kernel (device)"`."""
    return {
        f"{name} ({device_type})": kernel.unavailable(device_type) or "available"
        for name, kernel in KERNELS.items()
        for device_type in AUTO
    }


def choose_kernel(operation: str, backend: str, device_type: str) -> Callable[..., Tensor] | None:
    """The function that computes `operation` on `device_type`, or None for plain PyTorch.

    Args:
        operation: `selective_scan`, `depthwise_conv2d` or `causal_conv1d`.
        backend: `torch`, the name of a kernel (operations that it does not have use plain PyTorch), or `auto`.
        device_type: device type of the tensors, in the form of `torch.device.type`.

    Raises:
        ValueError: there is no such backend.
        ImportError: the named kernel cannot be used here; the message says why.
    """
    name = _choose_name(operation, backend, device_type)
    return None if name == "torch" else getattr(KERNELS[name], operation)


@torch.compiler.assume_constant_result
def _choose_name(operation: str, backend: str, device_type: str) -> str:
    return choose_name(KERNELS, AUTO, operation, backend, device_type)
