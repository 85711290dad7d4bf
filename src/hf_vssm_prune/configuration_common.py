"""What the configurations of the two model families share."""

import math
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .flops import schedule_for_budget
from .label_maps import complete_label_maps, names_by_id
from .pruning_schedule import METHOD_OPTIONS, check_layers, check_token_pruning, pruning_method


@strict
class VisionMambaConfig(BackboneConfigMixin, PreTrainedConfig):
    """Options of every vision Mamba.

    Args:
        image_size: pixels, or (height, width), for which the position embeddings are laid out. Other sizes work too.
        patch_size: pixels along a side of a patch.
        num_channels: of the images.
        hidden_size: width of the residual stream.
        num_hidden_layers: depth.
        state_size: of the selective scan, for each channel.
        expand: channels inside the mixer are `expand * hidden_size`.
        conv_kernel: size of the mixer's depthwise convolution.
        time_step_rank: features from which the time steps are projected; `"auto"` is ceil(hidden_size / 16).
        time_step_min, time_step_max, time_step_floor: range of the time steps at initialisation.
        initializer_range: standard deviation of the truncated normal initialisation.
        drop_path_rate: stochastic depth in the last layer; it rises linearly from 0 in the first.
        token_pruning: None for a dense model, or a dict with `layers`, `keep_ratios`, `alignment`, `importance` and
            `method`, see `pruning_schedule.check_token_pruning`; or with `flops_reduction` in place of `keep_ratios`,
            a share of the published FLOPs that is to go, for which a schedule is found and put into the dict, by stages
            before `layers` if these are given.
        scan_backend: which kernel scans, see `selective_scan.selective_scan`.

    Raises:
        ValueError: a value is not allowed; the message says what was given and what is allowed.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    # transformers' `Trainer` puts everything else together to the predictions.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["kept_tokens", "token_scores"]

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
    token_pruning: dict | None = None
    scan_backend: str = "auto"
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "VisionMambaConfig":
        """The configuration of a published model by name, with `overrides` put over it."""
        if name not in cls.presets:
            raise ValueError(f"unknown preset {name!r} of {cls.__name__}; known are {list(cls.presets)}.")
        num_labels = {} if {"id2label", "label2id"} & overrides.keys() else {"num_labels": 1000}
        return cls(**{**num_labels, **cls.presets[name], **overrides})

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_sizes()
        if self.time_step_rank == "auto":
            self.time_step_rank = math.ceil(self.hidden_size / 16)
        self.stage_names = ["stem"] + [f"stage{i}" for i in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        for name, labels in complete_label_maps({"id2label": self.id2label, "label2id": self.label2id}).items():
            setattr(self, name, labels)
        super().__post_init__(**kwargs)
        self.token_pruning = self.complete_token_pruning(self.token_pruning)

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
        if min(self.grid_size) < 1:
            raise ValueError(f"`image_size` is {self.image_size}: too small for a patch of {self.patch_size} pixels.")

    def _check_whole_number(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or value < least:
            raise ValueError(f"`{name}` is {value!r}; a whole number of at least {least} is needed.")

    @property
    def label_names(self) -> list[str]:
        """The labels' names in the order of their ids."""
        return names_by_id(self.id2label or {})

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers has it, with the labels in any form."""
        return super().from_dict(config_dict, **(kwargs | complete_label_maps(kwargs)))

    def complete_token_pruning(self, token_pruning: dict[str, Any] | None) -> dict[str, Any] | None:
        """Checks pruning options against this configuration and returns them complete, a budget turned into a schedule.

        Options that name no `method` are for the one that this configuration has, with its `alignment` and `importance`
        unless they have their own: weights that were trained for a method may get another budget. Those of a dense
        model mean `top`.

        Raises:
            ValueError: as `pruning_schedule.check_token_pruning` and `flops.schedule_for_budget`.
        """
        if token_pruning is None:
            return None
        if not isinstance(token_pruning, dict):
            raise ValueError(f"`token_pruning` is {token_pruning!r}; None or a dict is needed.")
        if "method" not in token_pruning and self.token_pruning is not None:
            own = self.token_pruning
            token_pruning = {name: own[name] for name in METHOD_OPTIONS if name in own} | token_pruning
        if "flops_reduction" in token_pruning:
            token_pruning = dict(token_pruning)
            budget = token_pruning.pop("flops_reduction")
            if "keep_ratios" in token_pruning:
                raise ValueError("`token_pruning` has both `flops_reduction` and `keep_ratios`; give one of them.")
            layers = token_pruning.get("layers")
            if layers is not None:
                layers = check_layers(layers, self.num_hidden_layers)
            token_pruning |= schedule_for_budget(self, budget, pruning_method(token_pruning), layers)
        return check_token_pruning(token_pruning, self.num_hidden_layers)

    @property
    def intermediate_size(self) -> int:
        """Channels inside the mixer."""
        return self.expand * self.hidden_size

    @property
    def grid_size(self) -> tuple[int, int]:
        """(height, width) in patches of an image of `image_size`."""
        return self.grid_size_for(*self.image_height_width(self.image_size))

    @staticmethod
    def image_height_width(image_size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
        """An image size as (height, width) in pixels."""
        height_width = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(height_width) != 2 or not all(isinstance(size, int) and size >= 1 for size in height_width):
            raise ValueError(f"`image_size` is {image_size!r}; a number of pixels or (height, width) is needed.")
        return height_width

    def grid_size_for(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in patches of an image of so many pixels; 0 where not one patch fits."""
        raise NotImplementedError
