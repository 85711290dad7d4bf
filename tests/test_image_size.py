"""Using a checkpoint at a different image size than it was trained at."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAKE_CONFIG, load_script
from PIL import Image
from test_training import fresh_accelerator, image_folder  # noqa: F401
from transformers import AutoModelForImageClassification, BitImageProcessor, ViTImageProcessor

from hf_vssm_prune.hub import save_for_hub
from hf_vssm_prune.hub.loading import load_image_processor, new_image_processor
from hf_vssm_prune.training.arguments import DenseModelArguments
from hf_vssm_prune.training.image_size import resize_image_processor, resize_model


SCHEDULE = ["--prune_layers", "1", "3", "--keep_ratios", "0.7", "0.6"]


def make_model(family: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(MAKE_CONFIG[family]()).eval()
    torch.nn.init.normal_(model.base_model.embeddings.position_embeddings)
    return model


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
@pytest.mark.parametrize("image_size", [24, 40, 64])
def test_a_resized_model_gives_what_it_gave_at_that_size(family, image_size):
    """After resizing, position embeddings need no interpolation at that size."""
    model = make_model(family)
    pixel_values = torch.randn(2, 3, image_size, image_size)
    with torch.no_grad():
        expected = model(pixel_values, interpolate_pos_encoding=True).logits
        resize_model(model, image_size)
        torch.testing.assert_close(model(pixel_values, interpolate_pos_encoding=False).logits, expected)
    assert model.config.image_size == image_size


def test_the_class_tokens_position_stays():
    model = make_model("vim")
    before = model.vim.embeddings.position_embeddings[:, 8].clone()
    resize_model(model, 24)
    assert model.vim.embeddings.position_embeddings.shape == (1, 10, 16)
    assert torch.equal(model.vim.embeddings.position_embeddings[:, 4], before)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"size": {"shortest_edge": 37}, "crop_size": {"height": 32, "width": 32}}, {"shortest_edge": 74}),
        (
            {"size": {"height": 40, "width": 60}, "crop_size": {"height": 32, "width": 48}},
            {"height": 80, "width": 80},
        ),
    ],
)
def test_a_resized_processor_crops_as_large_a_part(options, expected):
    processor = resize_image_processor(BitImageProcessor(**options, image_mean=[0.1] * 3), 64)
    assert {name: value for name, value in dict(processor.to_dict()["size"]).items() if value} == expected
    image = Image.fromarray(np.zeros((50, 70, 3), np.uint8))
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)
    assert list(processor.image_mean) == [0.1] * 3


def test_a_processor_that_only_resizes():
    processor = resize_image_processor(ViTImageProcessor(size={"height": 32, "width": 32}), 64)
    image = Image.fromarray(np.zeros((50, 70, 3), np.uint8))
    assert processor(image, return_tensors="pt")["pixel_values"].shape == (1, 3, 64, 64)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_training_goes_on_at_another_size(family, image_folder: Path, tmp_path, capsys):  # noqa: F811
    """Trains a dense model, then prunes it with the same checkpoint as its teacher."""
    model = make_model(family)
    processor = new_image_processor(model.config, [0.5] * 3, [0.25] * 3, crop_pct=0.8)
    checkpoint = save_for_hub(model, tmp_path / "checkpoint", processor)
    shared = ["--dataset_name", image_folder, "--workers", "0", "--batch_size", "4", "--use_cpu"]
    shared += ["--max_train_steps", "2", "--num_warmup_steps", "0", "--lr", "1e-3"]
    runs = {
        "train": ["--model_name_or_path", checkpoint, "--image_size", "48"],
        "finetune": [
            "--model_name_or_path",
            tmp_path / "train" / "last",
            "--img_size",
            "64",
            *SCHEDULE,
        ],
    }
    for (script, options), size in zip(runs.items(), (48, 64), strict=True):
        arguments = [*shared, *options, "--output_dir", tmp_path / script]
        assert load_script(script).main(list(map(str, arguments))) == 0, capsys.readouterr().err
        folder = tmp_path / script / "last"
        assert json.loads((folder / "config.json").read_text())["image_size"] == size
        trained = AutoModelForImageClassification.from_pretrained(folder)
        assert trained.config.grid_size == (size // 8, size // 8)
        assert load_image_processor(folder).to_dict()["crop_size"] == {"height": size, "width": size}


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="--image_size is 0: it must be at least 1"):
        DenseModelArguments(model_name_or_path="m", image_size=0)
    with pytest.raises(ValueError, match="too small"):
        resize_model(make_model("vim"), 4)
