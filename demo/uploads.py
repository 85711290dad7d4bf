"""Opens an uploaded image. Only some formats, file sizes and numbers of pixels are accepted; others are rejected with a
sentence that says why."""

import os
import warnings

from PIL import Image

from hf_vssm_prune.training.image_steps import decode_image


MAX_BYTES = 10 * 1024**2
MAX_PIXELS = 30_000_000
MAX_ASPECT_RATIO = 20  # because its shortest edge is resized to the model's size
FORMATS = ("JPEG", "PNG", "WEBP")
# Offered by the browser's file dialog; the actual format is read from the file's header.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def open_upload(path: str) -> Image.Image:
    """Opens an uploaded file as an RGB image with its EXIF orientation applied.

    Format and size are read from the file's header before any pixel is decoded, because a small file may contain a huge
    image.

    Args:
        path: path of the file; its suffix is ignored.

    Raises:
        ValueError: the file is too large, not an image in an allowed format, damaged, or has too many pixels. The
            message is for the person who uploaded it.
    """
    name = os.path.basename(path)
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"{name} is larger than {MAX_BYTES // 1024**2} MB: send a smaller one.")
    width, height = _read_size(path, name)
    if width * height > MAX_PIXELS:
        raise ValueError(f"{name} has {width} × {height} pixels; at most {MAX_PIXELS // 10**6} million are accepted.")
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise ValueError(f"{name} is {width} × {height}: at most {MAX_ASPECT_RATIO} times as long as wide; crop it.")
    return decode_image({"bytes": None, "path": path}, "RGB", name)


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
