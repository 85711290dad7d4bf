"""The settings that a resumed run must share with the run whose checkpoint it continues, and their comparison."""

import json
from collections.abc import Mapping
from typing import Any

from transformers import BaseImageProcessor

from hf_vssm_prune.training.image_steps import NORMALIZATION, SIZES


# These only change the random numbers for mixup, CutMix and drop path, which each process draws for its own batch.
SPREAD = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
# Checkpoints of version 0.1 called this "updates"; they have no task, because there was only one.
NEW_NAMES = {
    "update": "step",
    "updates": "steps",
    "updates_per_epoch": "steps_per_epoch",
    "images_per_update": "images_per_step",
}
FIRST_TASK = "image-classification"
# Settings that are dicts and compared entry by entry. An entry that only one side has is from another version of
# transformers or of this package.
DESCRIPTIONS = ("config", "image_processor")
# Settings that are fingerprints, and what it means if one differs.
FINGERPRINTS = {
    "training_images": "the names, the labels or the order of the training images were others",
    "evaluation_images": "the names, the labels or the order of the evaluation images were others",
    "teacher": "the teacher had other weights",
}
ADDED = (*DESCRIPTIONS, *FINGERPRINTS, "label_names")  # checkpoints of version 0.1 do not have them
MOST_SHOWN = 100  # characters of a setting in a message
# Entries of a configuration that are settings of their own, or depend on the machine or on the version of transformers.
NOT_DESCRIBED = {
    *("id2label", "label2id", "num_labels", "token_pruning", "drop_path_rate"),
    *("scan_backend", "transformers_version", "dtype", "architectures", "auto_map"),
}
DESCRIBED_STEPS = (*SIZES, "resample", *NORMALIZATION)


def compare_settings(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Describes the settings that differ.

    Args:
        saved: settings in a checkpoint, of this version or an earlier one.
        settings: those of the run that resumes from it.

    Returns:
        Those that must not differ, for the run to end with the same weights, and those in `SPREAD`.
    """
    before = {"task": FIRST_TASK} | with_new_names(saved)
    now = json.loads(json.dumps(settings))  # in the file, tuples have become lists
    differing = _differences(before, now)
    fixed = [words for name, words in differing.items() if name not in SPREAD]
    if (was := _images_per_epoch(before)) != (images := _images_per_epoch(now)):
        fixed.append(f"the images in whole batches of an epoch were {was} and are {images}")
    return fixed, [words for name, words in differing.items() if name in SPREAD]


def with_new_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a checkpoint by their names in this version."""
    return {NEW_NAMES.get(name, name): value for name, value in saved.items()}


def _differences(saved: dict[str, Any], settings: dict[str, Any]) -> dict[str, str]:
    """For each setting that differs, a description."""
    before, now = _entries(saved), _entries(settings)
    return {
        name: FINGERPRINTS.get(name, f"{name} was {_shown(before.get(name))} and is {_shown(value)}")
        for name, value in now.items()
        if value != before.get(name) and (name in before or name.split(".")[0] not in ADDED)
    }


def _entries(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The settings, with those in `DESCRIPTIONS` replaced by their entries, as "config.image_size"."""
    entries: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and (prefix or name in DESCRIPTIONS):
            entries |= _entries(value, f"{prefix}{name}.")
        else:
            entries[f"{prefix}{name}"] = value
    return entries


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"


def describe_config(config: Any) -> dict[str, Any]:
    """The options of a model's configuration that a resumed run must share and that are not settings of their own."""
    return _without(json.loads(config.to_json_string(use_diff=False)))


def _without(options: dict[str, Any]) -> dict[str, Any]:
    return {
        name: _without(value) if isinstance(value, dict) else value
        for name, value in options.items()
        if name not in NOT_DESCRIBED and not name.startswith("_")
    }


def describe_image_processor(image_processor: BaseImageProcessor) -> dict[str, Any]:
    """The steps of an image processor, which a resumed run must share."""
    options = json.loads(image_processor.to_json_string())
    return {name: options[name] for name in DESCRIBED_STEPS if name in options}


def _images_per_epoch(settings: dict[str, Any]) -> int:
    """Number of training images of an epoch, without those that do not fill a batch of all processes: with batches of
    another size, the last step of an epoch may have others."""
    batch_size = settings["per_device_train_batch_size"] * settings["num_processes"]
    return settings["num_training_images"] // batch_size * batch_size
