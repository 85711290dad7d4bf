"""A model family in two files and one line: what the package offers for all families works for it, too.

The toy is a video model, whose tokens are on a three-dimensional grid and follow the class token.
"""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from toy_family import configuration_toy, modeling_toy
from toy_family.configuration_toy import ToyConfig
from toy_family.modeling_toy import ToyForVideoClassification, ToyModel
from transformers import AutoConfig, AutoModel, AutoModelForVideoClassification

from hf_vssm_prune import count_flops, visualize
from hf_vssm_prune.conversion import (
    convert_official_state_dict,
    convert_to_official_state_dict,
    infer_config,
    load_official_model,
    save_official_model,
)
from hf_vssm_prune.families import FAMILIES, register
from hf_vssm_prune.hub import ModelCardInfo, create_model_card, save_for_hub
from hf_vssm_prune.hub.loading import load_classifier, new_image_processor
from hf_vssm_prune.visualization import draw_classification, draw_stages, kept_patches


@pytest.fixture(scope="module", autouse=True)
def toy():
    """Registers the family with one line, and removes it for the other tests."""
    yield register(configuration_toy, modeling_toy)
    del FAMILIES["toy"]


def make_model(**changes) -> ToyForVideoClassification:
    torch.manual_seed(0)
    return ToyForVideoClassification(ToyConfig.from_preset("XS", num_labels=4, **changes)).eval()


@pytest.fixture
def videos() -> torch.Tensor:
    return torch.randn(2, 3, 3, 32, 32)


ROOT = Path(__file__).resolve().parents[1]
CODE = [file for folder in ("src", "scripts", "demo") for file in sorted((ROOT / folder).rglob("*.py"))]


def test_nothing_else_asks_which_family_a_model_is_of() -> None:
    """No code compares model types, or has a table of them."""
    names = "|".join(FAMILIES)
    pattern = re.compile(rf"model_type (==|!=|in|not in) |[\"']({names})[\"']\s*:|[=!]= *[\"']({names})[\"']")
    found = [f"{file.relative_to(ROOT)}: {match[0]}" for file in CODE for match in pattern.finditer(file.read_text())]
    assert not found


def test_auto_classes() -> None:
    config = AutoConfig.for_model("toy", num_frames=2)
    assert type(config) is ToyConfig
    assert type(AutoModel.from_config(config)) is ToyModel
    assert type(AutoModelForVideoClassification.from_config(config)) is ToyForVideoClassification
    assert FAMILIES["toy"].auto_map() == {
        "AutoConfig": "configuration_toy.ToyConfig",
        "AutoModel": "modeling_toy.ToyModel",
        "AutoModelForVideoClassification": "modeling_toy.ToyForVideoClassification",
    }


def test_its_grid_and_its_class_token() -> None:
    config = ToyConfig.from_preset("XS")
    assert config.grid_size == (3, 4, 4)
    assert config.cls_token_id(48) == 0
    assert config.modality == "video"
    assert config.pixel_values_shape(2) == (2, 3, 3, 32, 32)


def test_its_own_rule_counts_flops() -> None:
    count = count_flops(ToyConfig.from_preset("XS", num_labels=4)).dense
    linear_layers = 48 * 8 * 8 * 3 * 16 + 6 * 49 * 3 * 16 * 32 + 16 * 4
    assert count.published == linear_layers
    assert count.total - count.published == 6 * 2 * 49 * 32 * (4 + 2 * 1 + 2 * 16 + 9 * 16)
    assert count_flops(ToyConfig.from_preset("XS"), 64).dense.published > 3 * count.published


def test_a_budget_becomes_a_schedule_and_tokens_go(videos) -> None:
    model = make_model()
    model.set_token_pruning({"flops_reduction": 0.3})
    assert count_flops(model.config).reduction == pytest.approx(0.3, abs=0.006)
    with torch.no_grad():
        outputs = model(videos)
    assert outputs.logits.shape == (2, 4)
    for kept in outputs.kept_tokens:
        assert (kept[:, 0] == 0).all(), "the class token is first and stays"
    patches = kept_patches(outputs.kept_tokens, model.config)
    for ids, kept in zip(patches, outputs.kept_tokens, strict=True):
        assert torch.equal(ids, kept[:, 1:] - 1)


def test_its_layers_skip_scans_and_are_counted_without_them(videos) -> None:
    model = make_model()
    model.set_token_pruning({"layers": [2], "keep_ratios": [1.0], "method": "uniform", "block_keep_ratio": 0.5})
    flops = count_flops(model.config)
    assert flops.pruned.breakdown["scans"] == flops.dense.breakdown["scans"] / 2
    with torch.no_grad():
        gates = model(videos, output_block_gates=True).block_gates
    assert [gate.shape for gate in gates] == 6 * [(2, 2)]


def test_saved_and_opened(videos, tmp_path) -> None:
    model = make_model(token_pruning={"layers": [2, 4], "keep_ratios": [0.7, 0.5]})
    folder = save_for_hub(model, tmp_path / "toy")
    assert {file.name for file in folder.glob("*.py")} == {"configuration_toy.py", "modeling_toy.py"}
    opened = load_classifier(folder)
    with torch.no_grad():
        assert torch.equal(opened(videos).logits, model(videos).logits)
    remote = AutoModelForVideoClassification.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(remote(videos).logits, model(videos).logits)


def test_official_files_there_and_back(videos, tmp_path) -> None:
    model = make_model()
    official = convert_to_official_state_dict(model.config, model.state_dict())
    assert {name.partition(".")[0] for name in official} == {"body", "top"}
    save_official_model(model, tmp_path / "toy.pth")
    opened = load_official_model(tmp_path / "toy.pth")
    assert type(opened) is ToyForVideoClassification
    with torch.no_grad():
        assert torch.equal(opened(videos).logits, model(videos).logits)

    old = official | {"body.embeddings.class_token": official["body.embeddings.class_token"].flatten()}
    old = {f"encoder.{name}": tensor for name, tensor in old.items()} | {"distill_head.weight": torch.zeros(3)}
    config = infer_config(old)
    assert config.model_type == "toy"
    for name, tensor in convert_official_state_dict(config, old).items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_a_family_that_is_named_is_taken() -> None:
    official = convert_to_official_state_dict(make_model().config, make_model().state_dict())
    assert infer_config(official, family="toy").grid_size == (3, 4, 4)
    with pytest.raises(ValueError, match=r"not a complete image classifier; missing: patch_embed\.proj\.weight"):
        infer_config(official, family="vim")
    with pytest.raises(ValueError, match=r"`family` is 'top'; allowed values are .*'toy'"):
        infer_config(official, family="top")
    with pytest.raises(ValueError, match="`depthwise_layers` is an option of PlainMamba, not of Toy"):
        infer_config(official, depthwise_layers=[0])


def test_model_card() -> None:
    model = make_model(token_pruning={"layers": [2], "keep_ratios": [0.5], "method": "top"})
    card = create_model_card(model, ModelCardInfo("My toy"))
    assert "| Architecture | Toy, 6 layers, 16 channels |" in card.text
    assert "| Image size | 3 frames of 32 × 32 pixels, 3 × 4 × 4 patches |" in card.text
    assert "for one video and count linear layers alone" in card.text
    assert "| 2 | 0.5 | 48 | 24 |" in card.text
    assert "[A Toy](https://arxiv.org/abs/0000.00000)" in card.text
    assert 'AutoModelForVideoClassification.from_pretrained("My toy")' in card.text


def test_published_figures() -> None:
    model = ToyForVideoClassification(ToyConfig.from_preset("XS"))
    text = create_model_card(model, ModelCardInfo("Toy-XS")).text
    assert "For the same architecture on Toys." in text
    assert "| dense | 12.3 | – | A Toy |" in text


def test_a_picture_is_a_sheet_of_frames(videos) -> None:
    model = make_model(token_pruning={"layers": [2, 4], "keep_ratios": [0.7, 0.5], "method": "top"})
    statistics = ([0.5] * 3, [0.5] * 3)
    picture = draw_classification(model, videos, *statistics)
    taller = draw_classification(model, videos, *statistics, importance=True)
    assert taller.height > 1.5 * picture.height

    processor = new_image_processor(model.config, *statistics, crop_pct=1.0)
    frames = [Image.new("RGB", (40, 32), colour) for colour in ("red", "green", "blue")]
    one, two = visualize(model, processor, frames), visualize(model, processor, [frames, frames])
    assert one.width == two.width
    assert one.height < two.height


def test_patches_are_covered_in_their_own_frame() -> None:
    grid = (3, 2, 2)
    frames = [Image.new("RGB", (20, 20), (100, 100, 100)) for _ in range(3)]
    kept = torch.tensor([ids for ids in range(math.prod(grid)) if ids != 4 * 2 + 1])  # frame 2, first row, right
    whole, pruned = draw_stages(frames, [kept], grid)
    changed = np.argwhere((np.asarray(whole) != np.asarray(pruned)).any(-1))
    side = whole.width // 2  # two frames in the first row of the sheet, the last one below them
    assert (changed[:, 0] > side).all()
    assert (changed[:, 1] < side + 2).all()
    centre = np.asarray(pruned)[side + 4 + side // 4, 3 * side // 4]
    assert (centre != 100).any()
    with pytest.raises(ValueError, match=r"there are 2 frames; a grid of 3 x 2 x 2 needs 3"):
        draw_stages(frames[:2], [kept], grid)
