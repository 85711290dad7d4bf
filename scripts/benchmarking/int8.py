"""int8 linear layers: ours compared with torchao's, if it is installed."""

import argparse
import copy
from functools import partial

import torch
from torch import nn

from benchmarking.measuring import Case, Group, take_turns
from benchmarking.models import make_models, random_inputs
from hf_vssm_prune.quantization import quantize_linears


OURS = "int8, ours"


def int8_models(model: nn.Module) -> dict[str, nn.Module]:
    """The model with float32 linear layers, with our int8 layers, and with torchao's."""
    models = {"float32": model, OURS: quantize_linears(copy.deepcopy(model))}
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
    except ImportError:
        print("torchao is not installed: pip install torchao")
        return models
    for name, config in (
        ("int8, torchao", Int8DynamicActivationInt8WeightConfig()),
        ("int8 weights, torchao", Int8WeightOnlyConfig()),
    ):
        models[name] = copy.deepcopy(model)
        quantize_(models[name], config)
    return models


def int8_section(options: argparse.Namespace) -> list[Group]:
    groups = []
    for schedule, model in make_models(options).items():
        if schedule not in ("dense", "pruned, aligned"):
            continue
        models = int8_models(model)
        ratios = {f"{name} / ours": (1.0, name, OURS) for name in models if name != OURS}
        for batch in options.batch_sizes:
            images = random_inputs(model, batch)
            cases: dict[str, Case] = {name: partial(each, images) for name, each in models.items()}
            title = f"{options.family} {options.preset}, {schedule}, linear layers in int8, batch {batch}"
            with torch.no_grad():
                groups.append(take_turns(title, cases, ratios, options, images=batch))
    return groups
