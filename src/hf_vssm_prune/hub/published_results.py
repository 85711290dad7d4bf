"""What papers report for the published models, to put beside one's own. None of it was measured by this project."""

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.publication import PublishedModel


# What makes two configurations the same model for the same task.
ARCHITECTURE = ("patch_size", "grid_size", "num_channels", "hidden_size", "num_hidden_layers", "state_size", "expand")


def published_model(config: VisionMambaConfig) -> PublishedModel | None:
    """The published model with this architecture, for what papers report about it; None where there is none."""
    return config.published.get(preset_of(config) or "")


def preset_of(config: VisionMambaConfig) -> str | None:
    """The name of the preset that has this architecture and number of labels, None where there is none."""
    for name in type(config).presets:
        preset = type(config).from_preset(name)
        if all(getattr(config, key) == getattr(preset, key) for key in (*ARCHITECTURE, "num_labels")):
            return name
    return None
