"""VideoMamba on clips: dense and pruned, with increasing numbers of frames, and compared with a transformer."""

import argparse
from functools import partial

import torch
from torch import nn
from transformers import VideoMAEConfig, VideoMAEForVideoClassification

from benchmarking.measuring import Case, Group, growth, take_turns
from hf_vssm_prune import VideoMambaConfig, VideoMambaForVideoClassification, count_flops


TOTAL_REDUCTION = 0.416  # of all multiply-adds, including the scans


def pruned_config(preset: str, num_frames: int, **options: str) -> VideoMambaConfig:
    """A configuration with the smallest budget that removes `TOTAL_REDUCTION` of all multiply-adds. The published
    figures of this family include only some of them."""
    low, high = 0.0, 0.9
    for _ in range(12):
        middle = (low + high) / 2
        schedule = {"flops_reduction": middle, **options}
        config = VideoMambaConfig.from_preset(preset, num_frames=num_frames, token_pruning=schedule)
        flops = count_flops(config)
        low, high = (low, middle) if flops.pruned.total <= (1 - TOTAL_REDUCTION) * flops.dense.total else (middle, high)
    schedule = {"flops_reduction": high, **options}
    return VideoMambaConfig.from_preset(preset, num_frames=num_frames, token_pruning=schedule)


def make_models(preset: str, num_frames: int) -> dict[str, nn.Module]:
    """The same random weights: dense, and pruned with the recommended and with the paper's method."""
    dense = VideoMambaForVideoClassification(VideoMambaConfig.from_preset(preset, num_frames=num_frames)).eval()
    models = {"dense": dense}
    for name, options in (("pruned", {}), ("pruned by top", {"method": "top"})):
        models[name] = VideoMambaForVideoClassification(pruned_config(preset, num_frames, **options)).eval()
        models[name].load_state_dict(dense.state_dict())
    return models


def video_section(options: argparse.Namespace) -> list[Group]:
    """Batch 1, frames of 224 pixels."""
    with torch.no_grad():
        groups = [_pruning(preset, frames, options) for preset in ("Ti", "S") for frames in (8, 16)]
        return [*groups, _growing(options), _beside_transformer(options), _plain_scan(options)]


def _clip(num_frames: int) -> torch.Tensor:
    return torch.randn(1, num_frames, 3, 224, 224)


def _pruning(preset: str, num_frames: int, options: argparse.Namespace) -> Group:
    models, clip = make_models(preset, num_frames), _clip(num_frames)
    flops = count_flops(models["pruned"].config)
    cases: dict[str, Case] = {name: partial(model, clip) for name, model in models.items()}
    ratios = {
        f"dense / pruned (all FLOPs: {flops.dense.total / flops.pruned.total:.2f})": (1.0, "dense", "pruned"),
        "dense / pruned by top": (1.0, "dense", "pruned by top"),
    }
    return take_turns(f"VideoMamba-{preset}, {num_frames} frames, batch 1", cases, ratios, options, images=1)


def _growing(options: argparse.Namespace) -> Group:
    """Increasing numbers of frames: a model that is linear in the number of tokens takes the same time per frame."""
    model = VideoMambaForVideoClassification(VideoMambaConfig.from_preset("Ti")).eval()
    frames = (8, 16, 32, 64)
    cases: dict[str, Case] = {
        f"{count} frames": partial(model, _clip(count), interpolate_pos_encoding=True) for count in frames
    }
    tokens = {count: count * 14 * 14 + 1 for count in frames}
    ratios = {
        f"time per token, {count} frames / 8 frames": (tokens[8] / tokens[count], f"{count} frames", "8 frames")
        for count in frames[1:]
    }
    group = take_turns("VideoMamba-Ti at growing numbers of frames, dense, batch 1", cases, ratios, options)
    for name, case in cases.items():
        print(f"{name}: {growth(case)}", flush=True)
    return group


def _beside_transformer(options: argparse.Namespace) -> Group:
    """transformers' VideoMAE-S, whose tubelets have two frames, so that it has half as many tokens."""
    config = VideoMAEConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_frames=16)
    models = {"VideoMAE-S": VideoMAEForVideoClassification(config).eval(), **make_models("S", 16)}
    del models["pruned by top"]
    clip = _clip(16)
    cases: dict[str, Case] = {name: partial(model, clip) for name, model in models.items()}
    ratios = {
        "VideoMamba-S, dense / VideoMAE-S": (1.0, "dense", "VideoMAE-S"),
        "VideoMamba-S, pruned / VideoMAE-S": (1.0, "pruned", "VideoMAE-S"),
    }
    return take_turns("VideoMamba-S and VideoMAE-S, 16 frames, batch 1", cases, ratios, options, images=1)


def _plain_scan(options: argparse.Namespace) -> Group:
    clip = _clip(8)
    cases: dict[str, Case] = {}
    for name, backend in (("chosen kernel", "auto"), ("plain PyTorch", "torch")):
        config = VideoMambaConfig.from_preset("Ti", scan_backend=backend)
        cases[name] = partial(VideoMambaForVideoClassification(config).eval(), clip)
    ratios = {"plain PyTorch / chosen kernel": (1.0, "plain PyTorch", "chosen kernel")}
    return take_turns("VideoMamba-Ti, 8 frames, dense, by its scan", cases, ratios, options, images=1)
