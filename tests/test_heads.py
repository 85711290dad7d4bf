"""transformers' dense prediction models with our backbones: UPerNet, Deformable DETR with a single map, Mask2Former,
and RT-DETR with a pyramid."""

import copy
import inspect
import json
import pickle
import re
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from conftest import TOKEN_PRUNING, make_plainmamba_config, make_vim_config, same_tensors
from fvcore.nn import FlopCountAnalysis
from PIL import Image
from test_remote_code import python_without_package  # noqa: F401
from transformers import (
    DeformableDetrConfig,
    DeformableDetrImageProcessorPil,
    Mask2FormerConfig,
    RTDetrConfig,
    SegformerImageProcessorPil,
    UperNetConfig,
    pipeline,
)

from hf_vssm_prune import count_flops, prunable, put_pretrained_backbone
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.heads import auto_class_of, new_dense_model
from hf_vssm_prune.hub import ModelCardInfo, create_model_card
from hf_vssm_prune.hub.saving import save_for_hub
from hf_vssm_prune.pruned_heads import backbone_of, pruned_class
from hf_vssm_prune.training.memory import enable_activation_checkpointing
from hf_vssm_prune.visualization_of_heads import draw_segmentation, pixel_scores


MAKE_CONFIG = {
    "plainmamba": make_plainmamba_config,
    "vim": lambda **options: make_vim_config(**{"patch_stride": None, **options}),
}
LEVELS = ["stage1", "stage2", "stage3", "stage4"]
# Of 16 pixels a patch, as published.
PATCHES = {"image_size": 64, "patch_size": 16}


def upernet(make_backbone: Callable[..., Any]) -> UperNetConfig:
    backbone = make_backbone(out_features=LEVELS, feature_norm="per_level")
    return UperNetConfig(backbone_config=backbone, hidden_size=16, auxiliary_channels=8, num_labels=5)


def deformable_detr(make_backbone: Callable[..., Any]) -> DeformableDetrConfig:
    return DeformableDetrConfig(
        backbone_config=make_backbone(out_features=["stage4"]),
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        num_feature_levels=2,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_queries=7,
        num_labels=3,
    )


def mask2former(make_backbone: Callable[..., Any]) -> Mask2FormerConfig:
    return Mask2FormerConfig(
        backbone_config=make_backbone(out_features=LEVELS, feature_norm="per_level", feature_pyramid="simple"),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=1,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=7,
        num_labels=3,
        train_num_points=20,
    )


def rt_detr(make_backbone: Callable[..., Any]) -> RTDetrConfig:
    return RTDetrConfig(
        backbone_config=make_backbone(out_features=LEVELS[1:], feature_pyramid="vim"),
        encoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=32,
        encoder_ffn_dim=16,
        encoder_attention_heads=2,
        d_model=32,
        num_queries=7,
        decoder_in_channels=[32, 32, 32],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        num_labels=3,
        num_denoising=0,
    )


HEADS = {"upernet": upernet, "deformable_detr": deformable_detr, "mask2former": mask2former, "rt_detr": rt_detr}
# The head of RT-DETR itself takes sides of multiples of 32 pixels.
SIZES = {"rt_detr": [(64, 96), (96, 64)]}
WITHOUT_SCIPY = {"upernet"}


@pytest.fixture(params=sorted(MAKE_CONFIG))
def family(request) -> str:
    return request.param


@pytest.fixture(params=sorted(HEADS))
def head(request) -> str:
    return request.param


def make_config(family: str, head: str, **backbone: Any) -> Any:
    return HEADS[head](lambda **options: MAKE_CONFIG[family](**{**PATCHES, **options, **backbone}))


def make_model(family: str, head: str, **backbone: Any) -> Any:
    torch.manual_seed(0)
    return new_dense_model(make_config(family, head, **backbone)).eval()


def labels_for(head: str, height: int, width: int) -> dict[str, Any]:
    """Labels of two images for the model's own loss."""
    if head not in WITHOUT_SCIPY:
        pytest.importorskip("scipy")
    if head == "upernet":
        return {"labels": torch.randint(0, 5, (2, height, width))}
    if head == "mask2former":
        masks = [torch.rand(2, height, width).round() for _ in range(2)]
        return {"mask_labels": masks, "class_labels": [torch.tensor([0, 1])] * 2}
    boxes = torch.tensor([[0.4, 0.4, 0.3, 0.2], [0.6, 0.5, 0.2, 0.4]])
    return {"labels": [{"class_labels": torch.tensor([0, 2]), "boxes": boxes} for _ in range(2)]}


def answer(outputs: Any) -> torch.Tensor:
    return outputs.logits if "logits" in outputs else outputs.masks_queries_logits


def test_any_size_dense_and_pruned(family, head):
    model = make_model(family, head)
    for height, width in SIZES.get(head, [(64, 96), (70, 52)]):
        images = torch.randn(2, 3, height, width)
        model.set_token_pruning(None)
        with torch.no_grad():
            dense = model(images)
            model.set_token_pruning(dict(TOKEN_PRUNING))
            pruned = model(images, output_hidden_states=True)
            whole = model(images, token_pruning={"layers": [1], "keep_ratios": [1.0], "method": "top"})
        assert dense.kept_tokens is None
        assert len(pruned.kept_tokens) == 2
        assert pruned.kept_tokens[1].shape[1] < pruned.kept_tokens[0].shape[1]
        assert [len(states) for states in pruned.backbone_hidden_states] == [2] * 5
        assert answer(dense).shape == answer(pruned).shape
        assert not torch.equal(answer(dense), answer(pruned))
        torch.testing.assert_close(answer(whole), answer(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_loss_and_gradients(family, head, precision):
    model = make_model(family, head, token_pruning=dict(TOKEN_PRUNING)).train()
    # As transformers has them, DETR's backbones keep their batch norm as it is.
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
        outputs = model(torch.randn(2, 3, 64, 96), **labels_for(head, 64, 96))
    assert outputs.loss.isfinite().all()
    outputs.loss.sum().backward()
    gradients = {name: parameter.grad for name, parameter in backbone_of(model).named_parameters()}
    reached = [name for name, gradient in gradients.items() if gradient is not None and gradient.abs().sum() > 0]
    assert any("layers.0." in name for name in reached)
    assert any("layers.3." in name for name in reached)
    assert all(gradient is None or gradient.isfinite().all() for gradient in gradients.values())


def test_the_backbones_layers_are_checkpointed(head):
    images, labels = torch.randn(2, 3, 64, 96), labels_for(head, 64, 96)
    gradients = []
    for checkpointed in (False, True):
        model = make_model("vim", head, token_pruning=dict(TOKEN_PRUNING)).train()
        if checkpointed:
            enable_activation_checkpointing(model)
        torch.manual_seed(0)
        model(images, **labels).loss.sum().backward()
        gradients.append([each.grad for each in backbone_of(model).parameters() if each.grad is not None])
    assert all(layer.gradient_checkpointing for layer in backbone_of(model).layers)
    torch.testing.assert_close(*gradients)


def test_arguments_are_those_of_transformers(head):
    """transformers' `Trainer` removes columns that are not arguments, and finds the labels among these."""
    config = make_config("vim", head)
    own = auto_class_of(config)._model_mapping[type(config)]
    assert inspect.signature(pruned_class(own).forward) == inspect.signature(own.forward)


def test_saved_and_opened(family, head, tmp_path):
    model = make_model(family, head, token_pruning=dict(TOKEN_PRUNING))
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        expected = answer(model(images))
    save_for_hub(model, tmp_path / "model")
    # By transformers alone, as any of its models, and pruned by its backbone.
    opened = auto_class_of(model.config).from_pretrained(tmp_path / "model").eval()
    assert type(opened).__module__.startswith("transformers.")
    assert backbone_of(opened).config.token_pruning == model.config.backbone_config.token_pruning
    weights = model.state_dict()
    assert opened.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in opened.state_dict().items())
    with torch.no_grad():
        torch.testing.assert_close(answer(opened(images)), expected, rtol=1e-5, atol=1e-6)
        assert prunable(opened) is opened
        torch.testing.assert_close(answer(opened(images)), expected, rtol=1e-5, atol=1e-6)
    assert opened(images).kept_tokens is not None
    opened.set_token_pruning(None)
    opened.save_pretrained(tmp_path / "dense")
    assert json.loads((tmp_path / "dense" / "config.json").read_text())["backbone_config"]["token_pruning"] is None


def test_outputs_can_be_pickled():
    outputs = make_model("vim", "upernet", token_pruning=dict(TOKEN_PRUNING))(torch.randn(1, 3, 64, 64))
    copied = pickle.loads(pickle.dumps(outputs))
    assert type(copied) is type(outputs)
    assert copied.keys() == outputs.keys()
    assert same_tensors(copied.kept_tokens, outputs.kept_tokens)


def test_compiled_to_one_graph():
    model = make_model("plainmamba", "upernet", token_pruning=dict(TOKEN_PRUNING))
    graphs: list[Any] = []
    compiled = torch.compile(model, backend=lambda graph, _: (graphs.append(graph), graph)[1], fullgraph=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, outputs, _ = model(images), compiled(images), compiled(images)
    assert len(graphs) == 1
    torch.testing.assert_close(answer(outputs), answer(expected))
    assert type(outputs) is type(expected)
    assert same_tensors(outputs.kept_tokens, expected.kept_tokens)


def test_another_backbone_can_be_put_in():
    model = make_model("vim", "upernet", token_pruning=dict(TOKEN_PRUNING))
    model.backbone = make_model("vim", "upernet", token_pruning=dict(TOKEN_PRUNING)).backbone
    with torch.no_grad():
        assert len(model(torch.randn(1, 3, 64, 64)).kept_tokens) == 2


def test_a_model_with_hooks_of_accelerate():
    """`device_map` adds such hooks."""
    config = make_config("vim", "upernet", token_pruning=dict(TOKEN_PRUNING))
    model = auto_class_of(config).from_config(config)
    add_hook_to_module(model, ModelHook())
    model = prunable(model.eval())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert len(model(images).kept_tokens) == 2
        assert model(images, token_pruning=None).kept_tokens is None


def test_threads_do_not_see_one_another():
    """Both threads are in the backbone at the same time, like replicas of `DataParallel`."""
    model = make_model("vim", "upernet", token_pruning=dict(TOKEN_PRUNING))
    meeting, outputs = threading.Barrier(2, timeout=60), {}
    backbone_of(model).register_forward_pre_hook(lambda *_: (meeting.wait(), None)[1])
    backbone_of(model).register_forward_hook(lambda *_: (meeting.wait(), None)[1])

    def run(batch: int, **options: Any) -> None:
        with torch.no_grad():
            outputs[batch] = model(torch.randn(batch, 3, 64, 64), **options)

    dense = {"token_pruning": None}
    threads = [threading.Thread(target=run, args=(1,)), threading.Thread(target=run, args=(2,), kwargs=dense)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(kept) for kept in outputs[1].kept_tokens] == [1, 1]
    assert outputs[2].kept_tokens is None


def test_the_code_in_a_card_prints_an_entry_of_the_output(head):
    model = make_model("vim", head)
    processor = SegformerImageProcessorPil()
    (name,) = re.findall(
        r"print\(outputs\.(\w+)\.shape\)", create_model_card(model, ModelCardInfo("M"), processor).text
    )
    with torch.no_grad():
        assert model(torch.randn(1, 3, 64, 64))[name] is not None


def test_masks_of_queries_are_drawn():
    model = make_model("vim", "mask2former", token_pruning=dict(TOKEN_PRUNING))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        outputs = model(images)
    scores = torch.zeros(3, *outputs.masks_queries_logits.shape[-2:])
    for query in range(7):
        classes = outputs.class_queries_logits[0, query].softmax(0)
        for label in range(3):
            scores[label] += classes[label] * outputs.masks_queries_logits[0, query].sigmoid()
    torch.testing.assert_close(pixel_scores(outputs, 0), scores)
    assert draw_segmentation(model, images, [0.5] * 3, [0.25] * 3).width > 4 * 64


@pytest.mark.parametrize("head", ["upernet", "deformable_detr"])
def test_pipelines(family, head, tmp_path):
    model = make_model(family, head, token_pruning=dict(TOKEN_PRUNING))
    segments = head == "upernet"
    size = {"height": 64, "width": 64}
    processor = SegformerImageProcessorPil(size=size) if segments else DeformableDetrImageProcessorPil(size=size)
    save_for_hub(model, tmp_path, processor)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    if segments:
        answers = pipeline("image-segmentation", model=str(tmp_path), device="cpu")(image)
        assert answers
        assert all(each["mask"].size == (48, 40) for each in answers)
        assert sum(np.asarray(each["mask"]).astype(bool).sum() for each in answers) == 48 * 40
    else:
        answers = pipeline("object-detection", model=str(tmp_path), device="cpu")(image, threshold=0.0)
        assert all(set(each["box"]) == {"xmin", "ymin", "xmax", "ymax"} for each in answers)
        assert len(answers) == 7 * 3  # each query may be of each class


CLIENT = """
import sys, torch
from transformers import {auto_class}
model = {auto_class}.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    outputs = model(torch.load(sys.argv[2]))
torch.save([outputs["{field}"], [kept for kept in outputs.kept_tokens]], sys.argv[3])
"""


@pytest.mark.parametrize(("family", "head"), [("plainmamba", "upernet"), ("vim", "deformable_detr")])
def test_without_the_package(family, head, tmp_path, python_without_package):  # noqa: F811
    model = make_model(family, head, token_pruning=dict(TOKEN_PRUNING))
    save_for_hub(model, tmp_path / "model")
    images = torch.randn(2, 3, 64, 96)
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "client.py").write_text(CLIENT.format(auto_class=auto_class_of(model.config).__name__, field="logits"))
    done = subprocess.run(
        [python_without_package, "-I", tmp_path / "client.py"]
        + [tmp_path / name for name in ("model", "images.pt", "answer.pt")],
        env={"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    logits, kept_tokens = torch.load(tmp_path / "answer.pt")
    with torch.no_grad():
        outputs = model(images)
    torch.testing.assert_close(logits, outputs.logits, rtol=1e-4, atol=1e-5)
    assert same_tensors(kept_tokens, outputs.kept_tokens)


def test_a_classifiers_weights_go_into_a_backbone(family):
    config = MAKE_CONFIG[family](**PATCHES)
    classifier = FAMILIES[family].classifier(config).eval()
    model = make_model(family, "upernet")
    assert put_pretrained_backbone(model, classifier) is model
    weights = backbone_of(model).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in classifier.base_model.state_dict().items())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        states = classifier(images, output_hidden_states=True).hidden_states
        outputs = model(images, output_hidden_states=True)
    torch.testing.assert_close(outputs.hidden_states[-1], states[-1])


def test_a_dense_classifiers_weights_go_into_a_backbone_with_parameters_of_pruning():
    model = make_model("vim", "upernet", token_pruning={"layers": [2], "keep_ratios": [0.5], "method": "dyvm"})
    before = {name: tensor.clone() for name, tensor in backbone_of(model).state_dict().items()}
    classifier = FAMILIES["vim"].classifier(MAKE_CONFIG["vim"](**PATCHES))
    put_pretrained_backbone(model, classifier)
    expected = before | classifier.base_model.state_dict()
    assert any(name.startswith("token_predictors.") for name in before)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in backbone_of(model).state_dict().items())


def test_a_classifier_of_another_shape_is_refused():
    model = make_model("plainmamba", "upernet")
    with pytest.raises(
        ValueError, match="the pretrained model is of type 'vim', but the backbone is of type 'plainmamba'"
    ):
        put_pretrained_backbone(model, FAMILIES["vim"].classifier(make_vim_config(**PATCHES)))
    wider = FAMILIES["plainmamba"].classifier(make_plainmamba_config(**{**PATCHES, "hidden_size": 32}))
    with pytest.raises(
        ValueError, match=r"does not fit the backbone: embeddings\.position_embeddings is \[1, 16, 32\]"
    ):
        put_pretrained_backbone(model, wider)


def test_another_backbone_is_refused():
    with pytest.raises(ValueError, match="UperNetForSemanticSegmentation has no backbone of hf_vssm_prune"):
        new_dense_model(UperNetConfig())
    with pytest.raises(ValueError, match="transformers has no model for segmentation or detection of type 'vim'"):
        auto_class_of(make_vim_config())


# What is counted


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@pytest.mark.parametrize("pyramid", [None, "vim", "simple"])
def test_flops_of_a_head_by_another_counter(family, pyramid, size):
    """fvcore counts the head and the pyramid on feature maps, operation by operation."""
    config = make_config(family, "upernet", feature_pyramid=pyramid)
    counted = count_flops(config, size).dense
    model = new_dense_model(copy.deepcopy(config)).eval()
    backbone = model.backbone
    grid = config.backbone_config.grid_size_for(*size)

    class OnMaps(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pyramid = getattr(backbone, "feature_pyramid", None)
            self.decode_head, self.auxiliary_head = model.decode_head, model.auxiliary_head

        def forward(self, *maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            levels = list(maps) if self.pyramid is None else self.pyramid(list(maps))
            return self.decode_head(levels), self.auxiliary_head(levels)

    analysis = FlopCountAnalysis(OnMaps(), tuple(torch.randn(1, 16, *grid) for _ in range(4)))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    convolutions = analysis.by_operator()["conv"]
    assert counted.breakdown["dense_head"] == convolutions
    assert counted.total == sum(counted.breakdown.values())


def test_pruning_takes_from_the_backbone_alone(family):
    config = make_config(family, "upernet", token_pruning=dict(TOKEN_PRUNING))
    flops = count_flops(config, (64, 96))
    assert flops.pruned.breakdown["dense_head"] == flops.dense.breakdown["dense_head"] > 0
    assert 0 < flops.reduction < count_flops(config.backbone_config, (64, 96)).reduction


def test_flops_do_not_depend_on_the_precision(head):
    config = make_config("vim", head)
    expected = count_flops(config, (64, 64))
    for part in (config, config.backbone_config):
        part.dtype = torch.bfloat16  # as in a checkpoint saved in this precision
    assert count_flops(config, (64, 64)) == expected


# What a backbone's options change


@pytest.mark.parametrize(
    ("kind", "spacing", "levels", "strides"),
    [
        ("vim", 16, 4, [4, 8, 16, 32]),
        ("vim", 8, 4, [4, 8, 16, 32]),
        ("simple", 16, 4, [4, 8, 16, 32]),
        ("simple", 8, 3, [8, 16, 32]),
        ("vim", 32, 2, [16, 32]),
    ],
)
def test_strides_of_pyramids(family, kind, spacing, levels, strides):
    options = {"image_size": 64, "patch_size": spacing, "feature_pyramid": kind, "out_features": LEVELS[-levels:]}
    backbone = FAMILIES[family].classes["Backbone"](MAKE_CONFIG[family](**options)).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 128)).feature_maps
    assert [tuple(each.shape) for each in maps] == [(1, 16, 64 // stride, 128 // stride) for stride in strides]
    assert backbone.channels == [16] * levels


def test_norms_of_levels(family):
    images = torch.randn(2, 3, 64, 64)
    maps = {}
    for norm in ("final", "per_level", "none"):
        torch.manual_seed(0)
        config = MAKE_CONFIG[family](**PATCHES, out_features=["stage2", "stage4"], feature_norm=norm)
        backbone = FAMILIES[family].classes["Backbone"](config).eval()
        if norm == "per_level":
            assert set(backbone.hidden_states_norms) == {"stage2"}
            backbone.hidden_states_norms["stage2"].weight.data.mul_(3)
        with torch.no_grad():
            maps[norm] = backbone(images).feature_maps
    torch.testing.assert_close(maps["per_level"][0], 3 * maps["final"][0])
    torch.testing.assert_close(maps["per_level"][1], maps["final"][1])
    normed = backbone.norm(maps["none"][1].movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(normed, maps["final"][1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_norm": "batch"}, "`feature_norm` is 'batch'; allowed values are"),
        ({"feature_pyramid": "fpn"}, "`feature_pyramid` is 'fpn'; allowed values are None, 'vim', 'simple'"),
        ({"feature_pyramid": "vim", "patch_size": 12, "image_size": 48}, "patches 12 pixels apart"),
        ({"feature_pyramid": "vim", "out_features": ["stem", *LEVELS]}, "at most 4 levels; `out_features` names 5"),
    ],
)
def test_options_that_are_not_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        make_plainmamba_config(**{**PATCHES, **options})


def test_the_code_of_a_head_is_small(tmp_path: Path):
    """A head's folder has two more files than a classifier's."""
    save_for_hub(make_model("plainmamba", "upernet"), tmp_path / "head")
    save_for_hub(FAMILIES["plainmamba"].classifier(make_plainmamba_config()), tmp_path / "classifier")
    code = {folder: {file.name for file in (tmp_path / folder).glob("*.py")} for folder in ("head", "classifier")}
    assert code["head"] - code["classifier"] == {"modeling_plainmamba_upernet.py", "pruned_heads.py"}
