"""The media that a data set can contain: images or videos."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from datasets import Image, Video
from PIL import Image as PILImage

from hf_vssm_prune.training.image_steps import readable_formats


@dataclass(frozen=True)
class Medium:
    """A medium, such as images.

    Attributes:
        name: its singular, for messages.
        feature: type of its columns.
        suffixes: file suffixes in lower case.
        reader: the library that reads the files.
        example: a common suffix.
    """

    name: str
    feature: type
    suffixes: Callable[[], set[str]]
    reader: str
    example: str


@cache  # asked for each file of a folder
def _image_suffixes() -> set[str]:
    formats = readable_formats()
    return {suffix for suffix, form in PILImage.registered_extensions().items() if form in formats}


def _video_suffixes() -> set[str]:
    """The usual suffixes of videos. FFmpeg itself detects the format from the content."""
    return {
        *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
        *(".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
    }


IMAGES = Medium("image", Image, _image_suffixes, "Pillow", ".png")
VIDEOS = Medium("video", Video, _video_suffixes, "FFmpeg", ".mp4")
