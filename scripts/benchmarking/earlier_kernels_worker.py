"""A process of `earlier.py`, with the package of one checkout.

For each name of a case that it reads, it runs the case and prints its CPU time in seconds.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hf_vssm_prune import (
    PlainMambaConfig,
    PlainMambaForImageClassification,
    VimConfig,
    VimForImageClassification,
)
from hf_vssm_prune.causal_convolution import causal_conv1d
from hf_vssm_prune.grid_convolution import depthwise_conv2d
from hf_vssm_prune.selective_scan import selective_scan


SIDE, CHANNELS, STATES = 14, 896, 16  # of a layer of PlainMamba-L3
# A kernel takes milliseconds: the fastest of so many runs counts.
REPEATS = 5
IMAGES = 32
BACKWARD = ", with backward"


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape).requires_grad_()


def scan(batch: int, paths: int) -> Callable[[], Tensor]:
    """Along the rows and columns of the grid, there and back, or along the rows only."""
    cells = torch.arange(SIDE * SIDE).view(SIDE, SIDE)
    ways = [cells.flatten(), cells.flatten().flip(0), cells.t().flatten(), cells.t().flatten().flip(0)]
    order = torch.stack(ways[:paths]).int().unsqueeze(0) if paths > 1 else None
    u, time_step, gate = (numbers(batch, SIDE * SIDE, CHANNELS) for _ in range(3))
    B, C = numbers(batch, SIDE * SIDE, STATES), numbers(batch, SIDE * SIDE, STATES)
    A = torch.arange(1.0, STATES + 1).neg().repeat(CHANNELS, 1).requires_grad_()
    D, bias = numbers(CHANNELS), (torch.randn(CHANNELS) - 4).requires_grad_()
    return lambda: selective_scan(u, time_step, A, B, C, D, time_step_bias=bias, gate=gate, order=order)


def depthwise(batch: int) -> Callable[[], Tensor]:
    tokens, weight, bias = numbers(batch, SIDE * SIDE, CHANNELS), numbers(CHANNELS, 1, 7, 7), numbers(CHANNELS)
    return lambda: depthwise_conv2d(tokens, weight, bias, (SIDE, SIDE), None, True)


def causal(batch: int, reverse: bool) -> Callable[[], Tensor]:
    tokens, weight, bias = numbers(batch, SIDE * SIDE, CHANNELS), numbers(CHANNELS, 1, 4), numbers(CHANNELS)
    return lambda: causal_conv1d(tokens, weight, bias, reverse)


FORWARDS: dict[str, Callable[[int], Callable[[], Tensor]]] = {
    "scan, one direction": lambda batch: scan(batch, 1),
    "scan, four directions": lambda batch: scan(batch, 4),
    "depthwise 7 x 7": depthwise,
    "causal": lambda batch: causal(batch, reverse=False),
    "causal, reversed": lambda batch: causal(batch, reverse=True),
}
KERNELS = [name + suffix for name in FORWARDS for suffix in ("", BACKWARD)]
COMMON = {"image_size": 112, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 12, "num_labels": 10}
STEPS: dict[str, Callable[[], nn.Module]] = {
    "Vim": lambda: VimForImageClassification(VimConfig(**COMMON)),
    "PlainMamba": lambda: PlainMambaForImageClassification(
        PlainMambaConfig(**COMMON, stem_channels=32, depthwise_layers=[])
    ),
}


def make_case(name: str, batch: int) -> Callable[[], object]:
    torch.manual_seed(0)
    if name in STEPS:
        return training_step(STEPS[name]().train(), batch)
    forward = FORWARDS[name.removesuffix(BACKWARD)](batch)
    if not name.endswith(BACKWARD):
        return torch.no_grad()(forward)
    grad_output = torch.randn(batch, SIDE * SIDE, CHANNELS)
    return lambda: forward().backward(grad_output)


def training_step(model: nn.Module, batch: int) -> Callable[[], object]:
    side = COMMON["image_size"]
    images, labels = torch.randn(batch, 3, side, side), torch.randint(10, (batch,))

    def step() -> None:
        model.zero_grad()
        model(images, labels=labels).loss.backward()

    return step


def main(batch: int, threads: int) -> None:
    torch.set_num_threads(threads)
    cases: dict[str, Callable[[], object]] = {}
    for line in sys.stdin:
        name = line.strip()
        if name not in cases:
            cases[name] = make_case(name, batch)
        seconds = []
        for _ in range(1 if name in STEPS else REPEATS):
            before = time.process_time()
            cases[name]()
            seconds.append(time.process_time() - before)
        print(min(seconds), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
