"""Pascal VOC's XML format: one file per image, with its objects."""

from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from hf_vssm_prune.training.data.objects import ImageObjects
from hf_vssm_prune.training.data.sources import SPLIT_NAMES


# Lists of images by split; `trainval` is used if the others do not exist.
LISTS = {"train": ("train", "trainval"), "validation": ("val",), "test": ("test",)}


def read_voc(
    folder: Path, files: Sequence[Path], images: Sequence[Path]
) -> tuple[dict[str, list[ImageObjects]], list[str]]:
    """The images of each split with their objects, and the sorted names of the classes. Returns nothing if there is no
    such file. Objects marked as difficult are treated like crowds: they are not used for training and not counted.

    Args:
        folder: folder of the data set.
        files, images: XML files and images in it.

    Raises:
        ValueError: a file cannot be read, or its image is missing.
    """
    roots = {file: root for file in files if file.suffix.lower() == ".xml" and (root := _read(file)) is not None}
    by_stem = {(image.parent, image.stem): image for image in images}
    by_name: dict[str, list[Path]] = {}
    for image in images:
        by_name.setdefault(image.stem, []).append(image)
    rows = {}
    for file, root in roots.items():
        beside = by_stem.get((file.parent, file.stem))
        found = [beside] if beside else by_name.get(Path(root.findtext("filename") or file.stem).stem, [])
        found = found or by_name.get(file.stem, [])
        if not found:
            raise ValueError(f"The image of '{file}' is missing: '{root.findtext('filename')}'.")
        image = min(found, key=lambda each: _split_of(folder, each) != _split_of(folder, file))
        rows[file] = (str(image), [_object(each, file) for each in root.iter("object")])
    names = sorted({each["category"] for _, objects in rows.values() for each in objects})
    splits = _splits(folder, files, list(rows))
    return {split: [rows[file] for file in of_split] for split, of_split in splits.items()}, names


def _read(file: Path) -> ElementTree.Element | None:
    """The root of a file in VOC's format; None for other files."""
    try:
        root = ElementTree.parse(file).getroot()
    except (OSError, ElementTree.ParseError) as error:
        raise ValueError(f"'{file}' cannot be read as XML: {error}") from error
    return root if root.tag == "annotation" else None


def _object(element: ElementTree.Element, file: Path) -> dict[str, Any]:
    name = (element.findtext("name") or "").strip()
    corners = [element.findtext(f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")]
    try:
        left, top, right, bottom = (float(side or "") for side in corners)
    except ValueError as error:
        raise ValueError(f"An object of '{file}' has the box {corners}: it must have four numbers.") from error
    if not name:
        raise ValueError(f"An object of '{file}' has no name.")
    # Pixels are counted from 1, and the last pixel is part of the box.
    return {
        "bbox": [left - 1, top - 1, right - left + 1, bottom - top + 1],
        "category": name,
        "iscrowd": (element.findtext("difficult") or "0").strip() == "1",
    }


def _split_of(folder: Path, file: Path) -> str:
    parts = file.relative_to(folder).parts[:-1]
    return next((SPLIT_NAMES[part.lower()] for part in reversed(parts) if part.lower() in SPLIT_NAMES), "train")


def _splits(folder: Path, files: Sequence[Path], annotations: list[Path]) -> dict[str, list[Path]]:
    by_stem: dict[str, list[Path]] = {}
    for file in annotations:
        by_stem.setdefault(file.stem, []).append(file)
    splits: dict[str, list[Path]] = {
        split: [_listed(stem, by_stem, file) for stem, file in listed]
        for split, listed in listed_images(files, "Main", by_stem).items()
    }
    if splits:
        return splits
    for file in annotations:
        splits.setdefault(_split_of(folder, file), []).append(file)
    return splits


def listed_images(files: Sequence[Path], kind: str, stems: Container[str]) -> dict[str, list[tuple[str, Path]]]:
    """The images of each split, as names without a suffix, and the lists in which they are; nothing if there are no
    lists.

    Args:
        files: all files of the data set.
        kind: folder of the lists in `ImageSets`: `Main` for objects, `Segmentation` for masks.
        stems: names of the images that exist. A line that is none of them is a name and something else, separated by a
            space.
    """
    lists: dict[str, list[Path]] = {}  # a folder of several years has several lists of the same name
    for file in files:
        if file.suffix == ".txt" and file.parent.name == kind:
            lists.setdefault(file.stem, []).append(file)
    splits: dict[str, list[tuple[str, Path]]] = {}
    for split, names in LISTS.items():
        if name := next((name for name in names if name in lists), None):
            splits[split] = [(stem, file) for file in lists[name] for stem in _stems(file, stems)]
    return splits


def _stems(file: Path, stems: Container[str]) -> list[str]:
    lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    return [line if line in stems else line.split()[0] for line in lines]


def _listed(stem: str, by_stem: dict[str, list[Path]], file: Path) -> Path:
    """The XML file of a list's image, in the folder around the list's `ImageSets/Main` if there are several."""
    if stem not in by_stem:
        raise ValueError(f"'{file}' lists '{stem}', for which there is no XML file.")
    return min(by_stem[stem], key=lambda each: file.parent.parent.parent not in each.parents)
