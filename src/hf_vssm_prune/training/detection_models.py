"""RT-DETR and Deformable DETR on backbones of this package, for a data set's classes; see `dense_models`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoModelForObjectDetection, BaseImageProcessor, DeformableDetrConfig, RTDetrConfig

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.feature_pyramid import PYRAMID_STRIDES
from hf_vssm_prune.pruned_heads import prunable
from hf_vssm_prune.training.dense_models import DenseModels, backbone_of_levels, label_maps, quarters, statistics_of
from hf_vssm_prune.training.detection_losses import FiniteLoss


# Sides of images have to be multiples of it: RT-DETR's encoder doubles its coarsest map again.
SIZE_DIVISOR = {"rt_detr": PYRAMID_STRIDES[-1], "deformable_detr": 1}


@dataclass(frozen=True)
class DetectionHead:
    """What a new head is.

    Attributes:
        kind: of `HEADS`.
        channels, ffn_channels: of its encoder and decoder, and of their feed-forward layers.
        attention_heads: of both.
        encoder_layers, decoder_layers: how many; None: as published.
        num_queries: the most objects that it finds in an image; RT-DETR begins with one cell of its maps for each.
        num_denoising: noisy copies of the labelled boxes that RT-DETR also learns to restore; 0: none.
        levels: the layers, counted from 1, whose outputs it takes; None: RT-DETR three, Deformable DETR the last.
        feature_norm, feature_pyramid: of the backbone; RT-DETR needs a pyramid: None is `simple` then.
        image_size: (height, width) for which a classifier's position embeddings are laid out anew; None: they stay.
    """

    kind: str = "rt_detr"
    channels: int = 256
    ffn_channels: int = 1024
    attention_heads: int = 8
    encoder_layers: int | None = None
    decoder_layers: int = 6
    num_queries: int = 300
    num_denoising: int = 100
    levels: tuple[int, ...] | None = None
    feature_norm: str = "final"
    feature_pyramid: str | None = None
    image_size: tuple[int, int] | None = None

    def config(self, backbone: VisionMambaConfig) -> RTDetrConfig | DeformableDetrConfig:
        """One for the labels of a classifier's configuration, on a backbone that is otherwise like it."""
        return HEADS[self.kind](self, backbone)


def _rt_detr(head: DetectionHead, backbone: VisionMambaConfig) -> RTDetrConfig:
    levels = head.levels or quarters(backbone.num_hidden_layers, 3)
    count, channels = len(levels), head.channels
    return RTDetrConfig(
        backbone_config=backbone_of_levels(backbone, levels, head.feature_norm, head.feature_pyramid or "simple"),
        freeze_backbone_batch_norms=False,  # a pyramid's have no statistics yet
        feat_strides=list(PYRAMID_STRIDES[-count:]),
        num_feature_levels=count,
        encoder_in_channels=[backbone.hidden_size] * count,
        encoder_hidden_dim=channels,
        encoder_ffn_dim=head.ffn_channels,
        encoder_layers=1 if head.encoder_layers is None else head.encoder_layers,
        encoder_attention_heads=head.attention_heads,
        encode_proj_layers=[count - 1],
        d_model=channels,
        decoder_in_channels=[channels] * count,
        decoder_ffn_dim=head.ffn_channels,
        decoder_layers=head.decoder_layers,
        decoder_attention_heads=head.attention_heads,
        num_queries=_queries(head, backbone, count),
        num_denoising=head.num_denoising,
        **label_maps(backbone),
    )


def _deformable_detr(head: DetectionHead, backbone: VisionMambaConfig) -> DeformableDetrConfig:
    levels = head.levels or (backbone.num_hidden_layers,)
    return DeformableDetrConfig(
        backbone_config=backbone_of_levels(backbone, levels, head.feature_norm, head.feature_pyramid),
        use_timm_backbone=False,  # type: ignore[call-arg]
        num_feature_levels=len(levels) + 1,
        d_model=head.channels,
        encoder_ffn_dim=head.ffn_channels,
        encoder_layers=6 if head.encoder_layers is None else head.encoder_layers,
        encoder_attention_heads=head.attention_heads,
        decoder_ffn_dim=head.ffn_channels,
        decoder_layers=head.decoder_layers,
        decoder_attention_heads=head.attention_heads,
        num_queries=head.num_queries,
        with_box_refine=True,
        # Queries are learned: what the encoder proposes by `two_stage` transformers' loss does not train.
        two_stage=False,
        auxiliary_loss=True,
        **label_maps(backbone),
    )


def _queries(head: DetectionHead, backbone: VisionMambaConfig, count: int) -> int:
    """As many as are asked for, or as there are cells in so many maps."""
    height, width = head.image_size or backbone.input_size
    strides = PYRAMID_STRIDES[-count:]
    return min(head.num_queries, sum(max(1, height // stride) * max(1, width // stride) for stride in strides))


HEADS: dict[str, Callable[[DetectionHead, VisionMambaConfig], Any]] = {
    "rt_detr": _rt_detr,
    "deformable_detr": _deformable_detr,
}


@dataclass(frozen=True)
class DetectionModels(DenseModels):
    """RT-DETR or Deformable DETR; see `DenseModels`."""

    task: ClassVar[str] = "object-detection"
    kind: ClassVar[str] = "detector"
    verb: ClassVar[str] = "detects"
    auto_class: ClassVar[Any] = AutoModelForObjectDetection
    class_layers: ClassVar[re.Pattern[str]] = re.compile(
        r"(^|\.)(enc_score_head|class_embed(\.\d+)?|denoising_class_embed)\.(weight|bias)$"
    )
    head: DetectionHead = DetectionHead()

    def prepare(self, model: Any) -> Any:
        model = prunable(model)
        model.loss_function = FiniteLoss(model.loss_function)
        return model


def detection_processor(image_processor: BaseImageProcessor, size: tuple[int, int] | None) -> BaseImageProcessor:
    """An image processor whose outputs transformers' pipeline for detection understands, with the statistics of
    another; one that is of this kind already stays as it is unless a size is given.

    Args:
        image_processor: of a classifier, or of a detector.
        size: (height, width) to which all images are resized, whatever their aspect ratio; None: 640 × 640, for a
            classifier's.
    """
    detects = hasattr(image_processor, "post_process_object_detection")
    if detects and size is None:
        return image_processor
    # Without torchvision transformers warns as soon as this is imported.
    from transformers import RTDetrImageProcessor

    height, width = size or (640, 640)
    options = statistics_of(image_processor)
    return RTDetrImageProcessor(do_resize=True, size={"height": height, "width": width}, do_pad=False, **options)
