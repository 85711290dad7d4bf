"""Which frames of a video a clip has, counted from 0, as VideoMamba's authors choose them. A video of fewer frames than
a clip has some of them several times."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np


# From the frames of a video, those of a clip, which clip it is and how many there are, to the clip's frames, ascending.
Sampling: TypeAlias = Callable[[int, int, int, int], list[int]]


def uniform_frames(num_frames: int, clip_length: int, clip: int = 0, num_clips: int = 1) -> list[int]:
    """Spread over the whole video, each clip a little later than the one before: for Kinetics, Breakfast and COIN."""
    segment = (num_frames - 1) / clip_length
    later = int(segment * (clip + 1) / (num_clips + 1))
    return [min(num_frames - 1, round(i * segment) + later) for i in range(clip_length)]


def segment_frames(num_frames: int, clip_length: int, clip: int = 0, num_clips: int = 1) -> list[int]:
    """One of each of `clip_length` segments of one length: for Something-Something V2. A single clip has their middles,
    several have their beginnings and what is evenly behind these."""
    segment = num_frames / clip_length
    offset = 0.5 if num_clips == 1 else clip / num_clips
    return [int((i + offset) * segment) for i in range(clip_length)]


def random_frames(num_frames: int, clip_length: int, generator: np.random.Generator) -> list[int]:
    """For training: of each of these segments any."""
    places = np.arange(clip_length) + generator.random(clip_length)
    return np.minimum(places * num_frames / clip_length, num_frames - 1).astype(int).tolist()


SAMPLINGS: dict[str, Sampling] = {"uniform": uniform_frames, "segments": segment_frames}


def clips_of(sampling: str, num_frames: int, clip_length: int, num_clips: int) -> Sequence[list[int]]:
    """The frames of each clip of a video, by the name of a sampling."""
    return [SAMPLINGS[sampling](num_frames, clip_length, clip, num_clips) for clip in range(num_clips)]
