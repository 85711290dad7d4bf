"""`dyvm`: a small network, trained with the model, decides which tokens to keep."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init

from .precision import at_least_float32
from .pruning_stage import Reduction, Stage, StageModule, TokenView
from .token_pruning import gather_tokens, select_tokens


class TokenPredictor(StageModule):
    """Predicts the probability that a token is kept, from its features and the mean of all tokens' features.

    Args:
        hidden_size: hidden size of the model, at least 4.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.local_size = hidden_size // 2
        self.norm = nn.LayerNorm(hidden_size)
        self.input = nn.Linear(hidden_size, hidden_size)
        self.first = nn.Linear(hidden_size, hidden_size // 2)
        self.second = nn.Linear(hidden_size // 2, hidden_size // 4)
        self.output = nn.Linear(hidden_size // 4, 2)

    def init_weights(self) -> None:
        """PyTorch's default weights for linear layers, and biases of 0. The authors' code draws normal weights with a
        standard deviation of 0.02, as everywhere in the model; almost nothing would pass through four such layers."""
        for linear in (self.input, self.first, self.second, self.output):
            init.kaiming_uniform_(linear.weight, a=math.sqrt(5))
            init.zeros_(linear.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Log-probability of being kept (batch, n), from hidden states (batch, n, hidden)."""
        features = F.gelu(self.input(self.norm(hidden_states.to(self.norm.weight.dtype))))
        local, shared = features[..., : self.local_size], features[..., self.local_size :]
        features = torch.cat([local, shared.mean(dim=1, keepdim=True).expand_as(shared)], dim=-1)
        features = F.gelu(self.second(F.gelu(self.first(features))))
        return F.log_softmax(at_least_float32(self.output(features)), dim=-1)[..., 0]


def keep_predicted(stage: Stage) -> Reduction:
    """Token pruning of "Dynamic Vision Mamba" (DyVM, arXiv 2504.04787, section 3), with a fixed number of tokens.

    The predictor has the layers of the authors' code. Instead of the mean of all tokens' features, that code uses their
    sum divided by their number plus 1, and its initial weights are smaller (see `TokenPredictor.init_weights`).

    In the paper, each token's decision is drawn with the Gumbel-softmax trick, so images keep different numbers of
    tokens in training, and a loss pulls the fraction that each image keeps towards the keep ratio. Here the number is
    fixed: the `num_kept` most probable tokens are kept (in the authors' code too, in inference). In training, Gumbel
    noise from torch's generator is first added to the log-probabilities, which draws tokens without replacement
    (Gumbel-top-k, arXiv 1903.06059).

    As in the paper, tokens are multiplied by the decisions inside the layers with a straight-through estimator, so that
    the loss trains the predictor. Here this is a factor of 1 at the mixer's input with the gradient of the probability,
    and only kept tokens contribute. In the authors' code, the factors are applied before and after the convolution but
    not to the gate, have the gradient of the noisy softmax, and also concern dropped tokens.

    In the authors' code, Vim's class token moves to the middle of the kept tokens at each stage, and the number of kept
    tokens is rounded down; here it stays between its former neighbours, and the number is rounded up. An untrained
    predictor gives similar tokens similar scores and drops whole regions, which loses more accuracy than a random
    choice. DyVM's selection of blocks is a separate option, `block_keep_ratio`, see `pruning_block_selection`.

    Raises:
        ValueError: the model has no predictor for this stage.
    """
    if stage.module is None:
        raise ValueError(
            "the pruning method 'dyvm' needs a predictor for each stage, but the model has none for this one: "
            "`model.set_token_pruning` creates it."
        )
    # If a model is spread over several devices, its predictors may be on another one than their stage.
    log_probabilities = stage.module(stage.hidden_states).to(stage.hidden_states.device)
    scores = log_probabilities.detach()
    if stage.module.training:
        scores = scores - torch.empty_like(scores).exponential_().log()
    rows = select_tokens(scores, stage.num_kept)
    tokens = gather_tokens(stage.hidden_states, rows)
    gates = None
    if stage.module.training:
        probabilities = log_probabilities.exp().gather(1, rows)
        gates = 1 + (probabilities - probabilities.detach())
        if stage.view.scale is not None:
            gates = stage.view.scale.gather(1, rows) * gates
    return Reduction(rows, tokens, log_probabilities.detach(), view=TokenView(scale=gates))


def count_flops(num_tokens: int, count: int, config: PreTrainedConfig) -> int:
    """Multiply-adds of the predictor, which also runs if nothing is dropped."""
    hidden, half, quarter = config.hidden_size, config.hidden_size // 2, config.hidden_size // 4
    return num_tokens * (hidden * hidden + hidden * half + half * quarter + quarter * 2)
