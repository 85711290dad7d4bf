"""The tasks that the tests of the loop's guarantees go through: those of the package, and the toy of the docs."""

import importlib.util
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from conftest import make_video_config, make_vim_config
from datasets import ClassLabel, Dataset, Features, Image, Video
from PIL import Image as PILImage
from videos import coloured_frames, write_class_folders, write_video

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.training.tasks import TASKS
from hf_vssm_prune.training.tasks.classification import AugmentationArguments, ImageClassification
from hf_vssm_prune.training.tasks.task import Task
from hf_vssm_prune.training.tasks.video_classification import VideoClassification, VideoTrainingArguments


def load_toy() -> type[Task]:
    """The task that docs/extend.md shows."""
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
    """What a task is tested with.

    Attributes:
        plain, random: the task with nothing random in its batches, and with as much as it has.
        make_config: of a small model of its kind.
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
    """Three colours, in two files of 13 for training and one of 5."""
    generator = np.random.default_rng(0)
    features = Features({kind.__name__.lower(): kind(), "label": ClassLabel(names=["red", "green", "blue"])})
    for split, count in (("train-0", 13), ("train-1", 13), ("test-0", 5)):
        stored = [{"bytes": encode(i % 3, generator), "path": None} for i in range(count)]
        rows = {kind.__name__.lower(): stored, "label": [i % 3 for i in range(count)]}
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}.parquet")


IMAGE_DATA = (make_vim_config, write_image_folder, lambda folder: write_parquet(folder, Image, encode_image))
VIDEO_DATA = (make_video_config, write_video_folder, lambda folder: write_parquet(folder, Video, encode_video))
TESTED: dict[str, Tested] = {
    "image-classification": Tested(
        lambda: ImageClassification(AugmentationArguments(**PLAIN, **UNMIXED)), ImageClassification, *IMAGE_DATA
    ),
    "mean-colour": Tested(MeanColour, lambda: MeanColour(MeanColour.training_arguments(noise=0.1)), *IMAGE_DATA),
    "video-classification": Tested(
        lambda: VideoClassification(VideoTrainingArguments(**PLAIN, **UNMIXED)),
        lambda: VideoClassification(VideoTrainingArguments(num_clips=2, num_crops=3)),
        *VIDEO_DATA,
    ),
}
