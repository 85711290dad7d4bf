"""Images with boxes: where they are found, which are rejected, augmentation, and evaluation."""

import itertools
import json
import logging
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PILImage
from transformers import RTDetrImageProcessorPil

from hf_vssm_prune.training.arguments import DataArguments, EvaluationDataArguments
from hf_vssm_prune.training.average_precision import average_precision
from hf_vssm_prune.training.box_augmentation import BoxAugmentation, augment_boxes
from hf_vssm_prune.training.data.box_items import EvaluationBoxes, TrainingBoxes, collate_boxes
from hf_vssm_prune.training.data.detection import ObjectOptions, load_detection_datasets, load_detection_evaluation
from hf_vssm_prune.training.data.objects import fit_boxes
from hf_vssm_prune.training.image_steps import ImageError


PROCESSOR = RTDetrImageProcessorPil(size={"height": 32, "width": 48})
UNCHANGED = {"scale": (1.0, 1.0), "horizontal_flip": 0.0, "photometric_distortion": False}
BOX = [2.0, 3.0, 4.0, 5.0]


def write_image(file: Path, size=(20, 10)) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", size).save(file)


def load(folder: Path, label_file=None, corners=False, **options):
    data = DataArguments(str(folder), dataloader_num_workers=0, **options)
    return load_detection_datasets(data, ObjectOptions(label_file, corners), seed=0)


# Files of objects


def coco(annotations, names=("ball", "cube"), count=3) -> dict:
    return {
        "images": [{"id": 10 + i, "file_name": f"{i}.jpg"} for i in range(count)],
        "annotations": [{"id": number, **each} for number, each in enumerate(annotations)],
        "categories": [{"id": 7 * (1 + label), "name": name} for label, name in enumerate(names)],
    }


LAYOUTS = {
    "COCO": ("annotations/instances_{split}2017.json", "{split}2017/{name}.jpg"),
    "Roboflow": ("{split}/_annotations.coco.json", "{split}/{name}.jpg"),
    "beside": ("{split}.json", "images/{split}/{name}.jpg"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_folders_of_cocos_form(layout, tmp_path):
    file, image = LAYOUTS[layout]
    for split in ("train", "val"):
        for name in range(3):
            write_image(tmp_path / image.format(split=split, name=name))
        objects = [
            {"image_id": 10, "category_id": 14, "bbox": BOX},
            {"image_id": 12, "category_id": 7, "bbox": [0, 0, 20, 10], "iscrowd": 1},
            {"image_id": 12, "category_id": 7, "bbox": [1, 1, 2, 2], "iscrowd": 0},
        ]
        path = tmp_path / file.format(split=split)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco(objects, names=("ball", "cube", "unused"))))
    datasets = load(tmp_path)
    assert datasets.label_names == ["ball", "cube"]
    for side, split in ((datasets.train, "train"), (datasets.evaluation, "val")):
        assert [row["labels"] for row in side] == [[1], [], [0, 0]]  # an image without objects stays
        assert [row["crowd"] for row in side] == [[False], [], [True, False]]
        assert side[0]["boxes"] == [BOX]
        assert all(split in row["image"]["path"] for row in side)
        assert [Path(row["image"]["path"]).stem for row in side] == ["0", "1", "2"]


def test_files_that_number_categories_differently_are_compared_by_name(tmp_path):
    for split, names in (("train", ("ball", "cube")), ("val", ("cube", "ball"))):
        for name in range(3):
            write_image(tmp_path / split / f"{name}.jpg")
        content = coco([{"image_id": 10, "category_id": 7 * (1 + i), "bbox": BOX} for i in (0, 1)], names)
        (tmp_path / f"{split}.json").write_text(json.dumps(content))
    datasets = load(tmp_path)
    assert datasets.label_names == ["ball", "cube"]
    assert [part[0]["labels"] for part in (datasets.train, datasets.evaluation)] == [[0, 1], [1, 0]]


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        (
            {"image_id": 10, "category_id": 8, "bbox": BOX},
            "Annotation 0 of '.*' has the category 8, which is not",
        ),
        ({"image_id": 99, "category_id": 7, "bbox": BOX}, "Annotation 0 of '.*' belongs to image 99, which is not in"),
        ({"image_id": 10, "category_id": 7}, "Entry 0 of 'annotations' in '.*' has no 'bbox'"),
        ({"image_id": 10, "category_id": 7, "bbox": [1, 2, 3]}, "box 0 is .*; it must be four numbers"),
        (
            {"image_id": 10, "category_id": 7, "bbox": [9, 9, -3, 4]},
            "box 0 is .*, which has a negative size; boxes are",
        ),
    ],
)
def test_what_a_coco_file_may_not_say(annotation, message, tmp_path):
    for name in range(3):
        write_image(tmp_path / f"{name}.jpg")
    content = coco([annotation])
    content["categories"][0]["id"] = 7
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 10, "coco_url": "a/0.jpg"}]}, "Entry 10 of 'images' in '.*json' has no 'file_name'"),
        ({"images": [{"file_name": "0.jpg"}]}, "Entry 0 of 'images' in '.*json' has no 'id'"),
        ({"categories": [{"id": 7}]}, "Entry 7 of 'categories' in '.*json' has no 'name'"),
        ({"categories": ["ball"]}, "'categories' of '.*json' is not a list of entries with id, name"),
        ({"annotations": None}, "'annotations' of '.*json' is not a list"),
        ({"images": [{"id": 10, "file_name": "0.jpg"}] * 2}, "1 ids of images in '.*json' occur several times"),
        ({"images": [{"id": "10", "file_name": "0.jpg"}]}, "Annotation 0 of '.*json' belongs to image 10, which is"),
        ({"images": [{"id": [10], "file_name": "0.jpg"}]}, r"Entry 0 of 'images' in .* wrong type as 'id': \[10\]"),
        ({"images": [{"id": 10, "file_name": 0}]}, "Entry 0 of 'images' in '.*json' has a .* as 'file_name': 0"),
        ({"images": [{"id": 10, "file_name": ""}]}, "1 of 1 images of '.*json' are missing; the first is ''"),
        ({"annotations": [{"image_id": 10, "category_id": 7, "bbox": 5}]}, "wrong type as 'bbox': 5"),
    ],
)
def test_what_a_coco_file_must_say(changes, message, tmp_path):
    write_image(tmp_path / "0.jpg")
    content = coco([{"image_id": 10, "category_id": 7, "bbox": BOX}], count=1) | changes
    (tmp_path / "train.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_ids_of_categories_may_be_numbers_and_text(tmp_path):
    write_image(tmp_path / "0.jpg")
    write_image(tmp_path / "1.jpg")
    objects = [{"image_id": 10 + i, "category_id": number, "bbox": BOX} for i, number in enumerate(("x", 7))]
    categories = [{"id": "x", "name": "ball"}, {"id": 7, "name": "cube"}]
    (tmp_path / "train.json").write_text(json.dumps(coco(objects, count=2) | {"categories": categories}))
    assert load(tmp_path, train_val_split=0.5).label_names == ["cube", "ball"]


def test_a_coco_file_may_have_been_written_on_windows(tmp_path):
    content = coco([{"image_id": number, "category_id": 7, "bbox": BOX} for number in (10, 11)], count=2)
    for image in content["images"]:
        write_image(tmp_path / "images" / image["file_name"])
        image["file_name"] = f"images\\{image['file_name']}"
    (tmp_path / "train.json").write_text(json.dumps(content))
    assert len(load(tmp_path, train_val_split=0.5).train) == 1


def test_a_missing_image_is_named(tmp_path):
    write_image(tmp_path / "0.jpg")
    (tmp_path / "train.json").write_text(json.dumps(coco([{"image_id": 10, "category_id": 7, "bbox": BOX}])))
    with pytest.raises(ValueError, match=r"2 of 3 images of '.*train.json' are missing; the first is '1.jpg'"):
        load(tmp_path)


def write_voc(file: Path, image: str, objects) -> None:
    root = ElementTree.Element("annotation")
    ElementTree.SubElement(root, "filename").text = image
    for name, corners, difficult in objects:
        element = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(element, "name").text = name
        ElementTree.SubElement(element, "difficult").text = str(difficult)
        box = ElementTree.SubElement(element, "bndbox")
        for side, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
            ElementTree.SubElement(box, side).text = str(value)
    file.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(file)


@pytest.mark.parametrize("listed", [True, False])
def test_folders_of_pascal_vocs_form(listed, tmp_path):
    for number in range(4):
        split = "test" if number == 3 else "train"
        kinds = ("JPEGImages", "Annotations") if listed else (split, split)
        write_image(tmp_path / kinds[0] / f"{number}.jpg")
        # The whole image of 20 x 10 pixels, which are counted from 1.
        objects = [("dog", (1, 1, 20, 10), 0), ("cat", (2, 3, 4, 5), 1)]
        write_voc(tmp_path / kinds[1] / f"{number}.xml", f"{number}.jpg", objects)
    if listed:
        (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
        (tmp_path / "ImageSets" / "Main" / "trainval.txt").write_text("0\n1\n2\n")
        (tmp_path / "ImageSets" / "Main" / "test.txt").write_text("3\n")
        (tmp_path / "ImageSets" / "Main" / "dog_trainval.txt").write_text("0 1\n1 -1\n")
    datasets = load(tmp_path)
    assert (len(datasets.train), len(datasets.evaluation)) == (3, 1)
    assert datasets.label_names == ["cat", "dog"]
    row = datasets.evaluation[0]
    assert row["boxes"] == [[0, 0, 20, 10], [1, 2, 3, 3]]
    assert (row["labels"], row["crowd"]) == ([1, 0], [False, True])
    assert row["image"]["path"].endswith("3.jpg")


def test_names_in_a_list_may_have_spaces(tmp_path):
    (tmp_path / "ImageSets" / "Main").mkdir(parents=True)
    for split, names in (("train", ["a dog", "dog"]), ("val", ["two dogs"])):
        for name in names:
            write_image(tmp_path / f"{name}.jpg")
            write_voc(tmp_path / f"{name}.xml", f"{name}.jpg", [("dog", (1, 1, 20, 10), 0)])
        (tmp_path / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join([*names, ""]))
    (tmp_path / "ImageSets" / "Main" / "train.txt").write_text("a dog\ndog 1\n")
    datasets = load(tmp_path)
    assert [Path(row["image"]["path"]).stem for row in datasets.train] == ["a dog", "dog"]
    assert [Path(row["image"]["path"]).stem for row in datasets.evaluation] == ["two dogs"]


def test_lists_of_several_years_are_read_together(tmp_path):
    for year, name in (("VOC2007", "7"), ("VOC2012", "12")):
        for split in ("train", "val"):
            stem = f"{name}_{split}"
            write_image(tmp_path / year / "JPEGImages" / f"{stem}.jpg")
            write_voc(tmp_path / year / "Annotations" / f"{stem}.xml", f"{stem}.jpg", [("dog", (1, 1, 20, 10), 0)])
            lists = tmp_path / year / "ImageSets" / "Main"
            lists.mkdir(parents=True, exist_ok=True)
            (lists / f"{split}.txt").write_text(f"{stem}\n")
    datasets = load(tmp_path)
    assert [Path(row["image"]["path"]).stem for row in datasets.train] == ["7_train", "12_train"]
    assert [Path(row["image"]["path"]).stem for row in datasets.evaluation] == ["7_val", "12_val"]


# Tables


def write_table(file: Path, objects, features=None, size=(20, 10)) -> None:
    write_image(file.parent / "image.png", size)
    stored = {"bytes": (file.parent / "image.png").read_bytes(), "path": None}
    (file.parent / "image.png").unlink()
    features = features or {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=["a", "b"]))}
    columns = {"image": [stored] * len(objects), "objects": objects}
    Dataset.from_dict(columns, features=Features({"image": Image(), "objects": features})).to_parquet(file)


def test_objects_as_dicts_of_lists_and_as_lists_of_dicts(tmp_path):
    rows = [{"bbox": [BOX, BOX], "category": [1, 0]}, {"bbox": [BOX], "category": [1]}]
    write_table(tmp_path / "train.parquet", rows)
    features = List({"box": List(Value("int64")), "label": Value("string"), "is_crowd": Value("bool")})
    datasets = load(tmp_path, train_val_split=0.5)
    assert datasets.label_names == ["a", "b"]
    assert sorted([*datasets.train["labels"], *datasets.evaluation["labels"]]) == [[1], [1, 0]]
    (tmp_path / "other").mkdir()
    written = [[{"box": [1, 2, 3, 4], "label": "b", "is_crowd": True}, {"box": [1, 2, 3, 4], "label": "a"}]]
    for split in ("train", "test"):
        write_table(tmp_path / "other" / f"{split}.parquet", written, features)
    row = load(tmp_path / "other").evaluation[0]
    assert (row["boxes"], row["labels"], row["crowd"]) == ([[1, 2, 3, 4]] * 2, [1, 0], [True, False])


@pytest.mark.parametrize("saved_format", [{"type": "numpy"}, {"columns": ["image"]}], ids=["numpy", "columns"])
def test_the_format_and_missing_names_of_saved_splits_do_not_matter(saved_format, tmp_path):
    write_table(tmp_path / "table.parquet", [{"bbox": [BOX, BOX], "category": [1, 0]}] * 2)
    table = Dataset(Dataset.from_parquet(str(tmp_path / "table.parquet"), cache_dir=str(tmp_path / "cache")).data)
    DatasetDict({"train": table, "test": table}).with_format(**saved_format).save_to_disk(tmp_path / "saved")
    datasets = load(tmp_path / "saved")
    assert (datasets.train.split, datasets.evaluation.split) == ("train", "test")
    assert datasets.train["boxes"] == [[BOX, BOX]] * 2


def test_a_stream_has_as_many_images_as_are_asked_for(tmp_path):
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", [{"bbox": [BOX], "category": [1]}] * 3)
    assert len(load(tmp_path, streaming=True, max_train_samples=2).train) == 2
    with pytest.raises(ValueError, match="max_train_samples is 4: split 'train' has 3 images"):
        load(tmp_path, streaming=True, max_train_samples=4)


def test_corners_and_names_from_a_file(tmp_path):
    features = {"bbox": List(List(Value("float32"))), "category": List(Value("int64"))}
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", [{"bbox": [[2, 3, 6, 8]], "category": [1]}], features)
    assert load(tmp_path, corners=True).label_names == ["class 0", "class 1"]
    (tmp_path / "id2label.json").write_text('{"0": "zero", "1": "one"}')
    datasets = load(tmp_path, corners=True)
    assert datasets.label_names == ["zero", "one"]
    assert datasets.train[0]["boxes"] == [BOX]
    data = EvaluationDataArguments(str(tmp_path), dataloader_num_workers=0)
    rows, names = load_detection_evaluation(data, ObjectOptions(corners=True), seed=0)
    assert (len(rows), rows.split, names) == (1, "test", ["zero", "one"])


def test_boxes_without_area_are_left_out_and_counted(tmp_path, caplog):
    rows = [{"bbox": [BOX, [1, 1, 0, 5]], "category": [1, 0]}]
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", rows)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path).train[0]["labels"] == [1]
    assert "1 boxes of split 'train' have zero area and are left out" in caplog.text


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        ({"bbox": [BOX], "category": []}, "The objects in row 0 of split 'train': there are 1 boxes and 0 classes"),
        ({"bbox": [[float("nan")] * 4], "category": [0]}, "box 0 is .nan, nan, nan, nan.; it must be four numbers"),
        (
            {"bbox": [[0.1, 0.1, 0.5, 0.5]], "category": [0]},
            "lie between 0 and 1: they must be in pixels",
        ),
        ({"bbox": [], "category": []}, "None of the 1 images of split 'train' has an object"),
    ],
)
def test_what_a_table_may_not_say(objects, message, tmp_path):
    write_table(tmp_path / "test.parquet", [{"bbox": [BOX], "category": [0]}])
    write_table(tmp_path / "train.parquet", [objects])
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_difficult_objects_and_missing_classes_of_a_table(tmp_path):
    """As in Pascal VOC's own files, difficult objects are not used."""
    features = {
        "bbox": List(List(Value("float32"))),
        "category": List(Value("int64")),
        "difficult": List(Value("bool")),
    }
    objects = {"bbox": [BOX, BOX], "category": [0, 1], "difficult": [True, False]}
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", [objects], features)
    assert load(tmp_path).train["crowd"] == [[True, False]]
    for changed, message in (
        ({"category": [0, None]}, "row 0 of split 'train': the class id None is not allowed"),
        ({"difficult": [True]}, "row 0 of split 'train': there are 2 boxes and 1 values of 'difficult'"),
    ):
        write_table(tmp_path / "train.parquet", [{**objects, **changed}], features)
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_columns_that_are_not_there(tmp_path):
    write_table(tmp_path / "train.parquet", [{"place": [BOX]}], {"place": List(List(Value("float32")))})
    with pytest.raises(ValueError, match="Column 'objects' has the fields place: one of boxes"):
        load(tmp_path)
    with pytest.raises(
        ValueError, match="There is no column 'things' in split 'train'; the columns are image, objects"
    ):
        load(tmp_path, label_column_name="things")


def test_a_class_of_another_split_is_named(tmp_path):
    features = {"bbox": List(List(Value("float32"))), "category": List(Value("string"))}
    write_table(tmp_path / "train.parquet", [{"bbox": [BOX], "category": ["cat"]}], features)
    write_table(tmp_path / "test.parquet", [{"bbox": [BOX], "category": ["cow"]}], features)
    with pytest.raises(ValueError, match="row 0 of split 'test': the class 'cow' is unknown; the classes are cat"):
        load(tmp_path)


# Items


def test_boxes_are_cut_at_the_edges_and_refused_outside():
    boxes = np.array([[-2, 0, 6, 10], [10, 5, 10, 5]], np.float32)
    np.testing.assert_allclose(fit_boxes(boxes, (20, 10), "objects"), [[0, 0, 0.2, 1], [0.5, 0.5, 1, 1]])
    with pytest.raises(ImageError, match=r"box 0 is \[15.0, 5.0, 20.0, 10.0\] .* of which 12% are inside the image"):
        fit_boxes(np.array([[15, 5, 20, 10]], np.float32), (20, 10), "objects")


def test_items_to_train_and_to_evaluate(tmp_path):
    features = {
        "bbox": List(List(Value("float32"))),
        "category": List(ClassLabel(names=["a", "b"])),
        "iscrowd": List(Value("int64")),
    }
    rows = [{"bbox": [[5, 0, 10, 5], [0, 0, 20, 10]], "category": [1, 0], "iscrowd": [0, 1]}]
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", rows, features)
    datasets = load(tmp_path)
    items = TrainingBoxes(datasets.train, PROCESSOR, BoxAugmentation((32, 48), **UNCHANGED), seed=0)
    batch = collate_boxes([items[0], items[0]])
    assert batch["pixel_values"].shape == (2, 3, 32, 48)
    assert batch["labels"][0]["class_labels"].tolist() == [1]  # a crowd is not learned from
    torch.testing.assert_close(batch["labels"][0]["boxes"], torch.tensor([[0.5, 0.25, 0.5, 0.5]]))
    item = EvaluationBoxes(datasets.evaluation, PROCESSOR)[0]
    assert item["pixel_values"].shape == (3, 32, 48)
    assert item["objects"]["boxes"].tolist() == [[5, 0, 15, 5], [0, 0, 20, 10]]
    assert item["objects"]["crowd"].tolist() == [False, True]
    assert item["objects"]["size"].tolist() == [10, 20]


@given(seed=st.integers(0, 10_000), low=st.floats(0.3, 1.0), high=st.floats(1.0, 3.0))
def test_boxes_move_with_what_is_in_them(seed, low, high):
    """Draws rectangles in different colours: each box must be where its colour is."""
    generator = np.random.default_rng(seed)
    pixels = np.zeros((60, 80, 3), np.uint8)
    boxes = []
    for channel, (top, left) in enumerate(((2, 2), (30, 12), (10, 46))):
        height, width = generator.integers(10, 24, 2)
        pixels[top : top + height, left : left + width] = 0
        pixels[top : top + height, left : left + width, channel] = 255
        boxes.append([left / 80, top / 60, (left + width) / 80, (top + height) / 60])
    augmentation = BoxAugmentation((48, 48), (low, high), 0.5, 0.5, photometric_distortion=False)
    image, moved, kept = augment_boxes(
        PILImage.fromarray(pixels),
        np.array(boxes),
        PILImage.Resampling.NEAREST,
        (0, 0, 0),
        augmentation,
        np.random.default_rng(seed),
    )
    assert image.size == (48, 48)
    assert len(moved) == len(kept) > 0  # another crop is tried where there would be none
    seen = np.asarray(image)
    for box, number in zip(moved, kept, strict=True):
        rows, columns = np.nonzero(seen[..., number] > 128)
        assert len(rows)
        seen_box = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
        assert (np.abs(seen_box - box * 48) <= 1.5).all()


def test_what_is_random_depends_on_seed_epoch_and_index(tmp_path):
    for split in ("train", "test"):
        write_table(tmp_path / f"{split}.parquet", [{"bbox": [BOX], "category": [0]}] * 2)
    rows = load(tmp_path).train
    items, others = (TrainingBoxes(rows, PROCESSOR, BoxAugmentation((32, 48)), seed=seed) for seed in (3, 4))
    first, neighbour = items[1]["labels"]["boxes"], items[0]["labels"]["boxes"]
    assert torch.equal(items[1]["labels"]["boxes"], first)
    items.set_epoch(1)
    drawn = [first, neighbour, items[1]["labels"]["boxes"], others[1]["labels"]["boxes"]]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(drawn, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": (32,)}, r"size is \(32,\)"),
        ({"scale": (2.0, 1.0)}, r"scale is \(2.0, 1.0\): it must satisfy 0 < smallest <= largest"),
        ({"vertical_flip": 1.5}, "vertical_flip is 1.5: it must be from 0 to 1"),
    ],
)
def test_augmentation_that_is_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        BoxAugmentation(**{"size": (32, 32), **options})


# Metrics


def rows(*values) -> np.ndarray:
    return np.array(values, np.float64).reshape(-1, 6)


def test_average_precision_by_hand():
    """One of two objects is found, after a false positive: precision is 1/2 up to a recall of 1/2, which covers 51 of
    COCO's 101 points."""
    objects = [rows([0, 0, 10, 10, 0, 0], [20, 20, 30, 30, 0, 0])]
    detections = [rows([50, 50, 60, 60, 0.9, 0], [0, 0, 10, 10, 0.8, 0])]
    metrics = average_precision(detections, objects, num_labels=1)
    assert metrics["map_50"] == pytest.approx(51 / 101 / 2)
    assert metrics["map"] == pytest.approx(51 / 101 / 2)
    assert metrics["mar_100"] == pytest.approx(0.5)
    assert "map_large" not in metrics


def test_iou_of_a_box_decides_at_which_thresholds_it_counts():
    objects = [rows([0, 0, 100, 100, 1, 0])]
    metrics = average_precision([rows([0, 0, 100, 72, 0.5, 1])], objects, num_labels=2)
    assert metrics["map_50"] == pytest.approx(1)
    assert metrics["map_75"] == 0
    assert metrics["map"] == pytest.approx(0.5)  # 0.50, 0.55, 0.60, 0.65, 0.70 of ten
    assert average_precision([rows([0, 0, 100, 72, 0.5, 0])], objects, num_labels=2)["map_50"] == 0  # another class
    assert average_precision([rows()], objects, num_labels=2)["map"] == 0


def test_what_is_found_in_a_crowd_is_not_counted():
    objects = [rows([0, 0, 10, 10, 0, 0], [50, 50, 90, 90, 0, 1])]
    inside = [rows([55, 55, 60, 60, 0.9, 0], [0, 0, 10, 10, 0.8, 0])]
    assert average_precision(inside, objects, num_labels=1)["map"] == pytest.approx(1)
