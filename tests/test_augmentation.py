"""Augmentation: what each kind does to an image or a batch, and that it uses no randomness but its own generator's."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hf_vssm_prune.training.augmentation import (
    RANDAUGMENT_OPERATIONS,
    AugmentationConfig,
    MixConfig,
    mix_batch,
    randaugment,
    random_crop_with_padding,
    random_erasing,
    random_resized_crop,
)


BICUBIC = Image.Resampling.BICUBIC
GEOMETRY = {"resample": BICUBIC, "fillcolor": (7, 8, 9)}


def random_image(height: int = 24, width: int = 32, mode: str = "RGB") -> Image.Image:
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8))


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Random crops


@given(height=st.integers(1, 60), width=st.integers(1, 60), seed=st.integers(0, 2**32), smallest=st.floats(0.01, 1.0))
def test_random_resized_crop_has_the_asked_size(height: int, width: int, seed: int, smallest: float):
    crop = random_resized_crop(random_image(height, width), (13, 17), (smallest, 1.0), BICUBIC, rng(seed))
    assert crop.size == (17, 13)


def test_random_resized_crop_takes_areas_within_the_scale():
    """Pixel values are coordinates, so the corners of a crop show where it was taken."""
    rows, columns = np.mgrid[:200, :200].astype(np.uint8)
    image = Image.fromarray(np.stack([rows, columns, rows], axis=-1))
    shares, tops = [], set()
    for seed in range(200):
        crop = np.asarray(random_resized_crop(image, (64, 64), (0.2, 0.5), Image.Resampling.NEAREST, rng(seed)))
        height, width = (int(np.ptp(crop[..., channel])) * 64 / 63 for channel in (0, 1))
        shares.append(height * width / 200**2)
        tops.add(int(crop[0, 0, 0]))
        assert 0.7 < width / height < 1.4
    assert 0.18 < min(shares) < 0.24
    assert 0.46 < max(shares) < 0.53
    assert len(tops) > 50


def test_random_resized_crop_of_a_strip_falls_back_to_its_center():
    image = Image.fromarray(np.arange(200, dtype=np.uint8)[None].repeat(2, axis=0))
    crop = np.asarray(random_resized_crop(image, (2, 3), (1.0, 1.0), Image.Resampling.NEAREST, rng()))
    assert crop.tolist() == [[98, 99, 100]] * 2 or crop.tolist() == [[99, 100, 101]] * 2


def test_random_crop_with_padding_shifts_both_ways_and_fills_with_black():
    image = Image.fromarray(np.full((6, 6), 200, np.uint8))
    shifts = set()
    for seed in range(300):
        pixels = np.asarray(random_crop_with_padding(image, 2, rng(seed)))
        assert pixels.shape == (6, 6)
        assert set(np.unique(pixels)) <= {0, 200}
        rows, columns = (pixels > 0).any(1), (pixels > 0).any(0)
        shifts.add((rows.argmax() - rows[::-1].argmax(), columns.argmax() - columns[::-1].argmax()))
    assert shifts == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


# RandAugment


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("name", RANDAUGMENT_OPERATIONS)
def test_operations_keep_size_and_mode_and_change_the_image(name: str, mode: str):
    image = random_image(mode=mode)
    operation = RANDAUGMENT_OPERATIONS[name]
    geometry = GEOMETRY if mode == "RGB" else {"resample": BICUBIC, "fillcolor": 7}
    for strength in (0.0, 0.9, 1.0):
        for sign in (1, -1):
            result = operation.apply(image, operation.argument(strength, sign), geometry)
            assert (result.size, result.mode) == (image.size, mode)
    colorless = name == "color" and mode == "L"
    # Random noise already fills the range from 0 to 255.
    assert (result != image) != (colorless or name == "auto_contrast")


def test_auto_contrast_stretches():
    image = Image.fromarray(np.arange(50, 102, dtype=np.uint8).reshape(4, 13))
    operation = RANDAUGMENT_OPERATIONS["auto_contrast"]
    assert operation.apply(image, operation.argument(0.5, 1), GEOMETRY).getextrema() == (0, 255)


@pytest.mark.parametrize(
    ("name", "strength", "sign", "expected"),
    # By hand from timm's level functions for rand-m9-inc1 and rand-m5-inc1.
    [
        ("rotate", 0.9, -1, -27.0),
        ("shear_x", 0.9, 1, 0.27),
        ("translate_y", 0.9, -1, -0.405),
        ("posterize", 0.9, 1, 1),
        ("posterize", 0.5, 1, 2),
        ("posterize", 0.0, 1, 4),
        ("solarize", 0.9, 1, 26),
        ("solarize_add", 0.9, 1, 99),
        ("color", 0.9, 1, 1.81),
        ("contrast", 0.9, -1, 0.19),
        ("sharpness", 1.0, -1, 0.1),
    ],
)
def test_strengths_are_those_of_timm(name: str, strength: float, sign: int, expected: float):
    assert RANDAUGMENT_OPERATIONS[name].argument(strength, sign) == pytest.approx(expected)


def test_geometric_operations_fill_with_the_given_color():
    shifted = np.asarray(RANDAUGMENT_OPERATIONS["translate_x"].apply(random_image(), 0.45, GEOMETRY))
    assert (shifted[:, -14:] == GEOMETRY["fillcolor"]).all()


def test_geometric_operations_move_pixels_along_their_axis():
    pixels = np.random.default_rng(1).integers(0, 256, (24, 24), dtype=np.uint8)

    def apply(name: str, argument: float) -> np.ndarray:
        geometry = {"resample": Image.Resampling.NEAREST, "fillcolor": 7}
        return np.asarray(RANDAUGMENT_OPERATIONS[name].apply(Image.fromarray(pixels), argument, geometry))

    assert np.array_equal(apply("translate_x", 0.25)[:, :-6], pixels[:, 6:])
    assert np.array_equal(apply("translate_y", 0.25)[:-6], pixels[6:])
    assert np.array_equal(apply("rotate", 90), np.rot90(pixels))  # to the left
    by_rows, by_columns = apply("shear_x", 1.0), apply("shear_y", 1.0)
    for i in range(23):  # about the corner at the top left, from the middle of a pixel
        assert np.array_equal(by_rows[i, : 23 - i], pixels[i, i + 1 :])
        assert np.array_equal(by_columns[: 23 - i, i], pixels[i + 1 :, i])


def test_operations_on_values_by_their_formulas():
    values = np.arange(256)
    image = Image.fromarray(values.astype(np.uint8).reshape(16, 16))
    for name, argument, expected in (
        ("invert", 0, 255 - values),
        ("posterize", 2, values // 64 * 64),
        ("solarize", 100, np.where(values < 100, values, 255 - values)),
        ("solarize_add", 50, np.where(values < 128, values + 50, values)),
        ("brightness", 0.5, values / 2),
        ("contrast", 0.5, (values + 128) / 2),  # the mean is 127.5, rounded
    ):
        found = np.asarray(RANDAUGMENT_OPERATIONS[name].apply(image, argument, GEOMETRY)).ravel()
        assert np.abs(found - expected).max() <= 0.5, name


@given(seed=st.integers(0, 2**63), magnitude=st.floats(0, 10), std=st.floats(0, 5), num_ops=st.integers(0, 4))
def test_randaugment_depends_on_its_generator_alone(seed: int, magnitude: float, std: float, num_ops: int):
    config = AugmentationConfig(
        randaugment_num_ops=num_ops, randaugment_magnitude=magnitude, randaugment_magnitude_std=std
    )
    image = random_image()
    first, second = (randaugment(image, config, Image.Resampling.LANCZOS, (1, 2, 3), rng(seed)) for _ in range(2))
    assert first == second
    assert image == random_image()
    assert (first.size, first.mode) == (image.size, image.mode)


def test_randaugment_applies_half_of_the_operations():
    image = random_image()
    config = AugmentationConfig(randaugment_num_ops=1)
    unchanged = sum(randaugment(image, config, BICUBIC, (0, 0, 0), rng(seed)) == image for seed in range(1000))
    # Half, and auto_contrast, which leaves this image alone.
    assert unchanged / 1000 == pytest.approx(0.5 + 0.5 / 15, abs=0.05)


# Random erasing


def test_random_erasing_writes_noise_into_one_rectangle():
    shares = []
    for seed in range(200):
        erased = random_erasing(torch.zeros(3, 40, 50), 1.0, rng(seed)) != 0
        rows, columns = erased.any(0).any(1), erased.any(0).any(0)
        assert erased.sum() == 3 * rows.sum() * columns.sum()
        shares.append(float(erased.float().mean()))
    assert 0.015 < min(shares) < 0.05
    assert 0.28 < max(shares) < 0.36


def test_random_erasing_noise_is_standard_normal():
    noise = torch.cat([random_erasing(torch.full((3, 64, 64), 9.0), 1.0, rng(seed)).flatten() for seed in range(20)])
    noise = noise[noise != 9.0]
    assert abs(float(noise.mean())) < 0.02
    assert abs(float(noise.std()) - 1) < 0.02


def test_random_erasing_probability():
    erased = sum(bool(random_erasing(torch.zeros(1, 16, 16), 0.25, rng(seed)).any()) for seed in range(2000))
    assert erased / 2000 == pytest.approx(0.25, abs=0.04)
    assert not random_erasing(torch.zeros(1, 16, 16), 0.0, rng()).any()


def test_random_erasing_leaves_what_is_too_small():
    assert not random_erasing(torch.zeros(3, 1, 1), 1.0, rng()).any()


# Mixup and CutMix


def make_batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pixel of image i is i, and so is its label."""
    labels = torch.arange(size)
    return labels.float()[:, None, None, None].expand(size, 3, 16, 12).contiguous(), labels


@given(
    size=st.integers(1, 9),
    mixup_alpha=st.sampled_from([0.0, 0.2, 0.8]),
    cutmix_alpha=st.sampled_from([0.0, 1.0]),
    probability=st.floats(0, 1),
    smoothing=st.floats(0, 0.5),
    seed=st.integers(0, 2**63),
)
def test_soft_labels_are_what_the_pixels_hold(
    size: int, mixup_alpha: float, cutmix_alpha: float, probability: float, smoothing: float, seed: int
):
    config = MixConfig(mixup_alpha, cutmix_alpha, probability, 0.5, smoothing)
    pixel_values, labels = make_batch(size)
    mixed, soft_labels = mix_batch(pixel_values, labels, size, config, rng(seed))
    assert mixed.shape == pixel_values.shape
    torch.testing.assert_close(soft_labels.sum(1), torch.ones(size))
    assert (soft_labels >= 0).all()
    # Each image's mean value is the mean of its two labels' numbers, by their weights.
    weights = (soft_labels - smoothing / size) / (1 - smoothing)
    torch.testing.assert_close(mixed.mean((1, 2, 3)), weights @ labels.float(), rtol=1e-4, atol=1e-4)
    again = mix_batch(pixel_values, labels, size, config, rng(seed))
    assert torch.equal(again[0], mixed)
    assert torch.equal(again[1], soft_labels)
    assert torch.equal(pixel_values, make_batch(size)[0])


def test_cutmix_pastes_a_rectangle_and_mixup_blends():
    pixel_values, labels = make_batch(2)
    cut, _ = mix_batch(pixel_values, labels, 2, MixConfig(mixup_alpha=0), rng(3))
    assert set(cut.unique().tolist()) == {0.0, 1.0}
    blended, _ = mix_batch(pixel_values, labels, 2, MixConfig(cutmix_alpha=0), rng(3))
    assert all(len(image.unique()) == 1 for image in blended)
    assert 0 < blended[0].mean() < 1


@pytest.mark.parametrize(("switch_probability", "cuts"), [(0.0, 0), (0.3, 0.3), (1.0, 1)])
def test_switch_probability(switch_probability: float, cuts: float):
    pixel_values, labels = make_batch(2)
    config = MixConfig(switch_probability=switch_probability)
    mixed = [mix_batch(pixel_values, labels, 2, config, rng(seed))[0] for seed in range(500)]
    share = sum(set(batch.unique().tolist()) <= {0.0, 1.0} for batch in mixed) / len(mixed)
    assert share == pytest.approx(cuts, abs=0.06)


def test_weights_follow_the_beta_distribution():
    pixel_values, labels = make_batch(2)
    config = MixConfig(mixup_alpha=0.8, cutmix_alpha=0, label_smoothing=0)
    weights = [float(mix_batch(pixel_values, labels, 2, config, rng(seed))[1][0, 0]) for seed in range(1000)]
    assert np.mean(weights) == pytest.approx(0.5, abs=0.03)
    assert np.var(weights) == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.01)


def test_label_smoothing_without_mixing():
    pixel_values, labels = make_batch(4)
    mixed, soft_labels = mix_batch(pixel_values, labels, 4, MixConfig(mixup_alpha=0, cutmix_alpha=0), rng())
    assert torch.equal(mixed, pixel_values)
    torch.testing.assert_close(soft_labels, torch.full((4, 4), 0.025) + 0.9 * torch.eye(4))
    logits = torch.randn(4, 4)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(torch.nn.functional.cross_entropy(logits, soft_labels), expected)


def test_half_precision_batches_stay_half():
    pixel_values, labels = make_batch(4)
    for config in (MixConfig(mixup_alpha=0), MixConfig(cutmix_alpha=0)):
        mixed, soft_labels = mix_batch(pixel_values.bfloat16(), labels, 4, config, rng())
        assert mixed.dtype == torch.bfloat16
        assert soft_labels.dtype == torch.float32


def test_soft_labels_are_float32_whatever_torchs_default_is():
    torch.set_default_dtype(torch.float64)
    try:
        _, soft_labels = mix_batch(*make_batch(4), 4, MixConfig(), rng())
    finally:
        torch.set_default_dtype(torch.float32)
    assert soft_labels.dtype == torch.float32


# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"random_resized_crop_scale": (0.0, 1.0)}, r"random_resized_crop_scale is \(0.0, 1.0\)"),
        ({"random_resized_crop_scale": (0.5, 0.2)}, "smallest <= largest <= 1"),
        ({"random_resized_crop_scale": None, "random_crop_padding": -1}, "random_crop_padding is -1"),
        ({"random_crop_padding": 2}, "cannot be combined"),
        ({"horizontal_flip": 1.5}, "horizontal_flip is 1.5: it must be from 0 to 1"),
        ({"random_erasing": float("nan")}, "random_erasing is nan"),
        ({"randaugment_num_ops": -1}, "randaugment_num_ops is -1"),
        ({"randaugment_magnitude": 11}, "randaugment_magnitude is 11: it must be from 0 to 10"),
        ({"randaugment_magnitude_std": -0.5}, "randaugment_magnitude_std is -0.5"),
    ],
)
def test_bad_augmentation_is_refused(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        AugmentationConfig(**values)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mixup_alpha": -0.1}, "mixup_alpha is -0.1: it must not be negative"),
        ({"cutmix_alpha": float("inf")}, "cutmix_alpha is inf"),
        ({"probability": 2}, "probability is 2: it must be from 0 to 1"),
        ({"switch_probability": -1}, "switch_probability is -1"),
        ({"label_smoothing": 1.1}, "label_smoothing is 1.1"),
    ],
)
def test_bad_mixing_is_refused(values: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MixConfig(**values)


@pytest.mark.parametrize("wrong", [-1, 3])
def test_labels_out_of_range_are_refused(wrong: int):
    with pytest.raises(ValueError, match="allowed labels are 0 to 2"):
        mix_batch(torch.zeros(2, 3, 4, 4), torch.tensor([1, wrong]), 3, MixConfig(), rng())
