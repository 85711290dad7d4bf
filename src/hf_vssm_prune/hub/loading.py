"""Loads a checkpoint's configuration and its complete classifier, and creates an image processor if it has none."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.utils import cached_file

from hf_vssm_prune.configuration_common import VisionMambaConfig, has_head, pruned_config
from hf_vssm_prune.families import Family, ImageClassifier, family_names
from hf_vssm_prune.heads import auto_class_of
from hf_vssm_prune.hub.retrying import patiently
from hf_vssm_prune.pruned_heads import prunable


# Options of `from_pretrained` that say where on the Hub, or in which local copy of it, a model is.
PLACE_OPTIONS = ("token", "cache_dir", "subfolder", "local_files_only")
_PACKAGED_MODELS = Path(__file__).resolve().parents[1] / "data"


def packaged_model(name_or_path: str | Path) -> str:
    """The folder of a model that comes with the package, given its name; any other name or path is returned
    unchanged."""
    folder = _PACKAGED_MODELS / name_or_path
    is_name = len(Path(name_or_path).parts) == 1 and not Path(name_or_path).exists()
    return str(folder if is_name and (folder / "config.json").exists() else name_or_path)


def load_config(name_or_path: str, revision: str = "main", **place: Any) -> Any:
    """A checkpoint's configuration: for a model of this package, or for a transformers model with a backbone of this
    package. Code in the checkpoint's folder is not run.

    Args:
        name_or_path: a folder, or a model on the Hub.
        revision: branch, tag or commit of a model on the Hub.
        place: `PLACE_OPTIONS` for `from_pretrained`.

    Raises:
        ValueError: the model is of no family of this package, or the configuration has a value that is not allowed.
        OSError: there is no such checkpoint.
    """
    try:
        config = patiently(
            lambda: AutoConfig.from_pretrained(
                packaged_model(name_or_path), revision=revision, trust_remote_code=False, **place
            )
        )
    except StrictDataclassError as error:
        raise ValueError(f"The configuration of {name_or_path} is not valid: {error}") from error
    except OSError as error:
        is_there = Path(packaged_model(name_or_path)).exists()
        where = "" if is_there else ": there is no such folder; as a name on the Hub"
        raise OSError(f"{name_or_path} cannot be opened{where}: {error}") from error
    if not isinstance(pruned_config(config), VisionMambaConfig):
        raise ValueError(f"{name_or_path} is a {config.model_type!r} model; it must be a {family_names()} model.")
    return config


def load_classifier(
    name_or_path: str | Path, ignore_mismatched_sizes: bool = False, revision: str = "main", **options: Any
) -> ImageClassifier:
    """An image classifier of this package with all its weights, in evaluation mode.

    transformers initialises missing weights randomly and only warns. This is right for a new classifier; otherwise it
    gives a meaningless accuracy, so missing weights are an error here. Weights are read from safetensors only; pickle
    files are not opened.

    Args:
        name_or_path: a folder, or a model on the Hub.
        ignore_mismatched_sizes: replace a missing classifier, or one with another number of labels, by a new one.
        revision: branch, tag or commit of a model on the Hub.
        options: for `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: the weights are damaged, not finite, or differ from those that the Hub recorded; some are missing,
            unexpected or of the wrong shape; or see `load_config`.
        OSError: there is none.
    """
    place = {name: options[name] for name in PLACE_OPTIONS if name in options}
    config = load_config(str(name_or_path), revision, **place)
    if has_head(config):
        raise ValueError(f"{name_or_path} is a {config.model_type!r} model; it must be an image classifier.")
    return _load_whole(
        Family.auto_classifier(config), "image classifier", name_or_path, ignore_mismatched_sizes, revision, **options
    )


def load_dense_model(name_or_path: str | Path, revision: str = "main", **options: Any) -> Any:
    """A transformers model for segmentation or detection with a backbone of this package, with all its weights, in
    evaluation mode. Arguments and errors are those of `load_classifier`, but for `ignore_mismatched_sizes`."""
    place = {name: options[name] for name in PLACE_OPTIONS if name in options}
    config = load_config(str(name_or_path), revision, **place)
    if not has_head(config):
        raise ValueError(f"{name_or_path} is an image classifier; it must be a model with a head on a backbone.")
    kind = f"{config.model_type} model"
    return _load_whole(auto_class_of(config), kind, name_or_path, False, revision, **options)


def load_any_model(name_or_path: str | Path) -> Any:
    """An image classifier, or a model with a head created by `pruned_heads.prunable`. Errors are those of
    `load_classifier` and `load_dense_model`."""
    config = load_config(str(name_or_path))
    if not has_head(config):
        return load_classifier(name_or_path)
    return prunable(load_dense_model(name_or_path))


def _load_whole(
    auto_class: Any, kind: str, name_or_path: str | Path, ignore_mismatched_sizes: bool, revision: str, **options: Any
) -> Any:
    place = {name: options[name] for name in PLACE_OPTIONS if name in options}
    try:
        model, info = patiently(
            lambda: auto_class.from_pretrained(
                packaged_model(name_or_path),
                ignore_mismatched_sizes=ignore_mismatched_sizes,
                revision=revision,
                output_loading_info=True,
                use_safetensors=True,
                trust_remote_code=False,
                **options,
            )
        )
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"The weights of {name_or_path} cannot be read: {error}") from error
    wrong = {kind: sorted(names) for kind, names in info.items() if kind.endswith("_keys") and names}
    if ignore_mismatched_sizes:
        wrong = {kind: [name for name in names if "classifier." not in str(name)] for kind, names in wrong.items()}
    if any(wrong.values()):
        raise ValueError(f"{name_or_path} is not a complete {kind}: {wrong}.")
    if wrong_file := _wrongly_downloaded(name_or_path, revision, **place):
        raise ValueError(
            f"{wrong_file} differs from the file on the Hub: its SHA-256 is different. Delete it, and load the model "
            "again."
        )
    tensors = model.state_dict().items()
    if damaged := [name for name, tensor in tensors if tensor.is_floating_point() and not tensor.isfinite().all()]:
        raise ValueError(f"The weights of {name_or_path} contain NaN or infinity in {damaged}.")
    return model


def _wrongly_downloaded(name_or_path: str | Path, revision: str, **place: Any) -> Path | None:
    """A weights file in the Hub's cache whose bytes differ from those that the Hub recorded: files there are named by
    their SHA-256."""
    if Path(packaged_model(name_or_path)).exists():
        return None
    snapshot = Path(str(cached_file(name_or_path, "config.json", revision=revision, **place))).parent
    for weights in sorted(snapshot.glob("*.safetensors")):
        recorded = weights.resolve()
        if re.fullmatch("[0-9a-f]{64}", recorded.name) and sha256_of_file(recorded) != recorded.name:
            return recorded
    return None


def sha256_of_file(file: Path) -> str:
    """SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def load_image_processor(name_or_path: str | Path, revision: str = "main") -> BaseImageProcessor:
    """The image processor that was saved with a model. Code in the folder is not run.

    Raises:
        ValueError: transformers does not have its class.
        OSError: there is none.
    """
    return patiently(
        lambda: AutoImageProcessor.from_pretrained(
            packaged_model(name_or_path), revision=revision, trust_remote_code=False
        )
    )


def new_image_processor(
    config: VisionMambaConfig,
    image_mean: Sequence[float] | None = None,
    image_std: Sequence[float] | None = None,
    crop_pct: float | None = None,
) -> BaseImageProcessor:
    """A new image processor: resizes bicubically (for videos bilinearly), center-crops to the model's image size, and
    normalises.

    For a model with square images, the shortest edge is resized, which keeps the aspect ratio. For rectangular images,
    both sides are resized, each to the model's size divided by `crop_pct`, so that the model sees the fraction
    `crop_pct` of the height and of the width, regardless of the image's aspect ratio.

    Args:
        config: configuration of the model.
        image_mean, image_std: mean and standard deviation of each channel, for pixels from 0 to 1. None: ImageNet's.
        crop_pct: each side of the crop as a fraction of that side of the resized image, as in timm. None: 0.875 for
            images and 1 for videos, as the published models were evaluated.

    Raises:
        ValueError: a value is not allowed, or the number of values is not the number of channels.
    """
    image_mean = IMAGENET_DEFAULT_MEAN if image_mean is None else image_mean
    image_std = IMAGENET_DEFAULT_STD if image_std is None else image_std
    if not len(image_mean) == len(image_std) == config.num_channels:
        raise ValueError(
            f"image_mean has {len(image_mean)} and image_std {len(image_std)} values; the model's images have "
            f"{config.num_channels} channels."
        )
    if not all(std > 0 for std in image_std):
        raise ValueError(f"image_std is {list(image_std)}: each must be greater than 0.")
    if crop_pct is None:
        crop_pct = 1.0 if config.modality == "video" else 0.875
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}: it must be greater than 0 and at most 1.")
    # Without torchvision, transformers warns as soon as one of these classes is looked up, so it is not done before it
    # is needed.
    import transformers

    height, width = config.image_height_width(config.image_size)
    resized = {"height": round(height / crop_pct), "width": round(width / crop_pct)}
    options: dict[str, Any] = {
        "size": {"shortest_edge": resized["height"]} if height == width else resized,
        "crop_size": {"height": height, "width": width},
        "image_mean": list(image_mean),
        "image_std": list(image_std),
    }
    if config.modality == "video":
        # An image processor does not choose frames: `num_frames` is for the code that does.
        options["num_frames"] = config.input_size[0]
        return transformers.VideoMAEImageProcessor(**options)
    return transformers.BitImageProcessor(**options, do_convert_rgb=config.num_channels == 3)
