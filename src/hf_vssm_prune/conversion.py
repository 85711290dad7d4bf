"""Published PlainMamba and Vim checkpoints to ours, and back.

Both ways go through one table: the published name of each of our tensors. Tensors are renamed, never changed.
"""

import argparse
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from .configuration_common import VisionMambaConfig
from .configuration_plainmamba import PlainMambaConfig
from .configuration_vim import VimConfig
from .documentation import see
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
# Under which of these each family's own training code saves.
OFFICIAL_WEIGHT_KEY = {"plainmamba": "state_dict", "vim": "model"}
# PlainMamba's training keeps a second set of weights as buffers of these names beside the model's. It swaps the two
# before it saves: in a file the model's own names hold the averaged weights, and these the last ones.
SWAPPED_EMA_PREFIXES = ("ema_backbone_", "ema_head_")

ImageClassifier: TypeAlias = PlainMambaForImageClassification | VimForImageClassification


def load_official_model(path: str | Path, ema: bool = False, **overrides: Any) -> ImageClassifier:
    """A published `.pth` or `.safetensors` file as an image classifier, in evaluation mode, its tensors as they are.

    Args:
        path: of the file.
        ema: the weights averaged over training, in place of the last ones.
        **overrides: options of the configuration that the tensors do not imply, see `infer_config`; for instance
            `token_pruning`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no PlainMamba or Vim checkpoint, or not a whole one; the message names what is wrong.
    """
    state_dict = extract_state_dict(load_checkpoint(path), ema)
    config = infer_config(state_dict, **overrides)
    with torch.device("meta"):
        model = MODELS[config.model_type](config)
    model.load_state_dict(convert_official_state_dict(config, state_dict), assign=True)
    return model.eval()


def save_official_model(model: ImageClassifier, path: str | Path) -> None:
    """Saves a classifier the way its family's weights were published, as `.pth` or, bare, as `.safetensors`.

    The file appears at once and complete. A pruning schedule is no part of it.

    Raises:
        ValueError: the file has another suffix.
        OSError: it cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".pth", ".safetensors"):
        raise ValueError(f"{path}: published checkpoints are .pth or .safetensors files.")
    official = convert_to_official_state_dict(model.config, model.state_dict())
    temporary = path.with_name(f".unfinished-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix == ".safetensors":
                # `save_file` would make a file that nobody else may read.
                temporary.write_bytes(save({name: tensor.contiguous() for name, tensor in official.items()}))
            else:
                torch.save({OFFICIAL_WEIGHT_KEY[model.config.model_type]: official}, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch has no exception of its own for a full disk
        raise OSError(f"{path} cannot be written: {error}") from error


def official_name(model_type: str, name: str) -> str:
    """The published name of one of our tensors."""
    for pattern, published in NAMES[model_type]:
        if match := re.fullmatch(pattern, name):
            return published(match) if callable(published) else match.expand(published)
    raise KeyError(f"{name!r} is no tensor of a {model_type} classifier.")


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Reads a published `.pth` or `.safetensors` file. Nothing but tensors and plain values is unpickled.

    `argparse.Namespace` counts as one: Vim's training script saves its options in one.

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
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has exceptions of its own
        refused = re.search(r"Unsupported (?:global|operand|class).*", str(error))
        said = refused[0] if refused else f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values. It is damaged, or it holds Python "
            "objects, which are not loaded because they could run code; if you trust its source, load it yourself "
            f'and save {{"model": state_dict}} alone. The reader said: {said}. {see("checkpoint-cannot-be-read")}'
        ) from error
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"{path} holds a {type(checkpoint).__name__}; a dict of tensors is needed.")
    return dict(checkpoint)


def extract_state_dict(checkpoint: Mapping[str, Any], ema: bool = False) -> dict[str, Tensor]:
    """The weights in a published file's layout: under `state_dict` or `model`, or the file itself.

    Args:
        checkpoint: the file's content.
        ema: the weights averaged over training, in place of the last ones.

    Raises:
        ValueError: there are none.
    """
    keys = EMA_KEYS if ema else WEIGHT_KEYS
    found = next((checkpoint[key] for key in keys if key in checkpoint), None)
    if found is None and (not ema or _has_swapped_ema(checkpoint)):
        found = next((checkpoint[key] for key in WEIGHT_KEYS if key in checkpoint), checkpoint)
    if not isinstance(found, Mapping) or not found:
        kind = "EMA weights" if ema else "weights"
        raise ValueError(
            f"the checkpoint holds no {kind} under any of {list(keys)}; it has {sorted(map(str, checkpoint))[:20]}. "
            f"{see('checkpoint-of-another-layout')}"
        )
    tensors = {key: value for key, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise ValueError(f"the checkpoint holds no tensors; it has {sorted(map(str, found))[:20]}.")
    names = {key: key.removeprefix("module.") for key in tensors}
    return {name: tensors[key] for key, name in names.items() if not name.startswith(SWAPPED_EMA_PREFIXES)}


def _has_swapped_ema(checkpoint: Mapping[str, Any]) -> bool:
    weights = checkpoint.get("state_dict")
    return isinstance(weights, Mapping) and any(str(key).startswith(SWAPPED_EMA_PREFIXES) for key in weights)


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
            f"the checkpoint does not fit this {config.model_type} configuration. "
            f"{see('checkpoint-of-another-layout')}\n  " + "\n  ".join(problems)
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
        ValueError: it is neither a PlainMamba nor a Vim, a tensor that tells a size is missing, or the grid is not
            square and `image_size` is not given.
    """
    official = extract_state_dict(state_dict)
    if "backbone.layers.0.mamba.A_log" in official:
        return PlainMambaConfig(**{**_infer_plainmamba(official, overrides), **overrides})
    if "layers.0.mixer.A_b_log" in official:
        return VimConfig(**{**_infer_vim(official, overrides), **overrides})
    raise ValueError(
        "this is neither a PlainMamba (backbone.layers.0.mamba.A_log) nor a Vim (layers.0.mixer.A_b_log) checkpoint; "
        f"its tensors start with {sorted(official)[:5]}. {see('checkpoint-of-another-layout')}"
    )


def _infer_plainmamba(official: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    if "patch_stride" in overrides:
        raise ValueError("`patch_stride` is an option of Vim; PlainMamba's patches do not overlap.")
    inferred = _infer_mixer(official, "backbone.layers.{}.mamba")
    stem_channels, num_channels, _, _ = _shape(official, "backbone.patch_embed.stem.0.weight", 4)
    patch_size = 2 * _shape(official, "backbone.patch_embed.projection.weight", 4)[-1]
    _, num_patches, _ = _shape(official, "backbone.pos_embed", 3)
    depthwise = {int(match[1]) for key in official if (match := re.match(r"backbone\.layers\.(\d+)\.dw\.", key))}
    convolutions = [key for key in official if re.fullmatch(r"backbone\.patch_embed\.convs\.\d+\.weight", key)]
    return inferred | {
        "image_size": overrides.get("image_size") or _side(num_patches) * patch_size,
        "patch_size": patch_size,
        "num_channels": num_channels,
        "stem_channels": stem_channels,
        "num_stem_convs": sum(official[key].ndim == 4 for key in convolutions),
        "conv_kernel": _shape(official, "backbone.layers.0.mamba.conv2d.weight", 4)[-1],
        "depthwise_layers": sorted(depthwise),
        "num_labels": _shape(official, "head.fc.weight", 2)[0],
    }


def _infer_vim(official: Mapping[str, Tensor], overrides: Mapping[str, Any]) -> dict[str, Any]:
    inferred = _infer_mixer(official, "layers.{}.mixer")
    _, num_channels, _, patch_size = _shape(official, "patch_embed.proj.weight", 4)
    _, num_tokens, _ = _shape(official, "pos_embed", 3)
    stride = overrides.get("patch_stride") or patch_size
    image_size = overrides.get("image_size")
    if image_size is None:
        image_size = (_side(num_tokens - 1) - 1) * stride + patch_size
    return inferred | {
        "image_size": image_size,
        "patch_size": patch_size,
        "patch_stride": stride,
        "num_channels": num_channels,
        "conv_kernel": _shape(official, "layers.0.mixer.conv1d.weight", 3)[-1],
        "num_labels": _shape(official, "head.weight", 2)[0],
    }


def _infer_mixer(official: Mapping[str, Tensor], prefix: str) -> dict[str, Any]:
    pattern = re.escape(prefix).replace(r"\{\}", r"(\d+)") + r"\.A_log"
    layers = {int(match[1]) for key in official if (match := re.fullmatch(pattern, key))}
    if layers != set(range(len(layers))):
        raise ValueError(
            f"the checkpoint's layers are {sorted(layers)[:20]}; they must be numbered from 0 without gaps."
        )
    first = prefix.format(0)
    width, state_size = _shape(official, f"{first}.A_log", 2)
    hidden_size = _shape(official, f"{first}.in_proj.weight", 2)[1]
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "state_size": state_size,
        "expand": width // max(1, hidden_size),
        "time_step_rank": _shape(official, f"{first}.dt_proj.weight", 2)[1],
    }


def _shape(official: Mapping[str, Tensor], key: str, num_axes: int) -> torch.Size:
    """The shape of a tensor that tells a size of the model."""
    if key not in official:
        raise ValueError(f"the checkpoint is no whole image classifier; missing: {key}.")
    if official[key].ndim != num_axes:
        raise ValueError(f"shape: {key} is {list(official[key].shape)} in the checkpoint; {num_axes} axes are needed.")
    return official[key].shape


def _side(num_patches: int) -> int:
    side = math.isqrt(num_patches)
    if side * side != num_patches:
        raise ValueError(f"{num_patches} patches are no square grid: give `image_size`, a number or (height, width).")
    return side
