"""Decoding images of all kinds, and pixel values equal to those of the image processor."""

import io
import struct

import numpy as np
import pytest
import torch
from conftest import make_vim_config
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import BitImageProcessor, CLIPImageProcessor, ConvNextImageProcessor, ViTImageProcessor
from transformers.image_utils import load_image

from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.training import image_steps
from hf_vssm_prune.training.image_steps import ImageProcessorSteps, decode_image


GRAY = {"do_convert_rgb": False, "image_mean": [0.29], "image_std": [0.35]}
SQUARE = {"size": {"height": 20, "width": 24}, "do_center_crop": False}
CROPPED = {"size": {"shortest_edge": 20}, "crop_size": {"height": 18, "width": 16}}


def random_pixels(height: int = 30, width: int = 40, channels: int = 3) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)


def encode(image: Image.Image, form: str = "PNG", **options) -> dict:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def decode(stored: dict, mode: str = "RGB") -> np.ndarray:
    image = decode_image(stored, mode, "The image")
    assert image.mode == mode
    return np.asarray(image)


# Pixel values


@pytest.mark.parametrize(
    "image_processor",
    [
        CLIPImageProcessor(**SQUARE),
        CLIPImageProcessor(**CROPPED),
        CLIPImageProcessor(size={"shortest_edge": 10}, crop_size={"height": 30, "width": 17}),
        CLIPImageProcessor(do_resize=False, crop_size={"height": 11, "width": 50}),
        CLIPImageProcessor(**SQUARE, **GRAY),
        CLIPImageProcessor(**CROPPED, do_normalize=False),
        CLIPImageProcessor(**CROPPED, do_rescale=False),
        BitImageProcessor(**CROPPED, resample=Image.Resampling.BILINEAR),
        BitImageProcessor(**SQUARE, resample=Image.Resampling.NEAREST, rescale_factor=1 / 127),
        ViTImageProcessor(size={"height": 16, "width": 16}),
    ],
    ids=lambda processor: type(processor).__name__,
)
def test_pixel_values_equal_the_image_processors(image_processor):
    steps = ImageProcessorSteps(image_processor)

    @given(height=st.integers(1, 60), width=st.integers(1, 60))
    def check(height: int, width: int):
        image = Image.fromarray(random_pixels(height, width, 3 if steps.mode == "RGB" else 1))
        expected = image_processor(image, return_tensors="pt", input_data_format=None)["pixel_values"][0]
        actual = steps(image)
        assert actual.shape[1:] == steps.size
        assert actual.is_contiguous()
        torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)

    check()


def test_torchs_default_dtype_does_not_matter():
    image, processor = Image.fromarray(random_pixels(16, 16, 3)), CLIPImageProcessor(**CROPPED)
    expected = ImageProcessorSteps(processor)(image)
    torch.set_default_dtype(torch.bfloat16)
    try:
        actual = ImageProcessorSteps(processor)(image)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual, expected)


def test_what_training_reads_from_the_image_processor():
    steps = ImageProcessorSteps(CLIPImageProcessor(**CROPPED, image_mean=[0.0, 0.5, 1.0], image_std=[1.0] * 3))
    assert (steps.size, steps.mode, steps.resample) == ((18, 16), "RGB", Image.Resampling.BICUBIC)
    assert steps.fill == (0, 128, 255)


@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
@pytest.mark.parametrize("size", [(32, 32), (32, 64), (16, 64), (64, 16), (48, 32)])
@pytest.mark.parametrize("enlarged", [1, 3])
def test_a_new_processor_shows_the_model_the_same_fraction_of_each_side(size, crop_pct, enlarged):
    processor = new_image_processor(make_vim_config(image_size=list(size)), [0.0] * 3, [1.0] * 3, crop_pct)
    height, width = size[0] * enlarged, size[1] * enlarged
    y, x = np.mgrid[0:height, 0:width]
    image = Image.fromarray(np.stack([255 * y / height, 255 * x / width, 0 * x], -1).astype(np.uint8))
    seen = processor(image, return_tensors="np")["pixel_values"][0]
    assert seen.shape == (3, *size)
    for channel, side in zip(seen[:2], size, strict=True):
        assert np.ptp(channel) == pytest.approx(crop_pct, abs=2.5 / side)
    np.testing.assert_allclose(ImageProcessorSteps(processor)(image), seen, rtol=1e-5, atol=1e-5)


def test_a_rectangular_models_processor_shows_it_all_of_a_square_image():
    processor = new_image_processor(make_vim_config(image_size=[32, 64]), [0.0] * 3, [1.0] * 3, crop_pct=1.0)
    seen = processor(Image.new("RGB", (50, 50), "white"), return_tensors="np")["pixel_values"][0]
    assert (seen == 1).all()


@pytest.mark.parametrize(
    ("image_processor", "message"),
    [
        (CLIPImageProcessor(size={"shortest_edge": 20}, do_center_crop=False), "images of varying sizes"),
        (CLIPImageProcessor(do_resize=False, do_center_crop=False), "images of varying sizes"),
        (
            CLIPImageProcessor(size={"max_height": 20, "max_width": 20}, crop_size={"height": 9, "width": 9}),
            "resizes to {'max_height': 20, 'max_width': 20}: supported are height and width, or shortest_edge",
        ),
        (CLIPImageProcessor(**SQUARE, image_mean=[0.5] * 4, image_std=[0.5] * 4), "must have 1 or 3 values"),
        (
            CLIPImageProcessor(**SQUARE, do_pad=True, pad_size={"height": 40, "width": 40}),
            "does something other than resize",
        ),
        (ConvNextImageProcessor(size={"shortest_edge": 20}), "ConvNextImageProcessor.* gives images of varying sizes"),
    ],
)
def test_other_image_processors_are_refused(image_processor, message: str):
    with pytest.raises(ValueError, match=message):
        ImageProcessorSteps(image_processor)


# Decoding


def test_lossless_images_come_back():
    pixels = random_pixels()
    assert np.array_equal(decode(encode(Image.fromarray(pixels))), pixels)


def test_bytes_or_path(tmp_path):
    pixels = random_pixels()
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(decode({"bytes": None, "path": str(tmp_path / "a.png")}), pixels)
    # A Parquet file of the Hub often holds the bytes and a path that leads nowhere.
    assert np.array_equal(decode({**encode(Image.fromarray(pixels)), "path": "gone.png"}), pixels)


def test_grayscale_becomes_rgb_and_back():
    pixels = random_pixels(channels=1)
    stored = encode(Image.fromarray(pixels))
    assert np.array_equal(decode(stored), np.stack([pixels] * 3, axis=-1))
    assert np.array_equal(decode(stored, "L"), pixels)


def test_cmyk():
    stored = encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=95)
    assert np.abs(decode(stored).astype(int) - (255, 0, 0)).max() < 6


def test_palette():
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert (decode(encode(image)) == (10, 200, 30)).all()


def palette(**options) -> dict:
    image = Image.fromarray(random_pixels()).convert("P", palette=Image.Palette.ADAPTIVE)
    return encode(image, **options)


def turned(mode: str, form: str) -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode(Image.fromarray(random_pixels()).convert(mode), form, exif=exif.tobytes())


# Images of every kind that people have, as files.
KINDS = {
    "RGB": encode(Image.fromarray(random_pixels())),
    "gray": encode(Image.fromarray(random_pixels(channels=1))),
    "RGBA": encode(Image.fromarray(random_pixels(channels=4))),
    "LA": encode(Image.fromarray(random_pixels(channels=4)).convert("LA")),
    "RGBA, WebP": encode(Image.fromarray(random_pixels(channels=4)), "WEBP", lossless=True),
    "one transparent colour": encode(Image.new("RGB", (4, 4), (9, 8, 7)), transparency=(9, 8, 7)),
    "one transparent grey": encode(Image.new("L", (4, 4), 9), transparency=9),
    "palette": palette(),
    "palette, one transparent": palette(transparency=1),
    "palette, several transparent": palette(transparency=bytes([0, 128, 255] * 20)),
    "GIF": encode(Image.fromarray(random_pixels()), "GIF", transparency=3),
    "16 bits, PNG": encode(Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32))),
    "16 bits, TIFF": encode(Image.fromarray(np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)), "TIFF"),
    "32 bits, small": encode(Image.fromarray(np.arange(0, 300, dtype=np.int32).reshape(15, 20)), "TIFF"),
    "1 bit": encode(Image.fromarray(random_pixels(channels=1)).convert("1")),
    "CMYK": encode(Image.fromarray(random_pixels()).convert("CMYK"), "JPEG"),
    "CMYK, TIFF": encode(Image.fromarray(random_pixels()).convert("CMYK"), "TIFF"),
    "LAB": encode(Image.fromarray(random_pixels()).convert("LAB"), "TIFF"),
    "turned JPEG": turned("RGB", "JPEG"),
    "turned, with alpha": turned("RGBA", "PNG"),
}


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_those_of_the_pipeline(kind: str):
    theirs = load_image(Image.open(io.BytesIO(KINDS[kind]["bytes"])))
    assert np.array_equal(decode(KINDS[kind]), np.asarray(theirs))
    assert np.array_equal(decode(KINDS[kind], "L"), np.asarray(theirs.convert("L")))


def test_that_16_bits_are_clipped_is_said_once(caplog):
    said_to_be_clipped = image_steps._said_to_be_clipped
    said_to_be_clipped.clear()
    for kind in ("RGB", "32 bits, small", "16 bits, PNG", "16 bits, TIFF"):
        decode(KINDS[kind])
    (record,) = caplog.records
    assert "has pixels from 0 to 299, which are clipped at 255" in record.getMessage()


def test_1_bit():
    assert set(np.unique(decode(encode(Image.fromarray(random_pixels(channels=1)).convert("1"))))) == {0, 255}


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int):
    """The EXIF standard defines on which side of the upright picture the first stored row and column are."""
    first_row, first_column = {
        1: ("top", "left"),
        2: ("top", "right"),
        3: ("bottom", "right"),
        4: ("bottom", "left"),
        5: ("left", "top"),
        6: ("right", "top"),
        7: ("right", "bottom"),
        8: ("left", "bottom"),
    }[orientation]
    upright = random_pixels(8, 12)
    stored_pixels = upright if first_row in ("top", "bottom") else upright.transpose(1, 0, 2)
    stored_pixels = stored_pixels[::-1] if first_row in ("bottom", "right") else stored_pixels
    stored_pixels = stored_pixels[:, ::-1] if first_column in ("bottom", "right") else stored_pixels
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = encode(Image.fromarray(np.ascontiguousarray(stored_pixels)), exif=exif.tobytes())
    assert np.array_equal(decode(stored), upright)


def test_exif_that_cannot_be_read_says_nothing():
    """The resolution is a string: Pillow cannot write it again, but viewers show the picture."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(random_pixels(8, 12))
    content = encode(stored, exif=exif.tobytes() + b"nonsense")
    assert decode(content).shape == (12, 8, 3)
    assert decode(encode(stored, exif=b"Exif\x00\x00no TIFF")).shape == (8, 12, 3)


def test_elongated_images_take_no_more_than_what_is_left_of_them():
    processor = new_image_processor(make_vim_config(image_size=32), [0.5] * 3, [0.25] * 3, crop_pct=0.875)
    steps = ImageProcessorSteps(processor)
    wave = (127 + 127 * np.sin(np.arange(60_000) / 500)).astype(np.uint8)
    for image in (Image.fromarray(np.tile(wave, (2, 1))), Image.fromarray(np.tile(wave, (2, 1)).T)):
        image = image.convert("RGB")
        cut, size = steps._cut_ends(image, *steps._resized_size(image))
        assert max(cut.size) <= 4
        assert max(size) <= 80
        middle = np.asarray(steps.resize_and_crop(image), dtype=int)
        assert middle.shape == (32, 32, 3)
        assert abs(middle - wave[30_000]).max() <= 1


def broken_png_chunk() -> bytes:
    content = bytearray(encode(Image.fromarray(random_pixels()))["bytes"])
    position = content.index(b"IDAT")
    content[position - 4 : position] = struct.pack(">I", 10)
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not an image",
        encode(Image.fromarray(random_pixels(300, 300)), "JPEG")["bytes"][:2000],
        encode(Image.fromarray(random_pixels()))["bytes"][:700],
        encode(Image.fromarray(random_pixels()))["bytes"][:20],
        broken_png_chunk(),
        b"II*\x00\x08\x00\x00\x00",
    ],
    ids=["empty", "text", "cut JPEG", "cut PNG", "cut PNG header", "broken PNG chunk", "cut TIFF"],
)
def test_damaged_images_are_named(content: bytes):
    with pytest.raises(ValueError, match=r"^Row 7 cannot be read: ."):
        decode_image({"bytes": content, "path": None}, "RGB", "Row 7")


def test_missing_images_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"^Row 7 cannot be read: .*No such file"):
        decode_image({"bytes": None, "path": str(tmp_path / "gone.png")}, "RGB", "Row 7")
    for nothing in ({"bytes": None, "path": None}, None):
        with pytest.raises(ValueError, match=r"^Row 7 has neither bytes nor a path"):
            decode_image(nothing, "RGB", "Row 7")


@pytest.mark.parametrize("pixels", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32)])
def test_pixels_of_unknown_range_are_refused(pixels: np.ndarray):
    with pytest.raises(ValueError, match=r"The image has pixels of mode '[FI]' from .* convert it to 8 bits"):
        decode(encode(Image.fromarray(pixels), "TIFF"))
