"""Opens a checkpoint's configuration and its whole classifier, and makes the image processor of one without."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoImageProcessor, BaseImageProcessor
from transformers.utils import cached_file

from hf_vssm_prune.configuration_common import VisionMambaConfig, pruned_config
from hf_vssm_prune.families import Family, ImageClassifier, family_names
from hf_vssm_prune.heads import auto_class_of
from hf_vssm_prune.hub.retrying import patiently
from hf_vssm_prune.pruned_heads import prunable


# Options of `from_pretrained` that say where on the Hub, or in which copy of it, a model is.
PLACE_OPTIONS = ("token", "cache_dir", "subfolder", "local_files_only")
_PACKAGED_MODELS = Path(__file__).resolve().parents[1] / "data"


def packaged_model(name_or_path: str | Path) -> str:
    """The folder of a model that comes with the package, of which the name is enough; any other place as it is."""
    folder = _PACKAGED_MODELS / name_or_path
    is_name = len(Path(name_or_path).parts) == 1 and not Path(name_or_path).exists()
    return str(folder if is_name and (folder / "config.json").exists() else name_or_path)


def load_config(name_or_path: str, revision: str = "main", **place: Any) -> Any:
    """A checkpoint's configuration: of a model of this package, or of one of transformers' models on a backbone of it.
    Code that lies beside it is not run.

    Args:
        name_or_path: a folder, or a model on the Hub.
        revision: branch, tag or commit of a model on the Hub.
        place: of `PLACE_OPTIONS`.

    Raises:
        ValueError: it is of no family of this package, or has a value that is not allowed.
        OSError: there is none.
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
        raise OSError(f"{name_or_path} cannot be opened: {error}") from error
    if not isinstance(pruned_config(config), VisionMambaConfig):
        raise ValueError(f"{name_or_path} is a {config.model_type!r} model; it must be a {family_names()} model.")
    return config


def load_classifier(
    name_or_path: str | Path, ignore_mismatched_sizes: bool = False, revision: str = "main", **options: Any
) -> ImageClassifier:
    """An image classifier of this package with all its weights, in evaluation mode.

    transformers draws at random what a checkpoint lacks, and warns: right for a new classifier, and elsewhere an
    accuracy that means nothing. Weights are read from safetensors alone: a pickle is not opened.

    Args:
        name_or_path: a folder, or a model on the Hub.
        ignore_mismatched_sizes: a classifier that is missing, or of another number of labels, is replaced by a new one.
        revision: branch, tag or commit of a model on the Hub.
        options: for `from_pretrained`, such as `dtype`.

    Raises:
        ValueError: the weights are damaged, not finite, or not those that the Hub recorded; some are missing, of
            another shape or not the model's own; or see `load_config`.
        OSError: there is none.
    """
    place = {name: options[name] for name in PLACE_OPTIONS if name in options}
    config = load_config(str(name_or_path), revision, **place)
    if pruned_config(config) is not config:
        raise ValueError(f"{name_or_path} is a {config.model_type!r} model; it must be an image classifier.")
    return _load_whole(
        Family.auto_classifier(config), "image classifier", name_or_path, ignore_mismatched_sizes, revision, **options
    )


def load_dense_model(
    name_or_path: str | Path, ignore_mismatched_sizes: bool = False, revision: str = "main", **options: Any
) -> Any:
    """One of transformers' models for segmentation or detection on a backbone of this package, with all its weights, in
    evaluation mode; arguments and errors are those of `load_classifier`."""
    place = {name: options[name] for name in PLACE_OPTIONS if name in options}
    config = load_config(str(name_or_path), revision, **place)
    if pruned_config(config) is config:
        raise ValueError(f"{name_or_path} is an image classifier; it must be a model with a head on a backbone.")
    kind = f"{config.model_type} model"
    return _load_whole(auto_class_of(config), kind, name_or_path, ignore_mismatched_sizes, revision, **options)


def load_any_model(name_or_path: str | Path, **options: Any) -> Any:
    """An image classifier, or a model with a head that `pruned_heads.prunable` made; arguments and errors are those of
    `load_classifier` and `load_dense_model`."""
    config = load_config(str(name_or_path))
    if pruned_config(config) is config:
        return load_classifier(name_or_path, **options)
    return prunable(load_dense_model(name_or_path, **options))


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
    """Weights in the Hub's cache whose bytes are not those that the Hub recorded: files there are named by SHA-256."""
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
    """The image processor that was saved beside a model. Code that lies beside it is not run.

    Raises:
        ValueError: it is of no kind that transformers has.
        OSError: there is none.
    """
    return patiently(
        lambda: AutoImageProcessor.from_pretrained(
            packaged_model(name_or_path), revision=revision, trust_remote_code=False
        )
    )


def new_image_processor(
    config: VisionMambaConfig, image_mean: Sequence[float], image_std: Sequence[float], crop_pct: float | None = None
) -> BaseImageProcessor:
    """Resizes bicubically, of videos bilinearly, crops the center to the model's image size, and normalises.

    For a model of square images the shortest edge is resized, so that the aspect ratio stays; for one of rectangular
    images both sides are, each to the model's divided by `crop_pct`, so that the model sees `crop_pct` of the height
    and of the width whatever the image's aspect ratio.

    Args:
        config: of the model.
        image_mean, image_std: of each channel, of pixels from 0 to 1.
        crop_pct: each side of the crop as a fraction of that side of the resized image, as timm has it. None: 0.875 of
            images, all of a video's frames, as the published models were evaluated.

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
    if crop_pct is None:
        crop_pct = 1.0 if config.modality == "video" else 0.875
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct is {crop_pct}: it must be greater than 0 and at most 1.")
    # Without torchvision transformers warns as soon as one of them is looked up, so that it is not before it is needed.
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
        # Which frames there are to be is beyond an image processor: `num_frames` tells those who choose them.
        options["num_frames"] = config.input_size[0]
        return transformers.VideoMAEImageProcessor(**options)
    return transformers.BitImageProcessor(**options, do_convert_rgb=config.num_channels == 3)
