"""The common part of all model families: pruning options, classification, input checks, position embeddings, drop path,
initialisation."""

import functools
import importlib
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .configuration_common import VisionMambaConfig
from .function_transforms import is_traced, is_transformed
from .precision import at_least_float32
from .pruned_outputs import PrunedImageClassifierOutput, stage_fields
from .pruning_block_selection import BlockSelector
from .pruning_options import TokenPruning, layers_with_parameters, pruning_method
from .pruning_stage import StageModule


# Patterns for the names of the parameters that `TokenPruningMixin.add_pruning_parameters` creates, and their layers, by
# the kinds in `pruning_options.layers_with_parameters`.
PRUNING_PARAMETERS = {
    "token_predictors": r"token_predictors\.(\d+)\.",
    "hole_time_step": r"layers\.(\d+)\..*hole_time_step\.offset$",
    "block_selector": r"layers\.(\d+)\..*block_selector\.",
}


def is_pruning_parameter(name: str) -> bool:
    """Whether a tensor in a state dict belongs to pruning, so that a dense model may lack it."""
    return any(re.search(pattern, name) for pattern in PRUNING_PARAMETERS.values())


class VisionMambaKwargs(TransformersKwargs, total=False):
    """Additional options of the models' forward pass.

    Attributes:
        token_pruning: the schedule for this call, instead of the configuration's: options as in `config.token_pruning`,
            or None to keep all tokens.
        output_mixer_states: also return what each layer's mixer adds, see `StageFields`.
        output_block_gates: also return which scan directions ran, see `StageFields`.
    """

    token_pruning: TokenPruning | dict[str, Any] | None
    output_mixer_states: bool
    output_block_gates: bool


FORWARD_OPTIONS = (
    "token_pruning",
    "output_hidden_states",
    "output_mixer_states",
    "output_block_gates",
    "output_attentions",
    "num_items_in_batch",
    "use_cache",
)


class HoleTimeStep(nn.Module):
    """The step size of dropped tokens, for alignments in which it does not depend on the remaining tokens.

    `zero_input`: that of a token whose features are all 0. `learned` (ours): an offset per channel is added before the
    softplus; it starts at 0, like `zero_input`, and is trained with the model.
    """

    offset: nn.Parameter | None

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_parameter("offset", None)  # see `TokenPruningMixin.add_pruning_parameters`

    def forward(self, bias: Tensor, alignment: str) -> Tensor | None:
        """Step sizes (channels,), from the bias that the scan adds to time steps before the softplus. None: other
        alignments."""
        if alignment == "zero_input":
            return F.softplus(at_least_float32(bias))
        if alignment == "learned":
            if self.offset is None:
                raise ValueError("this layer has no learned time step for holes: `model.set_token_pruning` creates it.")
            return F.softplus(at_least_float32(bias) + at_least_float32(self.offset))
        return None


class TokenPruningMixin(PreTrainedModel):
    """The base class of all models of this package: their configuration has `token_pruning`.

    Attributes:
        hub_module: the module that saves and pushes these models together with their code, card and notices. The
            package names it; code that came with a model has none, and transformers saves it as all such code.
    """

    config: VisionMambaConfig
    hub_module: ClassVar[str | None] = None
    # A model whose pruning is turned off or changed keeps its pruning parameters, in case it is turned on again.
    _keys_to_ignore_on_load_unexpected: Any = [*PRUNING_PARAMETERS.values()]

    def save_pretrained(self, save_directory: str | os.PathLike, *arguments: Any, **options: Any) -> Any:
        """Like `hf_vssm_prune.hub.pretrained.save_pretrained` if the package is installed, otherwise as in
        transformers."""
        if self.hub_module is None:
            return super().save_pretrained(save_directory, *arguments, **options)
        return importlib.import_module(self.hub_module).save_pretrained(self, save_directory, *arguments, **options)

    def _push_to_hub(self, *arguments: Any, **options: Any) -> Any:
        """Like `hf_vssm_prune.hub.pretrained.push_to_hub` if the package is installed, otherwise as in transformers."""
        if self.hub_module is None:
            return super().push_to_hub(*arguments, **options)
        return importlib.import_module(self.hub_module).push_to_hub(self, *arguments, **options)

    push_to_hub: Any = _push_to_hub  # in transformers, this is an attribute and not a method

    def set_token_pruning(self, token_pruning: dict[str, Any] | None) -> None:
        """Changes the pruning schedule of a loaded model; None makes it dense. The weights do not change.

        The schedule belongs to the configuration: models created from the same configuration object change together.

        Args:
            token_pruning: like `config.token_pruning`; with `{"flops_reduction": 0.416}` a schedule is found. Without a
                `method` the model keeps its own, with its layers if the method has parameters; a dense model gets the
                recommended one.

        Raises:
            ValueError: the schedule is not allowed; the model's schedule does not change.
        """
        self.config.token_pruning = self.config.complete_token_pruning(token_pruning)
        self.add_pruning_parameters(self.config.token_pruning)

    def _pruning_of_call(self, options: Mapping[str, Any]) -> TokenPruning | None:
        """The schedule for a call of the model, from the given options.

        Raises:
            TypeError: the model does not know an option.
            ValueError: the schedule is not allowed, or a recorded output would have no gradient.
        """
        if unknown := [name for name in options if name not in FORWARD_OPTIONS]:
            raise TypeError(
                f"{type(self).__name__} got unknown options {unknown}; allowed options are its arguments and "
                f"{list(FORWARD_OPTIONS)}."
            )
        self._check_recorded(options)
        given = options.get("token_pruning", self.config.token_pruning)
        if isinstance(given, TokenPruning) and given["layers"][-1] < self.config.num_hidden_layers:
            return given
        return self.config.complete_token_pruning(given)  # also checks the options of a deeper model

    def _check_recorded(self, options: Mapping[str, Any]) -> None:
        """Rejects outputs recorded inside layers if reentrant checkpointing runs these layers without gradients: losses
        on such outputs would train nothing."""
        recorded = [name for name in ("output_mixer_states", "output_block_gates") if options.get(name)]
        if recorded and self.training and torch.is_grad_enabled() and any(map(_is_reentrant, self.modules())):
            raise ValueError(
                f"{recorded} would have no gradient with reentrant activation checkpointing: enable it with "
                "`{'use_reentrant': False}`."
            )

    def add_pruning_parameters(self, token_pruning: dict[str, Any] | None) -> None:
        """Creates the parameters that pruning options need and the model lacks, on the devices of their layers;
        existing ones are unchanged.

        For the kinds of parameters and their layers, see `pruning_options.layers_with_parameters`.

        Args:
            token_pruning: complete options; None: nothing is needed.
        """
        if token_pruning is None:  # no `isinstance`: a configuration's class may come from another copy of the code
            return
        base: Any = self.base_model

        def prepare(module: nn.Module, layer: nn.Module) -> nn.Module:
            module = module.to(_device_of(layer), next(layer.parameters()).dtype).train(base.training)
            return module.apply(self._init_weights)

        needed = layers_with_parameters(token_pruning, len(base.layers))
        make_module: Any = pruning_method(token_pruning).module
        for index in needed["token_predictors"]:
            if str(index) not in base.token_predictors:
                module = make_module(self.config.hidden_size)
                base.token_predictors[str(index)] = prepare(module, base.layers[index - 1])
        for index in needed["hole_time_step"]:
            like, device = next(base.layers[index].parameters()), _device_of(base.layers[index])
            for module in base.layers[index].modules():
                if isinstance(module, HoleTimeStep) and module.offset is None:
                    offset = torch.zeros(module.channels, device=device, dtype=like.dtype)
                    module.offset = nn.Parameter(offset)
        for index in needed["block_selector"]:
            mixer = base.layers[index].mixer
            if mixer.block_selector is None:
                selector = BlockSelector(2 * self.config.intermediate_size, self.config.num_scans)
                mixer.block_selector = prepare(selector, base.layers[index])

    def freeze_pruning_parameters(self, schedules: Sequence[TokenPruning | None]) -> None:
        """Freezes the parameters created by `add_pruning_parameters`, except those that one of the given schedules
        (complete options) uses."""
        base: Any = self.base_model
        used = [layers_with_parameters(each, len(base.layers)) for each in schedules if each is not None]
        for name, parameter in base.named_parameters():
            for kind, pattern in PRUNING_PARAMETERS.items():
                if (match := re.search(pattern, name)) is not None:
                    parameter.requires_grad_(any(int(match[1]) in each[kind] for each in used))

    @property
    def has_pruning_parameters(self) -> bool:
        """Whether `add_pruning_parameters` has created any parameters."""
        return any(is_pruning_parameter(name) for name, _ in self.named_parameters())

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """In code that is not its own, transformers skips modules whose parameters were all loaded. These include
        modules without any of their own, such as `StageModule`, which initialise those of their children."""
        has_own = next(module.parameters(recurse=False), None) is not None
        super()._initialize_weights(module, is_custom_code and has_own)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, HoleTimeStep) and module.offset is not None:
            init.zeros_(module.offset)
        if isinstance(module, StageModule | BlockSelector):
            module.init_weights()


class Classifier(TokenPruningMixin):
    """A classifier of pooled features. Subclasses create the base model, whose `pooler_output` it classifies, and
    `classifier`, see `image_classifier`."""

    classifier: nn.Module

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[VisionMambaKwargs]
    ) -> PrunedImageClassifierOutput:
        """
        Args:
            pixel_values: normalised, images (batch, channels, height, width) or, where the model is made for them,
                videos (batch, frames, channels, height, width).
            labels: class ids (batch,), or labels in the form of `config.problem_type`. If given, `loss` is returned.
        """
        outputs = self.base_model(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return PrunedImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **stage_fields(outputs)
        )


def _is_reentrant(module: nn.Module) -> bool:
    """Whether a layer's calls are checkpointed by `torch.utils.checkpoint` with `use_reentrant=True`, its default."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    checkpoint = getattr(module, "_gradient_checkpointing_func", None)
    return isinstance(checkpoint, functools.partial) and checkpoint.keywords.get("use_reentrant") is not False


def _device_of(layer: nn.Module) -> torch.device:
    """The device on which a layer computes. Weights offloaded by Accelerate are on the meta device between calls; its
    hooks have the device."""
    device = next(layer.parameters()).device
    if device.type != "meta":
        return device
    hooks = [getattr(module, "_hf_hook", None) for module in layer.modules()]
    hooks = [part for hook in hooks for part in getattr(hook, "hooks", (hook,))]
    devices = [getattr(hook, "execution_device", None) for hook in hooks]
    return next((torch.device(each) for each in devices if each is not None), device)


def mean_over_patches(tokens: Tensor, sizes: Tensor | None) -> Tensor:
    """The mean of tokens (batch, n, channels), weighted by the number of patches in each, sizes (batch, n)."""
    if sizes is None:
        return tokens.mean(dim=1)
    weights = sizes / sizes.sum(dim=1, keepdim=True)
    return (at_least_float32(tokens) * weights.unsqueeze(-1)).sum(dim=1).to(tokens.dtype)


def image_classifier(config: VisionMambaConfig) -> nn.Module:
    """A linear layer from pooled features to logits; the identity if there are no labels."""
    return nn.Linear(config.hidden_size, config.num_labels) if config.num_labels else nn.Identity()


def check_pixel_values(pixel_values: Tensor, config: VisionMambaConfig) -> None:
    """Rejects inputs that are not a batch of images (or of videos, for a video model), before a layer deep inside the
    model does.

    Values are checked in eager mode on the CPU only: elsewhere, the check would wait for the device or be traced, and
    function transforms do not allow it.
    """
    frames, one = ("frames, ", "a video") if config.modality == "video" else ("", "an image")
    if pixel_values is None:
        raise ValueError(f"You have to specify `pixel_values`, of shape (batch, {frames}channels, height, width).")
    if not isinstance(pixel_values, Tensor):
        raise TypeError(
            f"`pixel_values` is a {type(pixel_values).__name__}; a tensor is expected: call the image processor with "
            '`return_tensors="pt"`.'
        )
    shape = tuple(pixel_values.shape)
    if pixel_values.ndim != len(config.input_size) + 2 or shape[-3] != config.num_channels:
        raise ValueError(
            f"`pixel_values` has shape {shape}; expected shape: (batch, {frames}{config.num_channels}, height, "
            "width), with `num_channels` from the configuration."
        )
    if min(shape[1:]) < 1:
        raise ValueError(f"`pixel_values` has shape {shape}: {one} without pixels.")
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"`pixel_values` has dtype {pixel_values.dtype}; normalised floating-point values are expected."
        )
    if pixel_values.device.type != "cpu" or is_traced() or is_transformed():
        return
    if not pixel_values.sum().isfinite():
        # The sum is a quick check. It may overflow even if every value is finite, hence the thorough check.
        finite = pixel_values.isfinite().flatten(1).all(1)
        if not finite.all():
            raise ValueError(
                f"`pixel_values` contains NaN or infinity in samples {(~finite).nonzero().flatten().tolist()}."
            )


def resize_position_embeddings(
    position_embeddings: Tensor, grid: tuple[int, ...], new_grid: tuple[int, ...], interpolate: bool
) -> Tensor:
    """Position embeddings (1, cells, hidden) of one grid, resized to another grid if they differ.

    The last two axes of a grid, height and width, are resized bicubically; a third before them, time, linearly.

    Raises:
        ValueError: they differ, and `interpolate` is False.
    """
    if grid == new_grid:
        return position_embeddings
    if not interpolate:
        raise ValueError(
            f"The input has {' x '.join(map(str, new_grid))} patches, but the position embeddings are for "
            f"{' x '.join(map(str, grid))}: resize the input, or pass `interpolate_pos_encoding=True`."
        )
    hidden = position_embeddings.shape[-1]
    cells = at_least_float32(position_embeddings).reshape(-1, *grid[-2:], hidden).permute(0, 3, 1, 2)
    if grid[-2:] != new_grid[-2:]:
        cells = F.interpolate(cells, size=new_grid[-2:], mode="bicubic", align_corners=False)
    cells = cells.permute(0, 2, 3, 1)
    if grid[:-2] != new_grid[:-2]:
        frames = F.interpolate(cells.flatten(1).T[None], size=new_grid[:-2], mode="linear", align_corners=False)
        cells = frames[0].T
    return cells.reshape(1, -1, hidden).to(position_embeddings.dtype)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module does exactly what its class does, so that its weights can be used without a call. This
    is not the case if a hook, an adapter, a parametrisation or a quantiser has changed it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    changed = any(hooks) or "forward" in module.__dict__ or torch.nn.modules.module._has_any_global_hook()
    return type(module) is kind and not changed


class DropPath(nn.Module):
    """Stochastic depth per sample (arXiv 1603.09382): in training, a residual branch is dropped with this
    probability."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1 - self.drop_prob
        shape = (hidden_states.shape[0],) + (1,) * (hidden_states.ndim - 1)
        return hidden_states * hidden_states.new_empty(shape).bernoulli_(keep_prob).div_(keep_prob)

    def extra_repr(self) -> str:
        return f"p={self.drop_prob}"


def drop_path_rates(config: VisionMambaConfig) -> list[float]:
    """Linear from 0 in the first layer to `config.drop_path_rate` in the last."""
    return torch.linspace(0, config.drop_path_rate, config.num_hidden_layers, device="cpu").tolist()


class TimeStepProjection(nn.Module):
    """Projects to time steps before bias and softplus, and returns the bias, which the scan adds.

    The bias is returned by the call rather than read from outside, because offloaded weights exist only during a call.
    The layer is not an `nn.Linear`, because libraries that wrap these (PEFT, quantisation) expect them to return one
    tensor.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(features, self.weight), self.bias


def init_as_in_torch(weight: Tensor, bias: Tensor | None = None, scale: float = 1.0) -> None:
    """PyTorch's own initialisation of linear and convolutional layers: uniform, up to 1 / sqrt(inputs of one output);
    `scale` is a factor."""
    bound = scale * math.prod(weight.shape[1:]) ** -0.5
    init.uniform_(weight, -bound, bound)
    if bias is not None:
        init.uniform_(bias, -bound, bound)


def init_time_step_projection(projection: TimeStepProjection, config: VisionMambaConfig) -> None:
    """Mamba's initialisation: time steps spread log-uniformly between `time_step_min` and `time_step_max`, if the bias
    counts once.

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
