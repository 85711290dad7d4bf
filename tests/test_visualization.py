"""Pictures of kept tokens: the right patches are bright, for all families and any size; bad input is rejected."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    MAKE_CONFIG,
    NUM_CLS_TOKENS,
    TOKEN_PRUNING,
    make_plainmamba_config,
    make_vim_config,
)
from forking import run_forked
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_vssm_prune import EXAMPLE_MODEL, visualize
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.panels import DROPPED, DROPPED_OPACITY, wrap
from hf_vssm_prune.pruning_methods import METHODS
from hf_vssm_prune.visualization import (
    NO_IMPORTANCE,
    VIRIDIS,
    draw_classification,
    draw_importance,
    draw_kept_tokens,
    draw_merges,
    image_from_pixel_values,
    importance_maps,
    kept_patches,
    patched_area,
)
from hf_vssm_prune.visualization_of_heads import draw_legend, shares_of_classes


GREY = (100, 100, 100)
COVERED = tuple(
    round((1 - DROPPED_OPACITY) * pixel + DROPPED_OPACITY * cover) for pixel, cover in zip(GREY, DROPPED, strict=True)
)


def patch_colours(picture: Image.Image, panel_size: tuple[int, int], grid: tuple[int, int]) -> np.ndarray:
    """Which patches are covered in the second panel of a picture with one row and two columns, from the colour at their
    centre."""
    pixels = np.asarray(picture).astype(int)
    is_grey, is_covered = (np.abs(pixels - colour).max(-1) <= 2 for colour in (GREY, COVERED))
    is_panel = (is_grey | is_covered)[:, pixels.shape[1] // 2 :]
    # The edges of letters have these colours too, but never along half a panel.
    top = np.argmax(is_panel.sum(1) > panel_size[0] // 2)
    left = pixels.shape[1] // 2 + np.argmax(is_panel.sum(0) > panel_size[1] // 2)
    y = (top + (np.arange(grid[0]) + 0.5) * panel_size[1] / grid[0]).astype(int)
    x = (left + (np.arange(grid[1]) + 0.5) * panel_size[0] / grid[1]).astype(int)
    assert (is_grey | is_covered)[np.ix_(y, x)].all()
    return is_covered[np.ix_(y, x)]


@pytest.mark.parametrize(
    ("size", "grid", "panel_size"),
    [((28, 28), (14, 14), (224, 224)), ((64, 32), (4, 8), (192, 96)), ((300, 600), (10, 5), (112, 224))],
    ids=["enlarged", "wide", "made smaller"],
)
def test_kept_patches_are_bright_and_others_covered(size, grid, panel_size) -> None:
    num_patches = grid[0] * grid[1]
    kept = torch.randperm(num_patches)[: num_patches // 2].sort().values
    picture = draw_kept_tokens([Image.new("RGB", size, GREY)], [kept.unsqueeze(0)], grid)
    expected = np.ones(num_patches, dtype=bool)
    expected[kept] = False
    np.testing.assert_array_equal(patch_colours(picture, panel_size, grid), expected.reshape(grid))


def test_images_are_rows_and_stages_are_columns() -> None:
    images = [Image.new("L", (28, 28), value) for value in (0, 128, 255)]
    kept = [torch.arange(n).expand(3, -1) for n in (10, 5)]
    one = draw_kept_tokens(images[:1], [ids[:1] for ids in kept], (4, 4))
    three = draw_kept_tokens(images, kept, (4, 4))
    one_stage = draw_kept_tokens(images, kept[:1], (4, 4))
    assert three.width == one.width
    assert three.height > 2.5 * one.height
    assert one_stage.width < 0.75 * three.width


def test_long_captions_and_images_of_different_sizes_fit() -> None:
    images = [Image.new("RGB", (28, 28)), Image.new("RGBA", (640, 100)), Image.new("P", (1, 1))]
    kept = [torch.tensor([[0, 3], [1, 2], [0, 1]])]
    short = draw_kept_tokens(images, kept, (2, 2))
    long = draw_kept_tokens(
        images, kept, (2, 2), captions=["boot", "a very long caption\n" + 50 * "x", "bag"], layers=[4]
    )
    assert long.width > short.width
    assert long.height > short.height
    margins = np.asarray(long)[:, [0, -1]]
    assert (margins == 255).all(), "text runs over the edge"


def test_a_label_of_many_words_takes_several_lines() -> None:
    """As those of ImageNet; the panels stay next to one another."""
    name = "great white shark, white shark, man-eater, man-eating shark, Carcharodon carcharias"
    kept = [torch.tensor([[0, 3]])]
    short, long = (
        draw_kept_tokens([Image.new("RGB", (28, 28))], kept, (2, 2), captions=[text]) for text in ("shark", name)
    )
    assert long.width == short.width
    assert long.height > short.height
    assert wrap(name, 224).replace("\n", " ") == name


def test_a_legend_fits_its_panel() -> None:
    long = shares_of_classes(torch.tensor([[0, 0], [0, 1]]), ["a name that is much wider than the panel", "sky"])
    assert [text[:3] for _, text in long] == ["75%", "25%"]
    legend = np.asarray(draw_legend(long))
    assert (legend[:, -1] == 255).all(), "text runs over the edge"
    whole = np.asarray(draw_legend([(label, text[:10]) for label, text in long]))
    assert (legend[:, :80] == whole[:, :80]).all(), "the number is there"


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_from_a_model(family, size) -> None:
    config = MAKE_CONFIG[family](token_pruning=dict(TOKEN_PRUNING))
    model = AutoModelForImageClassification.from_config(config).eval()
    pixel_values = torch.randn(2, 3, *size)
    with torch.no_grad():
        kept_tokens = model(pixel_values).kept_tokens
    patches = kept_patches(kept_tokens, config, size)
    grid = config.grid_size_for(*size)
    num_patches = grid[0] * grid[1]
    for ids, tokens in zip(patches, kept_tokens, strict=True):
        assert ids.shape[1] == tokens.shape[1] - NUM_CLS_TOKENS[family]
        assert (ids.diff(dim=1) > 0).all()
        assert ids.min() >= 0
        assert ids.max() < num_patches
    images = [image_from_pixel_values(image, [0.5] * 3, [0.25] * 3) for image in pixel_values]
    draw_kept_tokens(images, patches, grid, layers=config.token_pruning["layers"])


def test_class_token_is_left_out_of_the_middle(vim_config) -> None:
    # 16 patches: the class token has id 8, the patches after it 9 to 16.
    kept = torch.tensor([[0, 7, 8, 9, 16], [1, 2, 8, 10, 11]])
    (patches,) = kept_patches([kept], vim_config)
    assert patches.tolist() == [[0, 7, 8, 15], [1, 2, 9, 10]]
    assert [each.shape for each in kept_patches([kept[:0]], vim_config)] == [(0, 4)]


def test_merged_patches_have_one_colour() -> None:
    """It is the mean of their colours. Dropped patches are covered."""
    colours = [(200, 0, 0), (100, 0, 0), (0, 200, 0), (0, 0, 250)]
    image = Image.new("RGB", (2, 2))
    image.putdata(colours)
    panel = draw_merges(image, torch.tensor([0, 0, 2, 3]), torch.tensor([0, 2]), (2, 2))
    width, height = panel.size
    middles = [panel.getpixel((x * width // 4, y * height // 4)) for y in (1, 3) for x in (1, 3)]
    assert middles[:3] == [(150, 0, 0), (150, 0, 0), (0, 200, 0)]
    assert middles[3] == tuple(round(0.72 * a + 0.28 * b) for a, b in zip((0, 114, 178), (0, 0, 250), strict=True))
    assert panel.getpixel((width // 2, height // 4)) == (150, 0, 0), "no border inside a token"
    assert panel.getpixel((width // 4, height // 2)) == (240, 228, 66)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_drawn(method, family) -> None:
    """Methods that merge have a second row, which shows the merged tokens."""
    config = MAKE_CONFIG[family](token_pruning={"layers": [1, 3], "keep_ratios": [0.6, 0.6], "method": method})
    model = FAMILIES[family].classifier(config).eval()
    images = torch.randn(config.pixel_values_shape(1))
    with torch.no_grad():
        merges = model(images).merged_tokens is not None
    picture = draw_classification(model, images, [0.5] * 3, [0.5] * 3)
    model.set_token_pruning({"layers": [1, 3], "keep_ratios": [0.6, 0.6], "method": "top"})
    plain = draw_classification(model, images, [0.5] * 3, [0.5] * 3)
    assert (picture.height > plain.height) == merges == (method not in PRUNES)


# These drop tokens and merge none.
PRUNES = ("top", "stand_in", "local_top", "uniform", "dyvm")


def test_image_from_pixel_values_undoes_normalisation() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    values = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[
        :, None, None
    ]
    np.testing.assert_array_equal(np.asarray(image_from_pixel_values(values, mean, std)), pixels)
    assert image_from_pixel_values(torch.zeros(1, 4, 4), [1.0], [1.0]).getpixel((0, 0)) == (255, 255, 255)


IMAGE = Image.new("RGB", (8, 8))
KEPT = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": []}, "`images` is empty"),
        ({"kept_tokens": []}, "`kept_tokens` is empty; a dense model keeps every token"),
        ({"images": [IMAGE, IMAGE]}, r"`kept_tokens\[0\]` has shape \(1, 2\).*2 images"),
        ({"kept_tokens": [KEPT[0]]}, r"`kept_tokens\[0\]` has shape \(2,\)"),
        (
            {"kept_tokens": [KEPT, KEPT + 3]},
            r"`kept_tokens\[1\]` has ids from 3 to 4; a grid of 2 x 2 patches has 0 to 3",
        ),
        ({"kept_tokens": [KEPT - 1]}, "has ids from -1 to 0"),
        ({"grid": (2,)}, "`grid` is"),
        ({"grid": (0, 4)}, "`grid` is"),
        ({"captions": ["a", "b"]}, "`captions` has 2 entries for 1 images"),
        ({"layers": [1, 2]}, "`layers` has 2 entries for 1 stages"),
    ],
)
def test_bad_input(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        draw_kept_tokens(**{"images": [IMAGE], "kept_tokens": [KEPT], "grid": (2, 2), **arguments})


@pytest.mark.parametrize("shape", [(8, 8), (2, 8, 8), (1, 3, 8, 8)])
def test_bad_pixel_values(shape) -> None:
    with pytest.raises(ValueError, match="`pixel_values` has shape"):
        image_from_pixel_values(torch.zeros(shape), [0.5], [0.5])


def test_classification_is_drawn_for_any_image_size(tiny_pruned_config) -> None:
    model = AutoModelForImageClassification.from_config(tiny_pruned_config).eval()
    statistics = ([0.5] * 3, [0.5] * 3)
    square = draw_classification(model, torch.randn(2, 3, 32, 32), *statistics)
    wide = draw_classification(model, torch.randn(2, 3, 32, 64), *statistics)
    assert wide.height < square.height
    model.set_token_pruning(None)
    with pytest.raises(ValueError, match="dense"):
        draw_classification(model, torch.randn(1, 3, 32, 32), *statistics)


@pytest.mark.parametrize(
    "options", [[], ["--flops_reduction", "0.3", "--importance"]], ids=["image alone", "all options"]
)
def test_script(tmp_path: Path, options: list[str]) -> None:
    image, output = tmp_path / "image.png", tmp_path / "kept.png"
    Image.new("RGB", (40, 30), GREY).save(image)
    script = Path(__file__).resolve().parents[1] / "scripts" / "visualize.py"
    done = run_forked(script, image, "--output", output, *options)
    assert done.returncode == 0, done.stderr
    model = AutoModelForImageClassification.from_pretrained(EXAMPLE_MODEL)
    model.set_token_pruning({"flops_reduction": 0.3 if options else 0.416})
    processor = AutoImageProcessor.from_pretrained(EXAMPLE_MODEL)
    expected = visualize(model, processor, Image.open(image), importance=bool(options))
    np.testing.assert_array_equal(np.asarray(Image.open(output)), np.asarray(expected))


def test_importance_is_where_the_scores_belong() -> None:
    kept = [torch.tensor([[0, 1, 3]]), torch.tensor([[3]])]
    first, second = importance_maps(kept, [torch.tensor([[1.0, 2.0, 3.0, 5.0]]), torch.tensor([[7.0, 8.0, 9.0]])], 4)
    assert first.tolist() == [[1, 2, 3, 5]]
    torch.testing.assert_close(second, torch.tensor([[7, 8, math.nan, 9]]), equal_nan=True)
    pixels = np.asarray(draw_importance(second.view(2, 2), (2, 2)))
    assert pixels[0, 0].tolist() == list(VIRIDIS[0])
    assert pixels[0, 1].tolist() == list(VIRIDIS[2])
    assert pixels[1, 0].tolist() == list(NO_IMPORTANCE)
    assert pixels[1, 1].tolist() == list(VIRIDIS[-1])
    equal = np.asarray(draw_importance(torch.full((2, 2), 0.5), (8, 8)))
    assert (equal == VIRIDIS[0]).all()
    with pytest.raises(
        ValueError, match=r"`token_scores` has shapes \[\(1, 4\)\]; \[\(1, 4\), \(1, 3\)\] are expected"
    ):
        importance_maps(kept, [torch.ones(1, 4)], 4)


def test_visualize_takes_images_of_any_size(tiny_pruned_config) -> None:
    model = AutoModelForImageClassification.from_config(tiny_pruned_config)
    processor = new_image_processor(tiny_pruned_config, [0.5] * 3, [0.5] * 3, crop_pct=1.0)
    images = [Image.new("RGB", size, GREY) for size in ((40, 30), (32, 32), (7, 200))]
    one, three = visualize(model, processor, images[0]), visualize(model, processor, images)
    with_importance = visualize(model, processor, images, importance=True)
    assert one.width == three.width
    assert one.height < three.height < with_importance.height
    assert model.training, "the model's mode was changed"
    with pytest.raises(ValueError, match="`images` is empty"):
        visualize(model, processor, [])


def test_torchs_default_device_does_not_matter() -> None:
    config = make_vim_config(token_pruning={**TOKEN_PRUNING, "method": "evit", "importance": "clip"})
    model, image = FAMILIES["vim"].classifier(config), Image.new("RGB", (32, 32), GREY)
    processor = new_image_processor(config, [0.5] * 3, [0.5] * 3, crop_pct=1.0)
    expected = visualize(model, processor, image, importance=True)
    torch.set_default_device("meta")
    try:
        assert visualize(model, processor, image, importance=True) == expected
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    ("config", "size", "area"),
    [
        (make_plainmamba_config(), (30, 33), (32, 40)),
        (make_vim_config(), (30, 33), (24, 32)),
        (make_vim_config(patch_stride=4), (32, 32), (28, 28)),
    ],
    ids=["plainmamba pads", "vim leaves out", "vim overlaps"],
)
def test_patches_share_the_patched_area_evenly(config, size, area) -> None:
    coordinates = np.indices((size[1], size[0]), dtype=np.uint8)
    image = Image.fromarray(np.stack([*coordinates, np.full((size[1], size[0]), 1, dtype=np.uint8)], axis=-1))
    patched = patched_area(image, config)
    assert patched.size == area
    grid = config.grid_size_for(size[1], size[0])
    stride = getattr(config, "patch_stride", None) or config.patch_size
    assert (patched.height, patched.width) == tuple(stride * patches for patches in grid)
    margin = (config.patch_size - stride) // 2
    assert patched.getpixel((0, 0)) == (margin, margin, 1)
