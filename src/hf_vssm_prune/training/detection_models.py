"""RT-DETR and Deformable DETR on this package's backbones, for a data set's classes; see `dense_models`."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import AutoModelForObjectDetection, BaseImageProcessor, DeformableDetrConfig, RTDetrConfig

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.feature_pyramid import PYRAMID_STRIDES
from hf_vssm_prune.heads import check_image_size
from hf_vssm_prune.label_maps import complete_label_maps
from hf_vssm_prune.pruned_heads import prunable
from hf_vssm_prune.training.dense_models import DenseModels, backbone_of_levels, quarters, statistics_of
from hf_vssm_prune.training.detection_losses import FiniteLoss


# (height, width) to which images are resized for a detector that is made from a classifier, unless another is given.
NEW_DETECTORS_SIZE = (640, 640)
# Image sides must be multiples of this, because RT-DETR's encoder upsamples its coarsest map by 2.
SIZE_DIVISOR = {"rt_detr": PYRAMID_STRIDES[-1], "deformable_detr": 1}
CHANNELS_DIVISOR = {"rt_detr": 4, "deformable_detr": 32}  # for sines of positions, and for group norm


def check_size(kind: str, size: tuple[int, int] | None) -> None:
    """Raises an error for a size (height, width) of images that a detector cannot process.

    Args:
        kind: the detector's `model_type`; of a kind without a line in `SIZE_DIVISOR`, nothing is known.

    Raises:
        ValueError: a side is not a multiple of the detector's divisor.
    """
    divisor = SIZE_DIVISOR.get(kind, 1)
    if size is not None and any(side % divisor for side in size):
        raise ValueError(f"--input_size is {size}: {kind} needs multiples of {divisor}.")


@dataclass(frozen=True)
class DetectionHead:
    """Options of a new head.

    Attributes:
        kind: a name in `HEADS`.
        channels, ffn_channels: width of the encoder and decoder, and of their feed-forward layers.
        attention_heads: number of attention heads in both.
        encoder_layers, decoder_layers: numbers of layers; None: as published.
        num_queries: maximum number of objects found in an image; RT-DETR selects one cell of its feature maps for each.
        num_denoising: number of noisy copies of the labelled boxes that RT-DETR also learns to restore; 0: none.
        levels: layers, counted from 1, whose outputs are used; None: three for RT-DETR, the last one for Deformable
            DETR.
        feature_norm, feature_pyramid: options of the backbone. RT-DETR needs a pyramid, so None means `simple` for it.
        image_size: (height, width) to which a classifier's position embeddings are resized; None: they are unchanged.
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
        """The configuration of a detector with the labels of a classifier's configuration and an otherwise equal
        backbone.

        Raises:
            ValueError: the image size does not suit this head.
        """
        check_size(self.kind, self.image_size)
        return HEADS[self.kind](self, backbone)


def _rt_detr(head: DetectionHead, backbone: VisionMambaConfig) -> RTDetrConfig:
    levels = head.levels or quarters(backbone.num_hidden_layers, 3)
    count, channels = len(levels), head.channels
    return RTDetrConfig(
        backbone_config=backbone_of_levels(backbone, levels, head.feature_norm, head.feature_pyramid or "simple"),
        freeze_backbone_batch_norms=False,  # those in a pyramid have no statistics yet
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
        **complete_label_maps({"id2label": backbone.label_names}),
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
        # Queries are learned, because transformers' loss does not train the encoder's proposals of `two_stage`.
        two_stage=False,
        auxiliary_loss=True,
        **complete_label_maps({"id2label": backbone.label_names}),
    )


def _queries(head: DetectionHead, backbone: VisionMambaConfig, count: int) -> int:
    """The requested number of queries, or the number of cells in `count` feature maps if that is smaller."""
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
        model.register_forward_pre_hook(_check_inputs, with_kwargs=True)
        return model


def _check_inputs(model: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    pixel_values = arguments[0] if arguments else options["pixel_values"]
    check_image_size(model.config, *pixel_values.shape[-2:])


def detection_processor(image_processor: BaseImageProcessor, size: tuple[int, int] | None) -> BaseImageProcessor:
    """An image processor whose outputs work with transformers' object detection pipeline, with the statistics of the
    given one. A detector's image processor is returned unchanged unless a size is given.

    Args:
        image_processor: image processor of a classifier or a detector.
        size: (height, width) to which all images are resized, whatever their aspect ratio; None: 640 × 640 for a
            classifier's image processor.
    """
    detects = hasattr(image_processor, "post_process_object_detection")
    if detects and size is None:
        return image_processor
    # Without torchvision, transformers warns when this is imported.
    from transformers import RTDetrImageProcessor

    height, width = size or NEW_DETECTORS_SIZE
    options = statistics_of(image_processor)
    return RTDetrImageProcessor(do_resize=True, size={"height": height, "width": width}, do_pad=False, **options)
