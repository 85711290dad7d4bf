"""The common part of all families' configurations, and the interface that each family implements."""

import copy
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .feature_pyramid import check_pyramid
from .flops import FlopCount, schedule_for_budget
from .label_maps import complete_label_maps, names_by_id
from .pruning_importances import IMPORTANCES, OF_BACKWARD_SCAN
from .pruning_options import (
    TokenPruning,
    check_block_keep_ratio,
    check_layers,
    check_token_pruning,
    inherit_method,
    plain_value,
    pruning_method,
)
from .publication import Paper, PublishedModel


# Entries of a model's output; see `pruned_outputs.StageFields`.
STAGE_FIELDS = ("kept_tokens", "token_scores", "merged_tokens")
FEATURE_FILLS = ("last", "merged")
FEATURE_NORMS = ("final", "per_level", "last", "none")
FEATURE_SOURCES = ("stream", "mixer")
_BACKBONE_OUTPUTS = ("out_features", "out_indices")


@strict
class VisionMambaConfig(BackboneConfigMixin, PreTrainedConfig):
    """Options of every vision Mamba. The class of each family also defines everything that the rest of the package
    needs to know about the family.

    Attributes:
        presets: options of the published models by name.
        published: location of the weights of these models, and results reported in papers, by the same names.
        published_images: the same for image models, in a family whose presets are video models.
        published_segmentation: the same for the presets with UPerNet as the head.
        paper: the family's paper.
        cls_token: position of the class token among the patches: "none", "middle" or "first".
        num_scans: number of scans with their own parameters, which is also the number of Δ, B and C per token.
        has_backward_scan: whether one of them visits the tokens from the last to the first.

    Args:
        image_size: size in pixels, or (height, width), of the position embeddings. Other sizes work too.
        patch_size: side of a patch in pixels.
        num_channels: number of image channels.
        hidden_size: width of the residual stream.
        num_hidden_layers: number of layers.
        state_size: state size of the selective scan, per channel.
        expand: the mixer has `expand * hidden_size` channels.
        conv_kernel: size of the mixer's depthwise convolution.
        time_step_rank: rank of the time steps' projection; `"auto"` is ceil(hidden_size / 16).
        time_step_min, time_step_max, time_step_floor: range of the time steps at initialisation, as in Mamba.
            PlainMamba's start near the squares of such values, because their bias counts twice. The official code later
            sets this bias to 0 (Vim's: only in the backward scan), so its time steps start near 0.7.
        initializer_range: standard deviation of the truncated normal initialisation of embeddings, the classifier, and
            most projections of PlainMamba and VideoMamba. Other weights start as in the official code, except for the
            time steps and VideoMamba's class token, which is 0 there.
        drop_path_rate: stochastic depth rate of the last layer; it increases linearly from 0 in the first.
        token_pruning: None for a dense model, or a dict with `layers`, `keep_ratios`, `alignment`, `importance`,
            `method` and `block_keep_ratio`, see `pruning_options.check_token_pruning`. Instead of `keep_ratios`, it may
            have `flops_reduction`, the fraction of the published FLOPs to remove, for which a schedule is found;
            `layers` is then optional. Whichever form is set, reading it returns checked and complete options.
        scan_backend: kernel of the scan, see `selective_scan.selective_scan`.
        feature_fill: content of a backbone's feature maps at dropped tokens: `last`, the last state of the token;
            `merged`, for methods that merge, the state of the token into which it was merged.
        feature_norm: norm of a backbone's feature maps: `final`, the model's last norm for all of them; `per_level`, a
            separate norm for each, and the model's for the last layer's; `last`, only the last layer's is normalised;
            `none`.
        feature_source: what a backbone's feature maps contain: `stream`, the residual stream after a layer; `mixer`,
            what the layer's mixer adds to it.
        feature_pyramid: None: a backbone's feature maps have the resolution of the patches; `vim` or `simple`: strides
            of 4, 8, 16 and 32 pixels, or the last of these if there are fewer maps; see `feature_pyramid`.

    Raises:
        ValueError: a value is not allowed; the message says what was given and what is allowed.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    published: ClassVar[dict[str, PublishedModel]] = {}
    published_images: ClassVar[dict[str, PublishedModel]] = {}
    published_segmentation: ClassVar[dict[str, PublishedModel]] = {}
    paper: ClassVar[Paper]
    cls_token: ClassVar[str] = "none"
    num_scans: ClassVar[int] = 1
    has_backward_scan: ClassVar[bool] = False

    id2label: dict | list | tuple | None = None  # type: ignore[assignment]
    label2id: dict | list | tuple | None = None  # type: ignore[assignment]
    image_size: int | list[int] | tuple[int, int] = 224
    patch_size: int = 16
    num_channels: int = 3
    hidden_size: int = 192
    num_hidden_layers: int = 24
    state_size: int = 16
    expand: int = 2
    conv_kernel: int = 4
    time_step_rank: int | str = "auto"
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    initializer_range: float = 0.02
    drop_path_rate: float | int = 0.0
    token_pruning: dict | None = None  # reading it returns a `TokenPruning`, see `_TokenPruningOption`
    scan_backend: str = "auto"
    feature_fill: str = "last"
    feature_norm: str = "final"
    feature_source: str = "stream"
    feature_pyramid: str | None = None
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VisionMambaConfig":
        """The configuration of a published model by name; `overrides` replace options."""
        if name not in cls.presets:
            raise ValueError(f"unknown preset {name!r} of {cls.__name__}; known presets are {list(cls.presets)}.")
        num_labels = {} if {"id2label", "label2id"} & overrides.keys() else {"num_labels": 1000}
        return cls(**{**num_labels, **cls.presets[name], **overrides})

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        kwargs.pop("stage_names", None)  # those of a saved configuration, which may have had another depth
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        if self.feature_source == "mixer" and "stem" in self.out_features:
            raise ValueError(
                "`feature_source` is 'mixer', but `out_features` has 'stem', before which there is no mixer."
            )
        check_pyramid(self.feature_pyramid, self.patch_spacing, len(self.out_features))
        for name, labels in complete_label_maps({"id2label": self.id2label, "label2id": self.label2id}).items():
            setattr(self, name, labels)
        super().__post_init__(**kwargs)
        _ = self.token_pruning  # raises an error if it is not valid

    def _check_sizes(self) -> None:
        names = [
            "patch_size",
            "num_channels",
            "hidden_size",
            "num_hidden_layers",
            "state_size",
            "expand",
            "conv_kernel",
        ]
        if self.time_step_rank != "auto":
            names.append("time_step_rank")
        for name in names:
            self._check_whole_number(name, least=1)
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"`time_step_min` is {self.time_step_min} and `time_step_max` {self.time_step_max}; the first must be "
                "greater than 0, and the second at least as large."
            )
        if not 0 <= self.drop_path_rate < 1:
            raise ValueError(f"`drop_path_rate` is {self.drop_path_rate}; it must be in [0, 1).")
        for name, allowed in (
            ("feature_fill", FEATURE_FILLS),
            ("feature_norm", FEATURE_NORMS),
            ("feature_source", FEATURE_SOURCES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` is {getattr(self, name)!r}; allowed values are {list(allowed)}.")
        if min(self.grid_size) < 1:
            raise ValueError(
                f"`image_size` is {self.image_size}, which is too small for a patch of {self.patch_size} pixels."
            )

    def _check_whole_number(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` is {value!r}; it must be a whole number of at least {least}.")

    @property
    def keys_to_ignore_at_inference(self) -> list[str]:
        """Outputs that transformers' `Trainer` excludes from the predictions."""
        stages = range(len(self.token_pruning["layers"]) if self.token_pruning else 0)
        return [f"{field}_{stage}" for field in STAGE_FIELDS for stage in stages]

    @property
    def label_names(self) -> list[str]:
        """The names of the labels in the order of their ids."""
        return names_by_id(self.id2label or {})

    def complete_token_pruning(self, token_pruning: dict[str, Any] | None) -> TokenPruning | None:
        """Checks pruning options against this configuration and completes them; a budget is turned into a schedule.

        Options without a `method` use the method of this configuration, with its `alignment`, `importance` and
        `block_keep_ratio` unless they specify their own, so that weights trained for a method can be given another
        budget. Where these options have parameters, they use its `layers`, too. If the model is dense,
        `pruning_methods.RECOMMENDED_METHOD` is used.

        Raises:
            ValueError: see `pruning_options.check_token_pruning` and `flops.schedule_for_budget`.
        """
        return self._complete(inherit_method(token_pruning, self._valid_token_pruning))

    @property
    def _valid_token_pruning(self) -> Any:
        """The schedule whose method others inherit: this configuration's own, or, if that is not valid, the one before
        it."""
        own = self.__dict__
        if own.get("_token_pruning_depth") is not None:  # it was valid for that depth
            return own["_token_pruning"]
        try:
            return None if own.get("_token_pruning") is None else self.token_pruning
        except ValueError:
            return own["_token_pruning_before"]

    def _complete(self, token_pruning: Any) -> TokenPruning | None:
        if token_pruning is None:
            return None
        if not isinstance(token_pruning, dict):
            raise ValueError(f"`token_pruning` is {token_pruning!r}; it must be None or a dict.")
        block_keep_ratio = check_block_keep_ratio(token_pruning)
        if block_keep_ratio is not None and not self.selects_blocks:
            raise ValueError(
                f"`token_pruning['block_keep_ratio']` is {block_keep_ratio}, but {type(self).__name__} cannot select "
                "blocks: this needs a class token and a separate scan for each direction, as in Vim and VideoMamba."
            )
        importance = token_pruning.get("importance")
        if importance in OF_BACKWARD_SCAN and not self.has_backward_scan:
            raise ValueError(
                f"`token_pruning['importance']` is {importance!r}, but {type(self).__name__}'s models have no backward "
                f"scan; allowed values are {list(self.importances)}."
            )
        if "flops_reduction" in token_pruning:
            token_pruning = dict(token_pruning)
            budget = plain_value(token_pruning.pop("flops_reduction"))
            if "keep_ratios" in token_pruning:
                raise ValueError("`token_pruning` has both `flops_reduction` and `keep_ratios`; give one of them.")
            layers = token_pruning.get("layers")
            if layers is not None:
                layers = check_layers(layers, self.num_hidden_layers)
            method = pruning_method(token_pruning)
            token_pruning |= schedule_for_budget(self, budget, method, layers, block_keep_ratio)
        return check_token_pruning(token_pruning, self.num_hidden_layers)

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        for name in ("_token_pruning", "_token_pruning_depth", "_token_pruning_before"):
            values.pop(name, None)
        token_pruning = self.token_pruning
        return values | {"token_pruning": None if token_pruning is None else copy.deepcopy(dict(token_pruning))}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like transformers' method, except that the given options override those of the dict before anything is
        checked."""
        own = (set(cls.__dataclass_fields__) | set(_BACKBONE_OUTPUTS)) - set(PreTrainedConfig.__dataclass_fields__)
        given = {name: kwargs.pop(name) for name in own & set(kwargs)}
        # By default, a backbone returns the last layer's output, which depends on the depth: the given one, or one that
        # was edited in the file, whose `stage_names` are those of the former depth.
        last = (config_dict.get("stage_names") or [f"stage{config_dict.get('num_hidden_layers')}"])[-1:]
        is_default = config_dict.get("out_features") == last
        if is_default or given.keys() & set(_BACKBONE_OUTPUTS):  # each of the two options implies the other
            config_dict = {name: value for name, value in config_dict.items() if name not in _BACKBONE_OUTPUTS}
        if "token_pruning" in given:
            given["token_pruning"] = inherit_method(given["token_pruning"], config_dict.get("token_pruning"))
        return super().from_dict(config_dict | given, **(kwargs | complete_label_maps(kwargs)))

    @property
    def intermediate_size(self) -> int:
        """Number of channels inside the mixer."""
        return self.expand * self.hidden_size

    @property
    def input_size(self) -> tuple[int, ...]:
        """Size of the inputs for which the model is configured: (height, width) in pixels; for videos, (frames, height,
        width)."""
        return self.input_size_for(self.image_size)

    @property
    def modality(self) -> str:
        """What the model processes: "image" or "video"."""
        return "image" if len(self.input_size) == 2 else "video"

    def input_size_for(self, image_size: int | list[int] | tuple[int, ...]) -> tuple[int, ...]:
        """The input size for another image size, given in the form of `image_size`."""
        return self.image_height_width(image_size)

    def input_size_of(self, pixel_values_shape: Sequence[int]) -> tuple[int, ...]:
        """The input size, in the form of `input_size`, for pixel values of the given shape."""
        return (*pixel_values_shape[1:-3], *pixel_values_shape[-2:])

    def pixel_values_shape(self, batch_size: int) -> tuple[int, ...]:
        """(batch, channels, height, width); for videos, (batch, frames, channels, height, width)."""
        *frames, height, width = self.input_size
        return (batch_size, *frames, self.num_channels, height, width)

    @property
    def grid_size(self) -> tuple[int, ...]:
        """Size in patches of an image of `image_size`: (height, width); for videos, (time, height, width)."""
        return self.grid_size_for(*self.input_size)

    @property
    def patch_spacing(self) -> int:
        """Distance between patches in pixels."""
        return self.patch_size

    @property
    def frame_spacing(self) -> int:
        """Distance between the patches of a video in time, in frames."""
        return 1

    @property
    def importances(self) -> tuple[str, ...]:
        """The measures of importance that can be computed from the mixers' results, see `pruning_importances`."""
        return tuple(name for name in IMPORTANCES if self.has_backward_scan or name not in OF_BACKWARD_SCAN)

    @property
    def selects_blocks(self) -> bool:
        """Whether the mixers can choose which of their scans run, see `pruning_block_selection`. `count_flops` then has
        another argument, see `BidirectionalConfig`."""
        return False

    def cls_token_id(self, num_patches: int) -> int | None:
        """The class token's position in a sequence of this many patches and the class token; None if there is no class
        token."""
        return {"none": None, "middle": num_patches // 2, "first": 0}[self.cls_token]

    @staticmethod
    def image_height_width(image_size: int | list[int] | tuple[int, ...]) -> tuple[int, int]:
        """An image size as (height, width) in pixels."""
        height_width = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(height_width) != 2 or not all(isinstance(size, int) and size >= 1 for size in height_width):
            raise ValueError(f"`image_size` is {image_size!r}; it must be a number of pixels or (height, width).")
        return height_width

    def grid_size_for(self, *input_size: int) -> tuple[int, ...]:
        """The grid of patches for an input of this size, with the same number of dimensions; 0 if not even one patch
        fits."""
        raise NotImplementedError

    def count_flops(self, input_size: tuple[int, ...], tokens: Sequence[int]) -> FlopCount:
        """Multiply-adds for one input of this size, given the number of remaining patch tokens in each layer.

        The cost of the pruning method itself is not included: see `flops.count_flops`.
        """
        raise NotImplementedError


def pruned_config(config: Any) -> Any:
    """The configuration that has the pruning schedule: the model's own, or that of its backbone."""
    return config if hasattr(config, "token_pruning") else getattr(config, "backbone_config", None)


def has_head(config: Any) -> bool:
    """Whether a configuration is that of a model with a head on a backbone, rather than of a model of this package."""
    return pruned_config(config) is not config


class _TokenPruningOption:
    """A configuration's `token_pruning`, which is completed and checked when it is first read after it was set.

    `from_pretrained` sets options one by one on a configuration that already exists, so a schedule and the depth that
    it belongs to may come in any order.
    """

    def __get__(self, config: VisionMambaConfig | None, owner: type | None = None) -> TokenPruning | None:
        if config is None:
            return None  # becomes the dataclass's default
        token_pruning = config._token_pruning
        if token_pruning is None:
            return None
        if isinstance(token_pruning, TokenPruning) and config._token_pruning_depth == config.num_hidden_layers:
            return token_pruning
        config._token_pruning = config._complete(token_pruning)
        config._token_pruning_depth = config.num_hidden_layers
        return config._token_pruning

    def __set__(self, config: VisionMambaConfig, token_pruning: dict[str, Any] | None) -> None:
        before = config._valid_token_pruning
        config._token_pruning = inherit_method(token_pruning, before)
        config._token_pruning_depth, config._token_pruning_before = None, before


# Set outside the class body, where the dataclass would use it as the default value.
VisionMambaConfig.token_pruning = _TokenPruningOption()  # type: ignore[assignment]
