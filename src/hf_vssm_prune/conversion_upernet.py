"""Converts mmsegmentation's files of a backbone with UPerNet to transformers' `UperNetForSemanticSegmentation`.

The heads of the two compute the same. Three things cannot be expressed in transformers: the level that the auxiliary
head reads, see `set_auxiliary_level`; the dropout of a tenth of the channels before both classifiers, which is left
out; and the scales of the pooled maps, which are not in the files and assumed to be 1, 2, 3 and 6, as in
mmsegmentation.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import UperNetConfig, UperNetForSemanticSegmentation


# The first pattern that matches a whole name is used. Other names belong to the backbone.
HEAD_NAMES = [
    (r"((?:decode|auxiliary)_head)\.classifier\.(.+)", r"\1.conv_seg.\2"),
    (r"((?:decode|auxiliary)_head\..+)\.batch_norm\.(.+)", r"\1.bn.\2"),
    (r"((?:decode|auxiliary)_head\..+)", r"\1"),
]
DECODE_HEAD, AUXILIARY_HEAD = "decode_head.", "auxiliary_head."


def is_upernet(config: Any) -> bool:
    """Whether a configuration is for UPerNet with a backbone of this package."""
    return isinstance(config, UperNetConfig) and hasattr(config.backbone_config, "token_pruning")


def official_name(config: Any, name: str, of_backbone: Callable[[str], str]) -> str:
    """mmsegmentation's name of a tensor of the model.

    Args:
        config: configuration of the model.
        name: name of its tensor.
        of_backbone: maps a tensor of the base model to its published name in a classifier's file.

    Raises:
        KeyError: there is no such tensor.
    """
    backbone, last = config.backbone_config, config.backbone_config.num_hidden_layers
    if match := re.fullmatch(rf"backbone\.hidden_states_norms\.stage(?!{last}\.)(\d+)\.(.+)", name):
        return f"backbone.norm_layer{int(match[1]) - 1}.{match[2]}"
    if match := re.fullmatch(r"backbone\.feature_pyramid\.(\d+)\.(.+)", name):
        return f"backbone.fpn{int(match[1]) + 1}.{match[2]}"
    if name.startswith("backbone."):
        published = of_backbone(f"{backbone.model_type}.{name.removeprefix('backbone.')}")
        return f"backbone.{published.removeprefix('backbone.')}"
    for pattern, published in HEAD_NAMES:
        if match := re.fullmatch(pattern, name):
            return match.expand(published)
    raise KeyError(f"{name!r} is not a tensor of UPerNet.")


def has_upernet(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file's tensors are those of a segmentation model rather than a classifier."""
    return any(name.startswith(DECODE_HEAD) for name in tensors)


def options_of_heads(official: Any) -> dict[str, Any]:
    """Options of `UperNetConfig`, except those of the backbone, that mmsegmentation's tensors imply.

    Args:
        official: `conversion.OfficialTensors`.

    Raises:
        ValueError: a tensor that determines a size is missing.
    """
    poolings = {int(match[1]) for name in official if (match := re.match(r"decode_head\.psp_modules\.(\d+)\.", name))}
    if len(poolings) != len(UperNetConfig.pool_scales):
        known = len(UperNetConfig.pool_scales)
        raise ValueError(
            f"the checkpoint's decode head pools {len(poolings)} maps; only UPerNet with {known} is supported."
        )
    options = {
        "hidden_size": official.shape("decode_head.bottleneck.conv.weight", 4)[0],
        "num_labels": official.shape("decode_head.conv_seg.weight", 4)[0],
        "use_auxiliary_head": any(name.startswith(AUXILIARY_HEAD) for name in official),
    }
    if options["use_auxiliary_head"]:
        channels, in_channels, _, _ = official.shape("auxiliary_head.convs.0.conv.weight", 4)
        convolutions = [name for name in official if re.fullmatch(r"auxiliary_head\.convs\.\d+\.conv\.weight", name)]
        options |= {
            "auxiliary_channels": channels,
            "auxiliary_in_channels": in_channels,
            "auxiliary_num_convs": len(convolutions),
            "auxiliary_concat_input": "auxiliary_head.conv_cat.conv.weight" in official,
        }
    return options


def options_of_levels(official: Any, num_hidden_layers: int) -> dict[str, Any]:
    """Options of the backbone's feature maps that PlainMamba's per-level norms imply.

    Raises:
        ValueError: there are norms for layers that do not exist, or their number is not that of the decode head's
            levels.
    """
    normed = sorted({int(match[1]) for name in official if (match := re.match(r"backbone\.norm_layer(\d+)\.", name))})
    levels = [f"stage{layer + 1}" for layer in (*normed, num_hidden_layers - 1)]
    laterals = {match[1] for name in official if (match := re.match(r"decode_head\.lateral_convs\.(\d+)\.", name))}
    if len(normed) != len(laterals) or any(layer >= num_hidden_layers - 1 for layer in normed):
        raise ValueError(
            f"the checkpoint has norms for the outputs of layers {normed} of {num_hidden_layers}, but its decode "
            f"head uses {len(laterals)} levels in addition to the last."
        )
    return {"out_features": levels, "feature_norm": "per_level"}


def set_auxiliary_level(model: UperNetForSemanticSegmentation) -> UperNetForSemanticSegmentation:
    """Makes the auxiliary head read the last level, as in PlainMamba, instead of the third.

    The configuration cannot store this: a model that is saved and loaded reads the third level again. Only the training
    loss is affected.
    """
    if model.auxiliary_head is not None:
        model.auxiliary_head.in_index = len(model.backbone.out_features) - 1
    return model
