"""What the two model families share: outputs, input checks, position embeddings, drop path, initialisation."""

import math
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput

from .configuration_common import VisionMambaConfig
from .token_pruning import (
    check_token_pruning,
    count_kept,
    fill_dropped_tokens,
    gather_tokens,
    select_beside_class_token,
    select_tokens,
    token_importance,
)


@dataclass
class PrunedModelOutput(BaseModelOutputWithPooling):
    """Output of a model that can drop tokens on the way.

    Args:
        kept_tokens: for each stage of the pruning schedule the original ids of the tokens left after it, in raster
            order, int64 of shape (batch, n). A class token counts and is always there.
        token_scores: for each stage the importance of the tokens that could be dropped, shape (batch, candidates).
    """

    kept_tokens: tuple[Tensor, ...] | None = None
    token_scores: tuple[Tensor, ...] | None = None


@dataclass
class PrunedImageClassifierOutput(ImageClassifierOutput):
    """Output of an image classifier that can drop tokens on the way; see `PrunedModelOutput` for the last two."""

    kept_tokens: tuple[Tensor, ...] | None = None
    token_scores: tuple[Tensor, ...] | None = None


class TokenPruningMixin:
    """For `PreTrainedModel`s whose configuration has `token_pruning`."""

    config: VisionMambaConfig

    def set_token_pruning(self, token_pruning: dict[str, Any] | None) -> None:
        """Changes the pruning schedule of a loaded model; None makes it dense. The weights stay as they are.

        The schedule is the configuration's: models that were made from one configuration object change together.

        Args:
            token_pruning: as `config.token_pruning`; with `{"flops_reduction": 0.416}` a schedule is found.

        Raises:
            ValueError: the schedule is not allowed; the model keeps the one it has.
        """
        self.config.token_pruning = self.config.complete_token_pruning(token_pruning)


class TokenLayout(Protocol):
    """What a family's layers need to know of the tokens that are left."""

    @property
    def kept(self) -> Tensor | None:
        """Their original ids, shape (batch, n). None: all are there."""

    @property
    def class_position(self) -> Tensor | None:
        """The row of the class token in each sample, shape (batch, 1). None: there is none."""

    def keep(self: "Layout", kept: Tensor, alignment: str) -> "Layout":
        """The layout when only the tokens with the original ids `kept` (batch, n) stay."""


Layout = TypeVar("Layout", bound=TokenLayout)


def encode(
    layers: nn.ModuleList, hidden_states: Tensor, layout: Layout, config: VisionMambaConfig
) -> tuple[Tensor, Layout, tuple[Tensor, ...] | None, tuple[Tensor, ...] | None]:
    """Runs the layers; at the input of those in the pruning schedule the less important tokens are dropped.

    Args:
        layers: each maps (hidden states, layout) to the next hidden states and its mixer's gated output.
        hidden_states: all tokens, shape (batch, tokens, hidden).
        layout: of all tokens.
        config: with `token_pruning`, which is checked once more: an attribute set on a configuration was not.

    Returns:
        Hidden states (batch, tokens left, hidden), the layout of these tokens, and for each stage what it kept and the
        scores by which it chose, None in a dense model.
    """
    if config.token_pruning is None:
        for layer in layers:
            hidden_states, _ = layer(hidden_states, layout)
        return hidden_states, layout, None, None

    pruning = check_token_pruning(config.token_pruning, config.num_hidden_layers)
    keep_ratios = dict(zip(pruning["layers"], pruning["keep_ratios"], strict=True))
    kept_tokens, token_scores = [], []
    for index, layer in enumerate(layers, start=1):
        hidden_states, mixer_output = layer(hidden_states, layout)
        if index in keep_ratios:
            scores = token_importance(mixer_output, pruning["importance"])
            if layout.class_position is None:
                positions = select_tokens(scores, count_kept(scores.shape[1], keep_ratios[index]))
            else:
                count = count_kept(scores.shape[1] - 1, keep_ratios[index])
                positions, scores = select_beside_class_token(scores, count, layout.class_position)
            hidden_states = gather_tokens(hidden_states, positions)
            kept = positions if layout.kept is None else layout.kept.gather(1, positions)
            layout = layout.keep(kept, pruning["alignment"])
            kept_tokens.append(kept)
            token_scores.append(scores)
    return hidden_states, layout, tuple(kept_tokens), tuple(token_scores)


def image_classifier(config: VisionMambaConfig) -> nn.Module:
    """A linear layer from pooled features to logits; where there are no labels, the features themselves."""
    return nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()


def full_hidden_states(config: VisionMambaConfig, outputs: PrunedModelOutput, index: int) -> Tensor:
    """Hidden states number `index` of all tokens (batch, tokens, hidden): a dropped token keeps its last state."""
    layers = [] if config.token_pruning is None else config.token_pruning["layers"]
    stages = [layer for layer in layers if layer < index]
    hidden_states = outputs.hidden_states or ()
    states = [hidden_states[layer] for layer in (*stages, index)]
    return fill_dropped_tokens(states, (outputs.kept_tokens or ())[: len(stages)])


def check_pixel_values(pixel_values: Tensor, num_channels: int) -> None:
    """Refuses what is not a batch of images, before a layer deep inside does.

    Values are looked at in eager mode on the CPU only: elsewhere the look would wait for the device, or be traced.
    """
    if pixel_values is None:
        raise ValueError("You have to specify `pixel_values`, of shape (batch, channels, height, width).")
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != 4 or shape[1] != num_channels:
        raise ValueError(
            f"`pixel_values` has shape {shape}; expected is (batch, {num_channels}, height, width), "
            "with as many channels as the configuration's `num_channels` says."
        )
    if shape[2] < 1 or shape[3] < 1:
        raise ValueError(f"`pixel_values` has shape {shape}: an image without pixels.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` has dtype {pixel_values.dtype}; normalised floating-point values are expected."
        )
    if pixel_values.device.type == "cpu" and not torch.compiler.is_compiling():
        finite = pixel_values.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(
                f"`pixel_values` holds NaN or infinity in samples {(~finite).nonzero().flatten().tolist()}."
            )


def resize_position_embeddings(
    position_embeddings: Tensor, grid: tuple[int, int], new_grid: tuple[int, int], interpolate: bool
) -> Tensor:
    """Position embeddings (1, height * width, hidden) of one grid, resized bicubically to another where they differ.

    Raises:
        ValueError: they differ, and `interpolate` is False.
    """
    if grid == new_grid:
        return position_embeddings
    if not interpolate:
        raise ValueError(
            f"The image has {new_grid[0]} x {new_grid[1]} patches, and the position embeddings are laid out for "
            f"{grid[0]} x {grid[1]}: resize the image, or pass `interpolate_pos_encoding=True`."
        )
    image = position_embeddings.transpose(1, 2).unflatten(2, grid)
    image = F.interpolate(image.float(), size=new_grid, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(position_embeddings.dtype)


def at_least_float32(tensor: Tensor) -> Tensor:
    """In float32, or in float64 where it is that already: half precision is too coarse for states and time steps."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382): training leaves out a residual branch with this probability."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep_prob) / keep_prob

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


def drop_path_rates(config: VisionMambaConfig) -> list[float]:
    """Linear from 0 in the first layer to `config.drop_path_rate` in the last."""
    return torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()


class TimeStepProjection(nn.Linear):
    """Projects to time steps before bias and softplus, and hands out the bias, which the scan adds.

    The layer is called, its bias not read from outside: weights that were offloaded are there during a call only.
    """

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return F.linear(features, self.weight), self.bias


def init_time_step_projection(projection: nn.Linear, config: VisionMambaConfig) -> None:
    """Mamba's initialisation: time steps spread log-uniformly between `time_step_min` and `time_step_max`.

    The bias is the inverse softplus of the step: log(exp(step) - 1) = step + log(1 - exp(-step)).
    """
    bound = projection.in_features**-0.5
    init.uniform_(projection.weight, -bound, bound)
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)
    time_step = torch.exp(torch.rand(projection.out_features) * (high - low) + low).clamp(min=config.time_step_floor)
    init.copy_(projection.bias, time_step + torch.log(-torch.expm1(-time_step)))


def init_decay(A_log: Tensor) -> None:
    """Mamba's real initialisation (S4D): A = -(1, 2, ..., state_size) in every channel."""
    states = torch.arange(1, A_log.shape[1] + 1, dtype=torch.float32)
    init.copy_(A_log, states.log().expand_as(A_log))
