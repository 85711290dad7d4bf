"""Images with masks: where they are found, which are rejected, augmentation, and evaluation."""

import json
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image
from PIL import ExifTags
from PIL import Image as PILImage
from transformers import SegformerImageProcessorPil

from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.data.mask_items import EvaluationMasks, TrainingMasks, collate_masks
from hf_vssm_prune.training.data.masks import decode_mask, reduced
from hf_vssm_prune.training.data.segmentation import (
    MaskOptions,
    load_segmentation_datasets,
    load_segmentation_evaluation,
)
from hf_vssm_prune.training.image_steps import ImageError
from hf_vssm_prune.training.mask_augmentation import MaskAugmentation, augment, distort_colours, part_of_mask
from hf_vssm_prune.training.sliding_window import slide, window_boxes


PROCESSOR = SegformerImageProcessorPil(do_resize=False)
UNCHANGED = {"scale": (1.0, 1.0), "horizontal_flip": 0.0, "photometric_distortion": False, "most_of_a_class": 1.0}


def write_pair(image: Path, mask: Path, ids=(0, 1), size=(12, 8)) -> None:
    """Writes an image (width, height) whose red channel is 100 times its mask's id. Pixels differ between paths."""
    pixels = np.random.default_rng(zlib.crc32(str(image).encode())).choice(ids, size[::-1]).astype(np.uint8)
    for file in (image, mask):
        file.parent.mkdir(parents=True, exist_ok=True)
    red = PILImage.fromarray(pixels[..., None] * np.array([100, 0, 0], np.uint8))
    red.save(image, quality=95, subsampling=0)  # of JPEG, which would blur the colour
    PILImage.fromarray(pixels).save(mask)


def load(folder: Path, label_file=None, **options):
    data = DataArguments(str(folder), dataloader_num_workers=0, **options)
    return load_segmentation_datasets(data, MaskOptions(label_file), seed=0)


# Folders


LAYOUTS = {
    "kinds in splits": ("{split}/images/{name}.png", "{split}/masks/{name}.png"),
    "splits in kinds": ("img_dir/{split}/{name}.jpg", "ann_dir/{split}/{name}.png"),
    "deep": ("leftImg8bit/{split}/ulm/{name}_leftImg8bit.png", "gtFine/{split}/ulm/{name}_gtFine_labelIds.png"),
    "endings on both sides": ("images/{split}/{name}_l.png", "masks/{split}/{name}_l.png"),
    "another ending on both sides": ("images/{split}/{name}_img.png", "masks/{split}/{name}_img.png"),
    "beside": ("{split}/{name}.jpg", "{split}/{name}.png"),
    "beside, by name": ("{split}/{name}.png", "{split}/{name}_mask.png"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_images_beside_masks(layout, tmp_path):
    image, mask = LAYOUTS[layout]
    for split, count in (("train", 3), ("val", 2)):
        for i in range(count):
            names = {"split": split, "name": f"a{i}"}
            write_pair(tmp_path / image.format(**names), tmp_path / mask.format(**names))
    datasets = load(tmp_path)
    assert (len(datasets.train), len(datasets.evaluation)) == (3, 2)
    assert datasets.label_names == ["class 0", "class 1"]
    for row in datasets.train.rows:
        pixels = np.asarray(PILImage.open(row["image"]["path"]).convert("RGB"))
        ids = decode_mask(row["mask"], "mask")
        assert np.abs(pixels[..., 0].astype(int) - 100 * ids).mean() < 15  # of this very image, but for JPEG


def test_pascal_vocs_lists_choose_the_images(tmp_path):
    """Most of its photos have no masks, and it has a second kind of masks."""
    voc = tmp_path / "data" / "VOC2012"
    for name in ("a", "b", "c"):
        write_pair(voc / "JPEGImages" / f"{name}.jpg", voc / "SegmentationClass" / f"{name}.png")
        write_pair(voc / "JPEGImages" / f"{name}.jpg", voc / "SegmentationObject" / f"{name}.png")
    write_pair(voc / "JPEGImages" / "unlisted.jpg", tmp_path / "unlisted.png")
    lists = voc / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, stems in {"train": "a\nc\n", "val": "b\n", "trainval": "a\nb\nc\n"}.items():
        (lists / f"{name}.txt").write_text(stems)
    datasets = load(voc.parent)
    for side, stems in ((datasets.train, ["a", "c"]), (datasets.evaluation, ["b"])):
        assert [Path(row["image"]["path"]).stem for row in side.rows] == stems
        assert all("SegmentationClass" in row["mask"]["path"] for row in side.rows)
    (lists / "train.txt").write_text("a\nd\n")
    with pytest.raises(ValueError, match=r"train\.txt' lists 'd', for which there is no image"):
        load(voc.parent)


def test_cityscapes_trained_classes_are_preferred(tmp_path):
    for split in ("train", "val"):
        for kind in ("labelIds", "labelTrainIds", "color", "instanceIds"):
            write_pair(
                tmp_path / "leftImg8bit" / split / "ulm" / "a_leftImg8bit.png",
                tmp_path / "gtFine" / split / "ulm" / f"a_gtFine_{kind}.png",
            )
    rows = load(tmp_path).train.rows
    assert [Path(row["mask"]["path"]).name for row in rows] == ["a_gtFine_labelTrainIds.png"]


def test_a_part_is_set_apart_where_there_is_no_split(tmp_path):
    for i in range(10):
        write_pair(tmp_path / "images" / f"{i}.png", tmp_path / "labels" / f"{i}.png")
    datasets = load(tmp_path, train_val_split=0.2)
    rows = [row["row"] for part in (datasets.train, datasets.evaluation) for row in part.rows]
    assert (len(datasets.train), len(datasets.evaluation), sorted(rows)) == (8, 2, list(range(10)))
    assert len(load(tmp_path, max_train_samples=3).train) == 3


def test_names_with_and_without_an_ending_are_not_confused(tmp_path):
    for name in ("a", "a_img", "a_l"):
        write_pair(tmp_path / "images" / f"{name}.png", tmp_path / "masks" / f"{name}.png")
    datasets = load(tmp_path)
    rows = [row for part in (datasets.train, datasets.evaluation) for row in part.rows]
    assert len(rows) == 3
    assert all(Path(row["image"]["path"]).name == Path(row["mask"]["path"]).name for row in rows)
    write_pair(tmp_path / "images" / "b.png", tmp_path / "masks" / "b.png")
    write_pair(tmp_path / "images" / "b.png", tmp_path / "masks" / "b_mask.png")
    with pytest.raises(ValueError, match=r"1 of 4 images in '.*' have several masks; the first is '.*b\.png'"):
        load(tmp_path)


def test_a_class_of_images_set_apart_has_a_name(tmp_path):
    """With one of these seeds, the only image with the highest id is held out for evaluation."""
    for i in range(4):
        write_pair(
            tmp_path / "images" / f"{i}.png", tmp_path / "masks" / f"{i}.png", ids=(0, 1, 2) if i == 3 else (0, 1)
        )
    data = DataArguments(str(tmp_path), dataloader_num_workers=0, train_val_split=0.5)
    for seed in range(4):
        assert len(load_segmentation_datasets(data, MaskOptions(), seed).label_names) == 3


def test_an_image_without_a_mask_is_named(tmp_path):
    write_pair(tmp_path / "images" / "a.png", tmp_path / "masks" / "a.png")
    write_pair(tmp_path / "images" / "b.png", tmp_path / "other" / "b.txt.png")
    (tmp_path / "other" / "b.txt.png").unlink()
    with pytest.raises(ValueError, match=r"1 of 2 images in '.*' have no mask; the first is '.*b\.png'"):
        load(tmp_path)


def test_a_folder_without_masks_is_refused(tmp_path):
    write_pair(tmp_path / "images" / "a.png", tmp_path / "elsewhere.png")
    (tmp_path / "elsewhere.png").unlink()
    with pytest.raises(ValueError, match="contains 1 images and 0 masks: each image needs a mask"):
        load(tmp_path)


# Columns and names


def write_parquet(folder: Path, columns=("image", "annotation"), count=4, ids=(0, 1)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict = {name: [] for name in columns}
    for i in range(count):
        write_pair(folder / f"{i}.png", folder / f"{i}_mask.png", ids)
        for name, file in zip(columns, (f"{i}.png", f"{i}_mask.png"), strict=True):
            rows[name].append({"bytes": (folder / file).read_bytes(), "path": None})
            (folder / file).unlink()
    features = Features({name: Image() for name in columns})
    for split in ("train", "test"):
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


@pytest.mark.parametrize("columns", [("image", "annotation"), ("pixel_values", "label"), ("image", "mask")])
def test_columns_are_found(columns, tmp_path):
    write_parquet(tmp_path, columns)
    assert len(load(tmp_path).train) == 4
    named = load(tmp_path, image_column_name=columns[0], label_column_name=columns[1])
    assert named.label_names == ["class 0", "class 1"]


def test_columns_that_are_not_clear_are_asked_for(tmp_path):
    write_parquet(tmp_path, ("left", "right"))
    with pytest.raises(ValueError, match="name them with --image_column_name and --label_column_name"):
        load(tmp_path)
    with pytest.raises(ValueError, match="There is no column 'depth' in split 'train'; the columns are left, right"):
        load(tmp_path, label_column_name="depth")
    assert len(load(tmp_path, image_column_name="left", label_column_name="right").train) == 4


def test_names_of_classes(tmp_path):
    write_parquet(tmp_path)
    (tmp_path / "id2label.json").write_text(json.dumps({"0": "sky", "1": "road", "2": "tree"}))
    assert load(tmp_path).label_names == ["sky", "road", "tree"]
    (tmp_path / "names.txt").write_text("air\nground\n")
    assert load(tmp_path, label_file=str(tmp_path / "names.txt")).label_names == ["air", "ground"]
    data = EvaluationDataArguments(str(tmp_path), dataloader_num_workers=0)
    pairs, names = load_segmentation_evaluation(data, MaskOptions(), seed=0)
    assert (len(pairs), pairs.split, names) == (4, "test", ["sky", "road", "tree"])
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load(tmp_path, label_file=str(tmp_path / "missing.json"))


def test_streams(tmp_path):
    write_parquet(tmp_path)
    with pytest.raises(ValueError, match="does not name its classes, and the masks are streamed"):
        load(tmp_path, streaming=True)
    (tmp_path / "classes.txt").write_text("air\nground\n")
    datasets = load(tmp_path, streaming=True, shuffle_buffer_size=2)
    assert (len(datasets.train), datasets.train.num_labels, len(datasets.evaluation)) == (4, 2, 4)
    with pytest.raises(ValueError, match="max_train_samples is 5: split 'train' has 4 images"):
        load(tmp_path, streaming=True, max_train_samples=5)


# Masks


@pytest.mark.parametrize("mode", ["L", "P", "RGB", "I;16", "LA"])
def test_masks_of_all_modes(mode, tmp_path):
    ids = np.random.default_rng(0).integers(0, 9, (5, 7), dtype=np.uint8)
    if mode == "P":
        image = PILImage.fromarray(ids).convert("P")
        image.putdata(ids.flatten().tolist())
        image.putpalette(bytes(range(255, -1, -1)) * 3)
    elif mode == "I;16":
        image = PILImage.fromarray(ids.astype(np.uint16))
    else:
        image = PILImage.fromarray(ids).convert(mode)
    image.save(tmp_path / "mask.png")
    found = decode_mask({"bytes": (tmp_path / "mask.png").read_bytes(), "path": None}, "mask")
    assert (found == ids).all()
    assert found.dtype == np.int64


@pytest.mark.parametrize("mode", ["P", "L", "I;16"])
def test_masks_are_turned_as_their_images_are(mode, tmp_path):
    """A mask may have the EXIF orientation of the photo from which it was made."""
    write_pair(tmp_path / "train" / "images" / "a.png", tmp_path / "train" / "masks" / "a.png")
    write_pair(tmp_path / "test" / "images" / "a.png", tmp_path / "test" / "masks" / "a.png")
    for kind in ("images", "masks"):
        file = tmp_path / "test" / kind / "a.png"
        image = PILImage.open(file)
        if kind == "masks":
            image = PILImage.fromarray(np.asarray(image).astype(np.uint16 if mode == "I;16" else np.uint8))
            if mode == "P":
                image.putpalette(bytes(range(255, -1, -1)) * 3)
        orientation = PILImage.Exif()
        orientation[ExifTags.Base.Orientation] = 6
        image.save(file, exif=orientation)
    item = EvaluationMasks(load(tmp_path).evaluation, PROCESSOR, MaskOptions())[0]
    assert item["labels"].shape == (12, 8)
    assert ((item["pixel_values"][0] > item["pixel_values"][0].min()) == (item["labels"] == 1)).all()


def test_reduced_labels():
    ids = np.array([[0, 1, 2, 255]])
    assert reduced(ids, True).tolist() == [[255, 0, 1, 255]]
    assert reduced(ids, False) is ids


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (
            lambda file: file.write_bytes(b"no image"),
            r"The mask in row 0 of split 'train' \('.*a\.png'\) cannot be read",
        ),
        (
            lambda file: PILImage.new("L", (12, 9)).save(file),
            r"The mask in row 0 .* is 12 x 9 pixels, and its image 12 x 8: they must have the same size",
        ),
        (
            lambda file: PILImage.new("L", (12, 8), 7).save(file),
            r"The mask in row 0 .* has the class ids 7: allowed values are 0 to 1, and 255 for pixels of no class",
        ),
        (
            lambda file: PILImage.new("RGB", (12, 8), (1, 2, 3)).save(file),
            "is a colour image: a mask must have a class id in each pixel",
        ),
    ],
    ids=["damaged", "size", "ids", "colours"],
)
def test_bad_masks_are_named(write, message, tmp_path):
    for split in ("train", "test"):
        write_pair(tmp_path / split / "images" / "a.png", tmp_path / split / "masks" / "a.png")
    (tmp_path / "id2label.json").write_text('["a", "b"]')
    write(tmp_path / "train" / "masks" / "a.png")
    datasets = load(tmp_path)
    items = TrainingMasks(datasets.train, PROCESSOR, MaskOptions(), MaskAugmentation((8, 8)), seed=0)
    with pytest.raises(ImageError, match=message):
        items[0]
    assert EvaluationMasks(datasets.evaluation, PROCESSOR, MaskOptions())[0]["labels"].shape == (8, 12)


# Augmentation


def striped(height: int, width: int) -> tuple[PILImage.Image, np.ndarray]:
    """An image whose grey value is 20 times its mask's id: vertical stripes, 4 pixels wide."""
    ids = np.broadcast_to(np.arange(width) // 4 % 10, (height, width)).astype(np.int64)
    return PILImage.fromarray((20 * ids).astype(np.uint8)), ids


@pytest.mark.parametrize("seed", range(8))
def test_masks_move_with_their_images(seed):
    image, mask = striped(40, 60)
    changes = {**UNCHANGED, "scale": (0.5, 2.0), "horizontal_flip": 0.5}
    generator = np.random.default_rng(seed)
    augmentation = MaskAugmentation((24, 32), **changes)
    cut, ids = augment(image, mask, (40, 60), PILImage.Resampling.NEAREST, augmentation, 255, generator)
    assert ids.shape == (cut.height, cut.width)
    assert cut.height <= 24
    assert cut.width <= 32
    # Stripes of 2 to 8 pixels: all but those at their borders are of their own mask.
    assert (np.asarray(cut) == 20 * ids).mean() > 0.85


def test_nothing_changes_without_augmentation():
    image, mask = striped(16, 16)
    cut, ids = augment(
        image, mask, (16, 16), PILImage.Resampling.BILINEAR, MaskAugmentation((16, 16), **UNCHANGED), 255,
        np.random.default_rng(0),
    )  # fmt: skip
    assert (np.asarray(cut) == np.asarray(image)).all()
    assert (ids == mask).all()


def test_crops_of_one_class_are_avoided():
    mask = np.zeros((64, 64), np.int64)
    mask[:, 56:] = 1
    image = PILImage.fromarray(mask.astype(np.uint8))
    counts = {}
    for most in (0.9, 1.0):
        augmentation = MaskAugmentation((16, 16), **{**UNCHANGED, "most_of_a_class": most})
        crops = [
            augment(image, mask, (64, 64), PILImage.Resampling.NEAREST, augmentation, 255, np.random.default_rng(i))[1]
            for i in range(40)
        ]
        counts[most] = sum(len(np.unique(crop)) == 2 for crop in crops)
    assert counts[0.9] > counts[1.0] + 15


def test_small_images_are_padded_and_large_ones_cut(tmp_path):
    for split in ("train", "test"):
        write_pair(tmp_path / split / "images" / "a.png", tmp_path / split / "masks" / "a.png", size=(12, 40))
    items = TrainingMasks(
        load(tmp_path).train, PROCESSOR, MaskOptions(), MaskAugmentation((20, 20), **UNCHANGED), seed=0
    )
    item = items[0]
    assert item["pixel_values"].shape == (3, 20, 20)
    assert item["labels"].shape == (20, 20)
    assert (item["labels"][:, 12:] == 255).all()
    assert (item["labels"][:, :12] < 2).all()
    assert (item["pixel_values"][:, :, 12:] == 0).all()
    again = TrainingMasks(load(tmp_path).train, PROCESSOR, MaskOptions(), MaskAugmentation((20, 20)), seed=0)
    first = again[0]
    assert torch.equal(first["pixel_values"], again[0]["pixel_values"])
    again.set_epoch(1)
    assert not torch.equal(first["pixel_values"], again[0]["pixel_values"])


def test_colours_change_and_nothing_moves():
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = (200, 60, 60)
    image = PILImage.fromarray(pixels)
    changed = [np.asarray(distort_colours(image, np.random.default_rng(seed))) for seed in range(20)]
    assert len({each[0, 0].tobytes() for each in changed}) > 10
    for each in changed:
        assert (each[:4] == each[0, 0]).all()
        assert (each[4:] == each[7, 7]).all()
    gray = PILImage.fromarray(pixels[..., 0])
    assert distort_colours(gray, np.random.default_rng(3)).mode == "L"


@pytest.mark.parametrize("degrees", [0.3, 2.0, 17.5])
def test_hues_on_both_sides_of_red_are_mirrored(degrees):
    def turned(by):
        draws = iter([0.9, 0.9, 0.9, 0.9, 0.1])  # only the hue changes
        generator = SimpleNamespace(random=lambda: next(draws), uniform=lambda low, high: by if high == 18 else 1.0)
        return distort_colours(PILImage.new("RGB", (1, 1), "red"), generator).getpixel((0, 0))

    assert turned(-degrees) == turned(degrees)[::2] + turned(degrees)[1:2]


def test_a_part_of_a_mask_is_that_part_of_the_whole():
    mask = np.random.default_rng(0).integers(0, 9, (30, 50))
    whole = part_of_mask(mask, (45, 20), (0, 0, 45, 20))
    assert (part_of_mask(mask, (45, 20), (7, 3, 30, 19)) == whole[7:30, 3:19]).all()
    assert (part_of_mask(mask, (30, 50), (0, 0, 30, 50)) == mask).all()


@pytest.mark.parametrize("changes", [{"scale": (2.0, 1.0)}, {"crop_size": (0, 4)}, {"horizontal_flip": 1.5}])
def test_augmentation_out_of_range_is_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} is "):
        MaskAugmentation(**changes)


# Evaluation


def test_images_are_stretched_and_collated(tmp_path):
    for split in ("train", "test"):
        for name, size in (("a", (12, 8)), ("b", (33, 8))):
            write_pair(
                tmp_path / split / "images" / f"{name}.png", tmp_path / split / "masks" / f"{name}.png", size=size
            )
    evaluation = load(tmp_path).evaluation
    items = [EvaluationMasks(evaluation, PROCESSOR, MaskOptions(), size_divisor=16)[i] for i in range(2)]
    assert [tuple(item["pixel_values"].shape) for item in items] == [(3, 16, 16), (3, 16, 48)]
    assert [tuple(item["labels"].shape) for item in items] == [(8, 12), (8, 33)]
    assert isinstance(collate_masks(items)["pixel_values"], list)
    assert collate_masks(items[:1])["pixel_values"].shape == (1, 3, 16, 16)
    resizing = SegformerImageProcessorPil(size={"shortest_edge": 16, "longest_edge": 64})
    resized = [EvaluationMasks(evaluation, resizing, MaskOptions())[i] for i in range(2)]
    assert [tuple(item["pixel_values"].shape[1:]) for item in resized] == [(16, 24), (16, 64)]


@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((512, 512), [(0, 0, 512, 512)]),
        ((300, 600), [(0, 0, 300, 512), (0, 88, 300, 600)]),
        ((512, 1000), [(0, 0, 512, 512), (0, 341, 512, 853), (0, 488, 512, 1000)]),
    ],
)
def test_windows_cover_an_image_as_mmsegmentation_has_them(size, boxes):
    assert window_boxes(size, (512, 512), (341, 341)) == boxes


def test_overlapping_windows_are_averaged():
    images = torch.randn(2, 3, 20, 26)
    assert torch.allclose(slide(lambda part: 2 * part, images, (8, 8), (5, 5)), 2 * images)
    ones = slide(lambda part: torch.full_like(part, float(part.shape[-1])), images, (64, 64), (4, 4))
    assert (ones == 26).all()
