"""The depthwise convolutions for NVIDIA and AMD GPUs, written in Triton. Only kept cells are computed, without filling
a grid.

Sums are float32 for inputs of any precision; the cases listed in `plain_fallback.py` use the plain PyTorch functions.
Rows of channels are read in place, so the parts of a split projection do not have to be copied. The gradients are
summed in a fixed order, so they are reproducible. Unlike on the CPU, indices out of range are not detected.
"""

import math
from typing import Any

import torch
from torch import Tensor

from .convolution_operator import ConvolutionArguments, convolution_operator
from .convolution_torch import causal_conv1d_torch, depthwise_conv2d_torch
from .plain_fallback import left_to
from .triton_machine import PROGRAMS_THAT_FILL_A_GPU, is_interpreted


# A convolution kernel with more taps is copied, so that neighbouring threads read neighbouring channels.
MOST_TAPS_IN_PLACE = 9


@left_to(depthwise_conv2d_torch)
def depthwise_conv2d(*args: Any, **kwargs: Any) -> Tensor:
    """For arguments and result, see `hf_vssm_prune.grid_convolution.depthwise_conv2d`."""
    return _convolution(*ConvolutionArguments.on_grid(*args, **kwargs))


@left_to(causal_conv1d_torch)
def causal_conv1d(*args: Any, **kwargs: Any) -> Tensor:
    """For arguments and result, see `hf_vssm_prune.causal_convolution.causal_conv1d`."""
    return _convolution(*ConvolutionArguments.along_sequence(*args, **kwargs))


def _forward(arguments: ConvolutionArguments) -> Tensor:
    shown, places = _tables(arguments)
    hidden_states = arguments.hidden_states
    output = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    _convolve(arguments, hidden_states, shown, places, output, _window(arguments), arguments.bias, arguments.silu)
    return output


def _backward(arguments: ConvolutionArguments, grad_output: Tensor) -> list[Tensor]:
    shown, places = _tables(arguments)
    hidden_states, window = arguments.hidden_states, _window(arguments)
    grad_sums = grad_output
    if arguments.silu:
        grad_sums = torch.empty(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        _convolve(arguments, hidden_states, shown, places, grad_sums, window, arguments.bias, grad_output=grad_output)
    parameters = _sum_weight_gradients(arguments, shown, places, grad_sums, window)

    seen_from = _mirrored(window)
    grad_hidden_states = torch.empty(hidden_states.shape, dtype=hidden_states.dtype, device=hidden_states.device)
    if arguments.stand_ins is None:
        _convolve(arguments, grad_sums, places, places, grad_hidden_states, seen_from)
    else:
        batch, channels = hidden_states.shape[0], hidden_states.shape[2]
        cells = torch.empty(
            batch, arguments.height * arguments.width, channels, dtype=torch.float32, device=hidden_states.device
        )
        _convolve(arguments, grad_sums, places, None, cells, seen_from)
        _sum_cells(cells, arguments.stand_ins, grad_hidden_states)
    return [grad_hidden_states, *parameters]


_convolution = convolution_operator("triton_depthwise_convolution", _forward, _backward)


def _window(arguments: ConvolutionArguments) -> dict[str, int]:
    """The window of a cell. The kernel's last tap is for the window's last cell, unless it is mirrored."""
    kernel = arguments.weight.shape[-1]
    if arguments.looks:
        before = {"ROWS": 1, "COLUMNS": kernel, "ROWS_BEFORE": 0, "COLUMNS_BEFORE": kernel - 1, "MIRRORED": False}
        return before if arguments.looks > 0 else _mirrored(before)
    middle = kernel // 2
    return {"ROWS": kernel, "COLUMNS": kernel, "ROWS_BEFORE": middle, "COLUMNS_BEFORE": middle, "MIRRORED": False}


def _mirrored(window: dict[str, int]) -> dict[str, int]:
    """The cells whose windows contain a cell."""
    return {
        **window,
        "ROWS_BEFORE": window["ROWS"] - 1 - window["ROWS_BEFORE"],
        "COLUMNS_BEFORE": window["COLUMNS"] - 1 - window["COLUMNS_BEFORE"],
        "MIRRORED": not window["MIRRORED"],
    }


def _tile(batch: int, height: int, width: int, channels: int, most_channels: int = 128) -> dict[str, int]:
    """The number of cells and channels per program. Threads read four channels at once; with one channel each, there
    are more programs, which is better if there are few."""
    if is_interpreted():
        return {"STRIP": 4, "BLOCK_CHANNELS": 128, "num_warps": 1}
    strip = 7
    wide_programs = batch * height * math.ceil(width / strip) * math.ceil(channels / most_channels)
    block_channels = most_channels if wide_programs >= PROGRAMS_THAT_FILL_A_GPU else 32
    return {"STRIP": strip, "BLOCK_CHANNELS": block_channels, "num_warps": 1}


def _parts(strips: int) -> int:
    """The number of parts into which the sum over all strips is divided."""
    return min(strips, 2 if is_interpreted() else 64)


def _tables(arguments: ConvolutionArguments) -> tuple[Tensor | None, Tensor | None]:
    """The token that windows see in each cell, and the token located there, in the form used by the kernels."""
    places = _places(arguments)
    return places if arguments.stand_ins is None else arguments.stand_ins.contiguous(), places


def _places(arguments: ConvolutionArguments) -> Tensor | None:
    """The token in each cell, int32 (batch, cells), or -1 if there is none; None: every cell has its own token."""
    from .triton_convolution_kernels import list_places

    if arguments.kept is None:
        return None
    (batch, tokens), cells = arguments.kept.shape, arguments.height * arguments.width
    places = torch.empty(batch, cells, dtype=torch.int32, device=arguments.kept.device)
    with torch.cuda.device_of(places):
        list_places[(batch,)](arguments.kept.contiguous(), places, tokens, cells, BLOCK=128, num_warps=4)
    return places


def _with_rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _convolve(
    arguments: ConvolutionArguments,
    hidden_states: Tensor,
    shown: Tensor | None,
    places: Tensor | None,
    output: Tensor,
    window: dict[str, int],
    bias: Tensor | None = None,
    silu: bool = False,
    grad_output: Tensor | None = None,
) -> None:
    """Fills `output`; the arguments are those of the kernel."""
    from .triton_convolution_kernels import convolve

    hidden_states = _with_rows(hidden_states)
    batch, tokens, channels = output.shape
    height, width = arguments.height, arguments.width
    weight = arguments.weight.flatten(1)
    weight = weight.t().contiguous().t() if weight.shape[1] > MOST_TAPS_IN_PLACE else weight
    grad_output = None if grad_output is None else _with_rows(grad_output)
    tile = _tile(batch, height, width, channels)
    strips = batch * height * math.ceil(width / tile["STRIP"])
    with torch.cuda.device_of(output):
        convolve[(strips, math.ceil(channels / tile["BLOCK_CHANNELS"]))](
            *(hidden_states, weight, None if bias is None else bias.contiguous(), shown, places, grad_output, output),
            *(height, width, tokens, channels),
            *hidden_states.stride()[:2],
            *((0, 0) if grad_output is None else grad_output.stride()[:2]),
            *weight.stride(),
            SILU=silu,
            **window,
            **tile,
        )


def _sum_weight_gradients(
    arguments: ConvolutionArguments,
    shown: Tensor | None,
    places: Tensor | None,
    grad_sums: Tensor,
    window: dict[str, int],
) -> list[Tensor]:
    """The gradients of the weight and, if there is one, of the bias, in float32."""
    from .triton_convolution_kernels import sum_weight_gradients

    hidden_states, grad_sums = _with_rows(arguments.hidden_states), _with_rows(grad_sums)
    batch, _, channels = hidden_states.shape
    height, width, taps = arguments.height, arguments.width, window["ROWS"] * window["COLUMNS"]
    tile = _tile(batch, height, width, channels, most_channels=32)
    strips = batch * height * math.ceil(width / tile["STRIP"])
    parts = _parts(strips)
    grad_weight = torch.empty(parts, taps, channels, dtype=torch.float32, device=hidden_states.device)
    grad_bias = None if arguments.bias is None else torch.empty_like(grad_weight[:, 0])
    with torch.cuda.device_of(hidden_states):
        sum_weight_gradients[(parts, window["ROWS"], math.ceil(channels / tile["BLOCK_CHANNELS"]))](
            *(hidden_states, shown, places, grad_sums, grad_weight, grad_bias),
            *(strips, height, width, channels),
            *hidden_states.stride()[:2],
            *grad_sums.stride()[:2],
            **window,
            **tile,
        )
    weight_gradient = grad_weight.sum(0).t().reshape(arguments.weight.shape).contiguous()
    return [weight_gradient] if grad_bias is None else [weight_gradient, grad_bias.sum(0)]


def _sum_cells(grad_cells: Tensor, stand_ins: Tensor, output: Tensor) -> None:
    """Fills `output` (batch, tokens, channels) with the sums over the cells in which each token is seen."""
    from .triton_convolution_kernels import sum_cells

    batch, tokens, channels = output.shape
    shown, order = stand_ins.long().sort(dim=-1, stable=True)
    each = torch.arange(tokens + 1, device=output.device).expand(batch, -1).contiguous()
    starts = torch.searchsorted(shown, each)
    block = 128
    with torch.cuda.device_of(output):
        sum_cells[(batch * tokens, math.ceil(channels / block))](
            *(grad_cells, order, starts, output),
            *(grad_cells.shape[1], tokens, channels),
            BLOCK_CHANNELS=block,
            num_warps=1,
        )
