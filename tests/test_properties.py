"""Properties of all models: random configurations, schedules, image sizes and images of all families (hypothesis)."""

import math
import tempfile
from pathlib import Path

import numpy as np
import torch
from conftest import MAKE_CONFIG, NUM_CLS_TOKENS
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoConfig, AutoModelForImageClassification

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.conversion import (
    convert_official_state_dict,
    convert_to_official_state_dict,
    infer_config,
)
from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import load_classifier, new_image_processor
from hf_vssm_prune.modeling_common import is_pruning_parameter
from hf_vssm_prune.token_pruning import ALIGNMENTS, count_kept


quick = settings(max_examples=12)


@st.composite
def schedules(draw: st.DrawFn, config: VisionMambaConfig) -> dict | None:
    last = config.num_hidden_layers - 1
    layers = sorted(draw(st.sets(st.integers(1, last)))) if last else []
    if not layers:
        return None
    return {
        "layers": layers,
        "keep_ratios": [draw(st.floats(0.05, 1.0)) for _ in layers],
        "alignment": draw(st.sampled_from(ALIGNMENTS)),
        "importance": draw(st.sampled_from([name for name in config.importances if name != "random"])),
    }


@st.composite
def configs(draw: st.DrawFn, square: bool = False) -> VisionMambaConfig:
    config = draw(dense_configs(square))
    if (schedule := draw(schedules(config))) is not None:
        config.token_pruning = config.complete_token_pruning(schedule)
    return config


@st.composite
def dense_configs(draw: st.DrawFn, square: bool) -> VisionMambaConfig:
    patch_size, num_layers = draw(st.sampled_from([2, 4, 6])), draw(st.integers(1, 4))
    height, width = (patch_size * draw(st.integers(1, 6)) + draw(st.integers(0, 3)) for _ in "hw")
    if square:
        height = width = patch_size * draw(st.integers(1, 6))
    options = {
        "image_size": [height, width],
        "patch_size": patch_size,
        "num_channels": draw(st.sampled_from([1, 3])),
        "hidden_size": draw(st.sampled_from([8, 12, 20])),
        "num_hidden_layers": num_layers,
        "state_size": draw(st.integers(1, 5)),
        "expand": draw(st.integers(1, 3)),
        "num_labels": draw(st.integers(2, 5)),
    }
    family = draw(st.sampled_from(sorted(MAKE_CONFIG)))
    if family != "plainmamba":
        stride = patch_size if square else draw(st.integers(1, patch_size))
        return MAKE_CONFIG[family](**options, conv_kernel=draw(st.integers(1, 5)), patch_stride=stride)
    return MAKE_CONFIG["plainmamba"](
        **options,
        conv_kernel=draw(st.sampled_from([1, 3, 7])),
        stem_channels=draw(st.sampled_from([4, 8])),
        num_stem_convs=draw(st.integers(0, 2)),
        depthwise_layers=sorted(draw(st.sets(st.integers(0, num_layers - 1)))),
    )


def make_model(config: VisionMambaConfig) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForImageClassification.from_config(config).eval()


def images_for(config: VisionMambaConfig, height_width: tuple[int, int], seed: int = 0) -> torch.Tensor:
    return torch.randn(2, config.num_channels, *height_width, generator=torch.Generator().manual_seed(seed))


@st.composite
def sizes_for(draw: st.DrawFn, config: VisionMambaConfig) -> tuple[int, int]:
    """Any image size with at least one patch, including sizes that the model was not configured for."""
    height, width = (draw(st.integers(config.patch_size, 5 * config.patch_size)) for _ in "hw")
    return height, width


@quick
@given(data=st.data(), config=configs())
def test_saved_and_opened_it_gives_equal_logits(data, config) -> None:
    model = make_model(config)
    images = images_for(config, data.draw(sizes_for(config)))
    with tempfile.TemporaryDirectory() as folder:
        opened = load_classifier(save_for_hub(model, Path(folder) / "model")).eval()
    assert opened.config.token_pruning == config.token_pruning
    with torch.no_grad():
        expected, actual = model(images, interpolate_pos_encoding=True), opened(images, interpolate_pos_encoding=True)
    assert expected.logits.isfinite().all()
    assert torch.equal(actual.logits, expected.logits)
    for kept, expected_kept in zip(actual.kept_tokens or (), expected.kept_tokens or (), strict=True):
        assert torch.equal(kept, expected_kept)


@quick
@given(config=configs())
def test_configuration_file_tells_all(config) -> None:
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        opened = AutoConfig.from_pretrained(folder)
    assert {**opened.to_dict(), "_name_or_path": ""} == config.to_dict()


@quick
@given(config=configs(square=True))
def test_converted_there_and_back_no_bit_changes(config) -> None:
    state_dict = make_model(config).state_dict()
    official = convert_to_official_state_dict(config, state_dict)
    back = convert_official_state_dict(config, official)
    dense = {name: tensor for name, tensor in state_dict.items() if not is_pruning_parameter(name)}
    assert back.keys() == dense.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in dense.items())
    inferred = infer_config(official)
    for name in ("hidden_size", "num_hidden_layers", "state_size", "expand", "conv_kernel", "patch_size", "num_labels"):
        assert getattr(inferred, name) == getattr(config, name), name
    assert inferred.grid_size == config.grid_size


@quick
@given(data=st.data(), config=configs())
def test_tokens_that_are_kept(data, config) -> None:
    """Each stage keeps the scheduled number of the previous tokens in raster order, always including the class
    token."""
    height, width = data.draw(sizes_for(config))
    has_class_token = NUM_CLS_TOKENS[config.model_type]
    num_patches = math.prod(config.grid_size_for(height, width))
    with torch.no_grad():
        output = make_model(config)(images_for(config, (height, width)), interpolate_pos_encoding=True)
    if config.token_pruning is None:
        assert output.kept_tokens is None
        return
    left, count = torch.arange(num_patches + has_class_token).expand(2, -1), num_patches
    stages = zip(config.token_pruning["keep_ratios"], output.kept_tokens, output.token_scores, strict=True)
    for ratio, kept, scores in stages:
        assert scores.shape == (2, count)
        count = count_kept(count, ratio)
        assert count >= 1
        assert kept.shape == (2, count + has_class_token)
        assert (kept.diff(dim=1) > 0).all()
        for sample in range(2):
            assert set(kept[sample].tolist()) <= set(left[sample].tolist())
            if has_class_token:
                assert config.cls_token_id(num_patches) in kept[sample]
        left = kept


@quick
@given(config=configs())
def test_samples_of_a_batch_do_not_see_each_other(config) -> None:
    model, images = make_model(config), images_for(config, config.image_height_width(config.image_size))
    with torch.no_grad():
        both, swapped = model(images), model(images.flip(0))
    torch.testing.assert_close(swapped.logits.flip(0), both.logits)
    for kept, of_swapped in zip(both.kept_tokens or (), swapped.kept_tokens or (), strict=True):
        assert torch.equal(of_swapped.flip(0), kept)


@st.composite
def photos(draw: st.DrawFn) -> Image.Image:
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    pixels = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(draw(st.sampled_from(["RGB", "L", "RGBA", "P", "1", "CMYK"])))


@quick
@given(photo=photos(), config=configs())
def test_any_image_is_classified(photo, config) -> None:
    processor = new_image_processor(config, [0.5] * config.num_channels, [0.25] * config.num_channels, crop_pct=0.9)
    inputs = processor(photo.convert("RGB" if config.num_channels == 3 else "L"), return_tensors="pt")
    with torch.no_grad():
        logits = make_model(config)(**inputs).logits
    assert logits.shape == (1, config.num_labels)
    assert abs(logits.softmax(-1).sum().item() - 1) < 1e-5
