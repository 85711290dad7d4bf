"""Measures of a token's importance, by name: each is one function and one table entry. `importance` in `token_pruning`
selects one.

Each maps a stage to the scores of its patch tokens, float32 (float64 if the model is) of shape (batch, n), without
gradient. Tokens with higher scores are kept.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .mixer_output import token_influence
from .precision import at_least_float32
from .pruning_stage import Stage


def clip(stage: Stage) -> Tensor:
    """The mean over channels of max(0, y), y being the mixer's gated output before its output projection (ToP, arXiv
    2409.18962)."""
    return stage.of_patches(_gated(stage).clamp(min=0).mean(-1))


def mean(stage: Stage) -> Tensor:
    """The mean of y."""
    return stage.of_patches(_gated(stage).mean(-1))


def l1(stage: Stage) -> Tensor:
    """The mean of |y|."""
    return stage.of_patches(_gated(stage).abs().mean(-1))


def l2(stage: Stage) -> Tensor:
    """The root of the mean of y²."""
    return stage.of_patches(_gated(stage).square().mean(-1).sqrt())


def random(stage: Stage) -> Tensor:
    """Uniform numbers from torch's generator (`torch.manual_seed`)."""
    y = _gated(stage)
    return stage.of_patches(torch.rand(y.shape[:-1], dtype=y.dtype, device=y.device))


def influence(stage: Stage) -> Tensor:
    """Ours: step size · ‖B‖ · ‖C‖, mean over the directions; see `mixer_output.token_influence`."""
    return stage.of_patches(token_influence(stage.mixer.scans).mean(1))


def worst_influence(stage: Stage) -> Tensor:
    """Ours: the 4-norm over the directions, which is close to the maximum, so that a token is dropped only if no
    direction needs it. The maximum itself would cause ties: PlainMamba's paths visit several tokens with the same step
    size, B and C."""
    influences = token_influence(stage.mixer.scans)
    highest = influences.amax(1, keepdim=True).clamp(min=torch.finfo(influences.dtype).tiny)
    return stage.of_patches((highest * (influences / highest).pow(4).sum(1, keepdim=True).pow(0.25)).squeeze(1))


def mirrored_backward(stage: Stage) -> Tensor:
    """The score in the published code of ToP's authors (ZLKong/ToP-ViM), which differs from their paper; for checking
    their logs of Vim.

    The mean over channels of the backward scan's gated output, in the order of that scan: a token gets the value of the
    token at the mirrored position in the sequence. Only Vim and VideoMamba have that scan.

    Raises:
        ValueError: the model's mixer has no backward scan.
    """
    if stage.mixer.backward_gated is None:
        raise ValueError("the importance 'mirrored_backward' needs a backward scan, but this model's mixer has none.")
    return stage.of_patches(at_least_float32(stage.mixer.backward_gated.detach()).mean(-1).flip(-1))


def _gated(stage: Stage) -> Tensor:
    return at_least_float32(stage.mixer.gated.detach())


IMPORTANCES: dict[str, Callable[[Stage], Tensor]] = {
    "clip": clip,
    "mean": mean,
    "l1": l1,
    "l2": l2,
    "random": random,
    "influence": influence,
    "worst_influence": worst_influence,
    "mirrored_backward": mirrored_backward,
}
# Those that only a family with `has_backward_scan` can compute.
OF_BACKWARD_SCAN = ("mirrored_backward",)
