"""The common part of the bidirectional vision Mambas (Vim, VideoMamba): everything except their names and the form of
their inputs.

Each mixer scans the tokens in both directions, with separate parameters for each direction. The tokens include a class
token, which classifiers use.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .causal_convolution import causal_conv1d
from .configuration_bidirectional import BidirectionalConfig
from .mixer_output import MixerOutput, ScanInputs
from .modeling_common import (
    DropPath,
    HoleTimeStep,
    TimeStepProjection,
    TokenPruningMixin,
    VisionMambaKwargs,
    check_pixel_values,
    drop_path_rates,
    init_as_in_torch,
    init_decay,
    init_time_step_projection,
    mean_over_patches,
    resize_position_embeddings,
)
from .precision import at_least_float32
from .pruned_layers import encode, scale_tokens
from .pruned_outputs import PrunedModelOutput
from .pruning_block_selection import BlockSelector, run_block
from .pruning_stage import TokenView
from .rotary_embedding import grid_rotation, rotate
from .selective_scan import selective_scan
from .token_pruning import gather_tokens, path_gaps, split_token


class BidirectionalTokenLayout(NamedTuple):
    """The positions of the remaining tokens in the full sequence of patches and class token.

    Indices for the layers are int32, which the kernels expect, so that no layer has to convert them.

    Attributes:
        grid: shape of the full grid, in patches: (height, width), of a video (time, height, width).
        cls_id: the class token's position in the full sequence. None: there is no class token.
        cls_row: its row among the remaining tokens, int64 (batch, 1).
        backward_order: the remaining tokens in the order of the backward direction, shape (1, 1, n).
        kept: the position of each token in the full sequence, shape (batch, n). None: no token was dropped.
        gaps: for the forward and the backward direction the distances between tokens, each (batch, 1, n), in the order
            of the direction. None: no alignment, or nothing was dropped.
        alignment: how the scans cross the gaps.
        view: see `TokenLayout`; its stand-ins have the shape (batch, positions of the full sequence). Without
            stand-ins, convolutions run over the sequence of remaining tokens.
        rotation: the rotary embedding of all tokens of the full sequence, see `rotary_embedding`. None: no rotation.
        selects_blocks: whether layers choose which directions run, see `pruning_block_selection`.
    """

    grid: tuple[int, ...]
    cls_id: int | None
    cls_row: Tensor | None
    backward_order: Tensor
    kept: Tensor | None = None
    gaps: tuple[Tensor, Tensor] | None = None
    alignment: str = "none"
    view: TokenView = TokenView()
    rotation: Tensor | None = None
    selects_blocks: bool = False

    @classmethod
    def of_grid(
        cls, grid: tuple[int, ...], cls_id: int | None, batch: int, device: torch.device
    ) -> "BidirectionalTokenLayout":
        cls_row = None if cls_id is None else torch.full((batch, 1), cls_id, device=device)
        return cls(grid, cls_id, cls_row, cls._backwards(math.prod(grid) + int(cls_id is not None), device))

    def keep(self, kept: Tensor, alignment: str, view: TokenView) -> "BidirectionalTokenLayout":
        cls_row = None if self.cls_id is None else (kept < self.cls_id).sum(dim=1, keepdim=True)
        gaps = None
        if alignment != "none":
            gaps = path_gaps(kept).int().unsqueeze(1), path_gaps(-kept.flip(1)).int().unsqueeze(1)
        if view.stand_ins is not None:
            view = view._replace(stand_ins=self._in_sequence(view.stand_ins, self.cls_id, cls_row).int())
        return self._replace(
            cls_row=cls_row,
            backward_order=self._backwards(kept.shape[1], kept.device),
            kept=kept.int(),
            gaps=gaps,
            alignment=alignment,
            view=view,
        )

    def of_images(self, images: Tensor) -> "BidirectionalTokenLayout":
        """The layout of some of the images, given by their int64 indices in the batch."""

        def of(values: Any) -> Any:
            return None if values is None else values.index_select(0, images)

        gaps = None if self.gaps is None else (of(self.gaps[0]), of(self.gaps[1]))
        view = TokenView(of(self.view.scale), of(self.view.stand_ins))
        return self._replace(cls_row=of(self.cls_row), kept=of(self.kept), gaps=gaps, view=view)

    def rotate(self, hidden_states: Tensor) -> Tensor:
        """The remaining tokens (batch, n, hidden), rotated by their positions."""
        if self.rotation is None:
            return hidden_states
        return rotate(hidden_states, self.rotation if self.kept is None else self.rotation[self.kept.long()])

    @staticmethod
    def _in_sequence(stand_ins: Tensor, cls_id: int | None, cls_row: Tensor | None) -> Tensor:
        """Converts stand-ins for grid cells, as indices of patches, to stand-ins for all positions, as indices of all
        tokens: the class token stands in for itself."""
        if cls_id is None or cls_row is None:
            return stand_ins
        rows = stand_ins + (stand_ins >= cls_row).long()
        before, after = rows.tensor_split([cls_id], dim=1)
        return torch.cat([before, cls_row, after], dim=1)

    @staticmethod
    def _backwards(num_tokens: int, device: torch.device) -> Tensor:
        return torch.arange(num_tokens - 1, -1, -1, dtype=torch.int32, device=device).view(1, 1, -1)


class BidirectionalEmbeddings(nn.Module):
    """Converts pixel values to tokens: patch projection, class token (if any) at its position, position embeddings."""

    projection: nn.Conv2d | nn.Conv3d

    def __init__(self, config: BidirectionalConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = self._make_projection(config)
        num_patches = math.prod(config.grid_size[-2:])  # in one image or frame
        # `class_token` is its name in saved models; elsewhere, it is called `cls_token`.
        if config.cls_token_id(num_patches) is None:
            self.class_token = None
        else:
            self.class_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
            num_patches += 1
        self.position_embeddings = nn.Parameter(torch.zeros(1, num_patches, config.hidden_size))

    def _make_projection(self, config: BidirectionalConfig) -> nn.Conv2d | nn.Conv3d:
        return nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_spacing)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        check_pixel_values(pixel_values, self.config)
        grid = self.config.grid_size_for(*self.config.input_size_of(pixel_values.shape))
        if min(grid) < 1:
            raise ValueError(f"`pixel_values` has shape {tuple(pixel_values.shape)}: too small for {self._one_patch}.")
        patches = self._project(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)
        cls_token = None if self.class_token is None else self.class_token.expand(patches.shape[0], -1, -1)
        return self._insert(patches, cls_token) + self._positions(grid, interpolate_pos_encoding)

    @property
    def _one_patch(self) -> str:
        return f"one patch of {self.config.patch_size} x {self.config.patch_size} pixels"

    def _project(self, pixel_values: Tensor) -> Tensor:
        """(batch, hidden, *grid)"""
        return self.projection(pixel_values)

    def _positions(self, grid: tuple[int, ...], interpolate: bool) -> Tensor:
        patches: Tensor = self.position_embeddings
        cls_token: Tensor | None = None
        if (cls_id := self.config.cls_token_id(math.prod(self.config.grid_size[-2:]))) is not None:
            patches, cls_token = split_token(patches, cls_id)
        patches = self._positions_on_grid(patches)
        return self._insert(resize_position_embeddings(patches, self.config.grid_size, grid, interpolate), cls_token)

    def _positions_on_grid(self, positions: Tensor) -> Tensor:
        """Position embeddings (1, patches, hidden) for all patches of the configuration's grid, from those of an
        image's patches."""
        return positions

    def _insert(self, patches: Tensor, cls_token: Tensor | None) -> Tensor:
        """All tokens: the patches with the class token, if there is one, at its position."""
        cls_id = self.config.cls_token_id(patches.shape[1])
        if cls_id is None or cls_token is None:
            return patches
        before, after = patches.tensor_split([cls_id], dim=1)
        return torch.cat([before, cls_token, after], dim=1)


class CausalConvolution(nn.Module):
    """Depthwise convolution of each token with those visited before it in this direction, followed by SiLU.

    It is not an `nn.Conv1d`, because libraries that wrap these (PEFT, quantisation) expect them to map sequences to
    sequences.
    """

    def __init__(self, config: BidirectionalConfig, reverse: bool) -> None:
        super().__init__()
        self.config, self.reverse = config, reverse
        self.weight = nn.Parameter(torch.empty(config.intermediate_size, 1, config.conv_kernel))
        self.bias = nn.Parameter(torch.empty(config.intermediate_size))

    def forward(self, hidden_states: Tensor, layout: BidirectionalTokenLayout) -> Tensor:
        """`hidden_states` and result (batch, n, channels)."""
        stand_ins = layout.view.stand_ins
        kept = None if stand_ins is None else layout.kept
        return causal_conv1d(
            hidden_states, self.weight, self.bias, self.reverse, kept, stand_ins, self.config.scan_backend
        )


class DirectedScan(nn.Module):
    """One direction of the mixer: causal depthwise convolution, then the selective scan.

    All tokens stay in raster order. For the reversed direction, only the narrow projections for its steps are reversed.
    """

    def __init__(self, config: BidirectionalConfig, reverse: bool) -> None:
        super().__init__()
        self.config, self.reverse = config, reverse
        width = config.intermediate_size
        self.conv1d = CausalConvolution(config, reverse)
        # The parts of the projection: time-step features, B and C.
        self.sizes = [int(config.time_step_rank), config.state_size, config.state_size]
        self.x_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.dt_proj = TimeStepProjection(self.sizes[0], width)
        self.hole_time_step = HoleTimeStep(width)
        self.A_log = nn.Parameter(torch.empty(width, config.state_size))
        self.D = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor, gate: Tensor, layout: BidirectionalTokenLayout) -> tuple[Tensor, ScanInputs]:
        """Gated output of the scan, and its inputs; `x`, `gate` and output (batch, n, channels)."""
        x = self.conv1d(x, layout)
        projected = self.x_proj(x)
        features, B, C = (projected.flip(1) if self.reverse else projected).split(self.sizes, dim=-1)
        time_step, bias = self.dt_proj(features)
        gated = selective_scan(
            x,
            time_step,
            -torch.exp(at_least_float32(self.A_log)),
            B,
            C,
            self.D,
            time_step_bias=bias,
            gate=gate,
            order=layout.backward_order if self.reverse else None,
            gaps=None if layout.gaps is None else layout.gaps[self.reverse],
            hole_time_step=self.hole_time_step(bias, layout.alignment),
            backend=self.config.scan_backend,
        )
        return gated, ScanInputs(time_step, bias, B, C, reversed=self.reverse)


class BidirectionalMixer(nn.Module):
    """A scan in each direction, between projections shared by both."""

    def __init__(self, config: BidirectionalConfig) -> None:
        super().__init__()
        self.averages_directions = config.averages_directions
        self.in_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.forward_scan = DirectedScan(config, reverse=False)
        self.backward_scan = DirectedScan(config, reverse=True)
        self.block_selector: BlockSelector | None = None  # `add_pruning_parameters` creates it
        self.out_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(
        self, hidden_states: Tensor, layout: BidirectionalTokenLayout, with_output: bool
    ) -> tuple[Tensor, MixerOutput | None]:
        """Returns the mixed tokens (batch, n, hidden) and, if requested, the results that pruning methods can use."""
        projected = self.in_proj(hidden_states)
        if layout.selects_blocks and not with_output:
            return self._project(self._run_selected(projected, layout)), None
        x, gate = projected.chunk(2, dim=-1)
        forward_gated, forward = self.forward_scan(x, gate, layout)
        backward_gated, backward = self.backward_scan(x, gate, layout)
        gated = forward_gated + backward_gated
        mixed = self._project(gated)
        if not with_output:
            return mixed, None
        gated = gated / 2 if self.averages_directions else gated
        return mixed, MixerOutput(gated, mixed, (forward, backward), backward_gated).detach()

    def _run_selected(self, projected: Tensor, layout: BidirectionalTokenLayout) -> Tensor:
        """Gated output of the directions that the block selector chooses, (batch, n, channels)."""
        if self.block_selector is None:
            raise ValueError("this layer has no block selector: `model.set_token_pruning` creates it.")
        assert layout.cls_row is not None  # a configuration without a class token refuses `block_keep_ratio`
        gates = self.block_selector(gather_tokens(projected, layout.cls_row).squeeze(1))
        x, gate = projected.chunk(2, dim=-1)
        forward = run_block(self.forward_scan, gates[:, 0], x, gate, layout, self.training)
        return forward + run_block(self.backward_scan, gates[:, 1], x, gate, layout, self.training)

    def _project(self, gated: Tensor) -> Tensor:
        mixed = self.out_proj(gated)
        return mixed / 2 if self.averages_directions else mixed  # here (there is no bias), tokens are narrower


class StreamRMSNorm(nn.RMSNorm):
    """Normalises the residual stream in float32; the result has the precision of the weights."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        normalized = F.rms_norm(hidden_states, self.normalized_shape, eps=self.eps)
        return self.weight * normalized.to(self.weight.dtype)


class BidirectionalLayer(GradientCheckpointingLayer):
    """A norm and a mixer, and the rotation before the next layer, if any."""

    def __init__(self, config: BidirectionalConfig, layer_idx: int, drop_path_rate: float) -> None:
        super().__init__()
        self.rotates = config.rotates_tokens and layer_idx + 1 < config.num_hidden_layers
        self.norm = StreamRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = BidirectionalMixer(config)
        self.drop_path = DropPath(drop_path_rate)

    def forward(
        self, hidden_states: Tensor, layout: BidirectionalTokenLayout, with_output: bool, scale: Tensor | None
    ) -> tuple[Tensor, MixerOutput | None]:
        """Returns the layer's output and, if requested, the results of its mixer that pruning methods can use.

        `hidden_states` is the residual stream, which is float32 in every precision (float64 if the weights are).
        """
        mixed, mixer_output = self.mixer(scale_tokens(self.norm(hidden_states), scale), layout, with_output)
        hidden_states = hidden_states + self.drop_path(mixed).to(hidden_states.dtype)
        return layout.rotate(hidden_states) if self.rotates else hidden_states, mixer_output


class BidirectionalPreTrainedModel(TokenPruningMixin, PreTrainedModel):
    """Base class of all models of a family.

    Attributes:
        embeddings_class: creates tokens from the family's inputs.
    """

    embeddings_class: ClassVar[type[BidirectionalEmbeddings]] = BidirectionalEmbeddings
    config: BidirectionalConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]
    supports_gradient_checkpointing = True
    _no_split_modules = ["BidirectionalEmbeddings", "BidirectionalLayer"]
    _keep_in_fp32_modules_strict = ["A_log", "D"]
    _can_record_outputs = {
        "hidden_states": BidirectionalLayer,
        "mixer_states": OutputRecorder(BidirectionalMixer, index=0),
        "block_gates": OutputRecorder(BlockSelector),
    }
    # The format of published weights, see `conversion.OfficialFormat`.
    official_names = [
        (r"\w+\.embeddings\.class_token", r"cls_token"),
        (r"\w+\.embeddings\.position_embeddings", r"pos_embed"),
        (r"\w+\.embeddings\.projection\.(.+)", r"patch_embed.proj.\1"),
        (r"\w+\.layers\.(\d+)\.mixer\.backward_scan\.A_log", r"layers.\1.mixer.A_b_log"),
        (r"\w+\.layers\.(\d+)\.mixer\.backward_scan\.D", r"layers.\1.mixer.D_b"),
        (r"\w+\.layers\.(\d+)\.mixer\.backward_scan\.(\w+)\.(.+)", r"layers.\1.mixer.\2_b.\3"),
        (r"\w+\.layers\.(\d+)\.mixer\.(?:forward_scan\.)?(.+)", r"layers.\1.mixer.\2"),
        (r"\w+\.layers\.(\d+)\.norm\.(.+)", r"layers.\1.norm.\2"),
        (r"\w+\.norm\.(.+)", r"norm_f.\1"),
        (r"classifier\.(.+)", r"head.\1"),
    ]
    official_marks = ("layers.0.mixer.A_b_log",)
    official_signs: ClassVar[tuple[str, ...]] = ()
    official_weight_keys: ClassVar[tuple[str, ...]] = ("model",)
    official_prefixes: ClassVar[tuple[str, ...]] = ()
    official_ignored: ClassVar[tuple[str, ...]] = ()
    official_last_weights = ()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d | nn.Conv3d | CausalConvolution):
            init_as_in_torch(module.weight, module.bias)
        elif isinstance(module, BidirectionalMixer):
            # The residual stream is the sum of all layers' outputs.
            init_as_in_torch(module.out_proj.weight, scale=self.config.num_hidden_layers**-0.5)
        elif isinstance(module, BidirectionalEmbeddings):
            if module.class_token is not None:
                init.trunc_normal_(module.class_token, std=self.config.initializer_range)
            init.trunc_normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, DirectedScan):
            init_time_step_projection(module.dt_proj, self.config)
            init_decay(module.A_log)
            init.ones_(module.D)

    @classmethod
    def official_weight_key(cls, config: BidirectionalConfig) -> str | None:
        return "model"

    @staticmethod
    def _layout_of_official(
        official: Any, overrides: Mapping[str, Any], num_channels: int, patch_size: int
    ) -> dict[str, Any]:
        """Options that published tensors imply in all of these families, in addition to their projection and head."""
        stride = overrides.get("patch_stride") or patch_size
        image_size = overrides.get("image_size")
        if image_size is None:
            _, num_tokens, _ = official.shape("pos_embed", 3)
            image_size = (official.square_side(num_tokens - 1) - 1) * stride + patch_size
        return official.mixer_options("layers.{}.mixer") | {
            "image_size": image_size,
            "patch_size": patch_size,
            "patch_stride": stride,
            "num_channels": num_channels,
            "conv_kernel": official.shape("layers.0.mixer.conv1d.weight", 3)[-1],
        }

    @classmethod
    def complete_official(
        cls, config: BidirectionalConfig, official: Any, expected: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        return official


class BidirectionalModel(BidirectionalPreTrainedModel):
    """The model without a head: `last_hidden_state` is normalised; `pooler_output` is the class token, or the mean of
    the remaining tokens if there is no class token."""

    def __init__(self, config: BidirectionalConfig) -> None:
        super().__init__(config)
        self.embeddings = self.embeddings_class(config)
        rates = drop_path_rates(config)
        self.layers = nn.ModuleList([BidirectionalLayer(config, i, rates[i]) for i in range(config.num_hidden_layers)])
        self.norm = StreamRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
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
            pixel_values: normalised, images (batch, channels, height, width) or, where the model is made for them,
                videos (batch, frames, channels, height, width).
            interpolate_pos_encoding: resize the position embeddings if the grid of patches differs from that in the
                configuration; False: raise an error for such inputs.
        """
        token_pruning = self._pruning_of_call(kwargs)
        hidden_states = at_least_float32(self.embeddings(pixel_values, interpolate_pos_encoding))
        grid = self.config.grid_size_for(*self.config.input_size_of(pixel_values.shape))
        cls_id = self.config.cls_token_id(math.prod(grid))
        layout = BidirectionalTokenLayout.of_grid(grid, cls_id, hidden_states.shape[0], hidden_states.device)
        if self.config.rotates_tokens:
            rotation = grid_rotation(grid, self.config.hidden_size, hidden_states.device, hidden_states.dtype)
            layout = layout._replace(rotation=rotation)
        if token_pruning is not None and "block_keep_ratio" in token_pruning:
            layout = layout._replace(selects_blocks=True)
        encoding = encode(self.layers, self.token_predictors, layout.rotate(hidden_states), layout, token_pruning)
        encoding = encoding.with_states(self.norm(encoding.hidden_states))
        last_hidden_state, cls_row = encoding.hidden_states, encoding.layout.cls_row
        if cls_row is None:
            pooled = mean_over_patches(last_hidden_state, encoding.sizes)
        else:
            pooled = gather_tokens(last_hidden_state, cls_row).squeeze(1)
        return PrunedModelOutput(last_hidden_state=last_hidden_state, pooler_output=pooled, **encoding.stages)
