"""PlainMamba with token pruning.

The model is from "PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition" (arXiv 2403.17695), pruned as
in "Exploring Token Pruning in Vision State Space Models" (ToP, arXiv 2409.18962).
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_plainmamba import PlainMambaConfig
from .function_transforms import is_transformed
from .grid_convolution import depthwise_conv2d
from .mixer_output import MixerOutput, ScanInputs
from .modeling_backbone import FeatureMaps
from .modeling_common import (
    Classifier,
    DropPath,
    HoleTimeStep,
    TimeStepProjection,
    TokenPruningMixin,
    VisionMambaKwargs,
    check_pixel_values,
    drop_path_rates,
    image_classifier,
    init_as_in_torch,
    init_decay,
    init_time_step_projection,
    is_plain,
    mean_over_patches,
    resize_position_embeddings,
)
from .precision import at_least_float32
from .pruned_layers import encode, scale_tokens
from .pruned_outputs import PrunedModelOutput
from .pruning_stage import TokenView
from .selective_scan import selective_scan
from .token_pruning import ScanPaths, prune_paths, snake_paths


class PlainMambaTokenLayout(NamedTuple):
    """The positions of the remaining tokens on the grid.

    All indices are int32, which the kernels expect, so that no layer has to convert them.

    Attributes:
        grid: (height, width) of the full grid.
        full_paths: the scan paths over the full grid, int64.
        paths: the paths over the cells of the remaining tokens.
        kept: the cell of each token, shape (batch, n). None: every cell has its token.
        alignment: how the scans cross the gaps.
        view: see `TokenLayout`; without stand-ins, convolutions see zeros in dropped cells.
        cls_row: None, PlainMamba has no class token.
    """

    grid: tuple[int, int]
    full_paths: ScanPaths
    paths: ScanPaths
    kept: Tensor | None = None
    alignment: str = "none"
    view: TokenView = TokenView()
    cls_row: None = None

    @classmethod
    def of_grid(cls, grid: tuple[int, int], device: torch.device) -> "PlainMambaTokenLayout":
        paths = snake_paths(grid, device)
        return cls(grid, paths, cls._to_int32(paths))

    def keep(self, kept: Tensor, alignment: str, view: TokenView) -> "PlainMambaTokenLayout":
        paths = self._to_int32(prune_paths(self.full_paths, kept, alignment))
        view = view._replace(stand_ins=None if view.stand_ins is None else view.stand_ins.int())
        return self._replace(paths=paths, kept=kept.int(), alignment=alignment, view=view)

    @staticmethod
    def _to_int32(paths: ScanPaths) -> ScanPaths:
        return ScanPaths(paths.order.int(), None if paths.gaps is None else paths.gaps.int(), paths.moves.int())


class PlainMambaConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride=stride, padding=kernel_size // 2, bias=False
        )
        self.normalization = nn.BatchNorm2d(out_channels)

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self._can_fold():
            return F.relu(self.convolution._conv_forward(hidden_states, *self._folded()), inplace=True)
        return F.relu(self.normalization(self.convolution(hidden_states)))

    def _can_fold(self) -> bool:
        plain = is_plain(self.convolution, nn.Conv2d) and is_plain(self.normalization, nn.BatchNorm2d)
        return plain and not self.normalization.training and self.normalization.track_running_stats

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution with the batch norm folded in, from its running statistics."""
        norm, weight = self.normalization, self.convolution.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
        scale = norm.weight.to(dtype) * (variance.to(dtype) + norm.eps).rsqrt()
        bias = norm.bias.to(dtype) - mean.to(dtype) * scale
        return (weight.to(dtype) * scale[:, None, None, None]).to(weight.dtype), bias.to(weight.dtype)


def project_patches(convolution: nn.Conv2d, pixels: Tensor) -> Tensor:
    """A convolution whose stride is its kernel size, as one matrix product with the patches, which do not overlap.

    Args:
        convolution: called as a module if calling it does more than that.
        pixels: shape (batch, channels, height, width), multiples of the patch.

    Returns:
        (batch, patches, channels).
    """
    if not is_plain(convolution, nn.Conv2d):
        return convolution(pixels).flatten(2).transpose(1, 2)
    size = convolution.weight.shape[-1]
    height, width = pixels.shape[2] // size, pixels.shape[3] // size
    patches = pixels.unflatten(3, (width, size)).unflatten(2, (height, size)).permute(0, 2, 4, 1, 3, 5)
    return F.linear(patches.flatten(3).flatten(1, 2), convolution.weight.flatten(1), convolution.bias)


class PlainMambaEmbeddings(nn.Module):
    """Pixel values to tokens: a convolutional stem at half the resolution, patch projection, position embeddings."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.config = config
        channels = config.stem_channels
        stem = [PlainMambaConvNorm(config.num_channels, channels, kernel_size=7, stride=2)]
        stem += [PlainMambaConvNorm(channels, channels, kernel_size=3, stride=1) for _ in range(config.num_stem_convs)]
        self.stem = nn.Sequential(*stem)
        self.half_patch = config.patch_size // 2
        self.projection = nn.Conv2d(channels, config.hidden_size, self.half_patch, stride=self.half_patch)
        num_patches = config.grid_size[0] * config.grid_size[1]
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_patches, config.hidden_size))

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> tuple[Tensor, tuple[int, int]]:
        check_pixel_values(pixel_values, self.config)
        pixel_values = pixel_values.to(self.projection.weight.dtype)
        if pixel_values.device.type == "cpu" and not is_transformed():  # convolutions are fastest in this layout
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        pixels = self.stem(pixel_values)
        height, width = pixels.shape[2:]
        grid = (-(-height // self.half_patch), -(-width // self.half_patch))
        pixels = F.pad(pixels, (0, grid[1] * self.half_patch - width, 0, grid[0] * self.half_patch - height))
        positions = resize_position_embeddings(
            self.position_embeddings, self.config.grid_size, grid, interpolate_pos_encoding
        )
        return project_patches(self.projection, pixels) + positions, grid


class PlainMambaGridConvolution(nn.Module):
    """Depthwise convolution over the cells of the grid that still have a token.

    It is not an `nn.Conv2d`, because libraries that wrap these (PEFT, quantisation) expect them to map images to
    images.
    """

    def __init__(self, config: PlainMambaConfig, channels: int, kernel_size: int, bias: bool = True) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def forward(self, hidden_states: Tensor, layout: PlainMambaTokenLayout, silu: bool = False) -> Tensor:
        return depthwise_conv2d(
            hidden_states,
            self.weight,
            self.bias,
            layout.grid,
            layout.kept,
            silu,
            layout.view.stand_ins,
            backend=self.config.scan_backend,
        )


class PlainMambaMixer(nn.Module):
    """Depthwise convolution on the grid, then four selective scans along snake paths with one set of parameters."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.config = config
        width = config.intermediate_size
        self.in_proj = nn.Linear(config.hidden_size, 2 * width)
        self.conv2d = PlainMambaGridConvolution(config, width, config.conv_kernel)
        # Sizes of the projection's parts: time-step features, B and C.
        self.sizes = [int(config.time_step_rank), config.state_size, config.state_size]
        self.x_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.dt_proj = TimeStepProjection(self.sizes[0], width)
        self.hole_time_step = HoleTimeStep(width)
        self.A_log = nn.Parameter(torch.empty(width, config.state_size))
        self.D = nn.Parameter(torch.empty(width))
        # Added to B for each kind of move: start, right, left, up, down.
        self.direction_B = nn.Parameter(torch.empty(5, config.state_size))
        self.out_proj = nn.Linear(width, config.hidden_size)

    def forward(
        self, hidden_states: Tensor, layout: PlainMambaTokenLayout, with_output: bool
    ) -> tuple[Tensor, MixerOutput | None]:
        """Returns the mixed tokens (batch, n, hidden) and, if requested, the results that pruning methods can use."""
        x, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = self.conv2d(x, layout, silu=True)
        features, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        time_step, bias = self.dt_proj(features)
        # The published weights expect it twice: in the projection, and again before the softplus. A product would first
        # make a tensor of the number, by four more operators.
        bias = bias + bias
        gated = selective_scan(
            x,
            time_step,
            -torch.exp(at_least_float32(self.A_log)),
            B,
            C,
            self.D,
            time_step_bias=bias,
            gate=gate,
            order=layout.paths.order,
            gaps=layout.paths.gaps,
            hole_time_step=self.hole_time_step(bias, layout.alignment),
            direction_B=self.direction_B,
            moves=layout.paths.moves,
            backend=self.config.scan_backend,
        )
        mixed = self.out_proj(gated)
        if not with_output:
            return mixed, None
        paths = layout.paths
        scan = ScanInputs(time_step, bias, B, C, order=paths.order, direction_B=self.direction_B, moves=paths.moves)
        return mixed, MixerOutput(gated, mixed, (scan,)).detach()


class PlainMambaDepthwise(nn.Module):
    """Depthwise 3x3 convolution on the grid, batch norm, GELU; used after the first layer of L1."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__()
        self.convolution = PlainMambaGridConvolution(config, config.hidden_size, kernel_size=3, bias=False)
        self.normalization = nn.BatchNorm1d(config.hidden_size)

    def forward(self, hidden_states: Tensor, layout: PlainMambaTokenLayout) -> Tensor:
        hidden_states = self.convolution(hidden_states, layout)
        # Samples and tokens are flattened into one axis, because statistics are computed over both.
        return F.gelu(self.normalization(hidden_states.flatten(0, 1)).view_as(hidden_states))


class PlainMambaLayer(GradientCheckpointingLayer):
    def __init__(self, config: PlainMambaConfig, layer_idx: int, drop_path_rate: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mixer = PlainMambaMixer(config)
        self.drop_path = DropPath(drop_path_rate)
        self.depthwise = PlainMambaDepthwise(config) if layer_idx in config.depthwise_layers else None

    def forward(
        self, hidden_states: Tensor, layout: PlainMambaTokenLayout, with_output: bool, scale: Tensor | None
    ) -> tuple[Tensor, MixerOutput | None]:
        """Returns the layer's output and, if requested, the results of its mixer that pruning methods can use."""
        mixed, mixer_output = self.mixer(scale_tokens(self.norm(hidden_states), scale), layout, with_output)
        hidden_states = hidden_states + self.drop_path(mixed)
        if self.depthwise is not None:
            hidden_states = self.depthwise(hidden_states, layout)
        return hidden_states, mixer_output


class PlainMambaPreTrainedModel(TokenPruningMixin, PreTrainedModel):
    config: PlainMambaConfig
    config_class = PlainMambaConfig
    base_model_prefix = "plainmamba"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["PlainMambaEmbeddings", "PlainMambaLayer"]
    _keep_in_fp32_modules_strict = ["A_log", "D", "direction_B"]
    _can_record_outputs = {
        "hidden_states": PlainMambaLayer,
        "mixer_states": OutputRecorder(PlainMambaMixer, index=0),
    }
    # The format of published weights, see `conversion.OfficialFormat`.
    official_names = [
        (r"plainmamba\.embeddings\.position_embeddings", r"backbone.pos_embed"),
        (r"plainmamba\.embeddings\.stem\.0\.convolution\.(.+)", r"backbone.patch_embed.stem.0.\1"),
        (r"plainmamba\.embeddings\.stem\.0\.normalization\.(.+)", r"backbone.patch_embed.stem.1.\1"),
        # The published list holds a convolution, a norm and a ReLU for each of our blocks.
        (
            r"plainmamba\.embeddings\.stem\.(\d+)\.convolution\.(.+)",
            lambda match: f"backbone.patch_embed.convs.{3 * int(match[1]) - 3}.{match[2]}",
        ),
        (
            r"plainmamba\.embeddings\.stem\.(\d+)\.normalization\.(.+)",
            lambda match: f"backbone.patch_embed.convs.{3 * int(match[1]) - 2}.{match[2]}",
        ),
        (r"plainmamba\.embeddings\.projection\.(.+)", r"backbone.patch_embed.projection.\1"),
        (r"plainmamba\.layers\.(\d+)\.mixer\.direction_B", r"backbone.layers.\1.mamba.direction_Bs"),
        (r"plainmamba\.layers\.(\d+)\.mixer\.(.+)", r"backbone.layers.\1.mamba.\2"),
        (r"plainmamba\.layers\.(\d+)\.norm\.(.+)", r"backbone.layers.\1.norm.\2"),
        (r"plainmamba\.layers\.(\d+)\.depthwise\.convolution\.(.+)", r"backbone.layers.\1.dw.0.\2"),
        (r"plainmamba\.layers\.(\d+)\.depthwise\.normalization\.(.+)", r"backbone.layers.\1.dw.1.\2"),
        (r"plainmamba\.norm\.(.+)", r"backbone.ln1.\1"),
        (r"classifier\.(.+)", r"head.fc.\1"),
    ]
    official_marks = ("backbone.layers.0.mamba.A_log",)
    official_signs = ()
    official_weight_keys = ("state_dict",)
    official_prefixes = ()
    official_ignored = ()
    # Training keeps a second set of weights as buffers with these names, and swaps the two before saving: in a file,
    # the averaged weights are under the model's own names, and the last weights are under these.
    official_last_weights = ("ema_backbone_", "ema_head_")

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | PlainMambaGridConvolution):
            init_as_in_torch(module.weight, module.bias)
        elif isinstance(module, PlainMambaEmbeddings):
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, PlainMambaMixer):
            init_time_step_projection(module.dt_proj, self.config)
            init_decay(module.A_log)
            init.ones_(module.D)
            init.trunc_normal_(module.direction_B, std=self.config.initializer_range)

    @classmethod
    def official_weight_key(cls, config: PlainMambaConfig) -> str:
        return "state_dict"

    @classmethod
    def options_of_official(cls, official: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
        num_labels = official.shape("head.fc.weight", 2)[0]
        return cls.backbone_options_of_official(official, overrides) | {"num_labels": num_labels}

    @classmethod
    def backbone_options_of_official(cls, official: Any, overrides: Mapping[str, Any]) -> dict[str, Any]:
        stem_channels, num_channels, _, _ = official.shape("backbone.patch_embed.stem.0.weight", 4)
        patch_size = 2 * official.shape("backbone.patch_embed.projection.weight", 4)[-1]
        _, num_patches, _ = official.shape("backbone.pos_embed", 3)
        depthwise = {int(match[1]) for key in official if (match := re.match(r"backbone\.layers\.(\d+)\.dw\.", key))}
        convolutions = [key for key in official if re.fullmatch(r"backbone\.patch_embed\.convs\.\d+\.weight", key)]
        return official.mixer_options("backbone.layers.{}.mamba") | {
            "image_size": overrides.get("image_size") or official.square_side(num_patches) * patch_size,
            "patch_size": patch_size,
            "num_channels": num_channels,
            "stem_channels": stem_channels,
            "num_stem_convs": sum(official[key].ndim == 4 for key in convolutions),
            "conv_kernel": official.shape("backbone.layers.0.mamba.conv2d.weight", 4)[-1],
            "depthwise_layers": sorted(depthwise),
        }

    @classmethod
    def complete_official(
        cls, config: PlainMambaConfig, official: Any, expected: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Adds batch norm's counters, which old checkpoints lack and no forward pass reads."""
        counters = {name: tensor for name, tensor in expected.items() if name.endswith("num_batches_tracked")}
        return {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in counters.items()} | official


class PlainMambaModel(PlainMambaPreTrainedModel):
    """PlainMamba without a head: `last_hidden_state` is normalised, and `pooler_output` is its mean over tokens."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__(config)
        self.embeddings = PlainMambaEmbeddings(config)
        rates = drop_path_rates(config)
        self.layers = nn.ModuleList([PlainMambaLayer(config, i, rates[i]) for i in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.final_layer_norm_eps)
        self.token_predictors = nn.ModuleDict()
        self.add_pruning_parameters(config.token_pruning)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self, pixel_values: Tensor, interpolate_pos_encoding: bool = True, **kwargs: Unpack[VisionMambaKwargs]
    ) -> PrunedModelOutput:
        """
        Args:
            pixel_values: shape (batch, channels, height, width), normalised.
            interpolate_pos_encoding: resize the position embeddings if the grid of patches differs from that in the
                configuration; False: raise an error for such images.
        """
        token_pruning = self._pruning_of_call(kwargs)
        hidden_states, grid = self.embeddings(pixel_values, interpolate_pos_encoding)
        layout = PlainMambaTokenLayout.of_grid(grid, hidden_states.device)
        encoding = encode(self.layers, self.token_predictors, hidden_states, layout, token_pruning)
        encoding = encoding.with_states(self.norm(encoding.hidden_states))
        return PrunedModelOutput(
            last_hidden_state=encoding.hidden_states,
            pooler_output=mean_over_patches(encoding.hidden_states, encoding.sizes),
            **encoding.stages,
        )


class PlainMambaForImageClassification(PlainMambaPreTrainedModel, Classifier):
    """PlainMamba with a linear classifier on the mean of the remaining tokens."""

    def __init__(self, config: PlainMambaConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.plainmamba = PlainMambaModel(config)
        self.classifier = image_classifier(config)
        self.post_init()


class PlainMambaBackbone(FeatureMaps, PlainMambaModel):
    """PlainMamba as a feature extractor: see `FeatureMaps`."""


__all__ = ["PlainMambaBackbone", "PlainMambaForImageClassification", "PlainMambaModel", "PlainMambaPreTrainedModel"]
