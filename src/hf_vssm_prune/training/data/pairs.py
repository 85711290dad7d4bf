"""Folders of images and masks: finds the mask of each image."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import DatasetDict, Features, Image

from hf_vssm_prune.training.data.media import IMAGES
from hf_vssm_prune.training.data.sources import SPLIT_NAMES, find_files, find_saved
from hf_vssm_prune.training.data.stored_files import stored_file, stored_splits
from hf_vssm_prune.training.data.voc_files import listed_images


logger = logging.getLogger(__name__)

# Names of folders, in lower case.
IMAGE_FOLDERS = {"images", "image", "imgs", "img", "img_dir", "jpegimages", "photos", "leftimg8bit"}
MASK_FOLDERS = {
    *("masks", "mask", "annotations", "annotation", "ann_dir", "labels", "label", "segmentation", "segmentations"),
    *("segmentationclass", "gtfine", "gt", "seg"),
}
# Endings of file names, without the suffix, for masks and for images.
MASK_ENDS = re.compile(
    r"[ _-](gtfine[_-]labeltrainids|gtfine[_-]labelids|labeltrainids|labelids|masks?|seg|segmentation|labels?|gt|"
    r"annotations?|l)$",
    re.IGNORECASE,
)
IMAGE_ENDS = re.compile(r"[ _-](leftimg8bit|image|img|photo)$", re.IGNORECASE)
LOSSY = {".jpg", ".jpeg", ".webp"}  # such files are never masks
# Pascal VOC's masks of objects, which are not masks of classes.
OTHER_FOLDERS = {"segmentationobject"}
# Cityscapes' masks of all classes, and of those that are trained; if there are both, the second.
ALL_IDS, TRAIN_IDS = "_labelIds", "_labelTrainIds"


class _File(NamedTuple):
    """An image file: its split, whether it is a mask, its name with the folders that distinguish it, and the same
    without an ending such as "_mask". It shares one of the two with its partner."""

    path: Path
    split: str
    is_mask: bool
    name: str
    key: str


def holds_pairs(path: Path) -> bool:
    """Whether a path is a folder of image files, and not a data set of another kind."""
    if not path.is_dir() or find_saved(path):
        return False
    return not any(file.suffix == ".parquet" for file in find_files(path)[0])


def load_pair_folder(folder: Path) -> DatasetDict:
    """The columns "image" and "mask" of a folder of images with one mask each.

    Images and masks are in separate folders ("images" and "masks", "annotations" or "labels", inside or around the
    folders of splits), or next to each other: `a.jpg` and `a.png`, `a.png` and `a_mask.png`. If there are Pascal VOC's
    lists in `ImageSets/Segmentation`, only the images in these lists are used.

    Raises:
        ValueError: an image has no mask or several, there are no images, or an image in a list is missing.
    """
    paths, _ = find_files(folder)
    files = _listed(_describe_files(folder, paths), paths)
    images = sorted((file for file in files if not file.is_mask), key=lambda file: (file.split, file.key, file.path))
    masks = [file for file in files if file.is_mask]
    if not images or not masks:
        raise ValueError(
            f"The folder '{folder}' contains {len(images)} images and {len(masks)} masks: each image needs a mask, "
            "in a folder 'masks' next to 'images', or next to the image ('a.jpg' and 'a.png', or 'a_mask.png')."
        )
    partners = _find_partners(images, masks)
    for problem, wrong in (
        ("no mask", [path for path, found in partners.items() if not found]),
        ("several masks", [path for path, found in partners.items() if len(found) > 1]),
    ):
        if wrong:
            raise ValueError(
                f"{len(wrong)} of {len(images)} images in '{folder}' have {problem}; the first is '{min(wrong)}'."
            )
    used = {mask for found in partners.values() for mask in found}
    if idle := sorted(mask.path for mask in masks if mask.path not in used):
        logger.warning("%d masks in '%s' have no image; the first is '%s'.", len(idle), folder, idle[0])
    splits: dict[str, list[tuple[Path, Path]]] = {}
    for image in images:
        (mask,) = partners[image.path]
        splits.setdefault(image.split, []).append((image.path, mask))
    features = Features({"image": Image(decode=False), "mask": Image(decode=False)})
    columns = {
        split: {
            "image": [stored_file(image) for image, _ in pairs],
            "mask": [stored_file(mask) for _, mask in pairs],
        }
        for split, pairs in splits.items()
    }
    return stored_splits(columns, features)


def _listed(files: list[_File], paths: Sequence[Path]) -> list[_File]:
    """The files that Pascal VOC's lists name, in the splits of these lists; all files if there are no lists."""
    by_stem: dict[str, list[_File]] = {}
    for file in files:
        by_stem.setdefault(file.path.stem, []).append(file)
    lists = listed_images(paths, "Segmentation", by_stem)
    if not lists:
        return files
    found = []
    for split, listed in lists.items():
        for stem, list_file in listed:
            if stem not in by_stem:
                raise ValueError(f"'{list_file}' lists '{stem}', for which there is no image.")
            found += [each._replace(split=split) for each in by_stem[stem]]
    return found


def _find_partners(images: Sequence[_File], masks: Sequence[_File]) -> dict[Path, set[Path]]:
    """The masks of each image. A mask with the name of an image belongs to no other image: in separate folders, names
    may end in "_l" or "_img" on both sides."""
    by_name: dict[tuple[str, str], list[_File]] = {}
    for mask in masks:
        for name in {mask.name, mask.key}:
            by_name.setdefault((mask.split, name), []).append(mask)
    taken = {(image.split, image.name) for image in images}
    return {
        image.path: {
            mask.path
            for name in (image.name, image.key)
            for mask in by_name.get((image.split, name), ())
            if mask.name == image.name or (mask.split, mask.name) not in taken
        }
        for image in images
    }


def _describe_files(folder: Path, paths: Sequence[Path]) -> list[_File]:
    paths = sorted(
        file
        for file in paths
        if file.suffix.lower() in IMAGES.suffixes() and file.parent.name.lower() not in OTHER_FOLDERS
    )
    trained = {path.with_name(path.name.replace(TRAIN_IDS, ALL_IDS)) for path in paths if TRAIN_IDS in path.name}
    paths = [path for path in paths if path not in trained]
    photos = {path.with_suffix("") for path in paths if path.suffix.lower() in LOSSY}
    return [_describe_file(folder, path, photos) for path in paths]


def _describe_file(folder: Path, path: Path, photos: set[Path]) -> _File:
    parts = path.relative_to(folder).parts[:-1]
    kinds = [part for part in parts if part.lower() in IMAGE_FOLDERS | MASK_FOLDERS]
    if kinds:
        is_mask = kinds[-1].lower() in MASK_FOLDERS
    else:
        lossless = path.suffix.lower() not in LOSSY
        is_mask = lossless and (MASK_ENDS.search(path.stem) is not None or path.with_suffix("") in photos)
    named = next((part for part in parts if part.lower() in SPLIT_NAMES), None)
    rest = [part for part in parts if part != named and part not in kinds]
    stem = (MASK_ENDS if is_mask else IMAGE_ENDS).sub("", path.stem)
    split = "train" if named is None else SPLIT_NAMES[named.lower()]
    return _File(path, split, is_mask, "/".join([*rest, path.stem]), "/".join([*rest, stem]))
