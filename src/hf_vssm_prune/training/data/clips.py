"""Data sets of videos: clips of frames, decoded and augmented on access."""

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
    """The clips and crops of a video that are evaluated.

    Attributes:
        sampling: how frames of a clip are sampled, a name in `frame_sampling.SAMPLINGS`.
        num_clips, num_crops: number of clips per video and crops per clip; a single crop is the center crop.
    """

    sampling: str = "uniform"
    num_clips: int = 1
    num_crops: int = 1


class _Clips(Items):
    kind = "video"

    def __init__(self, dataset: Dataset | ImageStream, image_processor: BaseImageProcessor, *options: Any) -> None:
        pyav()  # raises an error before anything is read if the library is missing
        super().__init__(dataset, image_processor, *options)
        num_frames = image_processor.to_dict().get("num_frames")
        if not isinstance(num_frames, int) or num_frames < 1:
            raise ValueError(
                f"{type(image_processor).__name__} has num_frames={num_frames}: the image processor of a video model "
                "must say how many frames a clip has."
            )
        self._num_frames = num_frames


class EvaluationClips(_Clips):
    """Views of videos, with frames prepared by the image processor.

    Each item is {"pixel_values": float32 (views, frames, channels, height, width), "labels": int}: crops of the first
    clip, then of the second.

    Args:
        dataset: A video data set from `load_image_dataset` or `load_evaluation_dataset`.
        image_processor: An image processor supported by `ImageProcessorSteps`, with `num_frames`.
        views: The views of each video.
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
    """Augmented clips of random frames, with the same augmentation for all frames of a clip.

    Each item is {"pixel_values": float32 (frames, channels, height, width), "labels": int}.

    Args: those of `AugmentedItems`; the image processor has `num_frames`.
    """

    def _pixel_values(self, stored: Mapping[str, Any] | None, index: int, name: str) -> torch.Tensor:
        size: list[tuple[int, int]] = []

        def prepare(frame: Image.Image) -> torch.Tensor:
            size.append(frame.size)
            if frame.size != size[0]:  # in frames of different sizes, the same crop would show different parts
                frame = frame.resize(size[0], self._steps.resample)
            frame = self._augment(frame.convert(self._steps.mode), self._epoch.generator(index, 1))
            return self._steps.normalize(frame)

        frames = decode_frames(
            stored,
            lambda count: [random_frames(count, self._num_frames, self._epoch.generator(index, 0))],
            prepare,
            name,
        )
        clip = torch.stack(frames[0])
        # The same rectangle in all frames, with different noise in each.
        random_erasing(clip.flatten(0, 1), self._augmentation.random_erasing, self._epoch.generator(index, 2))
        return clip


class StreamedTrainingClips(StreamedItems, TrainingClips):
    """Augmented clips of a stream of videos."""
