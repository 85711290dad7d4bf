"""Opens what a checkpoint says about itself, and makes the image processor of one that comes without."""

from collections.abc import Sequence

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, BaseImageProcessor

from hf_vssm_prune.configuration_common import VisionMambaConfig


def load_config(name_or_path: str) -> VisionMambaConfig:
    """A checkpoint's configuration.

    Raises:
        ValueError: it is of no family of this package, or has a value that is not allowed.
        OSError: there is none.
    """
    try:
        config = AutoConfig.from_pretrained(name_or_path)
    except StrictDataclassError as error:
        raise ValueError(f"The configuration of {name_or_path} is not valid: {error}") from error
    if not isinstance(config, VisionMambaConfig):
        raise ValueError(f"{name_or_path} is a {config.model_type!r} model; a plainmamba or vim model is needed.")
    return config


def new_image_processor(
    config: VisionMambaConfig, image_mean: Sequence[float], image_std: Sequence[float], crop_pct: float
) -> BaseImageProcessor:
    """Resizes the shortest edge bicubically, crops the center to the model's image size, and normalises.

    Args:
        config: of the model.
        image_mean, image_std: of each channel, of pixels from 0 to 1.
        crop_pct: the crop's side as a share of the resized image's, as timm has it.

    Raises:
        ValueError: a value is not allowed, or there is not one for each channel.
    """
    if not len(image_mean) == len(image_std) == config.num_channels:
        raise ValueError(
            f"image_mean has {len(image_mean)} and image_std {len(image_std)} values; the model's images have "
            f"{config.num_channels} channels."
        )
    if not all(std > 0 for std in image_std):
        raise ValueError(f"image_std is {list(image_std)}: each must be greater than 0.")
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}: it must be greater than 0 and at most 1.")
    # Without torchvision transformers warns as soon as this is imported, so that it is not before it is needed.
    from transformers import BitImageProcessor

    height, width = config.image_height_width(config.image_size)
    return BitImageProcessor(
        size={"shortest_edge": round(max(height, width) / crop_pct)},
        crop_size={"height": height, "width": width},
        image_mean=list(image_mean),
        image_std=list(image_std),
        do_convert_rgb=config.num_channels == 3,
    )
