"""Chooses the frames of a clip, counted from 0, as VideoMamba's authors do. If a video has fewer frames than a clip,
some frames are repeated."""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np


# From the numbers of frames in a video and in a clip, the clip's index and the number of clips, to the clip's frames in
# ascending order.
Sampling: TypeAlias = Callable[[int, int, int, int], list[int]]


def uniform_frames(num_frames: int, clip_length: int, clip: int = 0, num_clips: int = 1) -> list[int]:
    """Frames spread evenly over the whole video, with each clip slightly later than the previous one: for Kinetics,
    Breakfast and COIN."""
    segment = (num_frames - 1) / clip_length
    later = int(segment * (clip + 1) / (num_clips + 1))
    return [min(num_frames - 1, round(i * segment) + later) for i in range(clip_length)]


def segment_frames(num_frames: int, clip_length: int, clip: int = 0, num_clips: int = 1) -> list[int]:
    """One frame from each of `clip_length` equal segments: for Something-Something V2. A single clip takes the middle
    of each segment; several clips take the start of each segment and evenly spaced later positions."""
    segment = num_frames / clip_length
    offset = 0.5 if num_clips == 1 else clip / num_clips
    return [int((i + offset) * segment) for i in range(clip_length)]


def random_frames(num_frames: int, clip_length: int, generator: np.random.Generator) -> list[int]:
    """For training: a random frame from each of these segments."""
    places = np.arange(clip_length) + generator.random(clip_length)
    return np.minimum(places * num_frames / clip_length, num_frames - 1).astype(int).tolist()


SAMPLINGS: dict[str, Sampling] = {"uniform": uniform_frames, "segments": segment_frames}


def clips_of(sampling: str, num_frames: int, clip_length: int, num_clips: int) -> Sequence[list[int]]:
    """The frames of each clip of a video, for the sampling with the given name."""
    return [SAMPLINGS[sampling](num_frames, clip_length, clip, num_clips) for clip in range(num_clips)]
