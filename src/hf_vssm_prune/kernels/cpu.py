"""The CPU kernels: the C++ of `csrc/`, reached through ctypes and wrapped as PyTorch operators with their gradients.

They compute in float32: half precision is converted, and float64 is left to the plain PyTorch functions. Rows of
channels are read where they lie, so the parts of a split projection need no copy. The gradients cannot be
differentiated again.
"""

import ctypes
import functools
import os
from ctypes import POINTER, c_char_p, c_int, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from hf_vssm_prune.kernels.build import BuildError, library_path


DISABLE = "HF_VSSM_PRUNE_DISABLE_CPU_KERNEL"


def unavailable(device_type: str) -> str | None:
    """Why these kernels cannot be used for tensors on `device_type`, or None where they can."""
    if device_type != "cpu":
        return "it computes on the CPU only"
    if os.environ.get(DISABLE, "0") not in ("", "0"):
        return f"it is turned off by the environment variable {DISABLE}"
    library = _load()
    return library if isinstance(library, str) else None


def selective_scan(
    hidden_states: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    time_step_bias: Tensor,
    gate: Tensor | None = None,
    order: Tensor | None = None,
    gaps: Tensor | None = None,
    hole_time_step: Tensor | None = None,
    direction_B: Tensor | None = None,
    moves: Tensor | None = None,
) -> Tensor:
    """Arguments and result as in `hf_vssm_prune.selective_scan.selective_scan`."""
    arguments = (
        *(hidden_states, time_step, A, B, C, D, time_step_bias, gate),
        *(order, gaps, hole_time_step, direction_B, moves),
    )
    if hidden_states.dtype == torch.float64:
        from hf_vssm_prune.selective_scan import selective_scan_torch

        return selective_scan_torch(*arguments)
    return _selective_scan(*map(_to_float32, arguments)).to(hidden_states.dtype)


def depthwise_conv2d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grid: tuple[int, int],
    kept: Tensor | None = None,
    silu: bool = False,
) -> Tensor:
    """Arguments and result as in `hf_vssm_prune.grid_convolution.depthwise_conv2d`."""
    if hidden_states.dtype == torch.float64:
        from hf_vssm_prune.grid_convolution import depthwise_conv2d_torch

        return depthwise_conv2d_torch(hidden_states, weight, bias, grid, kept, silu)
    tensors = map(_to_float32, (hidden_states, weight, bias))
    return _depthwise_conv2d(*tensors, kept, *grid, silu).to(hidden_states.dtype)


def _to_float32(tensor: Tensor | None) -> Tensor | None:
    return tensor.float() if tensor is not None and tensor.is_floating_point() else tensor


# ----------------------------------------------------------------------------------------------------------------------
# The library. The structures mirror csrc/arguments.h.
# ----------------------------------------------------------------------------------------------------------------------


class _Rows(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("batch_stride", c_int64), ("row_stride", c_int64))


class _Paths(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("batch_stride", c_int64))


class _ScanArguments(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "length", "channels", "states", "paths", "move_kinds")),
        *((name, _Rows) for name in ("hidden_states", "time_step", "B", "C", "gate")),
        *((name, c_void_p) for name in ("A", "D", "time_step_bias", "hole_time_step", "direction_B")),
        *((name, _Paths) for name in ("order", "gaps", "moves")),
    )


SCAN_GRADIENTS = (
    *("hidden_states", "time_step", "A", "B", "C", "D", "time_step_bias"),
    *("gate", "hole_time_step", "direction_B"),
)


class _ScanGradients(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in SCAN_GRADIENTS)


class _ConvolutionArguments(ctypes.Structure):
    _fields_ = (
        *((name, c_int64) for name in ("batch", "tokens", "channels", "kernel", "height", "width")),
        ("hidden_states", _Rows),
        *((name, c_void_p) for name in ("weight", "bias", "kept")),
        ("silu", c_int32),
    )


class _ConvolutionGradients(ctypes.Structure):
    _fields_ = tuple((name, c_void_p) for name in ("hidden_states", "weight", "bias"))


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or a sentence that says why there is none."""
    try:
        library = ctypes.CDLL(str(library_path()))
    except (BuildError, OSError) as error:
        return str(error)
    arguments: dict[str, tuple[Any, ...]] = {
        "selective_scan_forward": (POINTER(_ScanArguments), c_void_p),
        "selective_scan_backward": (POINTER(_ScanArguments), POINTER(_Rows), POINTER(_ScanGradients)),
        "depthwise_conv2d_forward": (POINTER(_ConvolutionArguments), c_void_p),
        "depthwise_conv2d_backward": (POINTER(_ConvolutionArguments), POINTER(_Rows), POINTER(_ConvolutionGradients)),
    }
    for name, types in arguments.items():
        function = getattr(library, name)
        function.argtypes = (*types, c_int)
        function.restype = c_char_p
    return library


def _call(function: str, *arguments: Any) -> None:
    library = _load()
    if isinstance(library, str):
        raise ImportError(library)
    error = getattr(library, function)(*arguments, torch.get_num_threads())
    if error:
        raise IndexError(error.decode())


# What a pointer points to must outlive the call: these return tensors to be kept in a local name.


def _contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _contiguous_int32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.int32).contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _rows(tensor: Tensor | None) -> _Rows:
    return _Rows() if tensor is None else _Rows(tensor.data_ptr(), tensor.stride(0), tensor.stride(1))


def _paths(tensor: Tensor | None) -> _Paths:
    if tensor is None:
        return _Paths()
    return _Paths(tensor.data_ptr(), tensor.stride(0) if tensor.shape[0] > 1 else 0)


def _expect_shape(name: str, tensor: Tensor | None, *shapes: tuple[int, ...]) -> None:
    if tensor is None:
        return
    if tensor.device.type != "cpu":
        raise ValueError(f"`{name}` is on the device {tensor.device}, other tensors are on the CPU.")
    if tuple(tensor.shape) not in shapes:
        raise ValueError(f"`{name}` must have the shape {' or '.join(map(str, shapes))}, got {tuple(tensor.shape)}.")


# ----------------------------------------------------------------------------------------------------------------------
# Selective scan
# ----------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("hf_vssm_prune::selective_scan", mutates_args=(), device_types="cpu")
def _selective_scan(
    hidden_states: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    time_step_bias: Tensor,
    gate: Tensor | None,
    order: Tensor | None,
    gaps: Tensor | None,
    hole_time_step: Tensor | None,
    direction_B: Tensor | None,
    moves: Tensor | None,
) -> Tensor:
    output = torch.empty(hidden_states.shape)
    inputs = (
        hidden_states,
        time_step,
        A,
        B,
        C,
        D,
        time_step_bias,
        gate,
        order,
        gaps,
        hole_time_step,
        direction_B,
        moves,
    )
    if output.numel():
        arguments, _keep = _scan_arguments(*inputs)
        _call("selective_scan_forward", arguments, output.data_ptr())
    return output


@_selective_scan.register_fake
def _(hidden_states: Tensor, *_others: Tensor | None) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _scan_arguments(
    hidden_states: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    time_step_bias: Tensor,
    gate: Tensor | None,
    order: Tensor | None,
    gaps: Tensor | None,
    hole_time_step: Tensor | None,
    direction_B: Tensor | None,
    moves: Tensor | None,
) -> tuple[_ScanArguments, list[Tensor | None]]:
    """The arguments as C++ takes them, and the tensors that they point into."""
    batch, length, channels = hidden_states.shape
    states = A.shape[-1]
    paths = 1 if order is None else order.shape[1]
    move_kinds = 0 if direction_B is None else direction_B.shape[0]
    for name, tensor in (("time_step", time_step), ("gate", gate)):
        _expect_shape(name, tensor, (batch, length, channels))
    _expect_shape("A", A, (channels, states))
    for name, tensor in (("B", B), ("C", C)):
        _expect_shape(name, tensor, (batch, length, states))
    for name, tensor in (("D", D), ("time_step_bias", time_step_bias), ("hole_time_step", hole_time_step)):
        _expect_shape(name, tensor, (channels,))
    _expect_shape("direction_B", direction_B, (move_kinds, states))
    for name, tensor in (("order", order), ("gaps", gaps), ("moves", moves)):
        _expect_shape(name, tensor, (batch, paths, length), (1, paths, length))

    rows = [_contiguous_rows(tensor) for tensor in (hidden_states, time_step, B, C, gate)]
    parameters = [_contiguous(tensor) for tensor in (A, D, time_step_bias, hole_time_step, direction_B)]
    indices = [_contiguous_int32(tensor) for tensor in (order, gaps, moves)]
    arguments = _ScanArguments(
        *(batch, length, channels, states, paths, move_kinds),
        *map(_rows, rows),
        *map(_pointer, parameters),
        *map(_paths, indices),
    )
    return arguments, rows + parameters + indices


@torch.library.custom_op("hf_vssm_prune::selective_scan_backward", mutates_args=(), device_types="cpu")
def _selective_scan_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    time_step_bias: Tensor,
    gate: Tensor | None,
    order: Tensor | None,
    gaps: Tensor | None,
    hole_time_step: Tensor | None,
    direction_B: Tensor | None,
    moves: Tensor | None,
) -> list[Tensor]:
    """The gradients of the floating-point inputs that are given, in the order of SCAN_GRADIENTS."""
    inputs = (
        hidden_states,
        time_step,
        A,
        B,
        C,
        D,
        time_step_bias,
        gate,
        order,
        gaps,
        hole_time_step,
        direction_B,
        moves,
    )
    wanted = (hidden_states, time_step, A, B, C, D, time_step_bias, gate, hole_time_step, direction_B)
    if hidden_states.numel() == 0:
        return [torch.zeros(tensor.shape) for tensor in wanted if tensor is not None]
    gradients = [None if tensor is None else torch.empty(tensor.shape) for tensor in wanted]
    arguments, _keep = _scan_arguments(*inputs)
    grad_output = grad_output.contiguous()
    _call("selective_scan_backward", arguments, _rows(grad_output), _ScanGradients(*map(_pointer, gradients)))
    return [gradient for gradient in gradients if gradient is not None]


@_selective_scan_backward.register_fake
def _(
    grad_output: Tensor,
    hidden_states: Tensor,
    time_step: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    time_step_bias: Tensor,
    gate: Tensor | None,
    order: Tensor | None,
    gaps: Tensor | None,
    hole_time_step: Tensor | None,
    direction_B: Tensor | None,
    moves: Tensor | None,
) -> list[Tensor]:
    wanted = (hidden_states, time_step, A, B, C, D, time_step_bias, gate, hole_time_step, direction_B)
    return [tensor.new_empty(tensor.shape) for tensor in wanted if tensor is not None]


def _save_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate_scan(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    gradients = iter(_selective_scan_backward(grad_output, *inputs))
    return tuple(next(gradients) if tensor is not None and tensor.is_floating_point() else None for tensor in inputs)


_selective_scan.register_autograd(_differentiate_scan, setup_context=_save_inputs)


# ----------------------------------------------------------------------------------------------------------------------
# Depthwise convolution on the grid
# ----------------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("hf_vssm_prune::depthwise_conv2d", mutates_args=(), device_types="cpu")
def _depthwise_conv2d(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    height: int,
    width: int,
    silu: bool,
) -> Tensor:
    output = torch.empty(hidden_states.shape)
    if output.numel():
        arguments, _keep = _convolution_arguments(hidden_states, weight, bias, kept, height, width, silu)
        _call("depthwise_conv2d_forward", arguments, output.data_ptr())
    return output


@_depthwise_conv2d.register_fake
def _(hidden_states: Tensor, *_others: Any) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)


def _convolution_arguments(
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    height: int,
    width: int,
    silu: bool,
) -> tuple[_ConvolutionArguments, list[Tensor | None]]:
    """The arguments as C++ takes them, and the tensors that they point into."""
    batch, tokens, channels = hidden_states.shape
    kernel = weight.shape[-1]
    if kernel % 2 == 0:
        raise ValueError(f"the kernel must have an odd size, got {kernel}.")
    if kept is None and tokens != height * width:
        raise ValueError(f"a grid of {height} x {width} has {height * width} tokens, got {tokens}; pass `kept`.")
    _expect_shape("weight", weight, (channels, 1, kernel, kernel))
    _expect_shape("bias", bias, (channels,))
    _expect_shape("kept", kept, (batch, tokens))
    rows = _contiguous_rows(hidden_states)
    by_tap = weight.flatten(1).t().contiguous()
    rest = [by_tap, _contiguous(bias), _contiguous_int32(kept)]
    arguments = _ConvolutionArguments(
        batch, tokens, channels, kernel, height, width, _rows(rows), *map(_pointer, rest), silu
    )
    return arguments, [rows, *rest]


@torch.library.custom_op("hf_vssm_prune::depthwise_conv2d_backward", mutates_args=(), device_types="cpu")
def _depthwise_conv2d_backward(
    grad_output: Tensor,
    hidden_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kept: Tensor | None,
    height: int,
    width: int,
    silu: bool,
) -> list[Tensor]:
    """The gradients of `hidden_states`, `weight` and, if there is one, `bias`."""
    wanted = (hidden_states, weight) if bias is None else (hidden_states, weight, bias)
    if hidden_states.numel() == 0:
        return [torch.zeros(tensor.shape) for tensor in wanted]
    gradients = [torch.empty(tensor.shape) for tensor in wanted]
    by_tap = torch.empty(weight[0].numel(), weight.shape[0])
    arguments, _keep = _convolution_arguments(hidden_states, weight, bias, kept, height, width, silu)
    grad_output = grad_output.contiguous()
    pointers = _ConvolutionGradients(gradients[0].data_ptr(), by_tap.data_ptr(), *map(_pointer, gradients[2:]))
    _call("depthwise_conv2d_backward", arguments, _rows(grad_output), pointers)
    gradients[1].copy_(by_tap.t().view_as(weight))
    return gradients


@_depthwise_conv2d_backward.register_fake
def _(grad_output: Tensor, hidden_states: Tensor, weight: Tensor, bias: Tensor | None, *_others: Any) -> list[Tensor]:
    wanted = (hidden_states, weight) if bias is None else (hidden_states, weight, bias)
    return [tensor.new_empty(tensor.shape) for tensor in wanted]


def _save_convolution_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.height, ctx.width, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_convolution(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    hidden_states, weight, bias, kept = ctx.saved_tensors
    gradients = _depthwise_conv2d_backward(
        grad_output, hidden_states, weight, bias, kept, ctx.height, ctx.width, ctx.silu
    )
    grad_bias = None if bias is None else gradients[2]
    return gradients[0], gradients[1], grad_bias, None, None, None, None


_depthwise_conv2d.register_autograd(_differentiate_convolution, setup_context=_save_convolution_inputs)
