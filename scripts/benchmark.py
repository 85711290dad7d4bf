"""How fast the scan, the convolution and whole models are on this machine, against named baselines.

    python scripts/benchmark.py                                   # all sections with PlainMamba-L3, some minutes
    python scripts/benchmark.py --sections model --preset L1 --batch_sizes 1 --json benchmark.json
    python scripts/benchmark.py --device cuda --batch_sizes 1 8 64

The cases of a group take turns, one run each, so that a machine that slows down slows all of them. A ratio compares the
fastest runs of two cases of one group, never of two groups; beside it is the median of the ratios turn by turn.
"""

import argparse
import copy
import ctypes
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification

from hf_vssm_prune import (
    PlainMambaConfig,
    PlainMambaForImageClassification,
    VimConfig,
    VimForImageClassification,
    count_flops,
)
from hf_vssm_prune.convolution_torch import depthwise_conv2d_torch
from hf_vssm_prune.export import FORMATS, export_classifier
from hf_vssm_prune.grid_convolution import depthwise_conv2d
from hf_vssm_prune.kernels import AUTO, KERNELS, available, build
from hf_vssm_prune.modeling_common import TimeStepProjection, encode
from hf_vssm_prune.modeling_plainmamba import PlainMambaTokenLayout
from hf_vssm_prune.pruning_methods import RECOMMENDED_METHOD
from hf_vssm_prune.quantization import quantize_linears
from hf_vssm_prune.selective_scan import selective_scan
from hf_vssm_prune.token_pruning import prune_paths, snake_paths
from hf_vssm_prune.training.arguments.parsing import check_output_file
from hf_vssm_prune.training.checkpoints import write_json


Case = Callable[[], object]


# ---- Measuring ---------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Cases that took turns.

    Attributes:
        title: what was computed.
        seconds: of each case, its runs in order.
        ratios: by name, the two cases that are compared, each with a factor: (factor, slower, faster).
        images: that a run of a case goes through; 0: a case is not about images.
    """

    title: str
    seconds: dict[str, list[float]]
    ratios: dict[str, tuple[float, str, str]] = field(default_factory=dict)
    images: int = 0

    def ratio(self, name: str) -> tuple[float, float]:
        """Of the fastest runs, and the median turn by turn."""
        factor, slower, faster = self.ratios[name]
        turns = zip(self.seconds[slower], self.seconds[faster], strict=True)
        fastest = min(self.seconds[slower]) / min(self.seconds[faster])
        return factor * fastest, factor * statistics.median(a / b for a, b in turns)

    def tables(self) -> str:
        head, rule = "| case | fastest ms | median ms |", "| --- | ---: | ---: |"
        if self.images:
            head, rule = f"{head} images/s |", f"{rule} ---: |"
        lines = [f"### {self.title}", "", head, rule]
        for name, runs in self.seconds.items():
            row = f"| {name} | {1e3 * min(runs):.3g} | {1e3 * statistics.median(runs):.3g} |"
            lines.append(f"{row} {self.images / min(runs):.3g} |" if self.images else row)
        if self.ratios:
            lines += ["", "| ratio | of the fastest | median |", "| --- | ---: | ---: |"]
            lines += ["| {} | {:.2f} | {:.2f} |".format(name, *self.ratio(name)) for name in self.ratios]
        return "\n".join(lines) + "\n"


# A case that takes fewer seconds runs once unmeasured in each turn, so that the cache holds its inputs, as in a model,
# and not those of the case before.
COLD_BELOW = 0.02


def take_turns(
    title: str,
    cases: dict[str, Case],
    ratios: dict[str, tuple[float, str, str]],
    options: argparse.Namespace,
    images: int = 0,
) -> Group:
    """Runs all cases in turn until the time is used up, and at least three times."""
    torch.set_default_device(None)  # what it adds to each call would be measured
    for case in cases.values():
        case()
    wait(options.device)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    first_runs = next(iter(seconds.values()))
    start = time.perf_counter()
    with tqdm(total=round(options.seconds), desc=title, unit="s", bar_format="{desc}: {n:.0f}/{total} s") as progress:
        while (elapsed := time.perf_counter() - start) < options.seconds or len(first_runs) < 3:
            for name, case in cases.items():
                if seconds[name] and seconds[name][-1] < COLD_BELOW:
                    case()
                    wait(options.device)
                before = time.perf_counter()
                case()
                wait(options.device)
                seconds[name].append(time.perf_counter() - before)
            progress.n = min(elapsed, options.seconds)
            progress.refresh()
    make_tensors_on(options.device)
    group = Group(title, seconds, ratios, images)
    print("\n" + group.tables(), flush=True)
    return group


def make_tensors_on(device: str) -> None:
    torch.set_default_device(None if torch.device(device).type == "cpu" else device)


def wait(device: str) -> None:
    """Until a GPU has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def with_threads(threads: int, case: Case) -> Case:
    def run() -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        case()
        torch.set_num_threads(before)

    return run


# ---- Baselines ---------------------------------------------------------------------------------------------------


def reference_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, z: Tensor | None
) -> Tensor:
    """One direction by the algorithm of mamba-ssm's `selective_scan_ref`: exp(ΔA) and ΔBu of the whole sequence first,
    (batch, channels, length, state_size) each, then a loop. Channels come before length; B and C are (batch, N, L)."""
    delta = F.softplus(delta + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    entering = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state = A.new_zeros(u.shape[0], *A.shape)
    outputs = []
    for step in range(u.shape[2]):
        state = decay[:, :, step] * state + entering[:, :, step]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, step]))
    y = torch.stack(outputs, dim=2) + u * D[:, None]
    return y if z is None else y * F.silu(z)


def time_major_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, z: Tensor | None
) -> Tensor:
    """The fastest loop that we know in plain PyTorch: time first, so that a step is contiguous, and in place. u, delta
    and z are (length, batch, channels); B and C (length, batch, state_size). Without gradient."""
    delta = F.softplus(delta + delta_bias)
    decay = (delta.unsqueeze(-1) * A).exp_()
    states = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    for step in range(1, len(u)):
        states[step].addcmul_(decay[step], states[step - 1])
    y = torch.matmul(states, C.unsqueeze(-1)).squeeze(-1) + u * D
    return y if z is None else y * F.silu(z)


def reference_kernel() -> SimpleNamespace:
    """A kernel for `scan_backend` that computes dense models as the published code does where it has no CUDA."""

    def scan(u, delta, A, B, C, D, bias, gate, order, gaps, hole_time_step, direction_B, moves) -> Tensor:
        if gaps is not None:
            raise ValueError("the reference knows no holes.")
        delta, C = delta.transpose(1, 2), C.transpose(1, 2)
        total = 0
        for path in range(1 if order is None else order.shape[1]):
            visited = u if order is None else u[:, order[0, path]]
            B_path = B if direction_B is None else B + direction_B[moves[0, path]]
            y = reference_scan(visited.transpose(1, 2), delta, A, B_path.transpose(1, 2), C, D, bias, None)
            y = y.transpose(1, 2)
            total = total + (y if order is None else y[:, order[0, path].argsort()])
        return total if gate is None else total * F.silu(gate)

    return SimpleNamespace(
        unavailable=lambda device_type: None, selective_scan=scan, depthwise_conv2d=depthwise_conv2d_torch
    )


@contextmanager
def registered(name: str, kernel: Any) -> Iterator[None]:
    KERNELS[name] = kernel
    try:
        yield
    finally:
        del KERNELS[name]


# ---- The scan ----------------------------------------------------------------------------------------------------

CHANNELS, STATES, GRID = 896, 16, (14, 14)  # of PlainMamba-L3
LENGTH = GRID[0] * GRID[1]


def scan_inputs(batch: int, keep_ratio: float | None = None, alignment: str = "repeat") -> dict[str, Tensor]:
    """Arguments of `selective_scan` as a PlainMamba-L3 block makes them."""
    kept = None
    length = LENGTH
    if keep_ratio is not None:
        length = round(keep_ratio * LENGTH)
        kept = torch.rand(batch, LENGTH).argsort(-1)[:, :length].sort(-1).values
    paths = snake_paths(GRID) if kept is None else prune_paths(snake_paths(GRID), kept, alignment)
    inputs = {
        "hidden_states": torch.randn(batch, length, CHANNELS),
        "time_step": torch.randn(batch, length, CHANNELS),
        "A": -torch.arange(1, STATES + 1).float().repeat(CHANNELS, 1),
        "B": torch.randn(batch, length, STATES),
        "C": torch.randn(batch, length, STATES),
        "D": torch.ones(CHANNELS),
        "time_step_bias": torch.randn(CHANNELS) - 4,
        "gate": torch.randn(batch, length, CHANNELS),
        "order": paths.order,
        "direction_B": torch.randn(5, STATES),
        "moves": paths.moves,
    }
    return inputs if paths.gaps is None else inputs | {"gaps": paths.gaps}


def one_direction(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in inputs.items() if name not in ("order", "direction_B", "moves", "gaps")}


def in_layout(inputs: dict[str, Tensor], *axes: int) -> list[Tensor]:
    """What the baselines take, the sequences' axes (batch, length, channels) in another order."""
    sequences = {
        name: inputs[name].permute(axes).contiguous() for name in ("hidden_states", "time_step", "B", "C", "gate")
    }
    values = {**inputs, **sequences}
    return [values[name] for name in ("hidden_states", "time_step", "A", "B", "C", "D", "time_step_bias", "gate")]


def scan_section(options: argparse.Namespace) -> list[Group]:
    groups = []
    for batch in options.batch_sizes:
        inputs = scan_inputs(batch)
        single = one_direction(inputs)
        by_channel, by_time = in_layout(single, 0, 2, 1), in_layout(single, 1, 0, 2)
        square = torch.randn(1024, 1024)
        cases: dict[str, Case] = {
            "mamba-ssm's reference, one direction": partial(reference_scan, *by_channel),
            "time-major loop, one direction": partial(time_major_scan, *by_time),
            "ours, one direction": partial(selective_scan, **single),
            "ours, four directions": partial(selective_scan, **inputs),
            "ours, four directions, one thread": with_threads(1, partial(selective_scan, **inputs)),
            "matrix product": partial(torch.matmul, square, square),
            "matrix product, one thread": with_threads(1, partial(torch.matmul, square, square)),
        }
        ratios = {
            "4 × mamba-ssm's reference / ours": (4.0, "mamba-ssm's reference, one direction", "ours, four directions"),
            "4 × time-major loop / ours": (4.0, "time-major loop, one direction", "ours, four directions"),
            "4 × ours alone / ours fused": (4.0, "ours, one direction", "ours, four directions"),
            f"one thread / {options.threads}": (1.0, "ours, four directions, one thread", "ours, four directions"),
            f"matrix product, 1024³: one thread / {options.threads}": (
                1.0,
                "matrix product, one thread",
                "matrix product",
            ),
        }
        for name in other_kernels(options.device):
            cases[f"{name}, one direction"] = partial(selective_scan, **single, backend=name)
            ratios[f"{name} / ours, one direction"] = (1.0, f"{name}, one direction", "ours, one direction")
        with torch.no_grad():
            groups.append(take_turns(f"Scan, forward, batch {batch}, {LENGTH} tokens", cases, ratios, options))
    groups.append(scan_gradients(options))
    groups.append(scan_with_holes(options))
    return groups


def other_kernels(device: str) -> list[str]:
    """The kernels that work on a device, beside the one that is chosen by itself."""
    device_type = torch.device(device).type
    working = [name for name in AUTO.get(device_type, ()) if KERNELS[name].unavailable(device_type) is None]
    return working[1:]


# Multiply-adds of the fused operation in each token and channel; an addition or a multiplication that stands alone is
# one. In each state: 6 for exp(ΔA), and for each of four paths 3, two for the state and one for the output. Beside the
# states: 20 for the softplus, 12 for the gate's SiLU, 8 for Δu and Du of four paths.
SCAN_MULTIPLY_ADDS = STATES * (6 + 4 * 3) + 20 + 12 + 8


@torch.no_grad()
def roofline_section(options: argparse.Namespace) -> list[Group]:
    """One core: the fused scan beside the multiply-adds and the memory traffic that it cannot do without."""
    with tempfile.TemporaryDirectory() as folder:
        multiply_adds = load_multiply_adds(Path(folder))
        count = SCAN_MULTIPLY_ADDS * LENGTH * CHANNELS
        floats = 2 * LENGTH * CHANNELS  # u, time step and gate are read, the result is written: two copies of two
        source, target = torch.randn(floats), torch.empty(floats)
        cases: dict[str, Case] = {
            "scan": with_threads(1, partial(selective_scan, **scan_inputs(1))),
            "its multiply-adds alone": partial(multiply_adds, count),
            "its memory traffic alone": with_threads(1, lambda: target.copy_(source)),
        }
        ratios = {
            "share of the roofline: its multiply-adds / the scan": (1.0, "its multiply-adds alone", "scan"),
            "its memory traffic / the scan": (1.0, "its memory traffic alone", "scan"),
        }
        group = take_turns("Roofline of the scan, four directions, batch 1, one thread", cases, ratios, options)
    fastest = {name: min(runs) for name, runs in group.seconds.items()}
    print(
        f"One core: {2 * count / fastest['its multiply-adds alone'] / 1e9:.0f} GFLOP/s, "
        f"copying {8 * floats / fastest['its memory traffic alone'] / 1e9:.0f} GB/s, read and written.\n",
        flush=True,
    )
    return [group]


def load_multiply_adds(folder: Path) -> Callable[[int], None]:
    """The function of `fma_peak.cpp`, compiled for this processor."""
    library = folder / "fma_peak.so"
    flags = (*build.FLAGS, *build.VARIANTS[build.best_variant()], f"-I{build.SOURCE_DIRECTORY}")
    source = Path(__file__).with_name("fma_peak.cpp")
    subprocess.run([*build.find_compiler(), *flags, str(source), "-o", str(library)], check=True)
    function = ctypes.CDLL(str(library)).multiply_adds
    function.argtypes, function.restype = (ctypes.c_int64,), None
    return function


def scan_gradients(options: argparse.Namespace) -> Group:
    inputs = scan_inputs(1)
    for tensor in inputs.values():
        tensor.requires_grad_(tensor.is_floating_point())
    single = one_direction(inputs)
    by_channel = [tensor.detach().requires_grad_() for tensor in in_layout(single, 0, 2, 1)]

    def differentiate(scan: Callable[[], Tensor]) -> Case:
        return lambda: scan().sum().backward()

    cases = {
        "mamba-ssm's reference, one direction": differentiate(lambda: reference_scan(*by_channel)),
        "ours, one direction": differentiate(lambda: selective_scan(**single)),
        "ours, four directions": differentiate(lambda: selective_scan(**inputs)),
    }
    ratios = {
        "reference / ours, one direction": (1.0, "mamba-ssm's reference, one direction", "ours, one direction"),
        "4 × reference / ours, four": (4.0, "mamba-ssm's reference, one direction", "ours, four directions"),
    }
    return take_turns("Scan, forward and backward, batch 1", cases, ratios, options)


@torch.no_grad()
def scan_with_holes(options: argparse.Namespace) -> Group:
    seed = torch.get_rng_state()
    cases: dict[str, Case] = {}
    for alignment in ("none", "repeat", "zero_input"):
        torch.set_rng_state(seed)
        inputs = scan_inputs(8, 0.5, alignment)
        if alignment == "zero_input":
            inputs["hole_time_step"] = F.softplus(inputs["time_step_bias"])
        cases[alignment] = partial(selective_scan, **inputs)
    ratios = {
        "repeat / none": (1.0, "repeat", "none"),
        "zero_input / none": (1.0, "zero_input", "none"),
    }
    return take_turns(
        "Scan across holes, forward, batch 8, half of the tokens, four directions", cases, ratios, options
    )


# ---- The convolution ---------------------------------------------------------------------------------------------


@torch.no_grad()
def convolution_section(options: argparse.Namespace) -> list[Group]:
    batch, kernel = options.batch_sizes[0], 7
    weight, bias = torch.randn(CHANNELS, 1, kernel, kernel), torch.randn(CHANNELS)
    image = torch.randn(batch, CHANNELS, *GRID)
    tokens = image.flatten(2).transpose(1, 2).contiguous()
    cases: dict[str, Case] = {
        "torch, all cells": lambda: F.silu(F.conv2d(image, weight, bias, padding=kernel // 2, groups=CHANNELS)),
        "ours, all cells": lambda: depthwise_conv2d(tokens, weight, bias, GRID, silu=True),
    }
    ratios = {"torch / ours, all cells": (1.0, "torch, all cells", "ours, all cells")}
    for share in (0.7, 0.5, 0.35):
        kept = torch.rand(batch, LENGTH).argsort(-1)[:, : round(share * LENGTH)].sort(-1).values
        left = tokens.gather(1, kept.unsqueeze(-1).expand(-1, -1, CHANNELS))
        arguments = (left, weight, bias, GRID, kept, True)
        cases[f"zeros, torch, gather, {share:.0%} of cells"] = partial(depthwise_conv2d_torch, *arguments)
        cases[f"ours, {share:.0%} of cells"] = partial(depthwise_conv2d, *arguments)
        ratios[f"zeros, torch, gather / ours, {share:.0%}"] = (
            1.0,
            f"zeros, torch, gather, {share:.0%} of cells",
            f"ours, {share:.0%} of cells",
        )
    return [take_turns(f"Depthwise {kernel}×{kernel} with SiLU, batch {batch}", cases, ratios, options)]


# ---- Whole models ------------------------------------------------------------------------------------------------


FAMILIES: dict[str, Any] = {
    "plainmamba": (PlainMambaConfig, PlainMambaForImageClassification),
    "vim": (VimConfig, VimForImageClassification),
}


def make_models(options: argparse.Namespace) -> dict[str, nn.Module]:
    """One set of random weights under four schedules."""
    config_class, model_class = FAMILIES[options.family]
    models = {}
    for name, pruning in (
        ("dense", None),
        ("pruned, aligned", {"flops_reduction": options.flops_reduction}),
        ("pruned, naive", {"flops_reduction": options.flops_reduction, "alignment": "none"}),
        (f"pruned, {RECOMMENDED_METHOD}", {"flops_reduction": options.flops_reduction, "method": RECOMMENDED_METHOD}),
    ):
        models[name] = model_class(config_class.from_preset(options.preset, token_pruning=pruning)).eval()
        models[name].load_state_dict(models["dense"].state_dict())
    return models


def model_section(options: argparse.Namespace) -> list[Group]:
    models = make_models(options)
    reduction = count_flops(models["pruned, aligned"].config).reduction
    on_cpu = torch.device(options.device).type == "cpu"
    if on_cpu:
        models["pruned, int8 linears"] = quantize_linears(copy.deepcopy(models["pruned, aligned"]))
    groups = []
    for batch in options.batch_sizes:
        images = torch.randn(batch, 3, 224, 224)
        cases: dict[str, Case] = {name: partial(model, images) for name, model in models.items()}
        ratios = {
            f"dense / pruned (FLOPs: {1 / (1 - reduction):.2f})": (1.0, "dense", "pruned, aligned"),
            "aligned / naive": (1.0, "pruned, aligned", "pruned, naive"),
            f"dense / pruned by {RECOMMENDED_METHOD}": (1.0, "dense", f"pruned, {RECOMMENDED_METHOD}"),
        }
        if on_cpu:
            ratios["dense / pruned with int8 linears"] = (1.0, "dense", "pruned, int8 linears")
        title = f"{options.family} {options.preset}, whole model, forward, batch {batch}"
        with torch.no_grad():
            groups.append(take_turns(title, cases, ratios, options, images=batch))
            for name, case in cases.items():
                print(f"{name}, batch {batch}: {growth(case)}", flush=True)
    return groups


@torch.no_grad()
def blocks_section(options: argparse.Namespace) -> list[Group]:
    """A PlainMamba without its stem and head: its layers as published, ours, and their matrix products alone."""
    config = PlainMambaConfig.from_preset(options.preset)
    model = PlainMambaForImageClassification(config).eval().plainmamba
    groups = []
    for batch in options.batch_sizes:
        tokens = torch.randn(batch, LENGTH, config.hidden_size)
        layers = partial(run_layers, model, tokens)
        cases: dict[str, Case] = {
            "ours": layers,
            "ours, one thread": with_threads(1, layers),
            "scans by mamba-ssm's reference": partial(by_reference, model, layers),
            "scans by mamba-ssm's reference, one thread": with_threads(1, partial(by_reference, model, layers)),
            "matrix products": matrix_products(model.layers, layers),
        }
        ratios = {
            "mamba-ssm's reference / ours": (1.0, "scans by mamba-ssm's reference", "ours"),
            "the same, one thread": (1.0, "scans by mamba-ssm's reference, one thread", "ours, one thread"),
            "ours / its matrix products": (1.0, "ours", "matrix products"),
        }
        title = f"plainmamba {options.preset}, layers without stem and head, forward, batch {batch}"
        groups.append(take_turns(title, cases, ratios, options))
    return groups


def run_layers(model: nn.Module, tokens: Tensor) -> Tensor:
    layout = PlainMambaTokenLayout.of_grid(GRID, tokens.device)
    return encode(model.layers, model.token_predictors, tokens, layout, model.config).hidden_states


def by_reference(model: nn.Module, case: Case) -> None:
    with registered("reference", reference_kernel()):
        by_backend("reference", model, case)


def by_backend(name: str, model: nn.Module, case: Case) -> None:
    model.config.scan_backend = name
    try:
        case()
    finally:
        model.config.scan_backend = "auto"


def matrix_products(layers: nn.Module, run: Case) -> Case:
    """The projections that `run` goes through, each once with an input of its shape."""
    shapes: list[tuple[Tensor, torch.Size]] = []
    handles = [
        module.register_forward_hook(lambda module, inputs, _: shapes.append((module.weight, inputs[0].shape)))
        for module in layers.modules()
        if isinstance(module, nn.Linear | TimeStepProjection)
    ]
    run()
    for handle in handles:
        handle.remove()
    inputs = {shape: torch.randn(shape) for _, shape in shapes}
    return lambda: [F.linear(inputs[shape], weight) for weight, shape in shapes]


PARTS = {
    "linear layers, patch projection": ("aten::addmm", "aten::mm", "aten::bmm", "aten::linear"),
    "scans": ("hf_vssm_prune::selective_scan",),
    "depthwise convolutions": ("hf_vssm_prune::depthwise_conv2d",),
    "stem": ("aten::mkldnn_convolution", "aten::convolution"),
    "normalisation": ("aten::native_layer_norm",),
}


@torch.no_grad()
def parts_section(options: argparse.Namespace) -> list[Group]:
    """Where the time of a forward goes, by PyTorch's profiler, which slows small operators down."""
    models = make_models(options)
    groups = []
    for batch in options.batch_sizes:
        images = torch.randn(batch, 3, 224, 224)
        for name in ("dense", "pruned, aligned"):
            models[name](images)
            with torch.profiler.profile() as profile:
                models[name](images)
            seconds = dict.fromkeys([*PARTS, "everything else"], 0.0)
            for event in profile.key_averages():
                part = next((part for part, names in PARTS.items() if event.key.startswith(names)), "everything else")
                seconds[part] += event.self_cpu_time_total / 1e6
            title = f"{options.family} {options.preset}, parts of a forward, {name}, batch {batch}"
            groups.append(Group(title, {part: [time_] for part, time_ in seconds.items()}))
            print("\n" + groups[-1].tables(), flush=True)
    return groups


def training_section(options: argparse.Namespace) -> list[Group]:
    models = make_models(options)
    batch = options.batch_sizes[-1]
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(1000, (batch,))

    def step(model: nn.Module) -> Case:
        def run() -> None:
            model.zero_grad()
            model(images, labels=labels).loss.backward()

        return run

    cases = {name: step(model.train()) for name, model in models.items()}
    ratios = {
        "dense / pruned": (1.0, "dense", "pruned, aligned"),
        "aligned / naive": (1.0, "pruned, aligned", "pruned, naive"),
        f"dense / pruned by {RECOMMENDED_METHOD}": (1.0, "dense", f"pruned, {RECOMMENDED_METHOD}"),
    }
    for name, case in cases.items():
        report_memory(models[name], name, case)
    title = f"{options.family} {options.preset}, forward and backward, batch {batch}"
    return [take_turns(title, cases, ratios, options, images=batch)]


def report_memory(model: nn.Module, name: str, step: Case) -> None:
    """Prints what a training step keeps for its backward, beside the inputs and outputs of its matrix products."""
    products: dict[int, Tensor] = {}  # the tensors too, so that none is freed and its address used again

    def note(module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> None:
        for tensor in (inputs[0], output[0] if isinstance(output, tuple) else output):
            products[tensor.data_ptr()] = tensor.detach()

    handles = [layer.register_forward_hook(note) for layer in model.modules() if isinstance(layer, nn.Linear)]
    step()
    for handle in handles:
        handle.remove()
    needed = sum(tensor.numel() * tensor.element_size() for tensor in products.values())
    products.clear()

    kept: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    total = sum(kept.values())
    line = (
        f"{name}: {total / 2**20:.0f} MiB are kept for the backward, {total / needed:.2f} times the inputs and outputs "
    )
    print(f"{line}of the matrix products ({needed / 2**20:.0f} MiB); {growth(step)}", flush=True)


def growth(case: Case) -> str:
    """How far memory grows in a run at its peak: a GPU's, or the process's where the system tells (Linux)."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        case()
        return f"the GPU's memory grows by {(torch.cuda.max_memory_allocated() - allocated) / 2**20:.0f} MiB"
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return "the system does not tell how far the process grows"
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed goes back to the system, to be counted again
    reset.write_text("5")  # the peak is now what is in use
    before = memory_in_use("VmRSS")
    case()
    return f"the process grows by {(memory_in_use('VmHWM') - before) / 2**10:.0f} MiB"


def memory_in_use(name: str) -> int:
    """A figure of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


@torch.no_grad()
def budgets_section(options: argparse.Namespace) -> list[Group]:
    """One model at growing budgets: does the clock follow the FLOPs? `--plot` draws it."""
    config_class, model_class = FAMILIES[options.family]
    dense = model_class(config_class.from_preset(options.preset)).eval()
    models, shares = {"dense": dense}, {"dense": 1.0}
    for reduction in (0.2, 0.3, 0.416, 0.5, 0.6):
        name = f"{reduction:.1%} fewer FLOPs"
        config = config_class.from_preset(options.preset, token_pruning={"flops_reduction": reduction})
        models[name] = model_class(config).eval()
        models[name].load_state_dict(dense.state_dict())
        shares[name] = 1 - count_flops(config).reduction
    groups = []
    for batch in options.batch_sizes:
        images = torch.randn(batch, 3, 224, 224)
        cases: dict[str, Case] = {name: partial(model, images) for name, model in models.items()}
        ratios = {
            f"dense / {name} (FLOPs: {1 / shares[name]:.2f})": (1.0, "dense", name)
            for name in models
            if name != "dense"
        }
        title = f"{options.family} {options.preset} at growing budgets, batch {batch}"
        groups.append(take_turns(title, cases, ratios, options, images=batch))
    if options.plot is not None:
        plot_budgets(groups, shares, Path(options.plot))
    return groups


def plot_budgets(groups: Sequence[Group], shares: dict[str, float], path: Path) -> None:
    """Time against FLOPs, both as shares of the dense model's; a model that keeps its promise lies on the diagonal."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5, 4), layout="constrained").subplots()
    axes.plot([0.35, 1], [0.35, 1], color="0.7", linestyle="--", label="time falls as FLOPs do")
    for group in groups:
        dense = min(group.seconds["dense"])
        times = [min(group.seconds[name]) / dense for name in shares]
        axes.plot(list(shares.values()), times, marker="o", label=f"batch {group.images}")
    axes.set(xlabel="FLOPs, share of the dense model's", ylabel="time, share of the dense model's")
    axes.set_title(groups[0].title.partition(" at ")[0])
    axes.legend()
    temporary = path.with_name(f".{path.name}.tmp{path.suffix}")
    axes.figure.savefig(temporary, dpi=150)
    temporary.replace(path)


@torch.no_grad()
def transformer_section(options: argparse.Namespace) -> list[Group]:
    """Vim-S beside a ViT of its size."""
    vit = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    models = {
        "ViT-S/16": ViTForImageClassification(vit).eval(),
        "Vim-S": VimForImageClassification(VimConfig.from_preset("S")).eval(),
        "Vim-S, pruned": VimForImageClassification(
            VimConfig.from_preset("S", token_pruning={"layers": [5, 10, 15], "keep_ratios": [0.8, 0.8, 0.8]})
        ).eval(),
    }
    groups = []
    for batch in options.batch_sizes:
        images = torch.randn(batch, 3, 224, 224)
        cases: dict[str, Case] = {name: partial(model, images) for name, model in models.items()}
        ratios = {
            "Vim-S / ViT-S": (1.0, "Vim-S", "ViT-S/16"),
            "Vim-S, pruned / ViT-S": (1.0, "Vim-S, pruned", "ViT-S/16"),
            "Vim-S / Vim-S, pruned": (1.0, "Vim-S", "Vim-S, pruned"),
        }
        groups.append(take_turns(f"Vim-S and ViT-S/16 at 224², batch {batch}", cases, ratios, options, images=batch))
    return groups


@torch.no_grad()
def resolution_section(options: argparse.Namespace) -> list[Group]:
    """Images of growing size: at twice the side a model that is linear in its tokens takes four times as long."""
    model = make_models(options)["pruned, aligned"]
    vit = ViTForImageClassification(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)).eval()
    cases: dict[str, Case] = {}
    for side in (224, 448, 896):
        images = torch.randn(1, 3, side, side)
        cases[f"pruned, {side}²"] = partial(model, images, interpolate_pos_encoding=True)
        cases[f"ViT-S/16, {side}²"] = partial(vit, images, interpolate_pos_encoding=True)
    ratios = {
        f"{name}: time per token at {side}² / at 224²": ((224 / side) ** 2, f"{name}, {side}²", f"{name}, 224²")
        for name in ("pruned", "ViT-S/16")
        for side in (448, 896)
    }
    return [take_turns(f"{options.family} {options.preset} at growing sizes, batch 1", cases, ratios, options)]


@torch.no_grad()
def export_section(options: argparse.Namespace) -> list[Group]:
    """The formats of `scripts/export.py` beside eager mode, with and without kernels."""
    models = make_models(options)
    eager = {name: models[name] for name in ("dense", "pruned, aligned")}
    exported: dict[str, Callable[[Tensor], object]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, model in eager.items():
            start = time.perf_counter()
            folder = export_classifier(model, Path(scratch) / name, options.formats)
            print(f"{name}: exported in {time.perf_counter() - start:.0f} s")
            for kind in options.formats:
                file = folder / FORMATS[kind].file
                print(f"{file.relative_to(scratch)}: {file.stat().st_size:,} bytes", flush=True)
                exported[f"{name}, {kind}"] = FORMATS[kind].load(file, options.threads)
        groups = []
        for batch in options.batch_sizes:
            images = torch.randn(batch, 3, 224, 224)
            cases: dict[str, Case] = {}
            ratios = {}
            for name, model in eager.items():
                cases[f"{name}, eager"] = partial(model, images)
                cases[f"{name}, eager without kernels"] = partial(by_backend, "torch", model, partial(model, images))
                for kind in options.formats:
                    cases[f"{name}, {kind}"] = partial(exported[f"{name}, {kind}"], images)
                    for other in ("eager", "eager without kernels"):
                        ratios[f"{name}: {other} / {kind}"] = (1.0, f"{name}, {other}", f"{name}, {kind}")
            for kind in options.formats:
                ratios[f"{kind}: dense / pruned"] = (1.0, f"dense, {kind}", f"pruned, aligned, {kind}")
            title = f"{options.family} {options.preset}, exported, batch {batch}"
            groups.append(take_turns(title, cases, ratios, options))
    return groups


# ---- Command line ------------------------------------------------------------------------------------------------

SECTIONS = {
    "scan": scan_section,
    "convolution": convolution_section,
    "roofline": roofline_section,
    "model": model_section,
    "blocks": blocks_section,
    "budgets": budgets_section,
    "parts": parts_section,
    "training": training_section,
    "transformer": transformer_section,
    "resolution": resolution_section,
    "export": export_section,
}

CPU_SECTIONS = ("roofline", "parts", "export")
PLAINMAMBA_SECTIONS = ("blocks",)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    make_tensors_on(options.device)
    machine = describe_machine(options.device)
    print(", ".join(f"{name}: {value}" for name, value in machine.items()))
    groups = [group for section in options.sections for group in SECTIONS[section](options)]
    if options.json is not None:
        results = [
            {
                **asdict(group),
                "ratios": {
                    name: dict(zip(("fastest", "median"), group.ratio(name), strict=True)) for name in group.ratios
                },
            }
            for group in groups
        ]
        write_json({"machine": machine, "groups": results}, Path(options.json))
    return 0


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument(
        "--sections", nargs="+", choices=SECTIONS, help="default: all of the device and family but export"
    )
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["onnx", "torch"], help="of exported models")
    parser.add_argument("--family", choices=FAMILIES, default="plainmamba", help="default: %(default)s")
    parser.add_argument("--preset", default="L3", help="of the whole models (default: %(default)s)")
    parser.add_argument("--flops_reduction", type=float, default=0.415, help="default: %(default)s")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--seconds", type=float, default=20, help="for each group of cases (default: %(default)s)")
    parser.add_argument("--plot", help="file to draw the time at growing budgets into (needs matplotlib)")
    parser.add_argument("--json", help="file to write all runs and ratios to")
    options = parser.parse_args(arguments)
    try:
        torch.device(options.device)
        check_output_file("plot", options.plot)
        check_output_file("json", options.json)
    except (RuntimeError, ValueError) as error:
        parser.error(f"--device {options.device}: {error}" if isinstance(error, RuntimeError) else str(error))
    presets = list(FAMILIES[options.family][0].presets)
    if options.preset not in presets:
        parser.error(f"--preset {options.preset}: {options.family} has {presets}.")
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no GPU here.")
    on_cpu, of_plainmamba = torch.device(options.device).type == "cpu", options.family == "plainmamba"
    possible = [
        name
        for name in SECTIONS
        if (name not in CPU_SECTIONS or on_cpu) and (name not in PLAINMAMBA_SECTIONS or of_plainmamba)
    ]
    options.sections = options.sections or [name for name in possible if name != "export"]
    if others := [name for name in options.sections if name not in possible]:
        parser.error(f"--sections {' '.join(others)}: not for {options.family} on {options.device}.")
    return options


def describe_machine(device: str) -> dict[str, str]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if torch.device(device).type == "cuda":
        processor = torch.cuda.get_device_name()
    elif cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    a = torch.randn(1024, 1024)
    runs = []
    for _ in range(10):
        before = time.perf_counter()
        a @ a
        wait(device)
        runs.append(time.perf_counter() - before)
    return {
        "processor": processor,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "kernels": ", ".join(name for name, state in available().items() if state == "available") or "none",
        "matrix products": f"{2 * 1024**3 / min(runs) / 1e9:.0f} GFLOP/s",
    }


if __name__ == "__main__":
    sys.exit(main())
