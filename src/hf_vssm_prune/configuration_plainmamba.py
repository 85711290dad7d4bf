"""PlainMamba's configuration."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_common import VisionMambaConfig
from .flops import FlopCount, count_projections, count_scans
from .publication import PLAINMAMBA_REPOSITORY, STORM, TOP, TOP_REDUCTION, Paper, PublishedModel, PublishedResult


def _upernet(*results: PublishedResult) -> PublishedModel:
    """With UPerNet on ADE20K: trained on crops of 512 pixels, with position embeddings for 224."""
    return PublishedModel(
        "ChenhongyiYang/PlainMamba",
        {"flops_reduction": TOP_REDUCTION, "method": "top"},
        results,
        dataset="ADE20K",
        dataset_id="zhoubolei/scene_parse_150",
        metric="mIoU",
        options={"num_labels": 150},
        sizes=({}, {"image_size": 512}),
    )


@strict
class PlainMambaConfig(VisionMambaConfig):
    """Configuration of PlainMamba (arXiv 2403.17695), with token pruning (ToP, arXiv 2409.18962).

    See `VisionMambaConfig` for the options that all vision Mambas share.

    Args:
        num_stem_convs: 3x3 convolutions after the first one of the patch embedding.
        stem_channels: width of the patch embedding's convolutions.
        depthwise_layers: layers that are followed by a depthwise 3x3 convolution (L1: the first).
        layer_norm_eps: epsilon of the layers' norms.
        final_layer_norm_eps: epsilon of the last norm.

    Example:

    ```python
    >>> from hf_vssm_prune import PlainMambaConfig, PlainMambaForImageClassification

    >>> config = PlainMambaConfig.from_preset("L3", token_pruning={"flops_reduction": 0.416})
    >>> model = PlainMambaForImageClassification(config)
    ```
    """

    model_type = "plainmamba"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "L1": {"hidden_size": 192, "num_hidden_layers": 24, "num_stem_convs": 1, "depthwise_layers": [0]},
        "L2": {"hidden_size": 384, "num_hidden_layers": 24, "num_stem_convs": 2},
        "L3": {"hidden_size": 448, "num_hidden_layers": 36, "num_stem_convs": 2},
    }
    published: ClassVar[dict[str, PublishedModel]] = {
        "L1": PublishedModel(
            "ChenhongyiYang/PlainMamba",
            {"flops_reduction": TOP_REDUCTION, "method": "top"},
            (PublishedResult("dense", PLAINMAMBA_REPOSITORY, 77.9),),
        ),
        "L2": PublishedModel(
            "ChenhongyiYang/PlainMamba",
            {"flops_reduction": TOP_REDUCTION, "method": "top"},
            (
                PublishedResult("dense", PLAINMAMBA_REPOSITORY, 81.6),
                PublishedResult("token reduction without training", STORM, 80.6),
            ),
        ),
        "L3": PublishedModel(
            "ChenhongyiYang/PlainMamba",
            {"layers": [6, 12, 18], "keep_ratios": [0.7, 0.7, 0.7], "method": "top"},
            (
                PublishedResult("dense", TOP, 82.3),
                PublishedResult("token pruning with alignment", TOP, 81.7, "−41.6%"),
                PublishedResult("token pruning without alignment", TOP, 79.3),
                PublishedResult("token reduction without training", STORM, 80.9, "9.74 G"),
                PublishedResult("ToMe without training", STORM, 76.1, "9.7 G"),
                PublishedResult("EViT without training", STORM, 75.2, "9.7 G"),
            ),
        ),
    }
    published_segmentation: ClassVar[dict[str, PublishedModel]] = {
        "L1": _upernet(PublishedResult("dense", PLAINMAMBA_REPOSITORY, 44.1)),
        "L2": _upernet(PublishedResult("dense", PLAINMAMBA_REPOSITORY, 46.8)),
        "L3": _upernet(
            PublishedResult("dense", PLAINMAMBA_REPOSITORY, 49.1),
            PublishedResult("token pruning with alignment", TOP, 48.6),
        ),
    }
    paper: ClassVar[Paper] = Paper(
        name="PlainMamba",
        title="PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition",
        arxiv="2403.17695",
        citation="""@inproceedings{yang2024plainmamba,
  title     = {{PlainMamba}: Improving Non-Hierarchical {Mamba} in Visual Recognition},
  author    = {Yang, Chenhongyi and Chen, Zehui and Espinosa, Miguel and Ericsson, Linus and Wang, Zhenyu and
               Liu, Jiaming and Crowley, Elliot J.},
  booktitle = {British Machine Vision Conference},
  year      = {2024}
}""",
        repository="https://github.com/ChenhongyiYang/PlainMamba",
        flops_convention="linear layers, convolutions and all four scans",
    )

    conv_kernel: int = 7
    num_stem_convs: int = 1
    stem_channels: int = 64
    depthwise_layers: list[int] | tuple[int, ...] = ()
    layer_norm_eps: float = 1e-5
    final_layer_norm_eps: float = 1e-6

    def _check_sizes(self) -> None:
        super()._check_sizes()
        self._check_whole_number("num_stem_convs", least=0)
        self._check_whole_number("stem_channels", least=1)
        if self.patch_size % 2:
            raise ValueError(
                f"`patch_size` is {self.patch_size}; it must be even, because PlainMamba's stem first halves the image."
            )
        if self.conv_kernel % 2 == 0:
            raise ValueError(f"`conv_kernel` is {self.conv_kernel}; it must be odd, so that a patch has a centre.")
        if outside := [layer for layer in self.depthwise_layers if not 0 <= layer < self.num_hidden_layers]:
            raise ValueError(f"`depthwise_layers` has {outside}; allowed values are 0 to {self.num_hidden_layers - 1}.")

    def grid_size_for(self, *input_size: int) -> tuple[int, int]:
        """(height, width) in patches; incomplete patches in the last row and column are padded with zeros."""
        height, width = input_size
        return math.ceil(height / self.patch_size), math.ceil(width / self.patch_size)

    def count_flops(self, input_size: tuple[int, ...], tokens: Sequence[int]) -> FlopCount:
        """See `VisionMambaConfig.count_flops`. The published figures count everything."""
        hidden, stem = self.hidden_size, self.stem_channels
        stem_pixels = math.prod(math.ceil(size / 2) for size in input_size)
        parts = Counter(
            stem=stem_pixels * stem * (self.num_channels * 7**2 + self.num_stem_convs * stem * 3**2),
            patch_projection=tokens[0] * (self.patch_size // 2) ** 2 * stem * hidden,
            head=hidden * (self.num_labels or 0),
        )
        for layer, length in enumerate(tokens):
            parts.update(count_projections(self, length))
            parts.update(count_scans(self, length, self.conv_kernel**2, num_paths=4))
            if layer in self.depthwise_layers:
                parts["convolutions"] += length * hidden * 3**2
        return FlopCount.of_parts(parts)


__all__ = ["PlainMambaConfig"]
