"""Whole models, dense and pruned."""

import argparse
import copy
from functools import partial

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarking.measuring import Case, Group, growth, take_turns
from hf_vssm_prune import VimConfig, VimForImageClassification, count_flops
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.pruning_methods import PAPERS_METHOD, RECOMMENDED_METHOD
from hf_vssm_prune.quantization import quantize_linears


def make_models(options: argparse.Namespace) -> dict[str, nn.Module]:
    """The same random weights with four schedules."""
    family = FAMILIES[options.family]
    budget = {"flops_reduction": options.flops_reduction}
    models = {}
    for name, pruning in (
        ("dense", None),
        ("pruned, aligned", {**budget, "method": PAPERS_METHOD}),
        ("pruned, naive", {**budget, "method": PAPERS_METHOD, "alignment": "none"}),
        (f"pruned, {RECOMMENDED_METHOD}", {**budget, "method": RECOMMENDED_METHOD}),
    ):
        models[name] = family.classifier(family.config.from_preset(options.preset, token_pruning=pruning)).eval()
        models[name].load_state_dict(models["dense"].state_dict())
    return models


def random_inputs(model: nn.Module, batch: int) -> Tensor:
    return torch.randn(model.config.pixel_values_shape(batch))


def random_labels(model: nn.Module, batch: int) -> Tensor:
    return torch.randint(model.config.num_labels, (batch,))


def model_section(options: argparse.Namespace) -> list[Group]:
    models = make_models(options)
    reduction = count_flops(models["pruned, aligned"].config).reduction
    on_cpu = torch.device(options.device).type == "cpu"
    if on_cpu:
        models["pruned, int8 linears"] = quantize_linears(copy.deepcopy(models["pruned, aligned"]))
    groups = []
    for batch in options.batch_sizes:
        images = random_inputs(models["dense"], batch)
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


PARTS = {
    "linear layers, patch projection": ("aten::addmm", "aten::mm", "aten::bmm", "aten::linear"),
    "scans": ("hf_vssm_prune::selective_scan",),
    "depthwise convolutions": ("hf_vssm_prune::depthwise_conv2d",),
    "stem": ("aten::mkldnn_convolution", "aten::convolution"),
    "normalisation": ("aten::native_layer_norm",),
}


@torch.no_grad()
def parts_section(options: argparse.Namespace) -> list[Group]:
    """How the time of a forward pass is distributed, according to PyTorch's profiler, which slows down small
    operators."""
    models = make_models(options)
    groups = []
    for batch in options.batch_sizes:
        images = random_inputs(models["dense"], batch)
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


@torch.no_grad()
def transformer_section(options: argparse.Namespace) -> list[Group]:
    """Vim-S compared with a ViT of the same size."""
    vit = ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
    papers = {"layers": [5, 10, 15], "keep_ratios": [0.8, 0.8, 0.8], "method": PAPERS_METHOD}
    models = {
        "ViT-S/16": ViTForImageClassification(vit).eval(),
        "Vim-S": VimForImageClassification(VimConfig.from_preset("S")).eval(),
        "Vim-S, pruned": VimForImageClassification(VimConfig.from_preset("S", token_pruning=papers)).eval(),
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
    """Increasing image sizes: at twice the side, a model that is linear in the number of tokens takes four times as
    long."""
    model = make_models(options)["pruned, aligned"]
    vit = ViTForImageClassification(ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536)).eval()
    cases: dict[str, Case] = {}
    for side in (224, 448, 896):
        inputs = torch.randn(*model.config.pixel_values_shape(1)[:-2], side, side)
        cases[f"pruned, {side}²"] = partial(model, inputs, interpolate_pos_encoding=True)
        cases[f"ViT-S/16, {side}²"] = partial(vit, torch.randn(1, 3, side, side), interpolate_pos_encoding=True)
    ratios = {
        f"{name}: time per token at {side}² / at 224²": ((224 / side) ** 2, f"{name}, {side}²", f"{name}, 224²")
        for name in ("pruned", "ViT-S/16")
        for side in (448, 896)
    }
    return [take_turns(f"{options.family} {options.preset} at growing sizes, batch 1", cases, ratios, options)]
