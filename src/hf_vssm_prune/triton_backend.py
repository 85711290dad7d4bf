"""The GPU kernels written in Triton, and a check whether they can be used. They need no CUDA compiler.

With TRITON_INTERPRET=1 (set before torch is imported) they run on the CPU, slowly, for tests.
"""

import functools
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from .convolution_torch import causal_conv1d_torch, depthwise_conv2d_torch
from .selective_scan_torch import selective_scan_torch
from .triton_convolution import causal_conv1d, depthwise_conv2d
from .triton_machine import is_interpreted
from .triton_scan import SHORTEST_CHUNK, selective_scan


__all__ = ["causal_conv1d", "depthwise_conv2d", "selective_scan", "unavailable"]


def unavailable(device_type: str) -> str | None:
    """The reason why these kernels cannot be used for tensors on `device_type`; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if device_type == "cpu" and not is_interpreted():
        return "it computes on a GPU only, or on the CPU under TRITON_INTERPRET=1"
    if device_type not in ("cpu", "cuda"):
        return "it computes on NVIDIA and AMD GPUs only"
    if device_type == "cpu":
        return None
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    try:
        index = torch.cuda.current_device()
    except Exception as error:  # a GPU that is taken, a driver that does not fit, a process that was forked
        return f"the GPU cannot be used: {error}"
    return _self_check_on_gpu(index, torch.is_grad_enabled())


@functools.cache
def _self_check_on_gpu(index: int, with_gradients: bool) -> str | None:
    # The first forward pass calls this, in any context. A new thread has no mode, autocast or function transform. Its
    # current GPU is the first one, on which not all processes of a distributed run should use memory.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(self_check, f"cuda:{index}", with_gradients).result()


def self_check(device: str, with_gradients: bool = True) -> str | None:
    """The reason why the kernels cannot be trusted on this device; None if they can. Triton compiles them for each kind
    of GPU, and this package has been tested on few. Small results are compared with plain PyTorch, and their gradients
    only if they are needed, because each kernel takes seconds to compile."""
    try:
        with torch.set_grad_enabled(with_gradients):
            worst = max(error for check in (_scan_errors, _convolution_errors) for error in check(device))
    except Exception as error:  # the compiler, the driver and the launch raise many types
        return f"Triton failed with {type(error).__name__}: {error}"
    return None if worst < 1e-4 else f"Triton's results differ from plain PyTorch's by {worst:.1e}"


def _scan_errors(device: str) -> Iterator[float]:
    """Errors of a scan with all optional arguments, and of a long path, which is divided into chunks."""
    yield _scan_error(device, batch=2, paths=2, length=7, channels=40, states=8)
    if not is_interpreted():  # where paths are not divided
        yield _scan_error(device, batch=1, paths=None, length=4 * SHORTEST_CHUNK + 3, channels=8, states=16)


def _scan_error(device: str, batch: int, paths: int | None, length: int, channels: int, states: int) -> float:
    token, state, path = (batch, length, channels), (batch, length, states), (batch, paths or 1, length)
    shapes = [token, token, (channels, states), state, state, (channels,), (channels,), token]
    random = np.random.default_rng(0)
    floats = [random.random(shape, np.float32) - 1 for shape in shapes]
    integers = []
    if paths is not None:
        floats += [random.random(channels, np.float32), random.random((3, states), np.float32) - 1]
        gaps, moves = (random.integers(low, high, path) for low, high in ((1, 9), (0, 3)))
        integers = [random.random(path).argsort(-1), gaps, moves]

    def scan_by(scan: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(inputs: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
            return scan(*inputs[:8], *indices[:2], *inputs[8:], *indices[2:])

        return compute

    return _error(scan_by(selective_scan), scan_by(selective_scan_torch), floats, integers, device)


def _convolution_errors(device: str) -> Iterator[float]:
    """Errors of a convolution on a grid with stand-ins, and along a sequence."""
    random = np.random.default_rng(0)
    kept, stand_ins = np.array([[0, 3, 4]]), np.array([[0, 0, 1, 1, 2, 2]])

    def on_grid(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def compute(inputs: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
            return convolution(*inputs, (2, 3), indices[0], True, indices[1])

        return compute

    def along_sequence(convolution: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda inputs, _: convolution(*inputs, True)

    floats = [random.random(shape, np.float32) - 0.5 for shape in ((1, 3, 40), (40, 1, 3, 3), (40,))]
    yield _error(on_grid(depthwise_conv2d), on_grid(depthwise_conv2d_torch), floats, (kept, stand_ins), device)
    floats[1] = floats[1][:, :, 0]
    yield _error(along_sequence(causal_conv1d), along_sequence(causal_conv1d_torch), floats, (), device)


def _error(
    ours: Callable[..., Tensor],
    plain: Callable[..., Tensor],
    floats: Sequence[np.ndarray],
    integers: Sequence[np.ndarray],
    device: str,
) -> float:
    """The largest error of the values and, if they are enabled, the gradients, each relative to the largest entry;
    infinite if an entry is not finite. Both functions take a list of floating-point tensors and a list of integer
    tensors."""
    results = []
    for function in (ours, plain):
        inputs = [torch.tensor(values, device=device).requires_grad_() for values in floats]
        output = function(inputs, [torch.tensor(values, device=device) for values in integers])
        results.append([output.detach()])
        if torch.is_grad_enabled():
            results[-1] += torch.autograd.grad(output.square().sum(), inputs)
    errors = [(ours - theirs).abs().max() / theirs.abs().max() for ours, theirs in zip(*results, strict=True)]
    return max(float(error.nan_to_num(nan=torch.inf)) for error in errors)
