"""What the two model families share: outputs, input checks, position embeddings, drop path, initialisation."""

import importlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import PreTrainedModel

from .configuration_common import VisionMambaConfig
from .mixer_output import MixerOutput
from .precision import at_least_float32
from .pruning_dyvm import TokenPredictor
from .pruning_schedule import check_token_pruning, pruning_method
from .pruning_stage import Reduction, Stage
from .token_pruning import count_kept, fill_dropped_tokens, gather_tokens


@dataclass
class PrunedModelOutput(BaseModelOutputWithPooling):
    """Output of a model that can drop tokens on the way.

    Args:
        kept_tokens: for each stage of the pruning schedule the original ids of the tokens left after it, in raster
            order, int64 of shape (batch, n). A class token counts and is always there.
        token_scores: for each stage the scores by which the method compared the tokens that could be dropped, in many
            methods their importance, shape (batch, candidates).
    """

    kept_tokens: tuple[Tensor, ...] | None = None
    token_scores: tuple[Tensor, ...] | None = None


@dataclass
class PrunedImageClassifierOutput(ImageClassifierOutput):
    """Output of an image classifier that can drop tokens on the way; see `PrunedModelOutput` for the last two."""

    kept_tokens: tuple[Tensor, ...] | None = None
    token_scores: tuple[Tensor, ...] | None = None


class HoleTimeStep(nn.Module):
    """The step size of a dropped token, where it does not depend on the tokens that are left.

    `zero_input`: that of a token whose features are all 0. `learned`, ours: an offset in each channel is added to it
    before the softplus; it begins at 0, as `zero_input`, and is trained with the model.
    """

    offset: nn.Parameter | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_parameter("offset", None)  # see `TokenPruningMixin.add_pruning_parameters`

    def forward(self, bias: Tensor, alignment: str) -> Tensor | None:
        """Step sizes (channels,), from what the scan adds to time steps before the softplus. None: other alignments."""
        if alignment == "zero_input":
            return F.softplus(at_least_float32(bias))
        if alignment == "learned":
            if self.offset is None:
                raise ValueError("this layer has no learned step for holes: `model.set_token_pruning` makes it.")
            return F.softplus(at_least_float32(bias) + at_least_float32(self.offset))
        return None


class TokenPruningMixin(PreTrainedModel):
    """What all models of this package derive from: their configuration has `token_pruning`.

    Attributes:
        hub_module: the module that saves and pushes these models together with their code, card and notices. The
            package names it; code that came with a model has none, and transformers saves it as all such code.
    """

    config: VisionMambaConfig
    hub_module: ClassVar[str | None] = None
    # A model whose pruning was turned off, or changed, keeps its parameters of pruning, for when it is turned on again.
    _keys_to_ignore_on_load_unexpected: Any = [r"hole_time_step\.offset$", r"token_predictors\."]

    def save_pretrained(self, save_directory: str | os.PathLike, *arguments: Any, **options: Any) -> Any:
        """As `hf_vssm_prune.hub.pretrained.save_pretrained` where that is installed, else as transformers has it."""
        if self.hub_module is None:
            return super().save_pretrained(save_directory, *arguments, **options)
        return importlib.import_module(self.hub_module).save_pretrained(self, save_directory, *arguments, **options)

    def _push_to_hub(self, *arguments: Any, **options: Any) -> Any:
        """As `hf_vssm_prune.hub.pretrained.push_to_hub` where that is installed, else as transformers has it."""
        if self.hub_module is None:
            return super().push_to_hub(*arguments, **options)
        return importlib.import_module(self.hub_module).push_to_hub(self, *arguments, **options)

    push_to_hub: Any = _push_to_hub  # transformers has an attribute there, and no method

    def set_token_pruning(self, token_pruning: dict[str, Any] | None) -> None:
        """Changes the pruning schedule of a loaded model; None makes it dense. The weights stay as they are.

        The schedule is the configuration's: models that were made from one configuration object change together.

        Args:
            token_pruning: as `config.token_pruning`; with `{"flops_reduction": 0.416}` a schedule is found. Where it
                names no `method`, the model keeps its own; a dense model, one that was made so, too, has none, and
                `top` is meant.

        Raises:
            ValueError: the schedule is not allowed; the model keeps the one it has.
        """
        self.config.token_pruning = self.config.complete_token_pruning(token_pruning)
        self.add_pruning_parameters(self.config.token_pruning)

    def add_pruning_parameters(self, token_pruning: dict[str, Any] | None) -> None:
        """Makes the parameters that pruning options need and the model lacks; those that it has stay as they are.

        They are the predictors of a method that has some, one for each stage, and, for the `learned` alignment, the
        offsets of the layers behind the first stage.

        Args:
            token_pruning: complete options; None: nothing is needed.
        """
        if token_pruning is None:
            return
        base: Any = self.base_model
        like = next(base.layers.parameters())
        if (make_predictor := pruning_method(token_pruning).predictor) is not None:
            for layer in map(str, token_pruning["layers"]):
                if layer not in base.token_predictors:
                    predictor = make_predictor(self.config.hidden_size).to(like.device, like.dtype)
                    predictor.apply(self._init_weights)
                    base.token_predictors[layer] = predictor.train(base.training)
        if token_pruning["alignment"] == "learned":
            for module in base.layers[token_pruning["layers"][0] :].modules():
                if isinstance(module, HoleTimeStep) and module.offset is None:
                    module.offset = nn.Parameter(torch.zeros(module.channels, device=like.device, dtype=like.dtype))

    def freeze_pruning_parameters(self, schedules: Sequence[dict[str, Any] | None]) -> None:
        """Of the parameters that `add_pruning_parameters` made, only those are trained from here on that one of these
        schedules uses, complete options each."""
        base: Any = self.base_model
        pruning = [schedule for schedule in schedules if schedule is not None]
        predicted = {
            str(layer) for each in pruning if pruning_method(each).predictor is not None for layer in each["layers"]
        }
        for layer, predictor in base.token_predictors.items():
            predictor.requires_grad_(layer in predicted)
        learned = min((each["layers"][0] for each in pruning if each["alignment"] == "learned"), default=math.inf)
        for index, layer in enumerate(base.layers):
            for module in layer.modules():
                if isinstance(module, HoleTimeStep):
                    module.requires_grad_(index >= learned)

    @property
    def has_pruning_parameters(self) -> bool:
        """Whether `add_pruning_parameters` has made any."""
        base: Any = self.base_model
        holes = [module for module in base.modules() if isinstance(module, HoleTimeStep)]
        return len(base.token_predictors) > 0 or any(hole.offset is not None for hole in holes)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HoleTimeStep) and module.offset is not None:
            init.zeros_(module.offset)
        if isinstance(module, TokenPredictor):
            module.init_weights()


class TokenLayout(Protocol):
    """What a family's layers need to know of the tokens that are left."""

    @property
    def grid(self) -> tuple[int, int]:
        """(height, width) of the full grid, in patches."""

    @property
    def kept(self) -> Tensor | None:
        """Their original ids, shape (batch, n). None: all are there."""

    @property
    def class_position(self) -> Tensor | None:
        """The row of the class token in each sample, shape (batch, 1). None: there is none."""

    @property
    def gates(self) -> Tensor | None:
        """In training, where a method learns whom to keep: 1 for each token, with the gradient of the decision for it,
        shape (batch, n, 1). Mixers see the tokens multiplied by them, behind the norm, which would hide a factor."""

    def keep(
        self: "Layout", kept: Tensor, alignment: str, gates: Tensor | None = None, stand_ins: Tensor | None = None
    ) -> "Layout":
        """The layout when only the tokens with the original ids `kept` (batch, n) stay; with
        `stand_ins`, as `Reduction` has them, convolutions see these in the places of the others."""


Layout = TypeVar("Layout", bound=TokenLayout)


@dataclass(frozen=True)
class Encoding(Generic[Layout]):
    """What the layers make of the tokens.

    Attributes:
        hidden_states: of the tokens that are left, shape (batch, tokens left, hidden).
        layout: of these tokens.
        kept_tokens, token_scores: as in `PrunedModelOutput`.
        sizes: how many patches were merged into each patch token that is left, shape (batch, patches left). None: one
            each, or the method does not count them.
    """

    hidden_states: Tensor
    layout: Layout
    kept_tokens: tuple[Tensor, ...] | None = None
    token_scores: tuple[Tensor, ...] | None = None
    sizes: Tensor | None = None


def encode(
    layers: nn.ModuleList,
    predictors: nn.ModuleDict,
    hidden_states: Tensor,
    layout: Layout,
    config: VisionMambaConfig,
) -> Encoding[Layout]:
    """Runs the layers; at the input of those in the pruning schedule the pruning method leaves fewer tokens.

    Args:
        layers: each maps (hidden states, layout) to the next hidden states and what its mixer tells of the tokens.
        predictors: by layer those of a pruning method that has some.
        hidden_states: all tokens, shape (batch, tokens, hidden).
        layout: of all tokens.
        config: with `token_pruning`, which is checked once more: an attribute set on a configuration was not.
    """
    if config.token_pruning is None:
        for layer in layers:
            hidden_states, _ = layer(hidden_states, layout)
        return Encoding(hidden_states, layout)

    pruning = check_token_pruning(config.token_pruning, config.num_hidden_layers)
    method = pruning_method(pruning)
    keep_ratios = dict(zip(pruning["layers"], pruning["keep_ratios"], strict=True))
    kept_tokens, token_scores, sizes, gates = [], [], None, None
    for index, layer in enumerate(layers, start=1):
        hidden_states, mixer = layer(hidden_states, layout)
        if index in keep_ratios:
            stage = _make_stage(hidden_states, mixer, layout, keep_ratios[index])
            predictor = dict(predictors.items()).get(str(index))
            stage = stage._replace(sizes=sizes, importance=pruning.get("importance", ""), predictor=predictor)
            reduction = method.reduce(stage)
            gates = _gather_gates(gates, reduction)
            positions, hidden_states, all_gates = _with_class_token(reduction, gates, hidden_states, stage, layout)
            kept = positions if layout.kept is None else layout.kept.gather(1, positions)
            layout = layout.keep(kept, pruning["alignment"], all_gates, reduction.stand_ins)
            kept_tokens.append(kept)
            token_scores.append(reduction.scores)
            sizes = reduction.sizes
    return Encoding(hidden_states, layout, tuple(kept_tokens), tuple(token_scores), sizes)


def _make_stage(hidden_states: Tensor, mixer: MixerOutput, layout: TokenLayout, keep_ratio: float) -> Stage:
    """The patch tokens among all tokens (batch, tokens, hidden)."""
    batch, num_tokens, _ = hidden_states.shape
    rows = torch.arange(num_tokens, device=hidden_states.device).expand(batch, -1)
    ids = rows if layout.kept is None else layout.kept
    if layout.class_position is None:
        return Stage(hidden_states, count_kept(num_tokens, keep_ratio), mixer, None, ids, layout.grid)
    class_id = ids.gather(1, layout.class_position)
    rows = rows[:, :-1] + (rows[:, :-1] >= layout.class_position)
    ids = ids.gather(1, rows)
    cells = ids - (ids > class_id).long()
    patches = gather_tokens(hidden_states, rows)
    return Stage(patches, count_kept(num_tokens - 1, keep_ratio), mixer, rows, cells, layout.grid)


def _gather_gates(gates: Tensor | None, reduction: Reduction) -> Tensor | None:
    """The gates (batch, patches left) of the patch tokens that are left, from those before the stage and its own."""
    if reduction.gates is None:
        return None
    return reduction.gates if gates is None else gates.gather(1, reduction.positions) * reduction.gates


def _with_class_token(
    reduction: Reduction, gates: Tensor | None, hidden_states: Tensor, stage: Stage, layout: TokenLayout
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Puts the class token, where there is one, back between the patch tokens that are left.

    Args:
        reduction: of the patch tokens.
        gates: of those that are left, shape (batch, patches left).
        hidden_states: of all tokens, as they were before the stage.
        stage, layout: of these tokens.

    Returns:
        The rows of all tokens that are left, ascending, their hidden states, and their gates, (batch, tokens left, 1).
    """
    patch_gates = None if gates is None else gates.unsqueeze(-1)
    if stage.rows is None or layout.class_position is None:
        return reduction.positions, reduction.hidden_states, patch_gates
    left = torch.cat([stage.rows.gather(1, reduction.positions), layout.class_position], dim=1)
    left, order = left.sort(dim=-1)

    def put_back(patches: Tensor, class_token: Tensor) -> Tensor:
        return gather_tokens(torch.cat([patches, class_token], dim=1), order)

    tokens = put_back(reduction.hidden_states, gather_tokens(hidden_states, layout.class_position))
    if patch_gates is not None:
        patch_gates = put_back(patch_gates, torch.ones_like(patch_gates[:, :1]))
    return left, tokens, patch_gates


def gate_tokens(tokens: Tensor, layout: TokenLayout) -> Tensor:
    """Tokens (batch, n, hidden), each times its gate, where there are gates."""
    return tokens if layout.gates is None else tokens * layout.gates.to(tokens.dtype)


def mean_over_patches(tokens: Tensor, sizes: Tensor | None) -> Tensor:
    """The mean of tokens (batch, n, channels), each as often as it has patches in it, sizes (batch, n)."""
    if sizes is None:
        return tokens.mean(dim=1)
    weights = (sizes / sizes.sum(dim=1, keepdim=True)).to(tokens.dtype)
    return (tokens * weights.unsqueeze(-1)).sum(dim=1)


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
    if pixel_values.device.type == "cpu" and not torch.compiler.is_compiling() and not pixel_values.sum().isfinite():
        # The sum is the quick look. It may overflow where every value is finite, hence the thorough one.
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
    image = F.interpolate(at_least_float32(image), size=new_grid, mode="bicubic", align_corners=False)
    return image.flatten(2).transpose(1, 2).to(position_embeddings.dtype)


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


class TimeStepProjection(nn.Module):
    """Projects to time steps before bias and softplus, and hands out the bias, which the scan adds.

    The layer is called, its bias not read from outside: weights that were offloaded are there during a call only. It is
    no `nn.Linear`, because what wraps those (PEFT, quantisation) takes them to return one tensor.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(features, self.weight), self.bias


def init_time_step_projection(projection: TimeStepProjection, config: VisionMambaConfig) -> None:
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
