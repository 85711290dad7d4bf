"""What papers report for the published models, to put beside one's own. None of it was measured by this project."""

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.publication import PublishedResult


# What makes two configurations the same model for the same task.
ARCHITECTURE = ("patch_size", "grid_size", "num_channels", "hidden_size", "num_hidden_layers", "state_size", "expand")


def published_results(config: VisionMambaConfig) -> tuple[PublishedResult, ...]:
    """What papers report for the model with this architecture; nothing where it is not a published one."""
    published = config.published.get(preset_of(config) or "")
    return () if published is None else published.results


def preset_of(config: VisionMambaConfig) -> str | None:
    """The name of the published ImageNet-1k model that has this architecture, None where there is none."""
    for name in type(config).presets:
        preset = type(config).from_preset(name)
        if all(getattr(config, key) == getattr(preset, key) for key in (*ARCHITECTURE, "num_labels")):
            return name
    return None
