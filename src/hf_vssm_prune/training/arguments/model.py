"""Options: the checkpoint or new model, its teacher, and the weights of the losses."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.families import FAMILIES, preset_names
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.label_maps import complete_label_maps
from hf_vssm_prune.training.arguments.parsing import check_range, describe
from hf_vssm_prune.training.losses import ALIGNMENT_DISTANCES, BLOCK_RATIO_WEIGHT, LossWeights
from hf_vssm_prune.training.recipes import SET_ASIDE


WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
# Options of a configuration that other options or the data set determine.
SET_ELSEWHERE = ("token_pruning", "drop_path_rate", "image_size", "patch_size", "id2label", "label2id")


@dataclass
class DistillationArguments:
    """The teacher's precision, and the weight of the distillation loss."""

    teacher_dtype: str = field(
        default="float32",
        metadata=describe(
            "data type of the teacher's weights; half precision halves its memory", choices=WEIGHT_DTYPES
        ),
    )
    kd_weight: float = field(default=1.0, metadata=describe("weight of the distillation loss; 0 turns it off"))
    kd_temperature: float = field(default=1.0, metadata=describe("temperature of the distillation loss"))

    def __post_init__(self) -> None:
        check_range("kd_weight", self.kd_weight, 0, math.inf, below=True)
        check_range("kd_temperature", self.kd_temperature, 0, math.inf, above=True, below=True)


@dataclass
class TeacherArguments(DistillationArguments):
    """A trained model from which the model learns in addition to the labels, for instance a larger one."""

    _argument_group_name = "teacher"

    teacher_name_or_path: str | None = field(
        default=None, metadata=describe("teacher, a checkpoint with the data set's labels; by default none")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [each.name for each in fields(DistillationArguments) if getattr(self, each.name) != each.default]
        if given and self.teacher_name_or_path is None:
            raise ValueError(f"--{given[0]} needs a --teacher_name_or_path.")
        if self.teacher_name_or_path is not None and self.kd_weight == 0:
            raise ValueError(f"--teacher_name_or_path {self.teacher_name_or_path} has no use: --kd_weight is 0.")

    def loss_weights(self) -> LossWeights:
        return LossWeights() if self.teacher_name_or_path is None else LossWeights(self.kd_weight, self.kd_temperature)


@dataclass
class LossArguments(DistillationArguments):
    """The teacher, its precision, and the weights of the losses."""

    _argument_group_name = "losses"

    teacher_name_or_path: str | None = field(
        default=None, metadata=describe("teacher; by default, that of a pruned model is the model without pruning")
    )
    alignment_weight: float = field(
        default=1.0, metadata=describe("weight of the alignment loss between hidden states; 0 turns it off")
    )
    alignment_layers: list[int] | None = field(
        default=None,
        metadata=describe("layers whose outputs the alignment loss compares; by default the last layer of each stage"),
    )
    alignment_distance: str = field(
        default="mse",
        metadata=describe("distance measure of the alignment loss", choices=tuple(ALIGNMENT_DISTANCES)),
    )
    block_ratio_weight: float | None = field(
        default=None,
        metadata=describe(
            "weight of the loss that holds the fraction of scan directions that run at --block_keep_ratio; by default "
            f"{BLOCK_RATIO_WEIGHT:g}; 0 turns it off"
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alignment_weight", self.alignment_weight, 0, math.inf, below=True)
        check_range("block_ratio_weight", self.block_ratio_weight, 0, math.inf, below=True)
        if self.alignment_layers is not None and self.alignment_weight == 0:
            raise ValueError("--alignment_layers needs an --alignment_weight above 0.")
        if self.teacher_name_or_path is not None and not self.loss_weights().needs_teacher:
            raise ValueError(
                f"--teacher_name_or_path {self.teacher_name_or_path} has no use: --kd_weight and --alignment_weight "
                "are 0."
            )

    def check_schedule(self, schedule: Mapping[str, Any] | None) -> None:
        """Raises an error for a weight of a loss that a schedule does not have.

        Raises:
            ValueError: there is one.
        """
        if self.block_ratio_weight is not None and (schedule or {}).get("block_keep_ratio") is None:
            raise ValueError(f"--block_ratio_weight is {self.block_ratio_weight}: it needs a --block_keep_ratio.")

    def loss_weights(self) -> LossWeights:
        layers = None if self.alignment_layers is None else tuple(self.alignment_layers)
        return LossWeights(
            self.kd_weight,
            self.kd_temperature,
            self.alignment_weight,
            layers,
            self.alignment_distance,
            self.block_ratio_weight,
        )


@dataclass(kw_only=True)
class FinetuneArguments(LossArguments):
    """The checkpoint to prune, its teacher, and the weights of the losses."""

    _argument_group_name = "model"

    model_name_or_path: str = field(metadata=describe("dense checkpoint: a Hub id or a folder"))
    image_size: int | None = field(
        default=None,
        metadata=describe("image size to fine-tune at, in pixels; by default the checkpoint's", "--img_size"),
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata=describe("replace the classifier if the labels differ")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("image_size", self.image_size, 1, math.inf)
        if self.ignore_mismatched_sizes and self.kd_weight > 0 and self.teacher_name_or_path is None:
            raise ValueError(
                "--ignore_mismatched_sizes gives the model a new classifier, which its own dense checkpoint cannot "
                "teach: set --kd_weight 0, or name a --teacher_name_or_path with these labels."
            )


@dataclass
class DenseModelArguments:
    """A new model of a family, or a checkpoint to start from."""

    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata=describe("continue from this checkpoint instead of a new model")
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata=describe("replace the checkpoint's classifier if the labels differ")
    )
    family: str | None = field(default=None, metadata=describe("family of the new model", choices=tuple(FAMILIES)))
    preset: str | None = field(default=None, metadata=describe(f"size of the new model: {preset_names()}"))
    image_size: int | None = field(
        default=None, metadata=describe("image size in pixels; by default 224, or the checkpoint's", "--img_size")
    )
    patch_size: int | None = field(
        default=None, metadata=describe("patch size of a new model in pixels; by default 16")
    )
    config_overrides: list[str] = field(
        default_factory=list,
        metadata=describe("other configuration options as key=value, e.g. hidden_size=64"),
    )
    image_mean: list[float] | None = field(
        default=None, metadata=describe("mean of each channel, for a new model; by default ImageNet's", "--mean")
    )
    image_std: list[float] | None = field(
        default=None,
        metadata=describe("standard deviation of each channel, for a new model; by default ImageNet's", "--std"),
    )
    crop_pct: float | None = field(
        default=None,
        metadata=describe(
            "center crop as a fraction of the resized image, for a new model; by default 0.875, or 1 for videos"
        ),
    )

    def __post_init__(self) -> None:
        check_range("image_size", self.image_size, 1, math.inf)
        if (self.model_name_or_path is None) == (self.family is None):
            raise ValueError(
                "Give either --family, for a new model, or --model_name_or_path, to start from a checkpoint."
            )
        if self.model_name_or_path is not None:
            if given := [name for name in SET_ASIDE["model_name_or_path"] if getattr(self, name) not in (None, [])]:
                raise ValueError(
                    f"--{given[0]} is for a new model; with --model_name_or_path it comes from the checkpoint."
                )
            return
        new_image_processor(self.config(label_names=["label"]), self.image_mean, self.image_std, self.crop_pct)

    def config(self, label_names: Sequence[str], drop_path_rate: float = 0.0) -> VisionMambaConfig:
        """The configuration of the new model."""
        family = FAMILIES[self.family or ""].config
        options: dict[str, Any] = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "drop_path_rate": drop_path_rate,
            "num_labels": len(label_names),
            **complete_label_maps({"id2label": list(label_names)}),
        }
        options = {name: value for name, value in options.items() if value is not None}
        options |= _parse_overrides(self.config_overrides, family)
        try:
            return family(**options) if self.preset is None else family.from_preset(self.preset, **options)
        except StrictDataclassError as error:
            raise ValueError(f"--config_overrides: {' '.join(str(error).split())}") from error


def _parse_overrides(overrides: Sequence[str], family: type[VisionMambaConfig]) -> dict[str, Any]:
    options = {}
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--config_overrides has {override!r}: it must be key=value.")
        if name in SET_ELSEWHERE or name.startswith("_"):
            raise ValueError(f"--config_overrides has {name!r}, which cannot be set this way; see --help.")
        if name not in family.__dataclass_fields__:
            raise ValueError(f"--config_overrides has {name!r}, which {family.__name__} does not have.")
        options[name] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    """A value in JSON or, for the words in which they differ, in Python; otherwise the text itself."""
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except json.JSONDecodeError:
        return text
