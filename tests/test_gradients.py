"""Gradients through pruning compared with finite differences, in float64, with plain PyTorch's scan.

Which tokens are kept is a step function of the scores: its derivative is zero, except where two scores tie. Therefore
either the kept tokens are fixed, or scores are checked to be further apart than the differences move them.
"""

import pytest
import torch
from conftest import MAKE_CONFIG, NUM_CLS_TOKENS, same_tensors
from torch import Tensor
from transformers import AutoModelForImageClassification

from hf_vssm_prune.token_pruning import ALIGNMENTS


STEP = 1e-6
TOLERANCE = 1e-8
# Far more than a step of 1e-6 in one weight or pixel moves a score, and far less than what lies between two scores.
SMALLEST_DISTANCE = 1e-5


def make_model(family: str, alignment: str) -> torch.nn.Module:
    torch.manual_seed(0)
    config = MAKE_CONFIG[family](
        image_size=24, hidden_size=8, num_hidden_layers=3, state_size=2, scan_backend="torch", initializer_range=0.5
    )
    model = AutoModelForImageClassification.from_config(config).double().eval()
    for name, parameter in model.named_parameters():  # the initial ones of Vim are too small for differences to show
        if name.endswith(("in_proj.weight", "x_proj.weight", "out_proj.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
    # By `top`, which cuts where the scores say; those of `local_merge` tie where two are alone in their window.
    model.set_token_pruning({"layers": [1, 2], "keep_ratios": [0.7, 0.6], "alignment": alignment, "method": "top"})
    return model


def smallest_distance_at_the_cut(model: torch.nn.Module, output) -> float:
    """Smallest gap between the worst kept and the best dropped score, over stages and samples."""
    class_tokens = NUM_CLS_TOKENS[model.config.model_type]  # not scored
    distances = []
    for kept, scores in zip(output.kept_tokens, output.token_scores, strict=True):
        count = kept.shape[1] - class_tokens
        ranked = scores.sort(dim=-1, descending=True).values
        distances.append((ranked[:, count - 1] - ranked[:, count]).min().item())
    return min(distances)


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_gradients_of_a_pruned_model_are_those_of_finite_differences(family, alignment):
    model = make_model(family, alignment)
    pixel_values = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    names = [
        name
        for name, _ in model.named_parameters()
        if ".layers.1." in name and name.endswith(("A_log", "D", "dt_proj.bias", "dt_proj.weight", "direction_B"))
    ]
    assert names
    values = tuple(model.get_parameter(name).detach().clone().requires_grad_() for name in names)
    output = model(pixel_values)
    assert smallest_distance_at_the_cut(model, output) > SMALLEST_DISTANCE

    def loss(*parameters: Tensor) -> Tensor:
        result = torch.func.functional_call(model, dict(zip(names, parameters, strict=True)), (pixel_values,))
        assert same_tensors(result.kept_tokens, output.kept_tokens)
        return result.logits

    gradients = torch.autograd.grad(loss(*values).square().sum(), values)
    assert all(gradient.abs().max() > 100 * TOLERANCE for gradient in gradients)
    torch.autograd.gradcheck(loss, values, eps=STEP, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(MAKE_CONFIG))
def test_gradients_reach_the_pixels_through_pruning(family):
    model = make_model(family, "repeat")
    pixel_values = torch.randn(1, 3, 24, 24, dtype=torch.float64, requires_grad=True)
    output = model(pixel_values)
    assert smallest_distance_at_the_cut(model, output) > SMALLEST_DISTANCE
    direction = torch.randn(1, 3, 24, 24, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(output.logits.sum(), pixel_values)
    with torch.no_grad():
        ahead, behind = (model(pixel_values + sign * STEP * direction) for sign in (1, -1))
    assert same_tensors(ahead.kept_tokens, behind.kept_tokens)
    difference = (ahead.logits.sum() - behind.logits.sum()) / (2 * STEP)
    torch.testing.assert_close((gradient * direction).sum(), difference, rtol=1e-5, atol=1e-8)
