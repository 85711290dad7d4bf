"""Fast kernels, one file each. Each computes what the plain PyTorch in the package's root computes, and is tested
against it.

A kernel is a module with two things: `unavailable(device_type)`, which says in a sentence why the kernel cannot be used
for tensors on such a device, or None where it can; and one function for each operation that it speeds up
(`selective_scan`, `depthwise_conv2d`), with the arguments of its plain counterpart.
"""

import warnings
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from hf_vssm_prune.documentation import see
from hf_vssm_prune.kernels import cpu, mamba_ssm, triton_scan


KERNELS: dict[str, ModuleType] = {"cpu": cpu, "triton": triton_scan, "mamba_ssm": mamba_ssm}

# For each device type what `auto` tries, in this order.
AUTO = {"cpu": ("cpu",), "cuda": ("triton", "mamba_ssm")}


def available() -> dict[str, str]:
    """For each kernel and device type, `"available"` or the reason why not, under the key `"kernel (device)"`."""
    return {
        f"{name} ({device_type})": kernel.unavailable(device_type) or "available"
        for name, kernel in KERNELS.items()
        for device_type in AUTO
    }


def choose_kernel(operation: str, backend: str, device_type: str) -> Callable[..., Tensor] | None:
    """The function that computes `operation` on `device_type`, or None for plain PyTorch.

    Args:
        operation: `selective_scan` or `depthwise_conv2d`.
        backend: `torch`, the name of a kernel (plain PyTorch computes what that kernel does not have), or `auto`.
        device_type: of the tensors, as `torch.device.type` has it.

    Raises:
        ValueError: no such backend.
        ImportError: the named kernel cannot be used here; the message says why.
    """
    name = _choose_name(operation, backend, device_type)
    return None if name == "torch" else getattr(KERNELS[name], operation)


@torch.compiler.assume_constant_result
def _choose_name(operation: str, backend: str, device_type: str) -> str:
    if backend == "torch":
        return "torch"
    if backend != "auto":
        if backend not in KERNELS:
            raise ValueError(
                f"unknown backend {backend!r}; known are 'auto', 'torch', {', '.join(map(repr, KERNELS))}."
            )
        if reason := KERNELS[backend].unavailable(device_type):
            raise ImportError(
                f"backend {backend!r} cannot be used on {device_type}: {reason}. {see('backend-cannot-be-used')}"
            )
        return backend if hasattr(KERNELS[backend], operation) else "torch"
    reasons = {}
    for name in AUTO.get(device_type, ()):
        if not hasattr(KERNELS[name], operation):
            continue
        reason = KERNELS[name].unavailable(device_type)
        if reason is None:
            return name
        reasons[name] = reason
    # On a GPU PyTorch's own convolution is the fast one; a meta tensor is computed by none.
    if reasons or device_type not in (*AUTO, "meta"):
        _warn_once(device_type, "; ".join(f"{name}: {reason}" for name, reason in reasons.items()))
    return "torch"


_WARNED: set[str] = set()


def _warn_once(device_type: str, reasons: str) -> None:
    if device_type not in _WARNED:
        _WARNED.add(device_type)
        warnings.warn(
            f"no fast kernel for {device_type}, plain PyTorch is used and is slower ({reasons}). "
            f"{see('no-fast-kernel')}",
            stacklevel=4,
        )
