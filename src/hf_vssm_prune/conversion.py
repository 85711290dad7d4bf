"""Published PlainMamba and Vim checkpoints to ours, and back.

Both ways go through one table: the published name of each of our tensors. Tensors are renamed, never changed.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .configuration_common import VisionMambaConfig
from .configuration_plainmamba import PlainMambaConfig
from .configuration_vim import VimConfig
from .modeling_plainmamba import PlainMambaForImageClassification
from .modeling_vim import VimForImageClassification


Names = list[tuple[str, str | Callable[[re.Match[str]], str]]]

# Our names -> published names, the first pattern that matches the whole name counts.
PLAINMAMBA_NAMES: Names = [
    (r"plainmamba\.embeddings\.position_embeddings", r"backbone.pos_embed"),
    (r"plainmamba\.embeddings\.stem\.0\.convolution\.(.+)", r"backbone.patch_embed.stem.0.\1"),
    (r"plainmamba\.embeddings\.stem\.0\.normalization\.(.+)", r"backbone.patch_embed.stem.1.\1"),
    # The published list holds a convolution, a norm and a ReLU for each of our blocks.
    (
        r"plainmamba\.embeddings\.stem\.(\d+)\.convolution\.(.+)",
        lambda match: f"backbone.patch_embed.convs.{3 * int(match[1]) - 3}.{match[2]}",
    ),
    (
        r"plainmamba\.embeddings\.stem\.(\d+)\.normalization\.(.+)",
        lambda match: f"backbone.patch_embed.convs.{3 * int(match[1]) - 2}.{match[2]}",
    ),
    (r"plainmamba\.embeddings\.projection\.(.+)", r"backbone.patch_embed.projection.\1"),
    (r"plainmamba\.layers\.(\d+)\.mixer\.direction_B", r"backbone.layers.\1.mamba.direction_Bs"),
    (r"plainmamba\.layers\.(\d+)\.mixer\.(.+)", r"backbone.layers.\1.mamba.\2"),
    (r"plainmamba\.layers\.(\d+)\.norm\.(.+)", r"backbone.layers.\1.norm.\2"),
    (r"plainmamba\.layers\.(\d+)\.depthwise\.convolution\.(.+)", r"backbone.layers.\1.dw.0.\2"),
    (r"plainmamba\.layers\.(\d+)\.depthwise\.normalization\.(.+)", r"backbone.layers.\1.dw.1.\2"),
    (r"plainmamba\.norm\.(.+)", r"backbone.ln1.\1"),
    (r"classifier\.(.+)", r"head.fc.\1"),
]
VIM_NAMES: Names = [
    (r"vim\.embeddings\.class_token", r"cls_token"),
    (r"vim\.embeddings\.position_embeddings", r"pos_embed"),
    (r"vim\.embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
    (r"vim\.layers\.(\d+)\.mixer\.backward_scan\.A_log", r"layers.\1.mixer.A_b_log"),
    (r"vim\.layers\.(\d+)\.mixer\.backward_scan\.D", r"layers.\1.mixer.D_b"),
    (r"vim\.layers\.(\d+)\.mixer\.backward_scan\.(\w+)\.(.+)", r"layers.\1.mixer.\2_b.\3"),
    (r"vim\.layers\.(\d+)\.mixer\.(?:forward_scan\.)?(.+)", r"layers.\1.mixer.\2"),
    (r"vim\.layers\.(\d+)\.norm\.(.+)", r"layers.\1.norm.\2"),
    (r"vim\.norm\.(.+)", r"norm_f.\1"),
    (r"classifier\.(.+)", r"head.\1"),
]
NAMES = {"plainmamba": PLAINMAMBA_NAMES, "vim": VIM_NAMES}
MODELS = {"plainmamba": PlainMambaForImageClassification, "vim": VimForImageClassification}

# Where published files keep their weights, and those averaged over training.
WEIGHT_KEYS = ("state_dict", "model")
EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict")


def official_name(model_type: str, name: str) -> str:
    """The published name of one of our tensors."""
    for pattern, published in NAMES[model_type]:
        if match := re.fullmatch(pattern, name):
            return published(match) if callable(published) else match.expand(published)
    raise KeyError(f"{name!r} is no tensor of a {model_type} classifier.")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a published `.pth` or `.safetensors` file. Nothing but tensors and plain values is unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or a pickle that wants more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has exceptions of its own
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values. It is damaged, or it holds Python "
            "objects, which are not loaded because they could run code; if you trust its source, load it yourself "
            f'and save {{"model": state_dict}} alone. The reader said: {error}'
        ) from error


def extract_state_dict(checkpoint: Mapping[str, Any], ema: bool = False) -> dict[str, Tensor]:
    """The weights in a published file's layout: under `state_dict` or `model`, or the file itself.

    Args:
        checkpoint: the file's content.
        ema: the weights averaged over training, in place of the last ones.

    Raises:
        ValueError: there are none.
    """
    keys = EMA_KEYS if ema else WEIGHT_KEYS
    found = next((checkpoint[key] for key in keys if key in checkpoint), None if ema else checkpoint)
    if not isinstance(found, Mapping) or not found:
        kind = "EMA weights" if ema else "weights"
        raise ValueError(
            f"the checkpoint holds no {kind} under any of {list(keys)}; it has {sorted(map(str, checkpoint))[:20]}."
        )
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"the checkpoint holds no tensors; it has {sorted(map(str, found))[:20]}.")
    return {key.removeprefix("module."): value for key, value in tensors.items()}


def convert_official_state_dict(
    config: VisionMambaConfig, state_dict: Mapping[str, Any], ema: bool = False
) -> dict[str, Tensor]:
    """A published checkpoint under our names, complete, for `load_state_dict(strict=True)` of the image classifier.

    Args:
        config: of the model to load it into; see `infer_config`.
        state_dict: what `torch.load` gave: `{"state_dict": ...}`, `{"model": ...}`, or the tensors themselves.
        ema: take the weights averaged over training.

    Raises:
        ValueError: tensors are missing, unexpected, or of another shape than the configuration says; each is named.
    """
    official = extract_state_dict(state_dict, ema)
    expected = {official_name(config.model_type, name): (name, tensor) for name, tensor in _tensors_of(config).items()}
    # Counters that old checkpoints lack and that no forward pass reads.
    for key, (_, tensor) in expected.items():
        if key.endswith("num_batches_tracked") and key not in official:
            official[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
    problems = [f"missing: {key} {list(tensor.shape)}" for key, (_, tensor) in expected.items() if key not in official]
    problems += [f"unexpected: {key} {list(tensor.shape)}" for key, tensor in official.items() if key not in expected]
    problems += [
        f"shape: {key} is {list(official[key].shape)} in the checkpoint and {list(tensor.shape)} in the model"
        for key, (_, tensor) in expected.items()
        if key in official and official[key].shape != tensor.shape
    ]
    if problems:
        raise ValueError(
            f"the checkpoint does not fit this {config.model_type} configuration:\n  " + "\n  ".join(problems)
        )
    return {name: official[key] for key, (name, _) in expected.items()}


def convert_to_official_state_dict(config: VisionMambaConfig, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of our image classifier under the published names.

    Raises:
        ValueError: tensors are missing or unexpected; each is named.
    """
    expected = _tensors_of(config)
    problems = [f"missing: {name}" for name in expected if name not in state_dict]
    problems += [f"unexpected: {name}" for name in state_dict if name not in expected]
    if problems:
        raise ValueError(
            f"these are not the weights of this {config.model_type} classifier:\n  " + "\n  ".join(problems)
        )
    return {official_name(config.model_type, name): state_dict[name] for name in expected}


def _tensors_of(config: VisionMambaConfig) -> dict[str, Tensor]:
    """Our state dict, as tensors without memory."""
    with torch.device("meta"):
        return MODELS[config.model_type](config).state_dict()


def infer_config(state_dict: Mapping[str, Any], **overrides: Any) -> VisionMambaConfig:
    """The configuration that a published checkpoint's tensors imply.

    The grid is taken to be square, and Vim's patches not to overlap: give `image_size` or `patch_stride` where it is
    otherwise.

    Args:
        state_dict: as for `convert_official_state_dict`.
        **overrides: options of the configuration, put over the inferred ones.

    Raises:
        ValueError: it is neither a PlainMamba nor a Vim, or its grid is not square and `image_size` is not given.
    """
    official = extract_state_dict(state_dict)
    if "backbone.layers.0.mamba.A_log" in official:
        return PlainMambaConfig(**{**_infer_plainmamba(official, overrides), **overrides})
    if "layers.0.mixer.A_b_log" in official:
        return VimConfig(**{**_infer_vim(official, overrides), **overrides})
    raise ValueError(
        "this is neither a PlainMamba (backbone.layers.0.mamba.A_log) nor a Vim (layers.0.mixer.A_b_log) checkpoint; "
        f"its tensors start with {sorted(official)[:5]}."
    )


def _infer_plainmamba(official: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    inferred = _infer_mixer(official, "backbone.layers.{}.mamba")
    stem = official["backbone.patch_embed.stem.0.weight"]
    patch_size = 2 * official["backbone.patch_embed.projection.weight"].shape[-1]
    depthwise = {int(match[1]) for key in official if (match := re.match(r"backbone\.layers\.(\d+)\.dw\.", key))}
    convolutions = [key for key in official if re.fullmatch(r"backbone\.patch_embed\.convs\.\d+\.weight", key)]
    return inferred | {
        "image_size": overrides.get("image_size") or _side(official["backbone.pos_embed"].shape[1]) * patch_size,
        "patch_size": patch_size,
        "num_channels": stem.shape[1],
        "stem_channels": stem.shape[0],
        "num_stem_convs": sum(official[key].ndim == 4 for key in convolutions),
        "conv_kernel": official["backbone.layers.0.mamba.conv2d.weight"].shape[-1],
        "depthwise_layers": sorted(depthwise),
        "num_labels": official["head.fc.weight"].shape[0],
    }


def _infer_vim(official: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    inferred = _infer_mixer(official, "layers.{}.mixer")
    projection = official["patch_embed.proj.weight"]
    patch_size = projection.shape[-1]
    stride = overrides.get("patch_stride") or patch_size
    image_size = overrides.get("image_size")
    if image_size is None:
        image_size = (_side(official["pos_embed"].shape[1] - 1) - 1) * stride + patch_size
    return inferred | {
        "image_size": image_size,
        "patch_size": patch_size,
        "patch_stride": stride,
        "num_channels": projection.shape[1],
        "conv_kernel": official["layers.0.mixer.conv1d.weight"].shape[-1],
        "num_labels": official["head.weight"].shape[0],
    }


def _infer_mixer(official: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    pattern = re.escape(prefix).replace(r"\{\}", r"(\d+)") + r"\.A_log"
    layers = {int(match[1]) for key in official if (match := re.fullmatch(pattern, key))}
    first = prefix.format(0)
    width, state_size = official[f"{first}.A_log"].shape
    hidden_size = official[f"{first}.in_proj.weight"].shape[1]
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layers) + 1,
        "state_size": state_size,
        "expand": width // hidden_size,
        "time_step_rank": official[f"{first}.dt_proj.weight"].shape[1],
    }


def _side(num_patches: int) -> int:
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches are no square grid: give `image_size`, a number or (height, width).")
    return side
