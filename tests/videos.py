"""Videos created by the tests."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np


BITS = 11


def numbered_frames(count: int, height: int = 48, width: int = 88) -> list[np.ndarray]:
    """Frames (height, width, 3) that show their index in binary as black and white stripes; see `number_in`."""
    stripes = np.arange(width) * BITS // width
    return [
        np.broadcast_to((40 + 175 * (i >> stripes & 1))[None, :, None], (height, width, 3)).astype(np.uint8)
        for i in range(count)
    ]


def number_in(pixels: Any) -> int:
    """The index shown by one of `numbered_frames`."""
    brightness = np.asarray(pixels, float).mean((0, 2))
    middles = (np.arange(BITS) + 0.5) * len(brightness) / BITS
    return sum(1 << bit for bit, place in enumerate(middles) if brightness[int(place)] > 128)


def write_video(
    file: Path | Any,
    frames: Sequence[np.ndarray],
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    rate: int = 25,
    times: Sequence[int] | None = None,
    sound: bool = False,
    **options: Any,
) -> None:
    """Writes frames (height, width, 3).

    Args:
        file: a path, whose suffix determines the container, or an open file, with `format` among the options.
        times: time of each frame in milliseconds, for a variable rate.
        sound: whether there is an audio stream before the video stream.
        options: `format`; `codec_options`; and attributes of the codec's context.
    """
    import av

    file = str(file) if isinstance(file, Path) else file
    with av.open(file, "w", format=options.pop("format", None)) as container:
        if sound:
            audio = container.add_stream("aac", rate=8000)
        stream = container.add_stream(codec, rate=rate, options=options.pop("codec_options", {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for name, value in options.items():
            setattr(stream.codec_context, name, value)
        if sound:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 8000
            container.mux(audio.encode(silence))
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if options.get("colorspace") == 1:
                frame = frame.reformat(format=pix_fmt, dst_colorspace="ITU709")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            container.mux(audio.encode())


def write_class_folders(folder: Path, split: str, per_class: int, generator: np.random.Generator) -> None:
    """Writes videos of 5 noisy frames of 32 x 32 pixels in three colours."""
    for number, name in enumerate(("blue", "green", "red")):
        (folder / split / name).mkdir(parents=True)
        for i in range(per_class):
            write_video(folder / split / name / f"{i}.mp4", coloured_frames(2 - number, generator))


def coloured_frames(channel: int, generator: np.random.Generator) -> list[np.ndarray]:
    frames = generator.integers(0, 120, (5, 32, 32, 3), dtype=np.uint8)
    frames[..., channel] += 100
    return list(frames)


def moving_square(count: int, side: int = 96) -> list[np.ndarray]:
    """Frames of a bright square that moves from left to right over a gradient."""
    background = np.broadcast_to(np.linspace(30, 110, side)[:, None, None], (side, side, 3)).astype(np.uint8)
    frames = []
    for number in range(count):
        pixels, left = background.copy(), number * (side - 20) // max(count - 1, 1)
        pixels[side // 2 - 12 :][:24, left : left + 24] = (235, 210, 60)
        frames.append(pixels)
    return frames


def save_video_model(folder: Path, **sizes: Any) -> Path:
    """Saves a tiny video model with random weights, with the package's `save_pretrained`."""
    import torch
    from conftest import make_video_config
    from transformers import AutoModelForVideoClassification

    from hf_vssm_prune.hub import save_for_hub
    from hf_vssm_prune.hub.loading import new_image_processor

    torch.manual_seed(0)
    config = make_video_config(**sizes)
    model = AutoModelForVideoClassification.from_config(config)
    return save_for_hub(model, folder, new_image_processor(config, [0.5] * 3, [0.5] * 3))
