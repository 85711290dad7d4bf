"""Block selection: in each layer, a small linear layer decides for each image which scan directions run.

It is from "Dynamic Vision Mamba" (DyVM, arXiv 2504.04787), which calls a direction of a mixer (its convolution, its
projections and its scan) a block. The option `block_keep_ratio` in `token_pruning` turns it on, with any pruning
method.

In training, every direction runs, and its output is multiplied by its gate, 0 or 1; gates are drawn with the
Gumbel-sigmoid trick, and a loss holds their mean at `block_keep_ratio` (`training.losses.block_ratio_loss`). In
inference, each direction runs only for the images that select it. As in the authors' code, the selector sees the class
token's features after the mixer's input projection, and starts with a bias for which nearly every direction runs. Their
segmentation models, which have no class token, use the mean of all tokens' features; here, selection needs a class
token.

Other pruning methods than `dyvm` may read the results of the mixer before a stage, which a skipped direction does not
have. Ours: the layer before each of their stages does not select, but always runs both directions.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .function_transforms import is_traced, is_transformed
from .precision import at_least_float32


TEMPERATURE = 2.0
INITIAL_BIAS = 5.0  # a direction runs with a probability of sigmoid(5) = 99.3%


class BlockSelector(nn.Module):
    """Decides which directions run, from the class token's features.

    `TokenPruningMixin.add_pruning_parameters` puts it into the mixers of models that select blocks. It is not an
    `nn.Linear`, because libraries that wrap these (PEFT, quantisation) would wrap it, too.

    Args:
        in_features: number of features.
        num_blocks: number of directions.
    """

    def __init__(self, in_features: int, num_blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_blocks, in_features))
        self.bias = nn.Parameter(torch.empty(num_blocks))

    @torch.no_grad()
    def init_weights(self) -> None:
        init.zeros_(self.weight)
        init.constant_(self.bias, INITIAL_BIAS)

    def forward(self, features: Tensor) -> Tensor:
        """Gates (batch, directions), each 0 or 1, from features (batch, in_features)."""
        logits = at_least_float32(F.linear(features, self.weight, self.bias))
        return draw_gates(logits) if self.training else (logits > 0).to(logits.dtype)


def draw_gates(logits: Tensor) -> Tensor:
    """Draws gates, each 1 with a probability of sigmoid(logit).

    Their gradient is that of sigmoid((logit + noise) / 2), the noise being that of the draw (Gumbel-sigmoid with a
    straight-through estimator).
    """
    noise = _draw_gumbel(logits) - _draw_gumbel(logits)
    probabilities = torch.sigmoid((logits + noise) / TEMPERATURE)
    return (probabilities > 0.5).to(logits.dtype) + (probabilities - probabilities.detach())


def _draw_gumbel(like: Tensor) -> Tensor:
    return -torch.empty_like(like).exponential_().log()


def run_block(
    block: Callable[[Tensor, Tensor, Any], tuple[Tensor, Any]],
    gates: Tensor,
    x: Tensor,
    gate: Tensor,
    layout: Any,
    training: bool,
) -> Tensor:
    """The output of a direction multiplied by its gates, shape (batch, n, channels).

    In inference, the direction runs only for images whose gate is 1. Programs that are traced (`torch.compile`,
    `torch.export`, `torch.jit.trace`) and function transforms (`torch.func`) cannot skip, because shapes would depend
    on values; they multiply, as training does.

    Args:
        block: the direction; maps (x, gate, layout) to its output and its scan's inputs.
        gates: shape (batch,).
        x, gate: the direction's inputs, shape (batch, n, channels).
        layout: the layout of the tokens.
        training: whether the gates need a gradient.
    """
    if training or is_traced() or is_transformed():
        return block(x, gate, layout)[0] * gates.view(-1, 1, 1).to(x.dtype)
    images = gates.nonzero().flatten()
    if len(images) == len(gates):
        return block(x, gate, layout)[0]
    if len(images) == 0:
        return torch.zeros_like(x)
    output = block(x.index_select(0, images), gate.index_select(0, images), layout.of_images(images))[0]
    return output.new_zeros(x.shape).index_copy_(0, images, output)


def count_flops(config: PreTrainedConfig, num_selectors: int) -> int:
    """Multiply-adds of the selectors of this number of layers."""
    return num_selectors * config.num_scans * 2 * config.intermediate_size
