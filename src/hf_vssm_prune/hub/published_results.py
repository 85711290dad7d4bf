"""The results that papers report for the published models, for comparison. None of them were measured by this
project."""

from typing import Any

from transformers import UperNetConfig

from hf_vssm_prune.configuration_common import VisionMambaConfig, has_head, pruned_config
from hf_vssm_prune.publication import PublishedModel


# The options that determine whether two configurations are the same model for the same task.
ARCHITECTURE = ("patch_size", "grid_size", "num_channels", "hidden_size", "num_hidden_layers", "state_size", "expand")
HEAD_CHANNELS = 512  # of the published UPerNet heads


def published_model(config: Any) -> PublishedModel | None:
    """The published model with this architecture, for inputs of one of the sizes in its reported results; None if
    there is none.

    Args:
        config: configuration of a classifier, or of a transformers model with a backbone of this package.
    """
    family = type(pruned_config(config))
    models = [*family.published.items(), *family.published_images.items()]
    if has_head(config):
        published_head = isinstance(config, UperNetConfig) and config.hidden_size == HEAD_CHANNELS
        models = [*family.published_segmentation.items()] if published_head else []
    found = (
        model
        for name, model in models
        for size in model.sizes
        if _same(config, family.from_preset(name, **model.options, **size))
    )
    return next(found, None)


def _same(config: Any, published: VisionMambaConfig) -> bool:
    backbone = pruned_config(config)
    same = all(getattr(backbone, key) == getattr(published, key) for key in ARCHITECTURE)
    return same and config.num_labels == published.num_labels
