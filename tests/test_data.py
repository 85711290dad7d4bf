"""Data sets from folders, Parquet files and the Hub; samples that depend only on seed, epoch and index; bad input."""

import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor

from hf_vssm_prune.training import jobs
from hf_vssm_prune.training.arguments import EvaluationArguments, EvaluationDataArguments
from hf_vssm_prune.training.augmentation import AugmentationConfig
from hf_vssm_prune.training.data import (
    EvaluationImages,
    TrainingImages,
    collate,
    load_evaluation_dataset,
    load_image_dataset,
    load_image_stream,
    sources,
)
from hf_vssm_prune.training.data.sources import _warn_of_unnamed, count_parquet_rows
from hf_vssm_prune.training.tasks.classification import ImageClassification


IMAGE_PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16})
NO_AUGMENTATION = AugmentationConfig(None, 0, 0.0, 0, random_erasing=0.0)


def picture(number: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8))


def write_class_folders(folder: Path, counts: dict[str, int], suffix: str = ".png") -> Path:
    number = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            picture(number).save(folder / name / f"{i}{suffix}")
            number += 1
    return folder


def make_table(count: int, labels=None, **columns) -> Dataset:
    """Row i has picture(i) and label i % 3."""
    values = {"image": [picture(i) for i in range(count)], "label": labels or [i % 3 for i in range(count)], **columns}
    features = {"image": ImageFeature(), "label": ClassLabel(names=["cat", "dog", "ox"])}
    features |= {name: Value("int64") for name in columns}
    return Dataset.from_dict(values, features=Features(features))


@pytest.fixture(scope="module")
def table() -> Dataset:
    return make_table(30)


@pytest.fixture(scope="module")
def parquet_file(tmp_path_factory: pytest.TempPathFactory, table: Dataset) -> Path:
    file = tmp_path_factory.mktemp("parquet") / "animals.parquet"
    table.to_parquet(file)
    return file


def as_hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, Dataset]) -> None:
    """Makes "org/name" resolve to a data set on the Hub."""
    dataset_dict = DatasetDict({split: Dataset(table.data, split=split) for split, table in splits.items()})

    def load_dataset(name: str, config_name: str | None, streaming: bool) -> DatasetDict:
        assert (name, config_name, streaming) == ("org/name", None, False)
        return dataset_dict

    monkeypatch.setattr(sources, "load_dataset", load_dataset)


# Where the data comes from


def test_the_packaged_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    datasets = load_image_dataset("trashnet")
    assert (len(datasets.train), len(datasets.evaluation)) == (1_771, 488)
    assert datasets.label_names[:2] == ["cardboard", "glass"]
    batch = collate([EvaluationImages(datasets.evaluation, IMAGE_PROCESSOR)[i] for i in (0, 1)])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    write_class_folders(tmp_path / "trashnet", {"mine": 20, "yours": 20})
    assert load_image_dataset("trashnet").label_names == ["mine", "yours"]
    assert count_parquet_rows("trashnet", "train") is None


def test_class_folders(tmp_path: Path):
    """A file named test_… is not a test split. Other files and hidden folders are not images."""
    folder = write_class_folders(tmp_path / "pets [new]", {"dog": 12, "cat": 20}, suffix=".jpg")
    os.replace(folder / "cat" / "0.jpg", folder / "cat" / "test_0.JPG")
    (folder / "cat" / "notes.txt").write_text("not an image")
    (folder / ".cache").mkdir()
    datasets = load_image_dataset(folder, validation_share=0.25)
    assert datasets.label_names == ["cat", "dog"]
    for dataset, cats, dogs in ((datasets.train, 15, 9), (datasets.evaluation, 5, 3)):
        assert np.bincount(dataset["label"][:]).tolist() == [cats, dogs]
        for row in dataset:
            assert Path(row["image"]["path"]).parent.name == datasets.label_names[row["label"]]


def test_files_that_are_left_out_are_named(tmp_path: Path, caplog):
    write_class_folders(tmp_path / "train", {"cat": 4, "dog": 5})
    write_class_folders(tmp_path / "test", {"cat": 2, "dog": 3})
    load_image_dataset(tmp_path)
    (tmp_path / "train" / ".DS_Store").write_text("")
    assert not caplog.records
    write_class_folders(tmp_path / "other", {"cat": 1})
    (tmp_path / "train" / "loose.png").write_text("")
    for i in range(3):
        (tmp_path / "train" / "cat" / f"{i}.heic").write_text("")
    load_image_dataset(tmp_path)
    message = caplog.records[-1].getMessage()
    assert f"5 files in '{tmp_path}' are not among its images: 3 .heic, 2 .png; the first is" in message


def write_table(folder: Path, first: str, line: str) -> Path:
    """A table of the images 0 and 1 of each class."""
    lines = [line.format(path=f"{name}/{i}.png", label=name) for name in ("cat", "dog") for i in (0, 1)]
    (folder / "pets.csv").write_text("\n".join([*filter(None, [first]), *lines]))
    return folder / "pets.csv"


def test_columns_of_a_table_are_named(tmp_path: Path):
    write_class_folders(tmp_path, {"cat": 2, "dog": 2})
    table = write_table(tmp_path, "id,filepath,species", "7,{path},{label}")
    columns = {"image_column": "filepath", "label_column": "species"}
    rows, names = load_evaluation_dataset(table, **columns)
    assert (names, rows["label"][:]) == (["cat", "dog"], [0, 0, 1, 1])
    assert rows[3]["image"]["path"] == str(tmp_path / "dog" / "1.png")
    for named, message in (
        (
            {},
            r"Line 1 of '.*' is \['id', .*path and a label\. If it is a header, name the columns with --image_column_",
        ),
        ({**columns, "label_column": "kind"}, r"no column 'kind' in '.*csv'; its first line is \['id', 'filepath'"),
        ({"label_column": "species"}, r"first line of '.*csv' is \['id'.* name its columns of paths and of labels"),
    ):
        with pytest.raises(ValueError, match=message):
            load_evaluation_dataset(table, **named)
    write_table(tmp_path, "filepath,species", "{path},{label}")
    with pytest.raises(
        ValueError, match=r"Line 1 of '.*' is .*, and there is no file '.*/filepath'\. If it is a header"
    ):
        load_evaluation_dataset(table)


def test_a_table_may_have_been_written_on_windows(tmp_path: Path):
    write_class_folders(tmp_path, {"cat": 2, "dog": 2})
    table = write_table(tmp_path, "path,label", "{path},{label}")
    table.write_text(table.read_text().replace("/", "\\"))
    rows, _ = load_evaluation_dataset(table)
    assert rows[3]["image"]["path"] == str(tmp_path / "dog" / "1.png")


def test_images_that_a_folders_table_does_not_list_are_named(tmp_path: Path, caplog):
    write_class_folders(tmp_path, {"cat": 2, "dog": 2})
    write_table(tmp_path, "path,label", "{path},{label}")
    load_evaluation_dataset(tmp_path)
    write_table(tmp_path, "", f"{tmp_path.resolve()}/../{tmp_path.name}/{{path}},{{label}}")
    load_evaluation_dataset(tmp_path)
    assert not caplog.records
    (tmp_path / "dog" / "0.png").rename(tmp_path / "dog" / "9.png")
    (tmp_path / "pets.csv").write_text("cat/0.png,cat\ncat/1.png,cat\ndog/1.png,dog\n")
    assert count(tmp_path) == {"cat": 2, "dog": 1}
    message = f"1 images in '{tmp_path}' are left out, because they are not listed in 'pets.csv'; the first is"
    assert message in caplog.text


@pytest.mark.parametrize(
    ("names", "unnamed"),
    [
        (["a", "b"], ["a", "b"]),
        (["train", "holdout", "test"], ["holdout"]),
        (["pets", "test"], []),
        (["pets-0-of-2", "pets-1-of-2", "train/7", "train/x"], ["pets-0-of-2", "pets-1-of-2"]),
        (["0", "1"], []),
    ],
)
def test_files_of_no_split_are_named(names: list[str], unnamed: list[str], caplog):
    _warn_of_unnamed([Path("pets", f"{name}.csv") for name in names])
    named = ", ".join(f"'{Path('pets', name)}.csv'" for name in unnamed)
    assert [record.getMessage() for record in caplog.records] == [
        f"{named}: these names begin with no split ('train', 'validation', 'test'), so the files are training data."
    ] * bool(unnamed)


def test_names_of_files_that_are_not_utf8_are_named(tmp_path: Path):
    write_class_folders(tmp_path, {"cat": 2, "dog": 2})
    os.rename(tmp_path / "cat" / "0.png", os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
    with pytest.raises(ValueError, match=r"The name of the file '.*caf\\udce9\.png' is not valid UTF-8: rename it"):
        load_evaluation_dataset(tmp_path)


def test_the_images_that_a_run_held_out_are_evaluated(tmp_path: Path, caplog):
    write_class_folders(tmp_path, {"cat": 8, "dog": 8})
    task, data = ImageClassification(), EvaluationDataArguments(str(tmp_path))
    rows, _ = jobs._load_rows(task, data, EvaluationArguments("a model", seed=3))
    assert len(rows) == 16
    assert "all its 16 rows are evaluated" in caplog.text
    caplog.clear()
    rows, _ = jobs._load_rows(task, data, EvaluationArguments("a model", seed=3, train_val_split=0.25))
    held_out = load_image_dataset(tmp_path, validation_share=0.25, seed=3).evaluation
    assert rows["row"][:] == held_out["row"][:]
    assert (len(rows), caplog.records) == (4, [])
    data = EvaluationDataArguments(str(tmp_path), eval_split="train")
    with pytest.raises(ValueError, match="--eval_split and --train_val_split cannot be combined"):
        jobs._load_rows(task, data, EvaluationArguments("a model", train_val_split=0.25))


def count(folder: Path) -> dict[str, int]:
    """Number of images per class."""
    dataset, names = load_evaluation_dataset(folder)
    return dict(zip(names, np.bincount(dataset["label"][:], minlength=len(names)).tolist(), strict=True))


def test_links_are_followed(tmp_path: Path, caplog):
    """Links to folders within a class, to class and split folders, to files, and through other links."""
    elsewhere = write_class_folders(tmp_path / "elsewhere", {"a": 4, "b": 5, "c": 2})
    folder = write_class_folders(tmp_path / "pets", {"train/cat": 1, "train/dog": 1})
    (folder / "train" / "cat" / "more").symlink_to(elsewhere / "a", target_is_directory=True)
    (elsewhere / "a" / "deeper").symlink_to(elsewhere / "c", target_is_directory=True)
    (folder / "train" / "ox").symlink_to(elsewhere / "b", target_is_directory=True)
    (folder / "train" / "dog" / "link.png").symlink_to(elsewhere / "b" / "0.png")
    assert count(folder) == {"cat": 7, "dog": 2, "ox": 5}
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "test").symlink_to(folder / "train", target_is_directory=True)
    assert count(tmp_path / "linked") == {"cat": 7, "dog": 2, "ox": 5}
    assert not caplog.records


def test_links_that_lead_back_end(tmp_path: Path, caplog):
    folder = write_class_folders(tmp_path / "pets", {"cat": 3, "dog": 2, "cat/sub": 1})
    for name, target in (("up", folder), ("self", folder / "cat"), ("sub/self", folder / "cat"), ("far", tmp_path)):
        (folder / "cat" / name).symlink_to(target, target_is_directory=True)
    (folder / "dog" / "again").symlink_to(folder / "dog", target_is_directory=True)
    assert count(folder) == {"cat": 4, "dog": 2}
    assert [record.args[0] for record in caplog.records] == [4, 1]
    assert "4 links in '" in caplog.records[0].getMessage()


def test_a_folder_that_is_linked_twice_is_read_once(tmp_path: Path, caplog):
    elsewhere = write_class_folders(tmp_path / "elsewhere", {"a": 4})
    folder = write_class_folders(tmp_path / "pets", {"cat": 3, "dog": 2})
    for name in ("cat/first", "cat/second", "dog/third"):
        (folder / name).symlink_to(elsewhere, target_is_directory=True)
    assert count(folder) == {"cat": 7, "dog": 6}
    assert "the first is" in caplog.records[0].getMessage()
    assert "cat/second" in caplog.records[0].getMessage()


def test_links_that_lead_nowhere_are_named(tmp_path: Path, caplog):
    folder = write_class_folders(tmp_path / "pets", {"cat": 3, "dog": 2})
    (folder / "cat" / "more").symlink_to(tmp_path / "gone", target_is_directory=True)
    (folder / "ox").symlink_to(tmp_path / "gone", target_is_directory=True)
    assert count(folder) == {"cat": 3, "dog": 2}
    assert "2 files in" in caplog.text
    assert "cat/more" in caplog.text
    (folder / "dog" / "9.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(ValueError, match=r"1 of 6 rows of split 'train' have no image .*row 5: its file '.*dog/9.png'"):
        load_evaluation_dataset(folder)


def test_images_beside_parquet_files_are_named(tmp_path: Path, table: Dataset, caplog):
    write_class_folders(tmp_path, {"cat": 3, "dog": 2})
    table.to_parquet(tmp_path / "cat" / "index.parquet")
    assert len(load_evaluation_dataset(tmp_path)[0]) == 30
    assert f"5 images in '{tmp_path}' are left out, because there are Parquet files" in caplog.text


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = write_class_folders(tmp_path / "pets", {"cat": 3, "dog": 2, "dog/closed": 2})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(ValueError, match=r"The folder '.*dog/closed' cannot be read: Permission denied"):
        load_image_dataset(folder)


# What datasets' save_to_disk wrote


@pytest.mark.parametrize("names", [("train", "test"), ("train", "validation", "unlabelled")])
def test_saved_splits(tmp_path: Path, table: Dataset, names: tuple):
    splits = DatasetDict({name: table.select(range(i, 20)) for i, name in enumerate(names)})
    splits.save_to_disk(tmp_path / "saved", num_shards=dict.fromkeys(names, 2))
    datasets = load_image_dataset(tmp_path / "saved")
    assert (len(datasets.train), len(datasets.evaluation)) == (20, 19)
    assert datasets.label_names == ["cat", "dog", "ox"]
    expected = IMAGE_PROCESSOR(picture(7), return_tensors="pt")["pixel_values"][0]
    seen = EvaluationImages(datasets.evaluation, IMAGE_PROCESSOR)[6]["pixel_values"]
    torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("split", "expected"), [(None, "train"), ("test", "test"), ("train[:50%]", "train")])
def test_one_saved_data_set(tmp_path: Path, table: Dataset, split: str | None, expected: str):
    Dataset(table.data, split=split).shuffle(seed=0).save_to_disk(tmp_path / "saved")
    dataset, names = load_evaluation_dataset(tmp_path / "saved")
    assert (str(dataset.split), len(dataset), names) == (expected, 30, ["cat", "dog", "ox"])
    assert sorted(dataset["label"][:]) == sorted(table["label"][:])


def test_saved_data_sets_in_folders_of_splits(tmp_path: Path, table: Dataset):
    table.save_to_disk(tmp_path / "Train")
    table.select(range(5)).save_to_disk(tmp_path / "val")
    datasets = load_image_dataset(tmp_path)
    assert (len(datasets.train), len(datasets.evaluation)) == (30, 5)


def test_a_damaged_saved_data_set_is_named(tmp_path: Path, table: Dataset):
    table.save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="omit --streaming"):
        load_image_stream(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    content = file.read_bytes()
    for damage in (lambda: file.write_bytes(content[:500]), lambda: file.unlink()):
        damage()
        with pytest.raises(ValueError, match=r"saved' was written by datasets' save_to_disk, and cannot be read"):
            load_image_dataset(tmp_path / "saved")


# Labels that are numbers or truth values


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1, 2], ["0", "1", "2"]),
        ([1, 2, 3], ["1", "2", "3"]),
        ([9, 10, 100], ["9", "10", "100"]),
        ([5, 70_000, 123_456], ["5", "70000", "123456"]),
        ([-1, 1, -20], ["-20", "-1", "1"]),
        ([2**62, 7, 0], ["0", "7", str(2**62)]),
        ([True, False, True], ["False", "True"]),
        (["10", "9", "b"], ["10", "9", "b"]),
    ],
)
def test_no_class_is_without_images(monkeypatch: pytest.MonkeyPatch, caplog, labels: list, names: list):
    images = [ImageFeature().encode_example(picture(i)) for i in range(12)]
    as_hub(monkeypatch, {"train": Dataset.from_dict({"image": images, "label": labels * 4})})
    datasets = load_image_dataset("org/name", image_column="image", label_column="label", validation_share=0.25)
    assert datasets.label_names == names
    for dataset, repeats in ((datasets.train, 3), (datasets.evaluation, 1)):
        assert sorted(names[i] for i in dataset["label"][:]) == sorted(str(label) for label in labels * repeats)
    said = [record.getMessage() for record in caplog.records]
    is_odd = type(labels[0]) is int and labels != [0, 1, 2]
    assert len(said) == is_odd
    if is_odd:
        assert f"has the numbers {', '.join(names)} as labels: they become 3 classes" in said[0]


def test_numbers_of_a_split_for_evaluation(monkeypatch: pytest.MonkeyPatch, caplog):
    images = [ImageFeature().encode_example(picture(i)) for i in range(6)]
    columns = {"image_column": "image", "label_column": "label"}

    def load(train: list, test: list):
        splits = {"train": train, "test": test}
        tables = {name: {"image": images[: len(labels)], "label": labels} for name, labels in splits.items()}
        as_hub(monkeypatch, {name: Dataset.from_dict(table) for name, table in tables.items()})
        return load_image_dataset("org/name", **columns)

    datasets = load([1, 2, 5] * 2, [5, 1])
    assert datasets.label_names == ["1", "2", "5"]
    assert datasets.evaluation["label"][:] == [2, 0]
    assert len(caplog.records) == 1
    for test in ([0, 1], [5, 6], [-1, 1]):
        with pytest.raises(
            ValueError, match=f"labels that the training split does not have: {min(set(test) - {1, 5})}"
        ):
            load([1, 2, 5] * 2, test)
    assert load([0, 1, 2] * 2, [0, 1]).evaluation["label"][:] == [0, 1]
    with pytest.raises(ValueError, match="does not have: 3"):
        load([0, 1, 2] * 2, [0, 3])


def test_class_labels_keep_their_names(monkeypatch: pytest.MonkeyPatch, caplog):
    table = make_table(6, labels=[0, 2] * 3)
    as_hub(monkeypatch, {"train": table, "test": make_table(3).remove_columns("label").add_column("label", [0, 2, 1])})
    datasets = load_image_dataset("org/name", label_column="label")
    assert datasets.label_names == ["cat", "dog", "ox"]
    assert datasets.evaluation["label"][:] == [0, 2, 1]
    assert not caplog.records


@pytest.mark.parametrize("name", ["val", "validation", "Valid", "test"])
def test_folders_of_splits(tmp_path: Path, name: str):
    write_class_folders(tmp_path / "train", {"cat": 4, "dog": 5})
    write_class_folders(tmp_path / name, {"cat": 2, "dog": 3})
    datasets = load_image_dataset(str(tmp_path))
    assert (len(datasets.train), len(datasets.evaluation)) == (9, 5)
    evaluation, label_names = load_evaluation_dataset(tmp_path)
    assert evaluation[:] == datasets.evaluation[:]
    assert label_names == ["cat", "dog"]


@pytest.mark.parametrize("names", [("val", "validation"), ("Test", "test")])
def test_two_folders_of_one_split_are_named(tmp_path: Path, names: tuple[str, str]):
    for name in ("train", *names):
        write_class_folders(tmp_path / name, {"cat": 4, "dog": 5})
    with pytest.raises(ValueError, match=rf"/{names[0]}' and '.*/{names[1]}' both belong to split"):
        load_image_dataset(str(tmp_path))


def test_a_split_may_have_a_link_with_another_name(tmp_path: Path, caplog):
    for name in ("train", "validation"):
        write_class_folders(tmp_path / name, {"cat": 4, "dog": 5})
    (tmp_path / "val").symlink_to("validation")
    assert len(load_image_dataset(str(tmp_path)).evaluation) == 9
    assert not caplog.records


def test_classes_that_are_only_evaluated_are_named(tmp_path: Path):
    write_class_folders(tmp_path / "train", {"cat": 4, "dog": 5})
    write_class_folders(tmp_path / "test", {"images": 3})
    with pytest.raises(ValueError, match=r"class folders \['images'\] without training images"):
        load_image_dataset(tmp_path)


def test_hidden_files_are_no_photos(tmp_path: Path):
    write_class_folders(tmp_path, {"cat": 4, "dog": 5})
    for name in ("._0.png", ".Trash/9.png", ".ipynb_checkpoints/0.png"):
        (tmp_path / "cat" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "cat" / name).write_text("no image")
    (tmp_path / "cat" / "folder.png").mkdir()
    (tmp_path / "cat" / "clip.mpg").write_text("no image")
    (tmp_path / "._train.csv").write_text("no table")
    datasets = load_image_dataset(tmp_path, validation_share=0.25)
    assert len(datasets.train) + len(datasets.evaluation) == 9


def test_a_class_may_be_called_test(tmp_path: Path):
    write_class_folders(tmp_path, {"test": 5, "control": 5})
    assert load_image_dataset(tmp_path, validation_share=0.2).label_names == ["control", "test"]


def test_parquet_files(tmp_path: Path, table: Dataset, parquet_file: Path):
    whole, names = load_evaluation_dataset(parquet_file)
    assert names == ["cat", "dog", "ox"]
    assert whole["label"][:] == table["label"][:]
    images = EvaluationImages(whole, IMAGE_PROCESSOR)
    expected = IMAGE_PROCESSOR(picture(7), return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(images[7]["pixel_values"], expected, rtol=1e-5, atol=1e-5)

    for file, rows in (
        ("data/train-00000-of-00002.parquet", range(0, 9)),
        ("data/train-00001-of-00002.parquet", range(9, 15)),
        ("validation/0000.parquet", range(15, 21)),
        ("test.parquet", range(21, 30)),
    ):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        table.select(rows).to_parquet(tmp_path / file)
    datasets = load_image_dataset(tmp_path)
    assert (len(datasets.train), len(datasets.evaluation)) == (15, 6)
    assert len(load_image_dataset(tmp_path, eval_split="test").evaluation) == 9


def test_hub(monkeypatch: pytest.MonkeyPatch):
    as_hub(monkeypatch, {"train": make_table(9), "test": make_table(6, labels=[-1] * 6), "valid": make_table(3)})
    datasets = load_image_dataset("org/name")
    assert (len(datasets.train), len(datasets.evaluation)) == (9, 3)
    assert load_image_dataset("org/name", train_split="valid", eval_split="train").label_names == ["cat", "dog", "ox"]


def test_named_columns_of_other_types(monkeypatch: pytest.MonkeyPatch):
    """Encoded images without a feature type, and labels as integers or as strings (in a different order for
    evaluation)."""
    images = [ImageFeature().encode_example(picture(i)) for i in range(6)]
    train = Dataset.from_dict({"png": images, "number": [0, 1, 2] * 2, "word": ["b", "a", "c"] * 2})
    evaluation = Dataset.from_dict({"png": images[:2], "number": [0, 1], "word": ["c", "a"]})
    as_hub(monkeypatch, {"train": train, "test": evaluation})
    by_number = load_image_dataset("org/name", image_column="png", label_column="number")
    assert by_number.label_names == ["0", "1", "2"]
    assert by_number.evaluation["label"][:] == [0, 1]
    by_word = load_image_dataset("org/name", image_column="png", label_column="word")
    assert by_word.label_names == ["a", "b", "c"]
    assert by_word.train["label"][:] == [1, 0, 2] * 2
    assert by_word.evaluation["label"][:] == [2, 0]
    assert EvaluationImages(by_word.evaluation, IMAGE_PROCESSOR)[1]["pixel_values"].shape == (3, 16, 16)


def test_rare_classes_are_split_too(monkeypatch: pytest.MonkeyPatch):
    as_hub(monkeypatch, {"train": make_table(14, labels=[0] * 11 + [1] * 2 + [2])})
    datasets = load_image_dataset("org/name", validation_share=0.1)
    assert np.bincount(datasets.train["label"][:]).tolist() == [10, 1, 1]
    assert np.bincount(datasets.evaluation["label"][:]).tolist() == [1, 1]
    as_hub(monkeypatch, {"train": make_table(3)})
    with pytest.raises(ValueError, match="None of the 3 training images can be held out for evaluation"):
        load_image_dataset("org/name")


@settings(max_examples=20)
@given(share=st.floats(0.1, 0.9), seed=st.integers(0, 1000))
def test_split_by_label_is_a_partition_in_equal_shares(parquet_file: Path, share: float, seed: int):
    datasets = load_image_dataset(parquet_file, validation_share=share, seed=seed)
    assert sorted(datasets.train["row"][:] + datasets.evaluation["row"][:]) == list(range(30))
    assert np.bincount(datasets.evaluation["label"][:]).tolist() == [round(10 * share)] * 3
    again = load_image_dataset(parquet_file, validation_share=share, seed=seed)
    assert again.evaluation["row"][:] == datasets.evaluation["row"][:]


def test_samples_are_drawn_by_the_seed(parquet_file: Path):
    drawn = [load_image_dataset(parquet_file, max_train_samples=9, max_eval_samples=2, seed=seed) for seed in (0, 0, 1)]
    rows = [datasets.train["row"][:] for datasets in drawn]
    assert [len(datasets.train) for datasets in drawn] == [9, 9, 9]
    assert [len(datasets.evaluation) for datasets in drawn] == [2, 2, 2]
    assert rows[0] == rows[1] != rows[2]


def test_images_are_not_copied(parquet_file: Path):
    """Added columns are stored separately; the images stay memory-mapped."""
    before = set(parquet_file.parent.rglob("*"))
    datasets = load_image_dataset(parquet_file)
    cached = {file["filename"] for file in datasets.train.cache_files}
    assert cached
    size = sum(Path(file).stat().st_size for file in cached)
    assert size < 2 * parquet_file.stat().st_size
    assert set(parquet_file.parent.rglob("*")) == before


# What a data loader reads


@pytest.fixture(scope="module")
def dataset(parquet_file: Path) -> Dataset:
    return load_evaluation_dataset(parquet_file)[0]


def read(images, **options) -> dict[str, torch.Tensor]:
    batches = list(DataLoader(images, batch_size=4, collate_fn=collate, **options))
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def test_evaluation_images_equal_the_image_processors(dataset: Dataset):
    batch = read(EvaluationImages(dataset, IMAGE_PROCESSOR))
    expected = IMAGE_PROCESSOR([picture(i) for i in range(30)], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(batch["pixel_values"], expected, rtol=1e-5, atol=1e-5)
    assert batch["labels"].tolist() == [i % 3 for i in range(30)]
    assert (batch["pixel_values"].dtype, batch["labels"].dtype) == (torch.float32, torch.int64)


def test_training_without_augmentation_is_evaluation(dataset: Dataset):
    training = read(TrainingImages(dataset, IMAGE_PROCESSOR, NO_AUGMENTATION))
    evaluation = read(EvaluationImages(dataset, IMAGE_PROCESSOR))
    assert torch.equal(training["pixel_values"], evaluation["pixel_values"])


@pytest.mark.parametrize("augmentation", [AugmentationConfig(), AugmentationConfig(None, random_crop_padding=2)])
def test_samples_depend_on_seed_epoch_and_index_alone(dataset: Dataset, augmentation: AugmentationConfig):
    images = {seed: TrainingImages(dataset, IMAGE_PROCESSOR, augmentation, seed) for seed in (0, 1)}
    reference = {(seed, epoch, index): None for seed in images for epoch in (0, 1, 5) for index in (0, 3, 29)}
    for seed, epoch, index in reference:
        images[seed].set_epoch(epoch)
        reference[seed, epoch, index] = images[seed][index]["pixel_values"]
    values = list(reference.values())
    assert not any(torch.equal(values[i], values[j]) for i in range(len(values)) for j in range(i))
    for (seed, epoch, index), expected in reversed(reference.items()):
        images[seed].set_epoch(epoch)
        np.random.seed(index)
        torch.manual_seed(index)
        batch = images[seed].__getitems__([7, index, 2])
        assert torch.equal(batch[1]["pixel_values"], expected)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_samples_and_see_the_epoch(dataset: Dataset, context: str):
    images = TrainingImages(dataset, IMAGE_PROCESSOR, AugmentationConfig(), seed=3)
    loader = DataLoader(
        images,
        batch_size=8,
        collate_fn=collate,
        num_workers=2 if context == "fork" else 1,  # of which each starts Python anew
        persistent_workers=True,
        multiprocessing_context=context,
    )
    for epoch in (0, 4):
        images.set_epoch(epoch)
        expected = read(images)["pixel_values"]
        assert torch.equal(torch.cat([batch["pixel_values"] for batch in loader]), expected)


def test_horizontal_flip_probability(dataset: Dataset):
    flip = AugmentationConfig(None, 0, 1.0, 0, random_erasing=0.0)
    flipped = TrainingImages(dataset, IMAGE_PROCESSOR, flip)[4]["pixel_values"]
    plain = EvaluationImages(dataset, IMAGE_PROCESSOR)[4]["pixel_values"]
    assert torch.equal(flipped, plain.flip(-1))
    sometimes = TrainingImages(dataset, IMAGE_PROCESSOR, replace(flip, horizontal_flip=0.3))
    flips = 0
    for epoch in range(300):
        sometimes.set_epoch(epoch)
        flips += torch.equal(sometimes[4]["pixel_values"], flipped)
    assert flips / 300 == pytest.approx(0.3, abs=0.08)


def test_one_channel_for_one_mean(dataset: Dataset):
    processor = CLIPImageProcessor(
        size={"height": 16, "width": 16}, do_center_crop=False, do_convert_rgb=False, image_mean=[0.3], image_std=[0.4]
    )
    assert EvaluationImages(dataset, processor)[0]["pixel_values"].shape == (1, 16, 16)
    assert TrainingImages(dataset, processor, AugmentationConfig())[0]["pixel_values"].shape == (1, 16, 16)


# Bad input


def remove(folder: Path, pattern: str) -> None:
    for file in folder.glob(pattern):
        file.unlink()


def test_missing_paths(tmp_path: Path):
    for path in (tmp_path / "gone", "./gone", "~/gone/for/good", "gone.parquet", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=re.escape(f"There is no file or folder '{path}'")):
            load_image_dataset(path)


def test_unreachable_hub():
    """Tests run offline."""
    with pytest.raises(ValueError, match=r"'no-such-org/no-such-data' is not a local folder .* from the Hub"):
        load_image_dataset("no-such-org/no-such-data")


def test_malformed_name():
    with pytest.raises(ValueError, match=r"'what is this\?' is not a local folder"):
        load_image_dataset("what is this?")


def test_folders_without_images(tmp_path: Path):
    with pytest.raises(ValueError, match=r"contains neither Parquet files nor class folders"):
        load_image_dataset(tmp_path)
    picture(0).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"contains neither Parquet files nor class folders"):
        load_image_dataset(tmp_path)
    write_class_folders(tmp_path, {"cat": 3, "dog": 3})
    remove(tmp_path / "dog", "*.png")
    with pytest.raises(ValueError, match=r"The class folder '.*dog' contains no images"):
        load_image_dataset(tmp_path)


def test_other_files(tmp_path: Path):
    (tmp_path / "data.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"data.json' is a file of type '.json': a data set must be a folder, a .parquet"
    ):
        load_image_dataset(tmp_path / "data.json")


def test_truncated_parquet(tmp_path: Path, parquet_file: Path):
    (tmp_path / "train.parquet").write_bytes(parquet_file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"Parquet cannot be read from '.*train.parquet': .*Parquet"):
        load_image_dataset(tmp_path)


def test_one_class(tmp_path: Path):
    write_class_folders(tmp_path, {"cat": 3})
    with pytest.raises(ValueError, match=r"All 3 images of split 'train' of .* have the same label"):
        load_image_dataset(tmp_path)


def test_unknown_classes_in_evaluation(monkeypatch: pytest.MonkeyPatch):
    table = make_table(6)
    strange = table.cast_column("label", ClassLabel(names=["cat", "yak", "ox"]))
    as_hub(monkeypatch, {"train": table, "test": strange})
    with pytest.raises(ValueError, match="labels that the training split does not have: yak"):
        load_image_dataset("org/name")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_split": "training"}, "'.*' has no split 'training'; it has train"),
        ({"eval_split": "val"}, "'.*' has no split 'val'; it has train"),
        ({"image_column": "img"}, "There is no column 'img' in split 'train'; the columns are image, label"),
        ({"label_column": "class"}, "There is no column 'class' in split 'train'; the columns are image, label"),
        ({"image_column": "label"}, "image_column and label_column are both 'label'"),
        ({"validation_share": 0.0}, "validation_share is 0.0: it must be greater than 0 and less than 1"),
        ({"validation_share": 1.0}, "validation_share is 1.0: it must be greater than 0 and less than 1"),
        ({"max_train_samples": 28}, "max_train_samples is 28: it must be from 1 to 27"),
        ({"max_train_samples": 0}, "max_train_samples is 0"),
        ({"max_eval_samples": 4}, "max_eval_samples is 4: it must be from 1 to 3"),
    ],
)
def test_bad_options(parquet_file: Path, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        load_image_dataset(parquet_file, **options)


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        (make_table(3, labels=[0, -1, 2]), {}, "Row 1 of split 'train' has the label -1 in column 'label'.*0 to 2"),
        (make_table(3, labels=[0, None, 2]), {}, "Row 1 of split 'train' has no label in column 'label'"),
        (
            make_table(5, labels=[0, None, 2, None, 1]),
            {},
            "Row 1 of split 'train' has no label in column 'label' .2 of 5 rows",
        ),
        (
            make_table(5, labels=[0, 1, -1, -1, 1]),
            {},
            "Row 2 .* has the label -1 in column 'label' .2 of 5 rows have a label that is not allowed.: allowed "
            "labels are 0",
        ),
        (
            make_table(4).add_column("word", ["a", " ", "", "b"]),
            {"label_column": "word"},
            "Row 1 of split 'train' has no label in column 'word' .2 of 4 rows",
        ),
        (
            make_table(3).add_column("nothing", [None] * 3),
            {"label_column": "nothing"},
            "Row 0 of split 'train' has no label in column 'nothing' .3 of 3 rows",
        ),
        (make_table(0), {}, "Split 'train' of 'org/name' is empty"),
        (make_table(3).remove_columns("label"), {}, "No columns have the type ClassLabel .* with label_column"),
        (make_table(3).remove_columns("image"), {}, "No columns have the type Image .* with image_column"),
        (
            make_table(3).add_column("second", [0, 1, 2], feature=ClassLabel(names=["a", "b", "c"])),
            {},
            "2 columns have the type ClassLabel .* with label_column",
        ),
        (
            make_table(3).add_column("score", [0.5, 1.0, 2.0]),
            {"label_column": "score"},
            r"Column 'score' contains no labels .* its type is Value\('float64'\)",
        ),
        (
            make_table(3).add_column("tags", [[0], [1], [2, 0]], feature=Sequence(Value("int64"))),
            {"label_column": "tags"},
            "Column 'tags' contains no labels",
        ),
        (
            make_table(3).add_column("score", [0.5, 1.0, 2.0]),
            {"image_column": "score"},
            r"Column 'score' contains no images; its type is Value\('float64'\)",
        ),
    ],
)
def test_bad_tables(monkeypatch: pytest.MonkeyPatch, table: Dataset, options: dict, message: str):
    as_hub(monkeypatch, {"train": table, "test": make_table(3)})
    with pytest.raises(ValueError, match=message):
        load_image_dataset("org/name", **options)


NO_IMAGE = {
    "null": (None, "it has neither bytes nor a path"),
    "neither": ({"bytes": None, "path": None}, "it has neither bytes nor a path"),
    "no bytes": ({"bytes": b"", "path": "x.png"}, "it is empty .0 bytes."),
    "no file": ({"bytes": None, "path": "gone.png"}, "its file 'gone.png' cannot be opened"),
    "a folder": ({"bytes": None, "path": "/"}, "'/' is not a file"),
    "an empty text": ({"bytes": None, "path": ""}, "it has neither bytes nor a path"),
    "no path at all": ({"bytes": None, "path": "a\0b"}, "null byte"),
}


@pytest.mark.parametrize("kind", NO_IMAGE)
@pytest.mark.parametrize("source", ["Hub", "Parquet", "saved", "evaluation of a stream"])
def test_rows_without_an_image_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, source: str):
    images = [ImageFeature().encode_example(picture(i)) for i in range(9)]
    images[4] = images[7] = NO_IMAGE[kind][0]
    # Without the type Image: with it, datasets reads the files as it writes the table.
    stored = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"image": stored, "label": ClassLabel(names=["a", "b", "c"])})
    table = Dataset.from_dict({"image": images, "label": [0, 1, 2] * 3}, features=features)
    if source == "Hub":
        as_hub(monkeypatch, {"train": table})
    elif source == "saved":
        table.save_to_disk(tmp_path / "data")
    else:
        table.to_parquet(tmp_path / "test.parquet")
        table.select([0, 1, 2]).to_parquet(tmp_path / "train.parquet")
    name = {"Hub": "org/name", "saved": tmp_path / "data"}.get(source, tmp_path)
    load = load_image_stream if source == "evaluation of a stream" else load_image_dataset
    split = "train" if source in ("Hub", "saved") else "test"
    message = (
        rf"2 of 9 rows of split '{split}' have no image in column 'image'; the first is row 4: .*{NO_IMAGE[kind][1]}"
    )
    with pytest.raises(ValueError, match=message):
        load(name, image_column="image")


def test_empty_files_in_a_folder_are_named(tmp_path: Path):
    write_class_folders(tmp_path, {"cat": 3, "dog": 3})
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    with pytest.raises(ValueError, match=r"1 of 7 rows of split 'train' .* row 6: '.*dog/pipe.png' is not a file"):
        load_image_dataset(tmp_path)
    (tmp_path / "dog" / "pipe.png").unlink()
    (tmp_path / "dog" / "1.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 of 6 rows of split 'train' .* row 4: its file '.*dog/1.png' is empty"):
        load_image_dataset(tmp_path)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_corrupt_images_are_named(tmp_path: Path, num_workers: int):
    folder = write_class_folders(tmp_path / "folder", {"cat": 3, "dog": 3})
    (folder / "dog" / "1.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    images = EvaluationImages(load_evaluation_dataset(folder)[0], IMAGE_PROCESSOR)
    with pytest.raises(ValueError, match=r"The image in row 4 of split 'train' \('.*dog/1.png'\) cannot be read"):
        read(images, num_workers=num_workers)


def test_corrupt_rows_are_named_by_their_row_in_the_file(tmp_path: Path):
    good = [ImageFeature().encode_example(picture(i)) for i in range(12)]
    good[8] = {"bytes": b"broken", "path": None}
    features = Features({"image": ImageFeature(decode=False), "label": ClassLabel(names=["a", "b"])})
    Dataset.from_dict({"image": good, "label": [0, 1] * 6}, features=features).to_parquet(tmp_path / "train.parquet")
    dataset = load_image_dataset(tmp_path, max_train_samples=5, seed=1).train
    assert dataset["row"][:].index(8) != 8
    with pytest.raises(ValueError, match="The image in row 8 of split 'train' cannot be read"):
        read(EvaluationImages(dataset, IMAGE_PROCESSOR))


def test_index_and_seed_out_of_range(dataset: Dataset):
    images = EvaluationImages(dataset, IMAGE_PROCESSOR)
    for index in (-1, 30):
        with pytest.raises(IndexError, match=f"There is no image {index}: there are 30"):
            images[index]
    with pytest.raises(ValueError, match="seed is -1: it must not be negative"):
        TrainingImages(dataset, IMAGE_PROCESSOR, NO_AUGMENTATION, seed=-1)
