"""Streamed training images: their order, resuming in the middle, errors, and a run that resumes within an epoch."""

import io
from pathlib import Path

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.training.arguments import DataArguments
from hf_vssm_prune.training.data import ImageStream, StreamedTrainingImages, collate, load_image_stream
from hf_vssm_prune.training.data.columns import store_stream, take_columns
from hf_vssm_prune.training.data.sources import load_splits
from hf_vssm_prune.training.sampling import StreamSampler
from hf_vssm_prune.training.tasks import TASKS
from hf_vssm_prune.training.tasks.classification import AugmentationArguments


@pytest.fixture(scope="module")
def parquet_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 training images in three files, and 4 test images. The label and every pixel of image i are i."""
    folder = tmp_path_factory.mktemp("parquet")
    write(folder / "train-0.parquet", range(0, 10))
    write(folder / "train-1.parquet", range(10, 20))
    write(folder / "train-2.parquet", range(20, 30))
    write(folder / "test-0.parquet", range(4))
    return folder


def write(file: Path, numbers: range, label=None) -> None:
    features = Features({"picture": Image(), "kind": label or ClassLabel(names=[f"kind {i}" for i in range(30)])})
    pictures = [PILImage.fromarray(np.full((8, 8, 3), number, np.uint8)) for number in numbers]
    Dataset.from_dict({"picture": pictures, "kind": list(numbers)}, features=features).to_parquet(file)


def order(sampler: StreamSampler) -> list[int]:
    rows = list(sampler)
    assert [place for place, _ in rows] == list(range(sampler.start, len(sampler.stream)))
    return [row["label"] for _, row in rows]


def test_the_order_depends_on_seed_and_epoch_and_can_start_in_the_middle(parquet_folder):
    datasets = load_image_stream(parquet_folder, shuffle_buffer_size=7)
    assert isinstance(datasets.train, ImageStream)
    assert (len(datasets.train), len(datasets.evaluation), len(datasets.label_names)) == (30, 4, 30)
    sampler = StreamSampler(datasets.train, seed=1)
    first = order(sampler)
    assert sorted(first) == list(range(30))
    assert order(sampler) == first
    sampler.start_at(epoch=1)
    second = order(sampler)
    assert sorted(second) == list(range(30))
    assert second != first
    sampler.start_at(epoch=1, image=11)
    assert order(sampler) == second[11:]
    assert len(sampler) == 19
    assert order(StreamSampler(datasets.train, seed=2)) != first


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_whatever_the_number_of_workers(parquet_folder, num_workers):
    stream = load_image_stream(parquet_folder, shuffle_buffer_size=7).train
    processor = new_image_processor(_Config(), [0.0] * 3, [1.0] * 3, crop_pct=1.0)
    augmentation = AugmentationArguments(no_random_crop=True, randaugment_num_ops=0, reprob=0.0).image_augmentation()
    images = StreamedTrainingImages(stream, processor, augmentation, seed=1)
    sampler = StreamSampler(stream, seed=1)
    loader = DataLoader(images, 4, sampler=sampler, collate_fn=collate, num_workers=num_workers, drop_last=True)
    batches = list(loader)
    assert len(batches) == len(loader) == 7
    labels = [label for batch in batches for label in batch["labels"].tolist()]
    assert labels == order(sampler)[:28]
    pixels = [value for batch in batches for value in batch["pixel_values"][:, 0, 0, 0].tolist()]
    assert pixels == pytest.approx([label / 255 for label in labels])


class _Config:
    image_size = 8
    num_channels = 3
    modality = "image"

    @staticmethod
    def image_height_width(size: int) -> tuple[int, int]:
        return size, size


def test_a_part_of_the_stream(parquet_folder):
    stream = load_image_stream(parquet_folder, max_train_samples=5).train
    assert sorted(order(StreamSampler(stream, seed=0))) == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="max_train_samples is 31: split 'train' has 30 images"):
        load_image_stream(parquet_folder, max_train_samples=31)


def test_a_stream_that_ends_too_soon_says_so(parquet_folder):
    stream = load_image_stream(parquet_folder).train
    longer = ImageStream(stream.rows, 32, stream.buffer_size, "train")
    with pytest.raises(ValueError, match="'train' has 30 images, fewer than the expected 32"):
        list(StreamSampler(longer, seed=0))


def test_what_cannot_be_streamed_is_refused(tmp_path, parquet_folder):
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    PILImage.new("RGB", (8, 8)).save(tmp_path / "pictures" / "cat" / "1.png")
    with pytest.raises(ValueError, match="omit --streaming"):
        load_image_stream(tmp_path / "pictures")
    write(tmp_path / "train.parquet", range(4), label=Value("int64"))
    with pytest.raises(ValueError, match="in a stream, labels need names"):
        load_image_stream(tmp_path / "train.parquet", label_column="kind")
    with pytest.raises(ValueError, match="no split to evaluate on"):
        load_image_stream(parquet_folder / "train-0.parquet")


@pytest.mark.parametrize(
    ("image", "label", "message"),
    [
        (None, 1, "The image in place 1 of epoch 0 of split 'train' has neither bytes nor a path"),
        ({"bytes": None, "path": None}, 1, "The image in place 1 of epoch 0 of split 'train' has neither bytes nor a"),
        ({"bytes": b"", "path": None}, 1, "The image in place 1 of epoch 0 of split 'train' cannot be read"),
        ("a picture", None, "The image in place 1 of split 'train' has the label None: allowed labels are 0 to 2"),
        ("a picture", -1, "The image in place 1 of split 'train' has the label -1: allowed labels are 0 to 2"),
    ],
)
def test_rows_that_cannot_be_used_are_named(image, label, message, tmp_path):
    picture = Image().encode_example(PILImage.new("RGB", (8, 8)))
    images = [picture, picture if image == "a picture" else image, picture]
    stored = {"bytes": Value("binary"), "path": Value("string")}
    features = Features({"image": stored, "label": ClassLabel(names=["a", "b", "c"])})
    table = Dataset.from_dict({"image": images, "label": [0, label, 2]}, features=features)
    table.to_parquet(tmp_path / "train.parquet")
    table.select([0, 2]).to_parquet(tmp_path / "test.parquet")
    stream = load_image_stream(tmp_path, image_column="image").train
    processor = new_image_processor(_Config(), [0.0] * 3, [1.0] * 3, crop_pct=1.0)
    images = StreamedTrainingImages(stream, processor, AugmentationArguments().image_augmentation())
    with pytest.raises(ValueError, match=message):
        images.__getitems__(list(enumerate(stream.rows)))


def test_rows_that_datasets_cannot_read_are_named(tmp_path):
    write(tmp_path / "train.parquet", range(4))
    stream = load_image_stream(tmp_path, eval_split="train").train

    def fail(row):
        if row["label"] == 2:
            raise ValueError("An image sample should have bytes")
        return row

    broken = ImageStream(stream.rows.map(fail, features=stream.rows.features), 4, buffer_size=1, split="train")
    with pytest.raises(ValueError, match=r"After [0-2] rows of split 'train', a row cannot be read: An image"):
        list(StreamSampler(broken, seed=0))
    # Evaluation images of any task are read before the run.
    message = "'photos' cannot be read: After 2 rows of split 'train', a row cannot be read: An image"
    with pytest.raises(ValueError, match=message):
        store_stream(broken.rows, "train", "photos")


def test_streamed_evaluation_images_are_stored_once(parquet_folder):
    """Later runs, and other processes, have other connections to the Hub and other objects for the same rows."""
    files = []
    for number in range(2):
        rows = load_splits(parquet_folder, None, streaming=True)["test"]._resolve_features()
        rows = take_columns(rows, {"kind": "label"})
        rows._IterableDataset__hffs_cache = {"connection": number}
        files.append(store_stream(rows, "test", "pictures").cache_files)
    assert files[0] == files[1]


LABELS = {
    "image-classification": (ClassLabel(names=["ball", "cube"]), [0, 1]),
    "semantic-segmentation": (Image(), [PILImage.new("L", (30, 20), label) for label in (0, 1)]),
    "object-detection": (
        {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=["ball", "cube"]))},
        [{"bbox": [[1, 1, 5, 5]], "category": [label]} for label in (0, 1)],
    ),
}


@pytest.mark.parametrize("task", LABELS)
def test_streamed_images_are_those_of_the_files(task, tmp_path):
    """JPEG files that were decoded and encoded again would have other pixels than in an evaluation without a stream."""
    kind, labels = LABELS[task]
    noise = PILImage.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8))
    noise.save(file := io.BytesIO(), "JPEG", quality=95)
    stored = {"bytes": file.getvalue(), "path": None}
    rows = Dataset.from_dict(
        {"photo": [stored] * 2, "label": labels}, features=Features({"photo": Image(), "label": kind})
    )
    for split in ("train", "test"):
        rows.to_parquet(tmp_path / f"{split}.parquet")
    (tmp_path / "classes.txt").write_text("ball\ncube\n")
    data = DataArguments(str(tmp_path), streaming=True, image_column_name="photo", label_column_name="label")
    datasets = TASKS[task](None).load_datasets(data, seed=0)
    for part in (datasets.train.rows, getattr(datasets.evaluation, "rows", datasets.evaluation)):
        assert [row["image"]["bytes"] for row in part] == [file.getvalue()] * 2
