"""The results that papers report for the published models, for comparison. None of them were measured by this
project."""

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.publication import PublishedModel


# The options that determine whether two configurations are the same model for the same task.
ARCHITECTURE = ("patch_size", "grid_size", "num_channels", "hidden_size", "num_hidden_layers", "state_size", "expand")


def published_model(config: VisionMambaConfig) -> PublishedModel | None:
    """The published model with this architecture, for inputs of one of the sizes in its reported results; None if
    there is none."""
    family = type(config)
    models = [*family.published.items(), *family.published_images.items()]
    found = (
        model
        for name, model in models
        for size in model.sizes
        if _same(config, family.from_preset(name, **model.options, **size))
    )
    return next(found, None)


def _same(config: VisionMambaConfig, other: VisionMambaConfig) -> bool:
    return all(getattr(config, key) == getattr(other, key) for key in (*ARCHITECTURE, "num_labels"))
