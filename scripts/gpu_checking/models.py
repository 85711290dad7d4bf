"""Whole models, dense and pruned, compared with transformers' ViT: images per second and memory."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from benchmarking.measuring import take_turns
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from gpu_checking.report import Report, Table
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.pruning_methods import PAPERS_METHOD, RECOMMENDED_METHOD


MODELS = (("plainmamba", "L3"), ("vim", "S"), ("plainmamba", "L1"), ("vim", "B"))
MODELS_BY_DTYPE = {torch.bfloat16: MODELS, torch.float32: MODELS[:2]}
TRANSFORMERS = {
    "ViT-S/16": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536},
    "ViT-B/16": {},
}
BATCHES = (1, 8, 64, 128)
REDUCTION = 0.416
SMALL = {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 8, "state_size": 4, "stem_channels": 4}
COLUMNS = ["model", "dtype", "batch", "way", "images/s", "dense / this", "additional MiB"]


def make_models(family: str, preset: str, options: argparse.Namespace) -> dict[str, nn.Module]:
    """A dense model, and the same random weights pruned by two methods."""
    entry = FAMILIES[family]
    known = entry.config.__dataclass_fields__
    sizes = {option: value for option, value in SMALL.items() if options.small and option in known}
    name = f"{entry.config.paper.name}-{preset}"
    models = {}
    for label, method in (("dense", None), (PAPERS_METHOD, PAPERS_METHOD), (RECOMMENDED_METHOD, RECOMMENDED_METHOD)):
        pruning = None if method is None else {"flops_reduction": REDUCTION, "method": method}
        config = entry.config.from_preset(preset, token_pruning=pruning, **sizes)
        models[f"{name}, {label}"] = entry.classifier(config).eval()
    return models


def make_transformers(options: argparse.Namespace) -> dict[str, nn.Module]:
    sizes = {"image_size": 64, "num_hidden_layers": 2} if options.small else {}
    return {
        name: ViTForImageClassification(ViTConfig(**kind, **sizes, num_labels=1000)).eval()
        for name, kind in TRANSFORMERS.items()
    }


def time_models(options: argparse.Namespace, report: Report) -> None:
    """Measures models in eager mode and as a CUDA graph, in float32 and bfloat16; the cases of a batch alternate."""
    rows = report.table("Forward", *COLUMNS)
    ways: dict[str, Callable[[nn.Module, Tensor], Callable[[], Any]]] = {"eager": partial}
    if options.device == "cuda":
        ways["CUDA graph"] = captured
    for dtype, families in MODELS_BY_DTYPE.items():
        for which in (None, *families)[: 2 if options.small else None]:
            models = make_transformers(options) if which is None else make_models(*which, options)
            for batch in batches(options):
                measure(models, dtype, batch, ways, rows, report, options)


@torch.no_grad()
def compile_models(family: str, preset: str, dtype: torch.dtype, options: argparse.Namespace, _: Report) -> None:
    """Runs every forward pass that `time_models` measures once."""
    models = make_models(family, preset, options)
    for batch in batches(options):
        images = random_images(models, dtype, batch, options)
        for model in models.values():
            model.to(options.device, dtype)(images)


def batches(options: argparse.Namespace) -> tuple[int, ...]:
    return BATCHES[:1] if options.small else BATCHES


def random_images(models: dict[str, nn.Module], dtype: torch.dtype, batch: int, options: argparse.Namespace) -> Tensor:
    side = next(iter(models.values())).config.image_size
    return torch.randn(batch, 3, side, side, device=options.device, dtype=dtype)


def time_compiled_models(options: argparse.Namespace, report: Report) -> None:
    """Measures compiled models in bfloat16. Compiling takes long, so only PlainMamba-L3 and Vim-S are measured."""
    rows = report.table("Forward, compiled", *COLUMNS)
    for which in MODELS[: 1 if options.small else 2]:
        models = make_models(*which, options)
        backend = {"backend": "aot_eager"} if options.small else {}
        compiled = {"compiled": lambda model, images, backend=backend: partial(torch.compile(model, **backend), images)}
        for batch in (1,) if options.small else (1, 64):
            measure(models, torch.bfloat16, batch, compiled, rows, report, options)


@torch.no_grad()
def measure(
    models: dict[str, nn.Module],
    dtype: torch.dtype,
    batch: int,
    ways: dict[str, Callable[[nn.Module, Tensor], Callable[[], Any]]],
    rows: Table,
    report: Report,
    options: argparse.Namespace,
) -> None:
    """Adds a row for each model and way. If one fails, it is named, and the others continue."""
    images = random_images(models, dtype, batch, options)
    for way, make in ways.items():
        cases, memory = {}, {}
        for name, model in models.items():
            model.to(options.device, dtype)
            try:
                case = make(model, images)
                memory[name] = peak_memory(case, options.device)
                cases[name] = case
            except Exception as error:  # a compiler or a capture can raise anything; only this case is lost
                report.complain(f"{name}, {way}, batch {batch}, {dtype}: {type(error).__name__}: {str(error)[:200]}")
        if not cases:
            continue
        options.seconds = 0.2 if options.small else 0.15 * len(cases)
        seconds = {name: min(runs) for name, runs in take_turns("", cases, {}, options).seconds.items()}
        dense = seconds.get(next(iter(models)))
        for name, fastest in seconds.items():
            kind = str(dtype).removeprefix("torch.")
            rows.add(name, kind, batch, way, f"{batch / fastest:.0f}", times_as_fast(dense, fastest), memory[name])


def times_as_fast(dense: float | None, fastest: float) -> str:
    """The ratio of the times; a dash if the dense model failed."""
    return "–" if dense is None else f"{dense / fastest:.2f}"


def captured(model: nn.Module, images: Tensor) -> Callable[[], Any]:
    """Captures a forward pass as a graph, and returns its replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model(images)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        model(images)
    return graph.replay


def peak_memory(case: Callable[[], Any], device: str) -> int | str:
    """The memory that a run allocates on a GPU at its peak, in MiB, in addition to what is allocated between runs: the
    weights of all models. A graph has its memory before it runs, so this is 0 for its replay."""
    case()
    if device != "cuda":
        return "–"
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    case()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20)
