"""Vim without a class token and with rotary embeddings, like its published segmentation backbones."""

import math

import pytest
import torch
from conftest import CLS_TOKEN_IDS, make_plainmamba_config, make_vim_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import UperNetConfig

from hf_vssm_prune import VimBackbone, VimForImageClassification, count_flops, put_pretrained_backbone
from hf_vssm_prune.families import FAMILIES
from hf_vssm_prune.heads import new_dense_model
from hf_vssm_prune.pruned_heads import backbone_of
from hf_vssm_prune.pruning_methods import METHODS
from hf_vssm_prune.rotary_embedding import grid_rotation, rotate


SCHEDULE = {"layers": [1, 3], "keep_ratios": [0.75, 0.5]}
ROTARY = {"use_cls_token": False, "rotary_embeddings": True}


@pytest.mark.parametrize("options", [{"use_cls_token": False}, ROTARY], ids=["plain", "rotary"])
@pytest.mark.parametrize("method", METHODS)
def test_a_classifier_without_class_token(method, options, tmp_path):
    config = make_vim_config(token_pruning=SCHEDULE | {"method": method}, **options)
    model = VimForImageClassification(config)
    images = torch.randn(2, 3, 32, 32)
    outputs = model(images, labels=torch.tensor([0, 2]))
    assert [kept.shape for kept in outputs.kept_tokens] == [(2, 12), (2, 6)]
    outputs.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    model.save_pretrained(tmp_path)
    opened = VimForImageClassification.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(opened(images).logits, model.eval()(images).logits)


def test_the_answer_is_that_of_the_tokens_mean():
    model = VimForImageClassification(make_vim_config(use_cls_token=False)).eval()
    assert model.vim.embeddings.class_token is None
    assert model.vim.embeddings.position_embeddings.shape == (1, 16, 16)
    with torch.no_grad():
        outputs = model.vim(torch.randn(2, 3, 32, 32))
    torch.testing.assert_close(outputs.pooler_output, outputs.last_hidden_state.mean(1))


def test_flops_are_those_of_one_token_less():
    with_token, without = (count_flops(make_vim_config(use_cls_token=use)).dense.total for use in (True, False))
    longer = make_vim_config(use_cls_token=False, image_size=(32, 40))
    of_a_token = (count_flops(longer).dense.total - without) // 4  # a column of 4 patches
    of_a_patch = 8 * 8 * 3 * 16
    assert with_token - without == of_a_token - of_a_patch


def test_rotation_by_the_formula(seed):
    """Each pair of channels is rotated by its own angle, computed in float64."""
    grid, channels = (3, 5), 12
    tokens = torch.randn(2, 15, channels, dtype=torch.float64)
    turned = rotate(tokens, grid_rotation(grid, channels, torch.device("cpu"), torch.float64))
    for cell in range(15):
        for pair in range(channels // 2):
            axis, index = divmod(pair, channels // 4)
            place = (cell // grid[1], cell % grid[1])[axis] * 14 / grid[axis]
            angle = place * 10_000 ** (-2 * index / (channels / 2))
            a, b = tokens[:, cell, 2 * pair], tokens[:, cell, 2 * pair + 1]
            expected = torch.stack(
                [a * math.cos(angle) - b * math.sin(angle), a * math.sin(angle) + b * math.cos(angle)]
            )
            torch.testing.assert_close(turned[:, cell, 2 * pair : 2 * pair + 2], expected.T, rtol=1e-12, atol=1e-12)


class _Dtypes(TorchDispatchMode):
    """Collects the dtypes of all tensors that are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        output = operator(*args, **(kwargs or {}))
        self.seen |= {each.dtype for each in tree_leaves(output) if isinstance(each, torch.Tensor)}
        return output


def test_rotation_without_float64():
    """MPS does not have it."""
    with _Dtypes() as dtypes:
        grid_rotation((3, 5), 12, torch.device("meta"))
    assert dtypes.seen == {torch.float32}


def test_all_tokens_kept_is_dense(pixel_values):
    model = VimForImageClassification(make_vim_config(**ROTARY)).eval()
    with torch.no_grad():
        dense = model(pixel_values).logits
        kept = model(pixel_values, token_pruning={"layers": [2], "keep_ratios": [1.0], "method": "top"}).logits
    torch.testing.assert_close(kept, dense)


@pytest.mark.parametrize("family", ["plainmamba", "vim"])
def test_maps_of_what_mixers_add(family, pixel_values):
    """They are differences between the outputs of consecutive layers."""
    make = {"plainmamba": make_plainmamba_config, "vim": make_vim_config}[family]
    options = {"out_features": ["stage2", "stage3"], "feature_norm": "none"}
    maps = {}
    for source in ("stream", "mixer"):
        config = make(feature_source=source, **options)
        torch.manual_seed(0)
        backbone = FAMILIES[family].classes["Backbone"](config).eval()
        with torch.no_grad():
            maps[source] = backbone(pixel_values).feature_maps
    difference = maps["stream"][1] - maps["stream"][0]
    torch.testing.assert_close(maps["mixer"][1], difference, rtol=1e-4, atol=1e-5)


def test_only_the_last_map_is_normed(pixel_values):
    options = {"out_features": ["stage2", "stage4"], "use_cls_token": False}
    maps = {}
    for norm in ("last", "none", "final"):
        torch.manual_seed(0)
        backbone = VimBackbone(make_vim_config(feature_norm=norm, **options)).eval()
        with torch.no_grad():
            maps[norm] = backbone(pixel_values).feature_maps
    assert torch.equal(maps["last"][0], maps["none"][0])
    assert torch.equal(maps["last"][1], maps["final"][1])


def test_pretrained_weights_without_their_class_token():
    """The classifier's other position embeddings are at the right places."""
    classifier = VimForImageClassification(make_vim_config(image_size=64, patch_size=16, patch_stride=16)).eval()
    backbone = make_vim_config(
        image_size=64, patch_size=16, patch_stride=16, use_cls_token=False, out_features=["stage2", "stage4"]
    )
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, num_labels=5)
    model = new_dense_model(config)
    put_pretrained_backbone(model, classifier)
    own, pretrained = (each.embeddings.position_embeddings[0] for each in (backbone_of(model), classifier.vim))
    places = [place for place in range(17) if place != CLS_TOKEN_IDS["vim"]]
    assert torch.equal(own, pretrained[places])
    tensors = classifier.vim.layers.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in backbone_of(model).layers.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotary_embeddings": True}, "`rotary_embeddings` with `use_cls_token=True`"),
        ({**ROTARY, "hidden_size": 18}, "`hidden_size=18`"),
        ({"feature_source": "layers"}, r"`feature_source` is 'layers'; allowed values are \['stream', 'mixer'\]"),
        ({"feature_source": "mixer", "out_features": ["stem", "stage4"]}, "'stem', before which there is no mixer"),
    ],
)
def test_what_does_not_go_together_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_vim_config(**options)
