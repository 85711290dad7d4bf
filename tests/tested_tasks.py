"""Tasks for which the loop's guarantees are tested: those of the package, and the toy task of the documentation."""

import importlib.util
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conftest import make_video_config, make_vim_config
from datasets import ClassLabel, Dataset, Features, Image, List, Value, Video
from PIL import Image as PILImage
from videos import coloured_frames, write_class_folders, write_video

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.training.tasks import TASKS
from hf_vssm_prune.training.tasks.classification import AugmentationArguments, ImageClassification
from hf_vssm_prune.training.tasks.object_detection import DetectionArguments, ObjectDetection
from hf_vssm_prune.training.tasks.semantic_segmentation import SegmentationArguments, SemanticSegmentation
from hf_vssm_prune.training.tasks.task import Task
from hf_vssm_prune.training.tasks.video_classification import VideoClassification, VideoTrainingArguments


def load_toy() -> type[Task]:
    """The task shown in docs/extend.md."""
    file = Path(__file__).resolve().parents[1] / "docs" / "examples" / "mean_colour.py"
    spec = importlib.util.spec_from_file_location("mean_colour", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.MeanColour


MeanColour = load_toy()
EVERY_TASK: dict[str, type[Task]] = {**TASKS, MeanColour.name: MeanColour}

PLAIN = {"no_random_crop": True, "hflip": 0.0, "randaugment_num_ops": 0, "reprob": 0.0}
UNMIXED = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0}


@dataclass(frozen=True)
class Tested:
    """A task and the data with which it is tested.

    Attributes:
        plain, random: the task without randomness in its batches, and with all of its randomness.
        make_config: creates the configuration of a small model for it.
        write_folder: writes 12 training and 5 test examples of each of three classes into an empty folder.
        write_stream: writes 26 training and 5 test examples there, in files that can be streamed.
    """

    plain: Callable[[], Task]
    random: Callable[[], Task]
    make_config: Callable[..., VisionMambaConfig]
    write_folder: Callable[[Path], None]
    write_stream: Callable[[Path], None]


def write_image_folder(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for number, name in enumerate(("blue", "green", "red")):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = coloured_frames(2 - number, generator)[0]
                PILImage.fromarray(pixels).save(folder / split / name / f"{i}.png")


def write_video_folder(folder: Path) -> None:
    generator = np.random.default_rng(0)
    write_class_folders(folder, "train", 12, generator)
    write_class_folders(folder, "test", 5, generator)


def encode_image(channel: int, generator: np.random.Generator) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(coloured_frames(channel, generator)[0]).save(file, "png")
    return file.getvalue()


def encode_video(channel: int, generator: np.random.Generator) -> bytes:
    file = io.BytesIO()
    write_video(file, coloured_frames(channel, generator), format="matroska")
    return file.getvalue()


def write_parquet(folder: Path, kind: type, encode: Callable[[int, np.random.Generator], bytes]) -> None:
    """Writes examples in three colours: two files of 13 for training, and one of 5."""
    generator = np.random.default_rng(0)
    features = Features({kind.__name__.lower(): kind(), "label": ClassLabel(names=["red", "green", "blue"])})
    for split, count in (("train-0", 13), ("train-1", 13), ("test-0", 5)):
        stored = [{"bytes": encode(i % 3, generator), "path": None} for i in range(count)]
        rows = {kind.__name__.lower(): stored, "label": [i % 3 for i in range(count)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


def masked_image(channel: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An image in one colour with a rectangle in another. The mask has the colours' ids."""
    pixels, other = coloured_frames(channel, generator)[0], coloured_frames((channel + 1) % 3, generator)[0]
    mask = np.full(pixels.shape[:2], channel, np.uint8)
    top, left = generator.integers(0, pixels.shape[0] // 2, 2)
    pixels[top : top + 12, left : left + 16] = other[top : top + 12, left : left + 16]
    mask[top : top + 12, left : left + 16] = (channel + 1) % 3
    return pixels, mask


COLOURS = {"0": "red", "1": "green", "2": "blue"}


def write_mask_folder(folder: Path, counts: Mapping[str, int] = {"train": 36, "test": 15}) -> None:
    generator = np.random.default_rng(0)
    for split, count in counts.items():
        for kind in ("images", "masks"):
            (folder / kind / split).mkdir(parents=True)
        for i in range(count):
            for kind, pixels in zip(("images", "masks"), masked_image(i % 3, generator), strict=True):
                PILImage.fromarray(pixels).save(folder / kind / split / f"{i}.png")
    (folder / "id2label.json").write_text(json.dumps(COLOURS))


def encode_pixels(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_mask_parquet(folder: Path) -> None:
    generator = np.random.default_rng(0)
    features = Features({"image": Image(), "annotation": Image()})
    for split, count in (("train-0", 13), ("train-1", 13), ("test-0", 5)):
        pairs = [masked_image(i % 3, generator) for i in range(count)]
        columns = {
            name: [{"bytes": encode_pixels(pixels), "path": None} for pixels in column]
            for name, column in zip(features, zip(*pairs, strict=True), strict=True)
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    (folder / "id2label.json").write_text(json.dumps(COLOURS))


def boxed_image(channel: int, generator: np.random.Generator) -> tuple[np.ndarray, list[int]]:
    """An image in one colour with a rectangle in the next one, and its box (left, top, width, height)."""
    pixels, mask = masked_image(channel, generator)
    rows, columns = np.nonzero(mask != channel)
    left, top = columns.min(), rows.min()
    return pixels, [int(each) for each in (left, top, columns.max() + 1 - left, rows.max() + 1 - top)]


def write_box_folder(folder: Path, counts: Mapping[str, int] = {"train": 36, "test": 15}) -> None:
    """Writes COCO's format, with one object per image."""
    generator = np.random.default_rng(0)
    categories = [{"id": label + 1, "name": name} for label, name in enumerate(COLOURS.values())]
    for split, count in counts.items():
        (folder / split).mkdir()
        content = {"images": [], "annotations": [], "categories": categories}
        for i in range(count):
            pixels, box = boxed_image(i % 3, generator)
            PILImage.fromarray(pixels).save(folder / split / f"{i}.png")
            content["images"].append({"id": i, "file_name": f"{i}.png"})
            content["annotations"].append({"id": i, "image_id": i, "category_id": (i + 1) % 3 + 1, "bbox": box})
        (folder / f"{split}.json").write_text(json.dumps(content))


def write_box_parquet(folder: Path) -> None:
    """Writes the column `objects` as in transformers' examples."""
    generator = np.random.default_rng(0)
    objects = {"bbox": List(List(Value("float32"))), "category": List(ClassLabel(names=list(COLOURS.values())))}
    features = Features({"image": Image(), "objects": objects})
    for split, count in (("train-0", 13), ("train-1", 13), ("test-0", 5)):
        pairs = [boxed_image(i % 3, generator) for i in range(count)]
        columns = {
            "image": [{"bytes": encode_pixels(pixels), "path": None} for pixels, _ in pairs],
            "objects": [{"bbox": [box], "category": [(i + 1) % 3]} for i, (_, box) in enumerate(pairs)],
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")


IMAGE_DATA = (make_vim_config, write_image_folder, lambda folder: write_parquet(folder, Image, encode_image))
VIDEO_DATA = (make_video_config, write_video_folder, lambda folder: write_parquet(folder, Video, encode_video))
MASK_DATA = (make_vim_config, write_mask_folder, write_mask_parquet)
BOX_DATA = (make_vim_config, write_box_folder, write_box_parquet)
SMALL_DETECTOR = {
    **{"input_size": [32], "head_channels": 16, "head_ffn_channels": 16, "head_attention_heads": 2},
    **{"decoder_layers": 1, "num_queries": 21},
}
SMALL_HEAD = {"head_channels": 8, "auxiliary_channels": 8, "crop_size": [32]}
TESTED: dict[str, Tested] = {
    "image-classification": Tested(
        lambda: ImageClassification(AugmentationArguments(**PLAIN, **UNMIXED)), ImageClassification, *IMAGE_DATA
    ),
    "mean-colour": Tested(MeanColour, lambda: MeanColour(MeanColour.training_arguments(noise=0.1)), *IMAGE_DATA),
    "object-detection": Tested(
        lambda: ObjectDetection(
            DetectionArguments(
                **SMALL_DETECTOR, scale=[1.0, 1.0], hflip=0.0, no_photometric_distortion=True, num_denoising=0
            )
        ),
        lambda: ObjectDetection(DetectionArguments(**SMALL_DETECTOR, vflip=0.5, num_denoising=4)),
        *BOX_DATA,
    ),
    "semantic-segmentation": Tested(
        lambda: SemanticSegmentation(
            SegmentationArguments(
                **SMALL_HEAD, scale=[1.0, 1.0], hflip=0.0, no_photometric_distortion=True, most_of_a_class=1.0
            )
        ),
        lambda: SemanticSegmentation(SegmentationArguments(**SMALL_HEAD, feature_pyramid="vim")),
        *MASK_DATA,
    ),
    "video-classification": Tested(
        lambda: VideoClassification(VideoTrainingArguments(**PLAIN, **UNMIXED)),
        lambda: VideoClassification(VideoTrainingArguments(num_clips=2, num_crops=3)),
        *VIDEO_DATA,
    ),
}
