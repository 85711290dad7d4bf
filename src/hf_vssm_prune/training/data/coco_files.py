"""COCO's JSON format: one file per split, with "images", "annotations" and "categories"."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from hf_vssm_prune.training.data.objects import ImageObjects
from hf_vssm_prune.training.data.sources import SPLIT_NAMES


ID = (int, float, str)
# The lists of a file, and the fields that each of their entries must have, with their types.
PARTS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": ID, "file_name": (str,)},
    "annotations": {"image_id": ID, "category_id": ID, "bbox": (list,)},
    "categories": {"id": ID, "name": ID},
}


def read_coco(
    folder: Path, files: Sequence[Path], images: Sequence[Path]
) -> tuple[dict[str, list[ImageObjects]], list[str]]:
    """The images of each split with their objects, and the categories' names in the order of their ids. Categories
    without objects, such as Roboflow's parent category, are left out. Returns nothing if there is no such file.

    Args:
        folder: folder of the data set.
        files, images: JSON files and images in it.

    Raises:
        ValueError: a file cannot be read, two files belong to the same split, an entry lacks a field or has a value of
            another type, an image is missing, or an object has no category.
    """
    contents = {file: content for file in files if file.suffix.lower() == ".json" and (content := _read(file))}
    files_of_split: dict[str, Path] = {}
    for file in contents:
        split = _split_of(file.relative_to(folder))
        if split in files_of_split:
            raise ValueError(
                f"'{files_of_split[split]}' and '{file}' both belong to split '{split}': rename one of them after "
                "its own split (train, val, test), or remove it."
            )
        files_of_split[split] = file
    # By name, because the files of two splits may have numbered the same categories differently.
    numbers: dict[str, int] = {}
    for content in contents.values():
        used = {each["category_id"] for each in content["annotations"]}
        for number, name in _names_of(content).items():
            if number in used:
                numbers.setdefault(name, number)
    places = _Places(folder, images)
    rows = {split: _rows(file, split, contents[file], places) for split, file in files_of_split.items()}
    return rows, sorted(numbers, key=lambda name: (isinstance(numbers[name], str), numbers[name], name))


def _names_of(content: dict[str, Any]) -> dict[int, str]:
    """The names of a file's categories by id."""
    return {category["id"]: str(category["name"]) for category in content["categories"]}


def _read(file: Path) -> dict[str, Any] | None:
    """The content of a file in COCO's format; None for other files."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise ValueError(f"'{file}' cannot be read as JSON: {error}") from error
    if not isinstance(content, dict) or not all(name in content for name in PARTS):
        return None
    for part, fields in PARTS.items():
        entries = content[part]
        if not isinstance(entries, list) or not all(isinstance(each, dict) for each in entries):
            raise ValueError(f"'{part}' of '{file}' is not a list of entries with {', '.join(fields)}.")
        for number, each in enumerate(entries):
            if missing := [field for field in fields if each.get(field) is None]:
                raise ValueError(f"Entry {each.get('id', number)} of '{part}' in '{file}' has no '{missing[0]}'.")
            if wrong := [field for field, types in fields.items() if not isinstance(each[field], types)]:
                raise ValueError(
                    f"Entry {number} of '{part}' in '{file}' has a value of the wrong type as '{wrong[0]}': "
                    f"{each[wrong[0]]!r}."
                )
    return content


def _split_of(file: Path) -> str:
    """The split in the file's name (`instances_train2017.json`, `val.json`) or in that of a parent folder."""
    for part in (file.stem, *reversed(file.parts[:-1])):
        for word in re.split(r"[^a-z]+", part.lower()):
            if word in SPLIT_NAMES:
                return SPLIT_NAMES[word]
    return "train"


def _rows(file: Path, split: str, content: dict[str, Any], places: "_Places") -> list[ImageObjects]:
    names = _names_of(content)
    objects: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    counts = Counter(image["id"] for image in content["images"])
    if twice := [number for number, count in counts.items() if count > 1]:
        raise ValueError(f"{len(twice)} ids of images in '{file}' occur several times; the first is {twice[0]!r}.")
    for each in content["annotations"]:
        label, number = each["category_id"], each.get("id")
        if label not in names:
            raise ValueError(f"Annotation {number} of '{file}' has the category {label!r}, which is not in the file.")
        if each["image_id"] not in counts:
            raise ValueError(
                f"Annotation {number} of '{file}' belongs to image {each['image_id']!r}, which is not in the file."
            )
        crowd = bool(each.get("iscrowd"))
        objects[each["image_id"]].append({"bbox": each["bbox"], "category": names[label], "iscrowd": crowd})
    found = [(places.find(image["file_name"], file, split), objects[image["id"]]) for image in content["images"]]
    if missing := [image["file_name"] for image, (place, _) in zip(content["images"], found, strict=True) if not place]:
        raise ValueError(f"{len(missing)} of {len(found)} images of '{file}' are missing; the first is '{missing[0]}'.")
    return [(str(place), of_image) for place, of_image in found]


class _Places:
    """Image files by name, because the JSON does not say which folder a `file_name` is relative to."""

    def __init__(self, folder: Path, images: Sequence[Path]) -> None:
        self._folder = folder
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        for image in images:
            self._by_name[image.name].append(image)

    def find(self, file_name: str, beside: Path, split: str) -> Path | None:
        """The file whose path ends with this name; if there are several, the one in the JSON file's split or the
        nearest one."""
        wanted = PurePosixPath(file_name.replace("\\", "/")).parts  # the file may have been written on Windows
        named = self._by_name.get(wanted[-1], ()) if wanted else ()
        found = [image for image in named if image.parts[-len(wanted) :] == wanted]

        def rank(image: Path) -> tuple[bool, int]:
            return _split_of(image.relative_to(self._folder)) != split, _distance(image, beside)

        return min(found, key=rank, default=None)


def _distance(image: Path, beside: Path) -> int:
    """The number of folders to go up and down from one file to the other."""
    one, other = image.parent.parts, beside.parent.parts
    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    return len(one) + len(other) - 2 * shared
