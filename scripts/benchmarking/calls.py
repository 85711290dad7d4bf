"""The calls of one layer: which operators it runs, how often and for how long."""

import argparse
from collections import Counter
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.autograd.profiler_util import FunctionEvent

from benchmarking.measuring import Case, Group
from benchmarking.models import make_models, random_inputs
from benchmarking.profiling import converts, operators, profiled


TIMES = 20
BETWEEN = "between operators"
KINDS = {
    "transposes": ("aten::t",),
    "copies": ("aten::copy_",),
    "clones": ("aten::clone",),
    "detached": ("aten::detach",),
}


@torch.no_grad()
def calls_section(options: argparse.Namespace) -> list[Group]:
    """The last layer of a model, dense and pruned, in float32 and bfloat16, at the smallest batch size."""
    models = make_models(options)
    groups = []
    for schedule in ("dense", "pruned, aligned"):
        for dtype in (torch.float32, torch.bfloat16):
            model = models[schedule].to(dtype)
            runs = profiled(last_layer(model, options.batch_sizes[0]), TIMES)
            title = f"{options.family} {options.preset}, calls of one layer, {schedule}, {str(dtype).split('.')[1]}"
            groups.append(Group(title, seconds_of_calls(runs)))
            print(f"\n{groups[-1].tables()}\n{count(runs[0])}", flush=True)
    return groups


def last_layer(model: nn.Module, batch: int) -> Case:
    """A call of the last layer with the inputs that it has in the model, where a pruned model has the fewest tokens."""
    layer: Any = model.base_model.layers[-1]  # type: ignore[union-attr, index]
    calls: list[Case] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        calls.append(partial(module, *inputs, **options))

    handle = layer.register_forward_pre_hook(note, with_kwargs=True)
    model(random_inputs(model, batch))
    handle.remove()
    return calls[0]


def seconds_of_calls(runs: list[FunctionEvent]) -> dict[str, list[float]]:
    """The times of each operator that the layer itself calls, in each run: all calls of an operator together."""
    seconds: dict[str, list[float]] = {}
    for run in runs:
        of_run: Counter[str] = Counter()
        for call in run.cpu_children:
            of_run[call.name] += call.cpu_time_total / 1e6
        times = Counter(call.name for call in run.cpu_children)
        for name, time in [*of_run.items(), (BETWEEN, run.self_cpu_time_total / 1e6)]:
            label = f"{name} × {times[name]}" if times[name] > 1 else name
            seconds.setdefault(label, []).append(time)
    return seconds


def count(run: FunctionEvent) -> str:
    """A sentence: how many calls there are, and of which kinds."""
    names = Counter(operator.name for operator in operators(run))
    kinds = {kind: sum(names[name] for name in of_kind) for kind, of_kind in KINDS.items()}
    kinds["conversions of dtype"] = sum(converts(operator) for operator in operators(run))
    said = ", ".join(f"{kind} {number}" for kind, number in kinds.items())
    return f"{len(run.cpu_children)} calls, {names.total()} operators with those that these call; {said}"
