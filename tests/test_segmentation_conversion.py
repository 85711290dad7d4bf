"""mmsegmentation's files compared with ours: feature maps and logits of the official models, and conversion in both
directions."""

import copy
from functools import partial

import pytest
import torch
from conftest import load_script
from golden import GoldenCase
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForSemanticSegmentation,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from hf_vssm_prune import PlainMambaConfig, VimConfig, prunable
from hf_vssm_prune.conversion import (
    convert_official_state_dict,
    convert_to_official_state_dict,
    infer_config,
    load_official_model,
    official_name,
    save_official_model,
)
from hf_vssm_prune.conversion_upernet import official_name as official_upernet_name


CASES = ["seg_plainmamba_small", "seg_plainmamba_small_rect"]
LEVELS = ["stage6", "stage12", "stage18", "stage24"]


@pytest.fixture(params=CASES)
def case(request, shared):
    return GoldenCase.load(shared / "golden" / "segmentation", request.param)


def make_model(case: GoldenCase) -> UperNetForSemanticSegmentation:
    state_dict = case.state_dict()
    config = infer_config(state_dict, image_size=case.recipe["arch"]["img_size"])
    model = UperNetForSemanticSegmentation(config).eval()
    model.load_state_dict(convert_official_state_dict(config, state_dict), strict=True)
    model.auxiliary_head.in_index = case.recipe["auxiliary_head"]["in_index"]
    return model


def assert_close(actual, expected):
    """Within 1e-4 of the largest value."""
    scale = float(abs(expected).max())
    torch.testing.assert_close(actual, torch.from_numpy(expected), rtol=0, atol=1e-4 * scale)


def schedule_of(pruned):
    """Our options for one of a recipe's pruned runs."""
    options = {name: pruned[name] for name in ("layers", "alignment", "importance")}
    return options | {"keep_ratios": pruned["keep"], "method": "top"}


def test_maps_and_logits_are_the_official_ones(case):
    model, pixel_values = make_model(case), case.pixel_values()
    assert sum(parameter.numel() for parameter in model.parameters()) == case.recipe["num_parameters"]
    runs = {"dense": None} | {each["name"]: schedule_of(each) for each in case.recipe["pruned"]}
    for name, schedule in runs.items():
        model.backbone.set_token_pruning(schedule)
        with torch.no_grad():
            outputs = model.backbone(pixel_values)
            logits = model.decode_head(list(outputs.feature_maps))
            auxiliary_logits = model.auxiliary_head(list(outputs.feature_maps))
        for level, feature_map in enumerate(outputs.feature_maps):
            assert_close(feature_map, case.expected[f"{name}.level{level}"])
        for stage, kept in enumerate(outputs.kept_tokens or ()):
            assert kept.tolist() == case.expected[f"{name}.kept{stage}"].tolist()
        assert_close(logits, case.expected[f"{name}.logits"])
        assert_close(auxiliary_logits, case.expected[f"{name}.aux_logits"])


def test_there_and_back(case):
    model, expected = make_model(case), case.state_dict()
    official = convert_to_official_state_dict(model.config, model.state_dict())
    assert official.keys() == expected.keys()
    assert all(torch.equal(official[key], expected[key]) for key in expected)


@pytest.fixture(scope="module")
def l1_upernet() -> UperNetForSemanticSegmentation:
    """Random weights, with the sizes of mmsegmentation's configuration for ADE20K."""
    torch.manual_seed(0)
    backbone = PlainMambaConfig.from_preset("L1", out_features=LEVELS, feature_norm="per_level")
    config = UperNetConfig(backbone_config=backbone, hidden_size=512, auxiliary_channels=256, num_labels=150)
    return UperNetForSemanticSegmentation(config).eval()


def test_a_whole_l1_there_and_back(l1_upernet, tmp_path):
    official = convert_to_official_state_dict(l1_upernet.config, l1_upernet.state_dict())
    assert len(official) == 447
    assert l1_upernet.num_parameters() == 35_455_596
    for name, shape in {
        "backbone.norm_layer5.weight": (192,),
        "backbone.ln1.bias": (192,),
        "decode_head.psp_modules.3.1.conv.weight": (512, 192, 1, 1),
        "decode_head.lateral_convs.0.bn.running_var": (512,),
        "decode_head.conv_seg.weight": (150, 512, 1, 1),
        "auxiliary_head.convs.0.conv.weight": (256, 192, 3, 3),
        "auxiliary_head.conv_seg.bias": (150,),
    }.items():
        assert official[name].shape == shape
    # As training saves it: counters that old files lack, and what else lies beside the weights.
    counters = [name for name in official if name.endswith("num_batches_tracked")]
    stored = {name: tensor for name, tensor in official.items() if name not in counters}
    torch.save({"state_dict": stored, "meta": {"iter": 160_000, "CLASSES": ("wall",)}}, tmp_path / "l1_upernet.pth")
    model = load_official_model(tmp_path / "l1_upernet.pth")
    assert model.config.backbone_config.out_features == LEVELS
    assert model.auxiliary_head.in_index == 3
    tensors = l1_upernet.state_dict()
    assert model.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    save_official_model(model, tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == official.keys()
    assert all(torch.equal(back[name], official[name]) for name in official)


def test_the_command(tmp_path, capsys):
    _, official = make_small_official()
    torch.save({"state_dict": official}, tmp_path / "upernet.pth")
    (tmp_path / "names.txt").write_text("sky\nroad\ncar\ntree\nwall\n")
    convert = load_script("convert").main
    names = ["--id2label", str(tmp_path / "names.txt")]
    assert convert([str(tmp_path / "upernet.pth"), str(tmp_path / "folder"), "--crop_pct", "1.0"]) == 1
    assert "--crop_pct is for classifiers" in capsys.readouterr().err
    assert convert([str(tmp_path / "upernet.pth"), str(tmp_path / "folder"), *names]) == 0
    assert "upernet on plainmamba: 4 layers" in capsys.readouterr().out
    opened = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "folder")
    assert opened.config.id2label[2] == "car"
    processor = AutoImageProcessor.from_pretrained(tmp_path / "folder")
    assert processor(Image.new("RGB", (300, 200)), return_tensors="pt")["pixel_values"].shape == (1, 3, 512, 768)
    assert "pipeline_tag: image-segmentation" in (tmp_path / "folder" / "README.md").read_text()
    assert convert([str(tmp_path / "folder"), str(tmp_path / "back.pth")]) == 0
    back = torch.load(tmp_path / "back.pth")["state_dict"]
    assert all(torch.equal(back[name], tensor) for name, tensor in official.items())


def make_small_official(**changes):
    options = {
        "image_size": 32,
        "patch_size": 8,
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "state_size": 4,
        "out_features": ["stage1", "stage3", "stage4"],
        "feature_norm": "per_level",
    }
    config = UperNetConfig(
        backbone_config=PlainMambaConfig(**options), hidden_size=12, auxiliary_channels=8, num_labels=5, **changes
    )
    model = UperNetForSemanticSegmentation(config).eval()
    return model, convert_to_official_state_dict(config, model.state_dict())


@pytest.mark.parametrize("form", [lambda names: {"CLASSES": names}, lambda names: {"dataset_meta": {"classes": names}}])
def test_names_of_classes_are_those_in_the_file(form, tmp_path):
    _, official = make_small_official()
    names = ("sky", "road", "car", "tree", "wall")
    torch.save({"state_dict": official, "meta": form(names)}, tmp_path / "upernet.pth")
    config = load_official_model(tmp_path / "upernet.pth").config
    assert config.id2label == dict(enumerate(names))
    assert config.label2id["car"] == 2
    torch.save({"state_dict": official, "meta": form(names[:2])}, tmp_path / "other.pth")
    assert load_official_model(tmp_path / "other.pth").config.id2label[0] == "LABEL_0"


@pytest.mark.parametrize(
    "changes", [{}, {"use_auxiliary_head": False}, {"auxiliary_num_convs": 2, "auxiliary_concat_input": True}]
)
def test_options_are_read_off_the_tensors(changes):
    model, official = make_small_official(**changes)
    config = infer_config(official)
    assert config.backbone_config.to_dict() == model.config.backbone_config.to_dict()
    for name in ("hidden_size", "num_labels", "use_auxiliary_head"):
        assert getattr(config, name) == getattr(model.config, name)
    other = UperNetForSemanticSegmentation(config).eval()
    other.load_state_dict(convert_official_state_dict(config, official))
    images = torch.randn(1, 3, 40, 32)
    with torch.no_grad():
        assert torch.equal(other(images).logits, model(images).logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda official: official.pop("decode_head.conv_seg.bias"), r"missing: decode_head\.conv_seg\.bias \[5\]"),
        (lambda official: official.pop("decode_head.conv_seg.weight"), r"missing: decode_head\.conv_seg\.weight"),
        (lambda official: official.update(extra=torch.ones(2)), r"unexpected: extra \[2\]"),
        (
            lambda official: official.update({"backbone.norm_layer0.weight": torch.ones(3)}),
            r"shape: backbone\.norm_layer0\.weight is \[3\] in the checkpoint and \[16\]",
        ),
        (
            lambda official: [official.pop(f"backbone.norm_layer0.{part}") for part in ("weight", "bias")],
            r"norms for the outputs of layers \[2\] of 4, but its decode head uses 2 levels",
        ),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    _, official = make_small_official()
    official = copy.copy(official)
    change(official)
    with pytest.raises(ValueError, match=message):
        convert_official_state_dict(infer_config(official), official)


# Vim's published backbones have no class token, and no weights of them are published: they are not converted.

VIM_BACKBONES = {
    "hidden": {"feature_source": "mixer", "feature_norm": "none"},
    "residual_add": {"feature_norm": "none"},
    "residual_norm": {"feature_norm": "last"},
    "rope": {"feature_norm": "none", "rotary_embeddings": True},
}


@pytest.fixture(scope="module")
def vim_case(shared):
    return GoldenCase.load(shared / "golden" / "segmentation", "seg_vim_small")


def make_vim_model(case, arrangement):
    """UPerNet on Vim with the case's weights, and a list that collects the inputs of the pyramid."""
    backbone = VimConfig(
        image_size=96,
        hidden_size=32,
        num_hidden_layers=4,
        use_cls_token=False,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        feature_pyramid="vim",
        **VIM_BACKBONES[arrangement],
    )
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=16, num_labels=6)
    model = prunable(UperNetForSemanticSegmentation(config)).eval()
    official, of_backbone = case.state_dict(), partial(official_name, "vim")
    model.load_state_dict(
        {name: official.pop(official_upernet_name(config, name, of_backbone)) for name in model.state_dict()}
    )
    assert not official
    maps, with_pyramid = [], model.backbone.with_pyramid

    def spy(levels):
        maps.extend(levels)
        return with_pyramid(levels)

    model.backbone.with_pyramid = spy
    return model, maps


def vim_runs(case):
    """Arrangement of the backbone and schedule, by name."""
    dense = {name: (name, None) for name in VIM_BACKBONES}
    return dense | {each["name"]: (each["arrangement"], schedule_of(each)) for each in case.recipe["pruned"]}


@pytest.mark.parametrize("run", [*VIM_BACKBONES, "repeat", "residual"])
def test_vims_backbones_are_the_official_ones(vim_case, run):
    expected = vim_case.expected
    arrangement, schedule = vim_runs(vim_case)[run]
    model, maps = make_vim_model(vim_case, arrangement)
    model.set_token_pruning(schedule)
    with torch.no_grad():
        outputs = model.backbone(vim_case.pixel_values())
        levels = list(outputs.feature_maps)
        heads = {"logits": model.decode_head(levels), "aux_logits": model.auxiliary_head(levels)}
    actual = {f"tap{level}": each for level, each in enumerate(maps)}
    actual |= {f"level{level}": each for level, each in enumerate(levels)} | heads
    compared = [name for name in actual if f"{run}.{name}" in expected]
    assert len(compared) == {"residual_norm": 1, "hidden": 9}.get(run, 6)
    for name in compared:
        goal = expected[f"{run}.{name}"]
        assert_close(actual[name][:, : goal.shape[1]], goal)
    for stage, kept in enumerate(outputs.kept_tokens or ()):
        assert kept.tolist() == expected[f"{run}.kept{stage}"].tolist()
        assert_close(outputs.token_scores[stage], expected[f"{run}.scores{stage}"])
