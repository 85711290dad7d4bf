"""The CPU kernels: the C++ code in `csrc/`, called through ctypes and registered as PyTorch operators with gradients.

They compute in float32. Each tensor may be float32, bfloat16 or float16; the cases listed in `plain_fallback.py` use
the plain PyTorch functions. Rows of channels are read in place, so the parts of a split projection do not have to be
copied.
"""

import ctypes
import functools
import warnings
from ctypes import c_char_p, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from hf_vssm_prune.convolution_operator import ConvolutionArguments, convolution_operator
from hf_vssm_prune.convolution_torch import causal_conv1d_torch, depthwise_conv2d_torch
from hf_vssm_prune.environment import is_switched_on
from hf_vssm_prune.kernels.build import BuildError, library_path
from hf_vssm_prune.plain_fallback import left_to
from hf_vssm_prune.scan_operator import ScanArguments, scan_operator
from hf_vssm_prune.selective_scan_torch import selective_scan_torch


DISABLE = "HF_VSSM_PRUNE_DISABLE_CPU_KERNEL"


def unavailable(device_type: str) -> str | None:
    """The reason why these kernels cannot be used for tensors on `device_type`; None if they can."""
    if device_type != "cpu":
        return "it computes on the CPU only"
    if is_switched_on(DISABLE):
        return f"it is turned off by the environment variable {DISABLE}"
    library = _load()
    return library if isinstance(library, str) else None


@left_to(selective_scan_torch)
def selective_scan(*args: Any, **kwargs: Any) -> Tensor:
    """For arguments and result, see `hf_vssm_prune.selective_scan.selective_scan`."""
    return _selective_scan(*ScanArguments(*args, **kwargs))


@left_to(depthwise_conv2d_torch)
def depthwise_conv2d(*args: Any, **kwargs: Any) -> Tensor:
    """For arguments and result, see `hf_vssm_prune.grid_convolution.depthwise_conv2d`."""
    return _depthwise_conv2d(*ConvolutionArguments.on_grid(*args, **kwargs))


@left_to(causal_conv1d_torch)
def causal_conv1d(*args: Any, **kwargs: Any) -> Tensor:
    """For arguments and result, see `hf_vssm_prune.causal_convolution.causal_conv1d`."""
    return _depthwise_conv2d(*ConvolutionArguments.along_sequence(*args, **kwargs))


# ----------------------------------------------------------------------------------------------------------------------
# The library
# ----------------------------------------------------------------------------------------------------------------------


# The values of `ElementType`; tensors of other types are converted to float32.
ELEMENT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


# The number of structures that each function takes, before the number of threads.
FUNCTIONS = {
    "selective_scan_forward": 2,
    "selective_scan_backward": 3,
    "depthwise_conv2d_forward": 2,
    "depthwise_conv2d_backward": 3,
}


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or a sentence that says why there is none."""
    try:
        library = ctypes.CDLL(str(library_path()))
    except (BuildError, OSError) as error:
        return str(error)
    for name, pointers in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes = (*(c_void_p,) * pointers, c_int)
        function.restype = c_char_p
    if not library.has_threads():
        warnings.warn("PyTorch brings no OpenMP runtime here: the CPU kernels use one thread", stacklevel=2)
    return library


def _call(function: str, *arguments: Any) -> None:
    library = _load()
    if isinstance(library, str):
        raise ImportError(library)
    error = getattr(library, function)(*arguments, torch.get_num_threads())
    if error == b"out of memory":
        raise MemoryError(f"{function}: there is not enough memory.")
    if error:
        raise IndexError(error.decode())


def _new(like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """An output of the C++ code: contiguous, regardless of torch's defaults."""
    return torch.empty(like.shape, dtype=dtype, device="cpu")


# Tensors must outlive the call that uses their pointers, so these functions also return the tensors, to be kept in a
# local variable.


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in ELEMENT_TYPES else tensor.float()


def _contiguous_rows(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    tensor = _readable(tensor)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    if tensor is None:
        return None
    return _readable(tensor).contiguous()


def _contiguous_int32(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.int32).contiguous()


# The structures in csrc/arguments.h, which consist of 64-bit numbers and addresses.


def _structure(*fields: tuple[int, ...]) -> ctypes.Array[c_int64]:
    numbers = [number for field in fields for number in field]
    return (c_int64 * len(numbers))(*numbers)


def _pointer(tensor: Tensor | None) -> tuple[int]:
    return (0,) if tensor is None else (tensor.data_ptr(),)


def _place(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), ELEMENT_TYPES[tensor.dtype])


def _rows(tensor: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if tensor is None else (*_place(tensor), *tensor.stride()[:2])


def _paths(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0) if tensor.shape[0] > 1 else 0)


# ----------------------------------------------------------------------------------------------------------------------
# Selective scan
# ----------------------------------------------------------------------------------------------------------------------


# The order of `ScanGradients`.
SCAN_ROW_GRADIENTS = ("hidden_states", "time_step", "gate")
SCAN_GRADIENTS = ("A", "B", "C", "D", "time_step_bias", "hole_time_step", "direction_B")


def _scan_forward(arguments: ScanArguments) -> Tensor:
    dtype = arguments.hidden_states.dtype
    arguments = _with_rows_of_one_type(arguments)
    output = _new(arguments.hidden_states, arguments.hidden_states.dtype)
    structure, _keep = _scan_structure(arguments)
    _call("selective_scan_forward", structure, _structure(_place(output)))
    return output if output.dtype == dtype else output.to(dtype)


def _scan_backward(arguments: ScanArguments, grad_output: Tensor) -> list[Tensor]:
    arguments = _with_rows_of_one_type(arguments)
    row_type = arguments.hidden_states.dtype
    gradients = {
        name: _new(tensor, row_type if name in SCAN_ROW_GRADIENTS else torch.float32)
        for name, tensor in arguments._asdict().items()
        if tensor is not None and tensor.is_floating_point()
    }
    structure, _keep = _scan_structure(arguments)
    grad_output = grad_output.to(row_type).contiguous()
    rows = [_place(gradients.get(name)) for name in SCAN_ROW_GRADIENTS]
    parameters = [_pointer(gradients.get(name)) for name in SCAN_GRADIENTS]
    _call("selective_scan_backward", structure, _structure(_rows(grad_output)), _structure(*rows, *parameters))
    return list(gradients.values())


def _with_rows_of_one_type(arguments: ScanArguments) -> ScanArguments:
    """The arguments with all tensors that have a row of channels per token converted to float32, if their types
    differ."""
    u, time_step, gate = arguments.hidden_states, arguments.time_step, arguments.gate
    is_one_type = u.dtype == time_step.dtype and (gate is None or gate.dtype == u.dtype)
    if is_one_type and u.dtype in ELEMENT_TYPES:
        return arguments
    gate = None if gate is None else gate.float()
    return arguments._replace(hidden_states=u.float(), time_step=time_step.float(), gate=gate)


_selective_scan = scan_operator("selective_scan", _scan_forward, _scan_backward, device_types="cpu")


def _scan_structure(arguments: ScanArguments) -> tuple[ctypes.Array[c_int64], list[Tensor | None]]:
    """The arguments in the form used by C++, and the tensors to which they point."""
    a = arguments
    rows = [_contiguous_rows(tensor) for tensor in (a.hidden_states, a.time_step, a.B, a.C, a.gate)]
    parameters = [_contiguous(tensor) for tensor in (a.A, a.D, a.time_step_bias, a.hole_time_step, a.direction_B)]
    indices = [_contiguous_int32(tensor) for tensor in (a.order, a.gaps, a.moves)]
    move_kinds = 0 if a.direction_B is None else a.direction_B.shape[0]
    structure = _structure(
        (*a.hidden_states.shape, a.A.shape[-1], a.num_paths(), move_kinds),
        *map(_rows, rows),
        *map(_place, parameters),
        *map(_paths, indices),
    )
    return structure, rows + parameters + indices


# ----------------------------------------------------------------------------------------------------------------------
# Depthwise convolution
# ----------------------------------------------------------------------------------------------------------------------


def _convolution_forward(arguments: ConvolutionArguments) -> Tensor:
    output = _new(arguments.hidden_states, arguments.hidden_states.dtype)
    structure, _keep = _convolution_structure(arguments)
    _call("depthwise_conv2d_forward", structure, _structure(_place(output)))
    return output


def _convolution_backward(arguments: ConvolutionArguments, grad_output: Tensor) -> list[Tensor]:
    hidden_states, weight, bias = arguments.hidden_states, arguments.weight, arguments.bias
    gradients = [_new(hidden_states, hidden_states.dtype), _new(weight)]
    gradients += [] if bias is None else [_new(bias)]
    structure, _keep = _convolution_structure(arguments)
    grad_output = grad_output.contiguous()
    weights = [*map(_pointer, gradients[1:]), (0,)][:2]
    places = _structure(_place(gradients[0]), *weights)
    _call("depthwise_conv2d_backward", structure, _structure(_rows(grad_output)), places)
    gradients[1] = _in_reading_order(gradients[1], arguments.looks)
    return gradients


_depthwise_conv2d = convolution_operator(
    "depthwise_conv2d", _convolution_forward, _convolution_backward, device_types="cpu"
)


def _in_reading_order(weight: Tensor, looks: int) -> Tensor:
    """A kernel with its taps in the order of the tokens they belong to, and back: for the reverse direction, the last
    tap comes first."""
    return weight.flip(-1) if looks < 0 else weight


def _window(arguments: ConvolutionArguments) -> tuple[int, int, int]:
    taps = arguments.weight.shape[-1]
    if arguments.looks == 0:
        return taps, taps, taps // 2
    return 1, taps, taps - 1 if arguments.looks > 0 else 0


def _convolution_structure(arguments: ConvolutionArguments) -> tuple[ctypes.Array[c_int64], list[Tensor | None]]:
    """The arguments in the form used by C++, and the tensors to which they point."""
    a = arguments
    rows = _contiguous_rows(a.hidden_states)
    parameters = [_contiguous(_in_reading_order(a.weight, a.looks)), _contiguous(a.bias)]
    indices = [_contiguous_int32(a.kept), _contiguous_int32(a.stand_ins)]
    sizes = (*a.hidden_states.shape, a.height, a.width, *_window(a))
    structure = _structure(sizes, _rows(rows), *map(_place, parameters), *map(_pointer, indices), (int(a.silu),))
    return structure, [rows, *parameters, *indices]
