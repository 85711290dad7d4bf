"""UPerNet on this package's backbones, for a data set's classes; see `dense_models`."""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoModelForSemanticSegmentation, BaseImageProcessor, UperNetConfig

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.label_maps import complete_label_maps
from hf_vssm_prune.training.dense_models import DenseModels, backbone_of_levels, quarters, statistics_of


@dataclass(frozen=True)
class SegmentationHead:
    """Options of a new head.

    Attributes:
        channels, auxiliary_channels: width of the decode head and of the auxiliary head.
        levels: layers, counted from 1, whose outputs are used; None: one at each quarter of the depth.
        feature_norm, feature_pyramid: options of the backbone.
        ignore_index: id of pixels that belong to no class, in a saved model as well.
        image_size: (height, width) to which a classifier's position embeddings are resized; None: they are unchanged.
    """

    channels: int = 512
    auxiliary_channels: int = 256
    levels: tuple[int, ...] | None = None
    feature_norm: str = "per_level"
    feature_pyramid: str | None = None
    ignore_index: int = 255
    image_size: tuple[int, int] | None = None

    def config(self, backbone: VisionMambaConfig) -> UperNetConfig:
        """The configuration of UPerNet with the labels of a classifier's configuration and an otherwise equal
        backbone."""
        levels = self.levels or quarters(backbone.num_hidden_layers)
        return UperNetConfig(
            backbone_config=backbone_of_levels(backbone, levels, self.feature_norm, self.feature_pyramid),
            hidden_size=self.channels,
            auxiliary_channels=self.auxiliary_channels,
            use_auxiliary_head=len(levels) > 2,  # its input is the third level
            loss_ignore_index=self.ignore_index,
            **complete_label_maps({"id2label": backbone.label_names}),
        )


@dataclass(frozen=True)
class SegmentationModels(DenseModels):
    """UPerNet; see `DenseModels`."""

    task: ClassVar[str] = "semantic-segmentation"
    kind: ClassVar[str] = "segmentation model"
    verb: ClassVar[str] = "segments"
    auto_class: ClassVar[Any] = AutoModelForSemanticSegmentation
    class_layers: ClassVar[re.Pattern[str]] = re.compile(r"^(decode_head|auxiliary_head)\.classifier\.")
    head: SegmentationHead = SegmentationHead()

    def prepare(self, model: Any) -> Any:
        model.config.loss_ignore_index = self.head.ignore_index  # may be another one in a saved model
        return super().prepare(model)


def segmentation_processor(image_processor: BaseImageProcessor, short_side: int | None) -> BaseImageProcessor:
    """An image processor whose outputs work with transformers' image segmentation pipeline, with the statistics of the
    given one. A segmentation model's image processor is returned unchanged unless a size is given.

    Args:
        image_processor: image processor of a classifier or a segmentation model.
        short_side: size in pixels to which the shorter side of images is resized; the longer side gets at most four
            times as many. None: with a classifier's image processor, images are not resized.
    """
    segments = hasattr(image_processor, "post_process_semantic_segmentation")
    if segments and short_side is None:
        return image_processor
    # Without torchvision, transformers warns when this is imported.
    from transformers import SegformerImageProcessor

    options = statistics_of(image_processor)
    if short_side is None:
        return SegformerImageProcessor(do_resize=False, **options)
    size = {"shortest_edge": short_side, "longest_edge": 4 * short_side}
    return SegformerImageProcessor(do_resize=True, size=size, **options)
