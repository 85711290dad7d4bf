"""Frames of stored videos, chosen by number, upright, in memory one at a time.

PyAV decodes. Its wheels bring FFmpeg along for every platform, they go with any build of PyTorch, and transformers'
video pipeline needs it anyway; torchcodec's are made for one version of PyTorch each and look for FFmpeg's libraries in
the system.
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

# A playlist in the place of a video could name other files, or addresses in the network.
NO_OTHER_FILES = {"protocol_whitelist": "none"}
MOST_PIXELS = 2**27  # of a frame: 16,384 x 8,192
# Frames that are decoded and thrown away rather than left out by a jump.
FEW_FRAMES = 32
# By the signs of a display matrix's a, b, c, d, with x' = ax + cy and y' = bx + dy: what has to be done to the pixels.
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
# The first such video: a data set of them would fill the log.
_said_to_be_hdr: list[str] = []


class VideoError(ImageError):
    """A video is missing, damaged, of no known format, without frames, or too large."""


class _OtherFramesError(Exception):
    """The frames that come out are not those that the file announced; how many there are, where that is known."""

    def __init__(self, num_frames: int | None = None) -> None:
        super().__init__()
        self.num_frames = num_frames


@dataclass(frozen=True)
class _Announced:
    """The frames of a stream as its packets announce them.

    Attributes:
        count: how many.
        times: in ascending order; None where they are not known for all.
        keys: numbers of those at which decoding can begin, ascending.
    """

    count: int
    times: list[int] | None
    keys: list[int]


def pyav() -> Any:
    """PyAV, which is imported where it is needed: not everybody has videos.

    Raises:
        ValueError: it is missing.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(
            "Videos are decoded by PyAV, which is not installed: pip install 'hf_vssm_prune[video]'."
        ) from error
    return av


def read_clip(
    video: str | Path | bytes, num_frames: int, sampling: str = "uniform", mode: str = "RGB"
) -> list[Image.Image]:
    """A clip of a video, as an image processor takes it.

    Args:
        video: a file, or what is in one.
        num_frames: of the clip.
        sampling: of `frame_sampling.SAMPLINGS`.
        mode: "RGB" or "L".

    Raises:
        VideoError: it has no frames, or they cannot be read.
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
) -> list[list[Prepared]]:
    """Decodes clips of a video that `datasets.Video(decode=False)` stored.

    Of several streams the one that players show is taken. Frames count as they are shown, however far apart. They are
    turned as the file says, in RGB, and keep their size: that of their pixels, even if these are not square. The light
    of HDR is not mapped to that of a usual screen, which is logged; neither do transformers' pipelines.

    Args:
        stored: {"bytes": the encoded file or None, "path": where the file is, used without bytes}; None: no video.
        choose: from the number of frames to those of each clip, counted from 0. It may be asked again, if a file has
            not as many frames as it announces.
        prepare: makes of a frame what is kept of it; called once for each, in their order.
        name: what an error calls the video.

    Returns:
        For each clip what was made of its frames.

    Raises:
        VideoError: see there.
    """
    with _errors_named(name):
        announced = _read_packets(stored, name)
    num_frames = announced.count
    for attempt in range(3):
        clips = choose(num_frames)
        wanted = sorted({number for clip in clips for number in clip})
        jumps = attempt == 0 and announced.times is not None and wanted[-1] > FEW_FRAMES
        prepared = {}
        try:
            for number, frame in _decode(stored, wanted, announced if jumps else None, name):
                prepared[number] = prepare(frame)
        except _OtherFramesError as other:
            num_frames = num_frames if other.num_frames is None else other.num_frames
            continue
        except VideoError:
            if not jumps:
                raise
            continue
        return [[prepared[number] for number in clip] for clip in clips]
    raise VideoError(f"{name} gives different frames each time it is read.")


@contextmanager
def _errors_named(name: str) -> Iterator[None]:
    try:
        yield
    except (VideoError, _OtherFramesError):
        raise
    except EOFError as error:
        raise VideoError(f"{name} has no frames.") from error
    # FFmpeg's errors are of many kinds.
    except Exception as error:
        raise VideoError(f"{name} cannot be read: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _opened(stored: Mapping[str, Any] | None, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video stream."""
    av, stored = pyav(), stored or {"bytes": None, "path": None}
    if stored["bytes"] is None and stored["path"] is None:
        raise VideoError(f"{name} has neither bytes nor a path.")
    if stored["bytes"] is not None and not stored["bytes"]:
        raise VideoError(f"{name} is empty (0 bytes).")
    # Opened here: to FFmpeg a name may be an address, or several files.
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
            _check_size(stream.codec_context, name)
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            stream.codec_context.thread_count = 1  # a data loader has processes
            yield container, stream


def _check_size(picture: Any, name: str) -> None:
    if picture.width * picture.height > MOST_PIXELS:
        raise VideoError(
            f"{name} has frames of {picture.width} x {picture.height} pixels: at most {MOST_PIXELS:,} are read."
        )


def _read_packets(stored: Mapping[str, Any] | None, name: str) -> _Announced:
    """Counts the frames without decoding them: what a file says of itself is missing in some, and wrong in others."""
    with _opened(stored, name) as (container, stream):
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
    stored: Mapping[str, Any] | None, wanted: Sequence[int], announced: _Announced | None, name: str
) -> Iterator[tuple[int, Image.Image]]:
    """The wanted frames, whose numbers ascend; with what is announced, what lies between them is not decoded."""
    with _errors_named(name), _opened(stored, name) as (container, stream):
        if announced is None:
            frames = _one_by_one(container, stream, wanted)
        else:
            frames = _by_jumps(container, stream, wanted, announced)
        # One for all frames: each of its own would start threads.
        converter = pyav().video.reformatter.VideoReformatter()
        for number, frame in frames:
            _check_size(frame, name)
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
                # In some containers a jump ends elsewhere, and what is decoded from there on is not whole.
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
