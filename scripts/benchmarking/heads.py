"""Segmentation and detection: the speedup from pruning the backbone, with the head included."""

import argparse
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import DeformableDetrConfig, UperNetConfig

from benchmarking.measuring import Case, Group, growth, take_turns
from hf_vssm_prune import PlainMambaConfig
from hf_vssm_prune.heads import new_dense_model
from hf_vssm_prune.pruned_heads import backbone_of


PRESETS = ("L1", "L3")
IMAGE_SIZES = (512, 1024)


def _upernet(preset: str, token_pruning: dict[str, Any] | None) -> UperNetConfig:
    """As published for PlainMamba: four levels, each with its own norm."""
    depth = PlainMambaConfig.presets[preset]["num_hidden_layers"]
    levels = [f"stage{depth * quarter // 4}" for quarter in (1, 2, 3, 4)]
    backbone = PlainMambaConfig.from_preset(
        preset, out_features=levels, feature_norm="per_level", token_pruning=token_pruning
    )
    return UperNetConfig(backbone_config=backbone, hidden_size=512, num_labels=150)


def _deformable_detr(preset: str, token_pruning: dict[str, Any] | None) -> DeformableDetrConfig:
    """On the last feature map, which has stride 16; the head adds coarser ones."""
    backbone = PlainMambaConfig.from_preset(preset, token_pruning=token_pruning)
    return DeformableDetrConfig(
        backbone_config=backbone, use_timm_backbone=False, use_pretrained_backbone=False, num_labels=91
    )


HEADS = {"UPerNet": _upernet, "Deformable DETR": _deformable_detr}


def heads_section(options: argparse.Namespace) -> list[Group]:
    """Batch 1, random weights, images of 512 and 1024 pixels."""
    with torch.no_grad():
        return [
            _group(head, preset, image_size, options)
            for image_size in IMAGE_SIZES
            for preset in PRESETS
            for head in HEADS
        ]


def _group(head: str, preset: str, image_size: int, options: argparse.Namespace) -> Group:
    image = torch.randn(1, 3, image_size, image_size)
    models: dict[str, nn.Module] = {}
    for name, schedule in (("dense", None), ("pruned", {"flops_reduction": options.flops_reduction})):
        models[f"{name}, whole"] = new_dense_model(HEADS[head](preset, schedule)).eval()
        models[f"{name}, backbone"] = backbone_of(models[f"{name}, whole"])
    models["pruned, whole"].load_state_dict(models["dense, whole"].state_dict())
    cases: dict[str, Case] = {name: partial(model, image) for name, model in models.items()}
    ratios = {f"dense / pruned, {part}": (1.0, f"dense, {part}", f"pruned, {part}") for part in ("backbone", "whole")}
    title = f"{head} on PlainMamba-{preset}, {image_size}², batch 1"
    group = take_turns(title, cases, ratios, options, images=1)
    for name in ("dense, whole", "pruned, whole"):
        print(f"{name}: {growth(cases[name])}", flush=True)
    return group
