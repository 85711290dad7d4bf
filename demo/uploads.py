"""Opens an uploaded image. Only some formats, file sizes and numbers of pixels are accepted; others are rejected with a
sentence that says why."""

import os
import re
import warnings
from pathlib import Path

from PIL import Image

from hf_vssm_prune.training.image_steps import decode_image


MAX_BYTES = 10 * 1024**2
MAX_PIXELS = 30_000_000
MAX_ASPECT_RATIO = 20  # because its shortest edge is resized to the model's size
# A scan of a progressive JPEG can be 50 bytes that change all pixels: ten megabytes would take an hour. Photos have
# about ten, and tens of other segments.
MAX_SEGMENTS = 300
FORMATS = ("JPEG", "PNG", "WEBP")
# The start of a segment of a JPEG file, but for markers without content.
SEGMENT = re.compile(rb"\xff+([^\x00\x01\xd0-\xd7\xff])")
END_OF_IMAGE = b"\xd9"
# Offered by the browser's file dialog; the actual format is read from the file's header.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def open_upload(path: str) -> Image.Image:
    """Opens an uploaded file as an RGB image with its EXIF orientation applied.

    Format and size are read from the file's header before any pixel is decoded, because a small file may contain a huge
    image, or one that takes long to decode.

    Args:
        path: path of the file; its suffix is ignored.

    Raises:
        ValueError: the file is too large, not an image in an allowed format, damaged, or has too many pixels or
            segments. The message is for the person who uploaded it.
    """
    name = os.path.basename(path)
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES // 1024**2} MB: send a smaller one.")
    width, height = _read_size(path, name)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width} × {height} pixels; at most {MAX_PIXELS // 10**6} million are accepted.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{name} is {width} × {height}: at most {MAX_ASPECT_RATIO} times as long as wide; crop it.")
    if _has_many_segments(Path(path).read_bytes()):
        raise ValueError(f"{name} has more than {MAX_SEGMENTS} scans and other segments: save it as a new JPEG file.")
    return decode_image({"bytes": None, "path": path}, "RGB", name)


def _has_many_segments(content: bytes) -> bool:
    """Whether a file is a JPEG whose image has more than `MAX_SEGMENTS` segments."""
    position = 2 if content.startswith(b"\xff\xd8") else len(content)
    for _ in range(MAX_SEGMENTS):
        found = SEGMENT.search(content, position)
        if found is None or found[1] == END_OF_IMAGE:
            return False
        position = found.end() + int.from_bytes(content[found.end() : found.end() + 2], "big")
    return True


def _read_size(path: str, name: str) -> tuple[int, int]:
    try:
        with warnings.catch_warnings():
            # Pillow's own limit is higher than the one here.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return image.size
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name} has too many pixels; at most {MAX_PIXELS // 10**6} million are accepted.") from error
    # Pillow's readers raise OSError, SyntaxError, ValueError, EOFError, struct.error, … for damaged files.
    except Exception as error:
        raise ValueError(f"{name} is not an image that can be read: JPEG, PNG and WebP are.") from error
