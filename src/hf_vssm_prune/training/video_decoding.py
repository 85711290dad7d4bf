"""Decodes selected frames of stored videos, applying their rotation, with one frame in memory at a time.

Videos are decoded with PyAV. Its wheels include FFmpeg for all platforms, work with every build of PyTorch, and are
needed by transformers' video pipeline anyway. torchcodec's wheels each require a specific PyTorch version and FFmpeg
installed on the system.
"""

import io
import logging
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from hf_vssm_prune.training.frame_sampling import clips_of
from hf_vssm_prune.training.image_steps import ImageError


logger = logging.getLogger(__name__)
Prepared = TypeVar("Prepared")

# A playlist instead of a video could refer to other files or network addresses.
NO_OTHER_FILES = {"protocol_whitelist": "none"}
MOST_PIXELS = 2**27  # per frame: 16,384 x 8,192
# Up to this number of frames, decoding and discarding is preferred to seeking.
FEW_FRAMES = 32
# How to transpose the pixels for the signs of a, b, c and d in a display matrix, with x' = ax + cy and y' = bx + dy.
TRANSPOSITIONS = {
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}
HDR_TRANSFERS = {16: "PQ", 18: "HLG"}
# The first such video. Only this one is logged, because a data set of them would fill the log.
_said_to_be_hdr: list[str] = []


class VideoError(ImageError):
    """A video is missing, damaged, in an unknown format, has no frames, or is too large."""


class _OtherFramesError(Exception):
    """The decoded frames are not those that the file announced. `num_frames` is their actual number, if it is known."""

    def __init__(self, num_frames: int | None = None) -> None:
        super().__init__()
        self.num_frames = num_frames


@dataclass(frozen=True)
class _Announced:
    """The frames of a stream according to its packets.

    Attributes:
        count: number of frames.
        times: time stamps in ascending order; None unless all of them are known.
        keys: indices of the frames at which decoding can start, ascending.
    """

    count: int
    times: list[int] | None
    keys: list[int]


def pyav() -> Any:
    """Imports PyAV only when it is needed, because not everybody works with videos.

    Raises:
        ValueError: PyAV is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError("Videos are decoded by PyAV, which is not installed: pip install av.") from error
    return av


def read_clip(
    video: str | Path | bytes, num_frames: int, sampling: str = "uniform", mode: str = "RGB"
) -> list[Image.Image]:
    """Reads a clip from a video, in the form expected by an image processor.

    Args:
        video: a path, or the content of a file.
        num_frames: number of frames in the clip.
        sampling: a name in `frame_sampling.SAMPLINGS`.
        mode: "RGB" or "L".

    Raises:
        VideoError: the video has no frames, or they cannot be read.
    """
    stored = {"bytes": video, "path": None} if isinstance(video, bytes) else {"bytes": None, "path": str(video)}
    name = "The video" if isinstance(video, bytes) else f"The video '{video}'"
    return decode_frames(
        stored, lambda count: clips_of(sampling, count, num_frames, 1), lambda frame: frame.convert(mode), name
    )[0]


def decode_frames(
    stored: Mapping[str, Any] | None,
    choose: Callable[[int], Sequence[Sequence[int]]],
    prepare: Callable[[Image.Image], Prepared],
    name: str,
    most_pixels: int | None = None,
) -> list[list[Prepared]]:
    """Decodes clips of a video stored by `datasets.Video(decode=False)`.

    If there are several video streams, the one that players would show is used. Frames are counted in display order,
    regardless of their time stamps. They are rotated as specified in the file and converted to RGB. Their size in
    pixels is unchanged, even if the pixels are not square. HDR is not tone mapped, which is logged; transformers'
    pipelines do not tone map either.

    Args:
        stored: {"bytes": the encoded file or None, "path": the file's path, used if there are no bytes}; None: no
            video.
        choose: function from the number of frames to the frame indices of each clip. It is called again if the file has
            a different number of frames than it announces.
        prepare: converts a frame to the value that is kept for it; called once per frame, in ascending order.
        name: name of the video in error messages.
        most_pixels: largest number of pixels of a frame. None: `MOST_PIXELS`.

    Returns:
        For each clip, the prepared values of its frames.

    Raises:
        VideoError: the video cannot be decoded; see there.
    """
    limit = MOST_PIXELS if most_pixels is None else most_pixels
    with _errors_named(name):
        announced = _read_packets(stored, name, limit)
    num_frames = announced.count
    for attempt in range(3):
        clips = choose(num_frames)
        wanted = sorted({number for clip in clips for number in clip})
        jumps = attempt == 0 and announced.times is not None and wanted[-1] > FEW_FRAMES
        prepared = {}
        try:
            for number, frame in _decode(stored, wanted, announced if jumps else None, name, limit):
                prepared[number] = _prepared(prepare, frame, name)
        except _OtherFramesError as other:
            num_frames = num_frames if other.num_frames is None else other.num_frames
            continue
        except VideoError:
            if not jumps:
                raise
            continue
        return [[prepared[number] for number in clip] for clip in clips]
    raise VideoError(f"{name} gives different frames each time it is read.")


def _prepared(prepare: Callable[[Image.Image], Prepared], frame: Image.Image, name: str) -> Prepared:
    try:
        return prepare(frame)
    except ImageError as error:
        raise VideoError(f"{name} cannot be used: {error}") from error


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    try:
        yield
    except (VideoError, _OtherFramesError):
        raise
    except EOFError as error:
        raise VideoError(f"{name} has no frames.") from error
    # FFmpeg raises many types of errors.
    except Exception as error:
        raise VideoError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _opened(stored: Mapping[str, Any] | None, name: str, most_pixels: int) -> Iterator[tuple[Any, Any]]:
    """The opened container and its video stream."""
    av, stored = pyav(), stored or {"bytes": None, "path": None}
    if stored["bytes"] is None and stored["path"] is None:
        raise VideoError(f"{name} has neither bytes nor a path.")
    if stored["bytes"] is not None and not stored["bytes"]:
        raise VideoError(f"{name} is empty (0 bytes).")
    # The file is opened here because FFmpeg may interpret a name as an address or as several files.
    with io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else open(stored["path"], "rb") as file:
        if not file.read(1):
            raise VideoError(f"{name} is empty (0 bytes).")
        file.seek(0)
        with av.open(file, metadata_errors="replace", options=NO_OTHER_FILES) as container:
            stream = container.streams.best("video")
            if stream is None:
                kinds = ", ".join(sorted({each.type for each in container.streams})) or "nothing"
                raise VideoError(f"{name} has no video stream: it contains {kinds}.")
            if stream.disposition & av.stream.Disposition.attached_pic:
                raise VideoError(f"{name} has no video stream: its only picture is a cover image.")
            if stream.codec_context is None:
                raise VideoError(f"{name} is in a format that FFmpeg cannot decode, or encrypted.")
            _check_size(stream.codec_context, name, most_pixels)
            stream.codec_context.options = {"max_pixels": str(most_pixels)}
            stream.codec_context.thread_count = 1  # a data loader already uses several processes
            yield container, stream


def _check_size(picture: Any, name: str, most_pixels: int) -> None:
    if picture.width * picture.height > most_pixels:
        raise VideoError(
            f"{name} has frames of {picture.width} x {picture.height} pixels: at most {most_pixels:,} are read."
        )


def _read_packets(stored: Mapping[str, Any] | None, name: str, most_pixels: int) -> _Announced:
    """Counts the frames without decoding them, because the number in a file's header may be missing or wrong."""
    with _opened(stored, name, most_pixels) as (container, stream):
        packets = [
            (packet.pts, packet.is_keyframe)
            for packet in container.demux(stream)
            if packet.size and not packet.is_discard
        ]
    if not packets:
        raise VideoError(f"{name} has no frames.")
    times = {time for time, _ in packets}
    if None in times or len(times) < len(packets):
        return _Announced(len(packets), None, [])
    packets.sort()
    return _Announced(
        len(packets), [time for time, _ in packets], [i for i, (_, is_key) in enumerate(packets) if is_key]
    )


def _decode(
    stored: Mapping[str, Any] | None,
    wanted: Sequence[int],
    announced: _Announced | None,
    name: str,
    most_pixels: int,
) -> Iterator[tuple[int, Image.Image]]:
    """Yields the wanted frames, given by ascending indices. If the frames are announced, decoding skips the frames
    between them where possible."""
    with _errors_named(name), _opened(stored, name, most_pixels) as (container, stream):
        if announced is None:
            frames = _one_by_one(container, stream, wanted)
        else:
            frames = _by_jumps(container, stream, wanted, announced)
        # Shared by all frames, because each reformatter starts its own threads.
        converter = pyav().video.reformatter.VideoReformatter()
        for number, frame in frames:
            _check_size(frame, name, most_pixels)
            _say_hdr(frame, name)
            pixels = converter.reformat(frame, format="rgb24").to_ndarray()
            yield number, _upright(Image.fromarray(pixels), frame.side_data)


def _one_by_one(container: Any, stream: Any, wanted: Sequence[int]) -> Iterator[tuple[int, Any]]:
    count, left = 0, set(wanted)
    for frame in container.decode(stream):
        if count in left:
            yield count, frame
            left.remove(count)
            if not left:
                return
        count += 1
    if count == 0:
        raise ValueError("none of its frames can be decoded")
    raise _OtherFramesError(count)


def _by_jumps(container: Any, stream: Any, wanted: Sequence[int], announced: _Announced) -> Iterator[tuple[int, Any]]:
    times, keys = announced.times or [], announced.keys
    frames, at = container.decode(stream), -1
    start: int | None = None
    for number in wanted:
        before = bisect_right(keys, number) - 1
        if before >= 0 and keys[before] > at + FEW_FRAMES:
            start = keys[before]
            container.seek(times[start], stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            at = len(times) if frame.pts is None else bisect_left(times, frame.pts)
            if start is not None and at >= start:
                # In some containers, seeking ends at another frame, and the frames decoded from there are incomplete.
                if at > start:
                    raise _OtherFramesError
                start = None
            if at >= number:
                break
        if at != number or frame.pts != times[number]:
            raise _OtherFramesError
        yield number, frame


def _say_hdr(frame: Any, name: str) -> None:
    if frame.color_trc in HDR_TRANSFERS and not _said_to_be_hdr:
        _said_to_be_hdr.append(name)
        logger.warning(
            "%s is HDR (%s): there is no tone mapping, so it looks flat to the model.",
            *(name, HDR_TRANSFERS[frame.color_trc]),
        )


def _upright(image: Image.Image, side_data: Any) -> Image.Image:
    for each in side_data:
        if each.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = (round(value / 2**16) for value in struct.unpack("=9i", bytes(each)))
            if (a, b, c, d) in TRANSPOSITIONS:
                return image.transpose(TRANSPOSITIONS[a, b, c, d])
    return image
