"""What a data loader reads of videos: clips of frames, decoded and augmented when they are asked for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from PIL import Image
from transformers import BaseImageProcessor

from hf_vssm_prune.training.augmentation import random_erasing
from hf_vssm_prune.training.data.columns import ImageStream
from hf_vssm_prune.training.data.items import AugmentedItems, Items, StreamedItems
from hf_vssm_prune.training.frame_sampling import clips_of, random_frames
from hf_vssm_prune.training.video_decoding import decode_frames, pyav


@dataclass(frozen=True)
class Views:
    """What of a video is evaluated: so many clips, each cropped in so many places.

    Attributes:
        sampling: which frames a clip has, a name in `frame_sampling.SAMPLINGS`.
        num_clips, num_crops: how many; one crop is the middle of the frames.
    """

    sampling: str = "uniform"
    num_clips: int = 1
    num_crops: int = 1


class _Clips(Items):
    kind = "video"

    def __init__(self, dataset: Dataset | ImageStream, image_processor: BaseImageProcessor, *options: Any) -> None:
        pyav()  # missing, it is named before anything is read
        super().__init__(dataset, image_processor, *options)
        num_frames = image_processor.to_dict().get("num_frames")
        if not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(
                f"{type(image_processor).__name__} has num_frames={num_frames}: the image processor of a video model "
                "must say how many frames a clip has."
            )
        self._num_frames = num_frames


class EvaluationClips(_Clips):
    """Views of videos, as the image processor gives their frames.

    Each item is {"pixel_values": float32 (views, frames, channels, height, width), "labels": int}: crops of the first
    clip, then of the second.

    Args:
        dataset: One of videos that `load_image_dataset` or `load_evaluation_dataset` gave.
        image_processor: One of plain steps, see `ImageProcessorSteps`, that says `num_frames`.
        views: Of each video.
    """

    def __init__(self, dataset: Dataset, image_processor: BaseImageProcessor, views: Views) -> None:
        super().__init__(dataset, image_processor)
        self._views = views

    def _pixel_values(self, stored: Mapping[str, Any] | None, index: int, name: str) -> torch.Tensor:
        views = self._views
        clips = decode_frames(
            stored,
            lambda count: clips_of(views.sampling, count, self._num_frames, views.num_clips),
            self._crops,
            name,
        )
        return torch.cat([torch.stack(clip, dim=1) for clip in clips])

    def _crops(self, frame: Image.Image) -> torch.Tensor:
        crops = self._steps.crops(frame.convert(self._steps.mode), self._views.num_crops)
        return torch.stack([self._steps.normalize(crop) for crop in crops])


class TrainingClips(_Clips, AugmentedItems):
    """Augmented clips of random frames: what is done to one frame is done to all of a clip.

    Each item is {"pixel_values": float32 (frames, channels, height, width), "labels": int}.

    Args: those of `AugmentedItems`; the image processor says `num_frames`.
    """

    def _pixel_values(self, stored: Mapping[str, Any] | None, index: int, name: str) -> torch.Tensor:
        size: list[tuple[int, int]] = []

        def prepare(frame: Image.Image) -> torch.Tensor:
            size.append(frame.size)
            if frame.size != size[0]:  # of another size than those before it, so that the same crop has another place
                frame = frame.resize(size[0], self._steps.resample)
            frame = self._augment(frame.convert(self._steps.mode), self._generator(index, 1))
            return self._steps.normalize(frame)

        frames = decode_frames(
            stored, lambda count: [random_frames(count, self._num_frames, self._generator(index, 0))], prepare, name
        )
        clip = torch.stack(frames[0])
        # One rectangle through all frames, of other noise in each.
        random_erasing(clip.flatten(0, 1), self._augmentation.random_erasing, self._generator(index, 2))
        return clip


class StreamedTrainingClips(StreamedItems, TrainingClips):
    """Augmented clips of a stream of videos."""
