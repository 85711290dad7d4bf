"""What a data set may be one of: images or videos."""

from collections.abc import Callable
from dataclasses import dataclass

from datasets import Image, Video
from PIL import Image as PILImage

from hf_vssm_prune.training.image_steps import readable_formats


@dataclass(frozen=True)
class Medium:
    """A kind of what is labelled.

    Attributes:
        name: for messages, of one.
        feature: the type of its columns.
        suffixes: of its files, in lower case.
        reader: what reads these.
        example: a suffix that they often have.
    """

    name: str
    feature: type
    suffixes: Callable[[], set[str]]
    reader: str
    example: str


def _image_suffixes() -> set[str]:
    formats = readable_formats()
    return {suffix for suffix, form in PILImage.registered_extensions().items() if form in formats}


def _video_suffixes() -> set[str]:
    """FFmpeg looks at a file itself, whatever its name: these are what videos are called."""
    return {
        *(".3gp", ".avi", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts"),
        *(".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv"),
    }


IMAGES = Medium("image", Image, _image_suffixes, "Pillow", ".png")
VIDEOS = Medium("video", Video, _video_suffixes, "FFmpeg", ".mp4")
