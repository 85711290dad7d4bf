"""Folders of images with annotation files for objects: COCO's JSON, or Pascal VOC's XML with one file per image."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import ClassLabel, DatasetDict, Features, Image, Value
from datasets import Sequence as Repeated

from hf_vssm_prune.training.data.coco_files import read_coco
from hf_vssm_prune.training.data.media import IMAGES
from hf_vssm_prune.training.data.objects import ImageObjects
from hf_vssm_prune.training.data.sources import find_files, find_saved
from hf_vssm_prune.training.data.stored_files import stored_file, stored_splits
from hf_vssm_prune.training.data.voc_files import read_voc


def holds_object_files(path: Path) -> bool:
    """Whether a path is a folder with JSON or XML files, and not a data set of another kind."""
    if not path.is_dir() or find_saved(path):
        return False
    suffixes = {file.suffix.lower() for file in find_files(path)[0]}
    return ".parquet" not in suffixes and bool(suffixes & {".json", ".xml"})


def load_object_files(folder: Path) -> DatasetDict:
    """The columns "image" and "objects" of a folder.

    For COCO, splits are determined by the names of the JSON files or their folders; for Pascal VOC, by the lists in
    `ImageSets/Main` or the folders of the files.

    Raises:
        ValueError: a file cannot be read or has another format, or an image is missing.
    """
    files = sorted(find_files(folder)[0])
    images = [file for file in files if file.suffix.lower() in IMAGES.suffixes()]
    splits, names = read_coco(folder, files, images)
    if not splits:
        splits, names = read_voc(folder, files, images)
    if not splits:
        raise ValueError(
            f"The folder '{folder}' contains neither a JSON file in COCO's format (with 'images', 'annotations' and "
            "'categories') nor XML files in Pascal VOC's format."
        )
    objects = {
        "bbox": Repeated(Repeated(Value("float32"))),
        "category": Repeated(ClassLabel(names=names)),
        "iscrowd": Repeated(Value("bool")),
    }
    features = Features({"image": Image(decode=False), "objects": objects})
    ids = {name: label for label, name in enumerate(names)}
    return stored_splits({split: _columns(rows, ids) for split, rows in splits.items()}, features)


def _columns(rows: Sequence[ImageObjects], ids: Mapping[str, int]) -> dict[str, Any]:
    return {
        "image": [stored_file(path) for path, _ in rows],
        "objects": [
            {
                "bbox": [each["bbox"] for each in objects],
                "category": [ids[each["category"]] for each in objects],
                "iscrowd": [each["iscrowd"] for each in objects],
            }
            for _, objects in rows
        ],
    }
