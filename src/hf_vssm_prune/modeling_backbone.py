"""Backbones for dense prediction, for all model families."""

import copy
from typing import Any

from torch import Tensor, nn
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.processing_utils import Unpack
from transformers.utils.generic import can_return_tuple

from .configuration_common import VisionMambaConfig
from .feature_pyramid import PYRAMIDS
from .modeling_common import VisionMambaKwargs
from .pruned_layers import full_states
from .pruned_outputs import PrunedBackboneOutput, stage_fields
from .token_pruning import split_token


class FeatureMaps(BackboneMixin):
    """Turns a model into a backbone, which returns maps of the full grid for images of any size.

    It comes before the model's class: `class NameBackbone(FeatureMaps, NameModel)`. `config.out_features` and
    `config.feature_source` say which layers' outputs become feature maps, `config.feature_fill` what the cell of a
    dropped token contains, `config.feature_norm` how maps are normalised, and `config.feature_pyramid` how their
    resolution changes. The class token is in no map.
    """

    has_attentions = False

    def __init__(self, config: VisionMambaConfig) -> None:
        super().__init__(config)
        model: Any = self
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        if config.feature_norm == "per_level":
            # For the last layer's output, the model's own norm is used.
            levels = [name for name in self.out_features if name != self.stage_names[-1]]
            model.hidden_states_norms = nn.ModuleDict({name: copy.deepcopy(model.norm) for name in levels})
        if config.feature_pyramid is not None:
            pyramid = PYRAMIDS[config.feature_pyramid]
            model.feature_pyramid = pyramid(config.hidden_size, config.patch_spacing, len(self.out_features))
        self.post_init()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(
        self: Any, pixel_values: Tensor, interpolate_pos_encoding: bool = True, **kwargs: Unpack[VisionMambaKwargs]
    ) -> PrunedBackboneOutput:
        """
        Args:
            pixel_values: shape (batch, channels, height, width), normalised.
            interpolate_pos_encoding: as in the models without a head.
        """
        wants_mixer_states = kwargs.get("output_mixer_states", False)
        if self.config.feature_source == "mixer":
            kwargs["output_mixer_states"] = True
        outputs = super(BackboneMixin, self).forward(  # type: ignore[misc]
            pixel_values, interpolate_pos_encoding, return_dict=True, **kwargs
        )
        grid = self.config.grid_size_for(*self.config.input_size_of(pixel_values.shape))
        states = full_states(self, outputs, self._pruning_of_call(kwargs))
        maps = [self._feature_map(name, each, grid) for name, each in zip(self.out_features, states, strict=True)]
        entries = stage_fields(outputs)
        if not wants_mixer_states:
            entries["mixer_states"] = None
        return PrunedBackboneOutput(
            feature_maps=tuple(self.with_pyramid(maps)), hidden_states=outputs.hidden_states, **entries
        )

    def with_pyramid(self: Any, maps: list[Tensor]) -> list[Tensor]:
        """The maps of the levels, from maps at the resolution of the patches."""
        return maps if self.config.feature_pyramid is None else self.feature_pyramid(maps)

    def _feature_map(self: Any, level: str, hidden_states: Tensor, grid: tuple[int, int]) -> Tensor:
        """The map (batch, hidden, height, width) of hidden states (batch, all tokens, hidden)."""
        if (cls_id := self.config.cls_token_id(grid[0] * grid[1])) is not None:
            hidden_states, _ = split_token(hidden_states, cls_id)
        norm = self.norm
        unnormed = self.config.feature_norm == "last" and level != self.stage_names[-1]
        if unnormed or self.config.feature_norm == "none":
            hidden_states = hidden_states.to(norm.weight.dtype)  # the residual stream may have a higher precision
        elif self.config.feature_norm == "per_level" and level in self.hidden_states_norms:
            hidden_states = self.hidden_states_norms[level](hidden_states)
        else:
            hidden_states = norm(hidden_states)
        return hidden_states.transpose(1, 2).unflatten(2, grid)
