"""Data sets from folders, Parquet and the Hub; samples that depend on seed, epoch and index alone; bad input."""

import os
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

from hf_vssm_prune.training.augmentation import AugmentationConfig
from hf_vssm_prune.training.data import (
    EvaluationImages,
    TrainingImages,
    collate,
    load_evaluation_dataset,
    load_image_dataset,
    sources,
)


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
    """Row i holds picture(i) and the label i % 3."""
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
    """Makes the name "org/name" a data set on the Hub."""
    dataset_dict = DatasetDict({split: Dataset(table.data, split=split) for split, table in splits.items()})

    def load_dataset(name: str, config_name: str | None, streaming: bool) -> DatasetDict:
        assert (name, config_name, streaming) == ("org/name", None, False)
        return dataset_dict

    monkeypatch.setattr(sources, "load_dataset", load_dataset)


# Where the data comes from


def test_the_packaged_fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    datasets = load_image_dataset("fashion_mnist")
    assert (len(datasets.train), len(datasets.evaluation)) == (10_000, 2_000)
    assert datasets.label_names[:2] == ["T-shirt/top", "Trouser"]
    batch = collate([EvaluationImages(datasets.evaluation, IMAGE_PROCESSOR)[i] for i in (0, 1)])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    write_class_folders(tmp_path / "fashion_mnist", {"mine": 20, "yours": 20})
    assert load_image_dataset("fashion_mnist").label_names == ["mine", "yours"]


def test_class_folders(tmp_path: Path):
    """A file called test_… is no test split, and other files and hidden folders are no images."""
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


@pytest.mark.parametrize("name", ["val", "validation", "Valid", "test"])
def test_folders_of_splits(tmp_path: Path, name: str):
    write_class_folders(tmp_path / "train", {"cat": 4, "dog": 5})
    write_class_folders(tmp_path / name, {"cat": 2, "dog": 3})
    datasets = load_image_dataset(str(tmp_path))
    assert (len(datasets.train), len(datasets.evaluation)) == (9, 5)
    evaluation, label_names = load_evaluation_dataset(tmp_path)
    assert evaluation[:] == datasets.evaluation[:]
    assert label_names == ["cat", "dog"]


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
    """Encoded images without a feature type, labels as integers or as strings (in another order for evaluation)."""
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
    with pytest.raises(ValueError, match="None of the 3 training images can be set apart for evaluation"):
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
    """The columns that are added lie beside the memory-mapped images."""
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
        num_workers=2,
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
    assert torch.equal(flipped, EvaluationImages(dataset, IMAGE_PROCESSOR)[4]["pixel_values"].flip(-1))


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
        with pytest.raises(FileNotFoundError, match=f"There is no file or folder '{path}'"):
            load_image_dataset(path)


def test_unreachable_hub():
    """The tests run offline."""
    with pytest.raises(ValueError, match=r"'no-such-org/no-such-data' is no local folder .* from the Hub"):
        load_image_dataset("no-such-org/no-such-data")


def test_malformed_name():
    with pytest.raises(ValueError, match=r"'what is this\?' is no local folder"):
        load_image_dataset("what is this?")


def test_folders_without_images(tmp_path: Path):
    with pytest.raises(ValueError, match=r"holds neither Parquet files nor class folders"):
        load_image_dataset(tmp_path)
    picture(0).save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match=r"holds neither Parquet files nor class folders"):
        load_image_dataset(tmp_path)
    write_class_folders(tmp_path, {"cat": 3, "dog": 3})
    remove(tmp_path / "dog", "*.png")
    with pytest.raises(ValueError, match=r"The class folder '.*dog' holds no images"):
        load_image_dataset(tmp_path)


def test_other_files(tmp_path: Path):
    (tmp_path / "data.csv").write_text("image,label\n")
    with pytest.raises(ValueError, match=r"data.csv' is a file of type '.csv': a data set is a folder or a .parquet"):
        load_image_dataset(tmp_path / "data.csv")


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
        ({"image_column": "img"}, "There is no column 'img' in split 'train'; there are image, label"),
        ({"label_column": "class"}, "There is no column 'class' in split 'train'; there are image, label"),
        ({"image_column": "label"}, "image_column and label_column are both 'label'"),
        ({"validation_share": 0.0}, "validation_share is 0.0: it must be between 0 and 1"),
        ({"validation_share": 1.0}, "validation_share is 1.0: it must be between 0 and 1"),
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
            r"Column 'score' holds no labels .* its type is Value\('float64'\)",
        ),
        (
            make_table(3).add_column("tags", [[0], [1], [2, 0]], feature=Sequence(Value("int64"))),
            {"label_column": "tags"},
            "Column 'tags' holds no labels",
        ),
        (
            make_table(3).add_column("score", [0.5, 1.0, 2.0]),
            {"image_column": "score"},
            r"Column 'score' holds no images; its type is Value\('float64'\)",
        ),
    ],
)
def test_bad_tables(monkeypatch: pytest.MonkeyPatch, table: Dataset, options: dict, message: str):
    as_hub(monkeypatch, {"train": table, "test": make_table(3)})
    with pytest.raises(ValueError, match=message):
        load_image_dataset("org/name", **options)


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
