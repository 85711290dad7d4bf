"""What papers report for the published models, to put beside one's own. None of it was measured by this project."""

from dataclasses import dataclass

from hf_vssm_prune.configuration_common import VisionMambaConfig


@dataclass(frozen=True)
class PublishedResult:
    """One row of a paper's table, on ImageNet-1k at 224 x 224.

    Attributes:
        method: what was done to the model.
        source: the paper that reports it.
        top1: accuracy in percent.
        flops: as the paper states it, in multiply-adds or as a share of the dense model's; None where it does not.
    """

    method: str
    source: str
    top1: float
    flops: str | None = None


TOP = "ToP, arXiv 2409.18962"
R_MEETO = "R-MeeTo, arXiv 2412.12496"
DYVM = "DyVM, arXiv 2504.04787"
STORM = "STORM"

# By model type and preset.
PUBLISHED_RESULTS: dict[tuple[str, str | None], list[PublishedResult]] = {
    ("plainmamba", "L2"): [
        PublishedResult("token reduction without training", STORM, 80.6),
    ],
    ("plainmamba", "L3"): [
        PublishedResult("dense", TOP, 82.3),
        PublishedResult("token pruning with alignment", TOP, 81.7, "−41.6%"),
        PublishedResult("token pruning without alignment", TOP, 79.3),
        PublishedResult("token reduction without training", STORM, 80.9, "9.74 G"),
        PublishedResult("ToMe without training", STORM, 76.1, "9.7 G"),
        PublishedResult("EViT without training", STORM, 75.2, "9.7 G"),
    ],
    ("vim", "T"): [
        PublishedResult("dense", TOP, 76.1),
        PublishedResult("token pruning with alignment", TOP, 75.1, "1.29 G"),
        PublishedResult("EViT", TOP, 71.3, "1.28 G"),
        PublishedResult("token merging, retrained", R_MEETO, 75.3, "1.28 G"),
    ],
    ("vim", "S"): [
        PublishedResult("dense", TOP, 80.5),
        PublishedResult("token pruning with alignment", TOP, 78.8, "3.60 G"),
        PublishedResult("token pruning without alignment", TOP, 75.4),
        PublishedResult("EViT", TOP, 74.8, "3.57 G"),
        PublishedResult("token merging, retrained", R_MEETO, 79.9, "3.58 G"),
        PublishedResult("dynamic pruning", DYVM, 78.8, "−35.2%"),
    ],
    ("vim", "B"): [
        PublishedResult("dense", R_MEETO, 81.9),
        PublishedResult("token merging, retrained", R_MEETO, 81.3, "13.21 G"),
    ],
}


# What makes two configurations the same model for the same task.
ARCHITECTURE = ("patch_size", "grid_size", "num_channels", "hidden_size", "num_hidden_layers", "state_size", "expand")


def published_results(config: VisionMambaConfig) -> list[PublishedResult]:
    """What papers report for the model with this architecture; an empty list where it is not a published one."""
    return PUBLISHED_RESULTS.get((config.model_type, preset_of(config)), [])


def preset_of(config: VisionMambaConfig) -> str | None:
    """The name of the published ImageNet-1k model that has this architecture, None where there is none."""
    for name in type(config).presets:
        preset = type(config).from_preset(name)
        if all(getattr(config, key) == getattr(preset, key) for key in (*ARCHITECTURE, "num_labels")):
            return name
    return None
