"""The options of the training scripts, as dataclasses for transformers' `HfArgumentParser`.

Names follow transformers' `run_image_classification_no_trainer.py` where it has the option, else timm's `train.py`.
What cannot work is refused when the dataclasses are made, before anything is loaded.
"""

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from hf_vssm_prune.configuration_common import VisionMambaConfig
from hf_vssm_prune.families import FAMILIES, preset_names
from hf_vssm_prune.hub.loading import new_image_processor
from hf_vssm_prune.pruning_importances import IMPORTANCES
from hf_vssm_prune.pruning_methods import METHODS, RECOMMENDED_METHOD
from hf_vssm_prune.token_pruning import ALIGNMENTS
from hf_vssm_prune.training.augmentation import AugmentationConfig, MixConfig
from hf_vssm_prune.training.losses import ALIGNMENT_DISTANCES, LossWeights
from hf_vssm_prune.training.optimization import LEARNING_RATE_SCHEDULES
from hf_vssm_prune.training.recipes import insert_recipe


TEACHER_DTYPES = ("float32", "bfloat16", "float16")
BATCH_NORM_MODES = ("local", "frozen", "sync")


def parse_arguments(dataclass_types: list[Any], arguments: Sequence[str] | None, description: str) -> tuple:
    """Parses a command line, and the recipe it names, into dataclasses; on a mistake prints what is wrong and exits
    with status 2."""
    parser = HfArgumentParser(dataclass_types, description=description, allow_abbrev=False)
    parser.add_argument("--recipe", help="YAML file of these options; what is given here overrides it")
    options = {option.removeprefix("--") for action in parser._actions for option in action.option_strings}
    try:
        words = insert_recipe(sys.argv[1:] if arguments is None else arguments, options - {"recipe"})
        return parser.parse_args_into_dataclasses(words, look_for_args_file=False)[: len(dataclass_types)]
    except ValueError as error:
        parser.error(str(error))


def _describe(text: str, *aliases: str, choices: Sequence[str] | None = None) -> dict[str, Any]:
    """What `HfArgumentParser` reads from a field's metadata."""
    metadata: dict[str, Any] = {"help": text, "aliases": list(aliases)}
    return metadata if choices is None else {**metadata, "choices": tuple(choices)}


def _check_range(name: str, value: float | None, low: float, high: float, below: bool = False) -> None:
    """Refuses a value outside [low, high], or outside [low, high) where it must stay `below`."""
    if value is None or (low <= value < high if below else low <= value <= high):
        return
    if high == math.inf:
        raise ValueError(f"--{name} is {value}: it must be at least {low}.")
    raise ValueError(f"--{name} is {value}: it must be from {low} to {'less than ' if below else ''}{high}.")


def _exclude(first: str, first_value: object, second: str, second_value: object) -> None:
    if first_value is not None and second_value is not None:
        raise ValueError(f"--{first} and --{second} exclude each other: give one of them.")


@dataclass
class EvaluationDataArguments:
    """Which images are evaluated, and how they are read."""

    dataset_name: str = field(
        metadata=_describe("a Hub data set, a folder of images by class, or Parquet files", "--data_dir")
    )
    dataset_config_name: str | None = field(default=None, metadata=_describe("configuration of the Hub data set"))
    eval_split: str | None = field(
        default=None, metadata=_describe("split to evaluate on; found by its name where it is not given")
    )
    image_column_name: str | None = field(
        default=None, metadata=_describe("column of the images; found by its type by default")
    )
    label_column_name: str | None = field(
        default=None, metadata=_describe("column of the labels; found by its type by default")
    )
    max_eval_samples: int | None = field(default=None, metadata=_describe("use only so many evaluation images"))
    dataloader_num_workers: int = field(default=2, metadata=_describe("processes that prepare images", "--workers"))

    def __post_init__(self) -> None:
        _check_range("max_eval_samples", self.max_eval_samples, 1, math.inf)
        _check_range("dataloader_num_workers", self.dataloader_num_workers, 0, math.inf)


@dataclass
class DataArguments(EvaluationDataArguments):
    """Which images are trained on and evaluated, and how they are read."""

    train_split: str = field(default="train", metadata=_describe("split to train on"))
    train_val_split: float = field(
        default=0.1, metadata=_describe("share held out for evaluation where there is no such split")
    )
    max_train_samples: int | None = field(default=None, metadata=_describe("use only so many training images"))
    streaming: bool = field(
        default=False, metadata=_describe("read the training images as they are needed, without a copy on this disk")
    )
    shuffle_buffer_size: int = field(
        default=10_000, metadata=_describe("with --streaming: images from which the next ones are drawn")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_range("shuffle_buffer_size", self.shuffle_buffer_size, 1, math.inf)
        if not 0 < self.train_val_split < 1:
            raise ValueError(f"--train_val_split is {self.train_val_split}: it must be between 0 and 1.")
        _check_range("max_train_samples", self.max_train_samples, 1, math.inf)


@dataclass
class AugmentationArguments:
    """Augmentation of the training images."""

    scale: list[float] = field(
        default_factory=lambda: [0.08, 1.0],
        metadata=_describe("smallest and largest share of the area of a random resized crop"),
    )
    random_crop_padding: int | None = field(
        default=None,
        metadata=_describe("for small images: random crops from a border of so many pixels, in place of --scale"),
    )
    no_random_crop: bool = field(default=False, metadata=_describe("neither kind of random crop"))
    hflip: float = field(default=0.5, metadata=_describe("probability of mirroring an image"))
    randaugment_num_ops: int = field(default=2, metadata=_describe("RandAugment operations on an image; 0: none"))
    randaugment_magnitude: float = field(default=9.0, metadata=_describe("their strength, 0 to 10"))
    reprob: float = field(default=0.25, metadata=_describe("probability of random erasing", "--random_erasing"))
    mixup: float = field(default=0.8, metadata=_describe("mixup's alpha; 0: no mixup"))
    cutmix: float = field(default=1.0, metadata=_describe("CutMix's alpha; 0: no CutMix"))
    mixup_prob: float = field(default=1.0, metadata=_describe("probability of mixing a batch at all"))
    mixup_switch_prob: float = field(
        default=0.5, metadata=_describe("probability of CutMix rather than mixup where both are on")
    )
    smoothing: float = field(default=0.1, metadata=_describe("label smoothing", "--label_smoothing"))

    def __post_init__(self) -> None:
        if self.no_random_crop and self.random_crop_padding:
            raise ValueError("--no_random_crop and --random_crop_padding exclude each other: give one of them.")
        if len(self.scale) != 2:
            raise ValueError(f"--scale is {self.scale}: the smallest and the largest share are needed.")
        self.image_augmentation()
        self.mix()

    def image_augmentation(self) -> AugmentationConfig:
        no_resized_crop = self.no_random_crop or self.random_crop_padding is not None
        return AugmentationConfig(
            random_resized_crop_scale=None if no_resized_crop else (self.scale[0], self.scale[1]),
            random_crop_padding=self.random_crop_padding or 0,
            horizontal_flip=self.hflip,
            randaugment_num_ops=self.randaugment_num_ops,
            randaugment_magnitude=self.randaugment_magnitude,
            random_erasing=self.reprob,
        )

    def mix(self) -> MixConfig:
        return MixConfig(self.mixup, self.cutmix, self.mixup_prob, self.mixup_switch_prob, self.smoothing)


@dataclass
class OptimizationArguments:
    """Optimizer, learning rate, length and precision. The defaults are those of the paper's fine-tuning; where the
    paper is silent (warm-up, lowest rate, batch size) they are ours."""

    num_train_epochs: int = field(default=30, metadata=_describe("passes over the training images", "--epochs"))
    max_train_steps: int | None = field(
        default=None, metadata=_describe("stop after so many updates; sets the schedule's length too")
    )
    per_device_train_batch_size: int = field(
        default=64, metadata=_describe("images on a device at a time", "--batch_size")
    )
    per_device_eval_batch_size: int = field(default=64, metadata=_describe("the same in evaluation"))
    gradient_accumulation_steps: int = field(
        default=1, metadata=_describe("batches for an update", "--grad_accum_steps")
    )
    learning_rate: float = field(default=1e-5, metadata=_describe("highest rate, for the batch size as it is", "--lr"))
    weight_decay: float = field(default=1e-8, metadata=_describe("AdamW's weight decay"))
    layer_decay: float | None = field(
        default=None, metadata=_describe("factor of the rate from each layer to the one before")
    )
    adam_beta1: float = field(default=0.9, metadata=_describe("AdamW's first beta"))
    adam_beta2: float = field(default=0.999, metadata=_describe("AdamW's second beta"))
    adam_epsilon: float = field(default=1e-8, metadata=_describe("AdamW's epsilon"))
    lr_scheduler_type: str = field(
        default="cosine",
        metadata=_describe("how the rate falls after the warm-up", "--sched", choices=LEARNING_RATE_SCHEDULES),
    )
    num_warmup_steps: int | None = field(
        default=None, metadata=_describe("updates of warm-up, in place of --warmup_epochs")
    )
    warmup_epochs: float | None = field(
        default=None, metadata=_describe("epochs of warm-up; by default a thirtieth of the epochs")
    )
    warmup_lr: float = field(default=1e-7, metadata=_describe("rate at which the warm-up begins"))
    min_lr: float = field(default=1e-6, metadata=_describe("rate at which the run ends"))
    clip_grad: float | None = field(default=None, metadata=_describe("largest norm of the gradient", "--max_grad_norm"))
    drop_path: float = field(default=0.0, metadata=_describe("stochastic depth in the last layer"))
    model_ema: bool = field(
        default=True, metadata=_describe("keep a moving average of the weights; evaluated and saved beside them")
    )
    model_ema_decay: float = field(default=0.99996, metadata=_describe("its decay"))
    model_ema_warmup: bool = field(default=False, metadata=_describe("let its decay rise: for short runs"))
    mixed_precision: str | None = field(
        default=None,
        metadata=_describe(
            "of the computation; by default what `accelerate launch` says, else none", choices=("no", "fp16", "bf16")
        ),
    )

    def __post_init__(self) -> None:
        for name in (
            "num_train_epochs",
            "max_train_steps",
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
        ):
            _check_range(name, getattr(self, name), 1, math.inf)
        for name in ("weight_decay", "num_warmup_steps", "warmup_epochs", "warmup_lr", "min_lr"):
            _check_range(name, getattr(self, name), 0, math.inf, below=True)
        for name in ("adam_beta1", "adam_beta2", "drop_path", "model_ema_decay"):
            _check_range(name, getattr(self, name), 0, 1, below=True)
        for name in ("learning_rate", "adam_epsilon", "clip_grad"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"--{name} is {value}: it must be greater than 0.")
        if self.layer_decay is not None and not 0 < self.layer_decay <= 1:
            raise ValueError(f"--layer_decay is {self.layer_decay}: it must be greater than 0 and at most 1.")
        for name in ("warmup_lr", "min_lr"):
            if getattr(self, name) > self.learning_rate:
                raise ValueError(
                    f"--{name} is {getattr(self, name)}, above --learning_rate {self.learning_rate}: "
                    "lower it, to 0 if need be."
                )
        _exclude("num_warmup_steps", self.num_warmup_steps, "warmup_epochs", self.warmup_epochs)


@dataclass
class ScratchOptimizationArguments(OptimizationArguments):
    """The defaults for training from scratch are those that Vim and PlainMamba took over from DeiT and Swin."""

    num_train_epochs: int = field(default=300, metadata=_describe("passes over the training images", "--epochs"))
    learning_rate: float = field(default=1e-3, metadata=_describe("highest rate, for the batch size as it is", "--lr"))
    weight_decay: float = field(default=0.05, metadata=_describe("AdamW's weight decay"))
    warmup_lr: float = field(default=1e-6, metadata=_describe("rate at which the warm-up begins"))
    min_lr: float = field(default=1e-5, metadata=_describe("rate at which the run ends"))
    clip_grad: float | None = field(default=5.0, metadata=_describe("largest norm of the gradient", "--max_grad_norm"))
    drop_path: float = field(default=0.1, metadata=_describe("stochastic depth in the last layer"))


@dataclass
class RunArguments:
    """Where results go, checkpoints, logging, the Hub."""

    output_dir: str = field(
        metadata=_describe("folder of everything that the run writes: best/, last/, checkpoint-*/, all_results.json")
    )
    seed: int = field(
        default=0, metadata=_describe("of the split, the order of images, augmentation, mixing and drop path")
    )
    checkpointing_steps: str = field(
        default="epoch", metadata=_describe("save a checkpoint every so many updates, or every 'epoch'")
    )
    save_total_limit: int = field(default=2, metadata=_describe("checkpoints to keep", "--checkpoint_hist"))
    resume: str | None = field(
        default=None,
        metadata=_describe("a checkpoint's folder, or 'latest' (none yet: a fresh start)", "--resume_from_checkpoint"),
    )
    logging_steps: int = field(default=50, metadata=_describe("log every so many updates", "--log_interval"))
    with_tracking: bool = field(default=False, metadata=_describe("send the figures to experiment trackers"))
    report_to: str = field(
        default="tensorboard", metadata=_describe("which: tensorboard, wandb, ..., or 'all' that are installed")
    )
    use_cpu: bool = field(default=False, metadata=_describe("train on the CPU even where there is a GPU"))
    push_to_hub: bool = field(
        default=False,
        metadata=_describe("push the best model at the end, with the token of `hf auth login` or HF_TOKEN"),
    )
    hub_model_id: str | None = field(default=None, metadata=_describe("repository to push to: 'user/name'"))

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}: it must be from 0 to 2^63 - 1.")
        if self.checkpointing_steps != "epoch" and not (
            self.checkpointing_steps.isdecimal() and int(self.checkpointing_steps) > 0
        ):
            raise ValueError(
                f"--checkpointing_steps is {self.checkpointing_steps!r}: a number of updates or 'epoch' is needed."
            )
        _check_range("save_total_limit", self.save_total_limit, 1, math.inf)
        _check_range("logging_steps", self.logging_steps, 1, math.inf)
        if self.push_to_hub and self.hub_model_id is None:
            raise ValueError("--push_to_hub needs --hub_model_id user/name.")


@dataclass
class ScaleArguments:
    """How a run is spread over devices and fitted into their memory."""

    fsdp: bool = field(
        default=False,
        metadata=_describe("shard weights, gradients and optimizer over the processes (FSDP2), in place of DDP"),
    )
    ddp_timeout: int = field(
        default=1800, metadata=_describe("seconds after which a process that does not answer ends the run")
    )
    gradient_checkpointing: bool = field(
        default=False, metadata=_describe("compute each layer again in the backward pass, to save memory")
    )
    batch_norm: str = field(
        default="local",
        metadata=_describe(
            "statistics of PlainMamba's batch norm in training: of each device's own batch, those of the checkpoint, "
            "or of all devices together (GPU only)",
            choices=BATCH_NORM_MODES,
        ),
    )
    deterministic: bool = field(
        default=False, metadata=_describe("only algorithms that give the same result every time; slower on a GPU")
    )

    def __post_init__(self) -> None:
        _check_range("ddp_timeout", self.ddp_timeout, 1, math.inf)


@dataclass
class PruningArguments:
    """The schedule of token pruning, explicit or from a budget."""

    prune_layers: list[int] | None = field(
        default=None, metadata=_describe("layers before which tokens are dropped, e.g. 6 12 18")
    )
    keep_ratios: list[float] | None = field(
        default=None, metadata=_describe("for each of them the share of the tokens that stays")
    )
    flops_reduction: float | None = field(
        default=None,
        metadata=_describe("in place of ratios: the share of FLOPs to remove, by stages at --prune_layers if given"),
    )
    prune_method: str | None = field(
        default=None,
        metadata=_describe(
            "how tokens go; `top` is the paper's; by default that of the checkpoint, of a dense one "
            f"{RECOMMENDED_METHOD}",
            choices=tuple(METHODS),
        ),
    )
    prune_alignment: str | None = field(
        default=None,
        metadata=_describe("how the scans cross the holes; by default as the method has it", choices=ALIGNMENTS),
    )
    importance: str | None = field(
        default=None,
        metadata=_describe(
            "what makes a token worth keeping, for a method that takes it; by default as the method has it",
            choices=tuple(IMPORTANCES),
        ),
    )

    def __post_init__(self) -> None:
        _exclude("keep_ratios", self.keep_ratios, "flops_reduction", self.flops_reduction)
        if self.flops_reduction is None and (self.prune_layers is None) != (self.keep_ratios is None):
            raise ValueError("--prune_layers and --keep_ratios go together: give both, or --flops_reduction.")
        if self.keep_ratios is not None and len(self.prune_layers or ()) != len(self.keep_ratios):
            raise ValueError(
                f"--prune_layers {self.prune_layers} and --keep_ratios {self.keep_ratios} differ in length: "
                "one ratio for each layer is needed."
            )
        if outside := [ratio for ratio in self.keep_ratios or () if not 0 < ratio <= 1]:
            raise ValueError(f"--keep_ratios has {outside}: each must be greater than 0 and at most 1.")
        if self.flops_reduction is not None and not 0 < self.flops_reduction < 1:
            raise ValueError(
                f"--flops_reduction is {self.flops_reduction}: it must be between 0 and 1, for instance 0.416."
            )

    def schedule(self, config: VisionMambaConfig) -> dict[str, Any] | None:
        """Complete `token_pruning` options for a checkpoint of this configuration: what was given, and for the rest
        what it has itself; None where neither has a schedule.

        Raises:
            ValueError: they are not allowed for this model, or say how tokens go, but not how many.
        """
        own = config.token_pruning
        if (stages := self._stages() or _stages_of(own)) is None:
            if idle := [name for name in ("prune_method", "prune_alignment", "importance") if getattr(self, name)]:
                raise ValueError(
                    f"--{idle[0]} is {getattr(self, idle[0])!r}, but nothing says how many tokens are to go: give "
                    "--flops_reduction, or --prune_layers and --keep_ratios."
                )
            return None
        given = {"method": self.prune_method, "alignment": self.prune_alignment, "importance": self.importance}
        choices = {name: value for name, value in given.items() if value is not None}
        return config.complete_token_pruning(stages | choices)

    def _stages(self) -> dict[str, Any] | None:
        """How many tokens go where, if it was given."""
        given = {
            "flops_reduction": self.flops_reduction,
            "layers": self.prune_layers,
            "keep_ratios": self.keep_ratios,
        }
        return {name: value for name, value in given.items() if value is not None} or None


def _stages_of(token_pruning: dict[str, Any] | None) -> dict[str, Any] | None:
    """How many tokens go where by complete options."""
    return None if token_pruning is None else {name: token_pruning[name] for name in ("layers", "keep_ratios")}


@dataclass
class ElasticArguments:
    """Training that prunes each update by another budget, so that one set of weights serves them all."""

    elastic_budgets: list[float] = field(
        default_factory=list,
        metadata=_describe(
            "shares of FLOPs to remove, 0 for none: each update draws one of them, with the stages that it has by "
            "default; evaluation and the saved model are not affected"
        ),
    )
    elastic_importance: str | None = field(
        default=None,
        metadata=_describe(
            "what makes a token worth keeping then; by default as in the model's own schedule",
            choices=tuple(IMPORTANCES),
        ),
    )

    def __post_init__(self) -> None:
        if outside := [budget for budget in self.elastic_budgets if not 0 <= budget < 1]:
            raise ValueError(f"--elastic_budgets has {outside}: each must be at least 0 and less than 1.")

    def schedules(self, config: VisionMambaConfig) -> list[dict[str, Any] | None]:
        """For each budget `token_pruning` options for a model of this configuration; None where nothing is to go.

        Raises:
            ValueError: no schedule of this model comes near a budget.
        """
        choices = {} if self.elastic_importance is None else {"importance": self.elastic_importance}
        return [
            config.complete_token_pruning({"flops_reduction": budget, **choices}) if budget > 0 else None
            for budget in self.elastic_budgets
        ]


@dataclass
class LossArguments:
    """The teacher's precision, and the weights of the losses."""

    teacher_dtype: str = field(
        default="float32",
        metadata=_describe("of the teacher's weights; half as much memory in half precision", choices=TEACHER_DTYPES),
    )
    kd_weight: float = field(default=1.0, metadata=_describe("weight of the distillation loss; 0: none"))
    kd_temperature: float = field(default=1.0, metadata=_describe("its temperature"))
    alignment_weight: float = field(
        default=1.0, metadata=_describe("weight of the hidden states' alignment loss; 0: none")
    )
    alignment_layers: list[int] | None = field(
        default=None,
        metadata=_describe(
            "layers whose outputs are compared; by default the last of those that a stage's tokens go through: before "
            "the next stage, and the last of all"
        ),
    )
    alignment_distance: str = field(
        default="mse", metadata=_describe("how they are compared", choices=tuple(ALIGNMENT_DISTANCES))
    )

    def __post_init__(self) -> None:
        _check_range("kd_weight", self.kd_weight, 0, math.inf, below=True)
        _check_range("alignment_weight", self.alignment_weight, 0, math.inf, below=True)
        if not 0 < self.kd_temperature < math.inf:
            raise ValueError(f"--kd_temperature is {self.kd_temperature}: it must be greater than 0.")
        if self.alignment_layers is not None and self.alignment_weight == 0:
            raise ValueError("--alignment_layers needs an --alignment_weight above 0.")

    def loss_weights(self) -> LossWeights:
        layers = None if self.alignment_layers is None else tuple(self.alignment_layers)
        return LossWeights(self.kd_weight, self.kd_temperature, self.alignment_weight, layers, self.alignment_distance)


@dataclass(kw_only=True)
class FinetuneArguments(LossArguments):
    """The checkpoint to prune, its teacher, and the weights of the losses."""

    model_name_or_path: str = field(metadata=_describe("the dense checkpoint, on the Hub or in a folder"))
    teacher_name_or_path: str | None = field(
        default=None, metadata=_describe("the teacher; by default the same checkpoint, dense")
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata=_describe("give the model a new classifier where the labels differ")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ignore_mismatched_sizes and self.kd_weight > 0 and self.teacher_name_or_path is None:
            raise ValueError(
                "--ignore_mismatched_sizes gives the model a new classifier, which its own dense checkpoint cannot "
                "teach: set --kd_weight 0, or name a --teacher_name_or_path with these labels."
            )


@dataclass
class EvaluationArguments:
    """What is evaluated, and how."""

    model_name_or_path: str = field(metadata=_describe("the checkpoint, on the Hub or in a folder"))
    per_device_eval_batch_size: int = field(default=64, metadata=_describe("images at a time", "--batch_size"))
    device: str | None = field(
        default=None, metadata=_describe("cpu, cuda, cuda:1, ...; by default a GPU where there is one")
    )
    mixed_precision: str = field(default="no", metadata=_describe("of the computation", choices=("no", "fp16", "bf16")))
    seed: int = field(default=0, metadata=_describe("of the choice of --max_eval_samples"))
    json: str | None = field(default=None, metadata=_describe("file to write the figures to"))

    def __post_init__(self) -> None:
        _check_range("per_device_eval_batch_size", self.per_device_eval_batch_size, 1, math.inf)
        if self.json is not None and not Path(self.json).absolute().parent.is_dir():
            raise ValueError(f"--json {self.json}: its folder does not exist.")


@dataclass
class BesideArguments:
    """What is evaluated beside a model."""

    dense_name_or_path: str | None = field(
        default=None, metadata=_describe("the dense model; by default the same weights without pruning")
    )
    int8: bool = field(
        default=False, metadata=_describe("the models with int8 linear layers as well; in float32 on a CPU only")
    )


@dataclass
class EstimateArguments:
    """What a training run is estimated for: images, devices, and how fast one is taken to be."""

    num_images: int = field(default=1_281_167, metadata=_describe("training images; ImageNet-1k's by default"))
    num_eval_images: int = field(default=50_000, metadata=_describe("images evaluated after each epoch"))
    num_classes: int = field(default=1000, metadata=_describe("labels"))
    num_devices: int = field(default=8, metadata=_describe("devices that share an update"))
    device_tflops: float = field(
        default=40.0,
        metadata=_describe(
            "assumed: 1e12 floating-point operations (a multiply-add is two) that a device sustains each second, which "
            "is far below its peak"
        ),
    )
    measured_batch_sizes: list[int] = field(
        default_factory=lambda: [1, 2],
        metadata=_describe("two batch sizes, ascending, with which memory and speed are measured on this machine"),
    )
    json: str | None = field(default=None, metadata=_describe("file to write the figures to"))

    def __post_init__(self) -> None:
        for name in ("num_images", "num_eval_images", "num_classes", "num_devices"):
            _check_range(name, getattr(self, name), 1, math.inf)
        if not 0 < self.device_tflops < math.inf:
            raise ValueError(f"--device_tflops is {self.device_tflops}: it must be greater than 0.")
        sizes = self.measured_batch_sizes
        if len(sizes) != 2 or not 0 < sizes[0] < sizes[1]:
            raise ValueError(f"--measured_batch_sizes is {sizes}: two sizes are needed, the smaller one first.")


@dataclass
class DenseModelArguments:
    """A new model of a family, or a checkpoint to go on from."""

    model_name_or_path: str | None = field(
        default=None, metadata=_describe("go on from this checkpoint, in place of a new model")
    )
    ignore_mismatched_sizes: bool = field(
        default=False, metadata=_describe("give the checkpoint a new classifier where labels differ")
    )
    family: str | None = field(default=None, metadata=_describe("of the new model", choices=tuple(FAMILIES)))
    preset: str | None = field(default=None, metadata=_describe(f"size by name: {preset_names()}"))
    image_size: int | None = field(
        default=None, metadata=_describe("side in pixels; 224 for a new model", "--img_size")
    )
    patch_size: int | None = field(default=None, metadata=_describe("side of a patch in pixels; 16 for a new model"))
    config_overrides: list[str] = field(
        default_factory=list,
        metadata=_describe("other options of the configuration, each key=value, e.g. hidden_size=64"),
    )
    image_mean: list[float] = field(
        default_factory=lambda: [0.485, 0.456, 0.406], metadata=_describe("of each channel, for a new model", "--mean")
    )
    image_std: list[float] = field(
        default_factory=lambda: [0.229, 0.224, 0.225], metadata=_describe("of each channel, for a new model", "--std")
    )
    crop_pct: float = field(
        default=0.875, metadata=_describe("share of the resized image's side that evaluation crops, for a new model")
    )

    def __post_init__(self) -> None:
        if (self.model_name_or_path is None) == (self.family is None):
            raise ValueError(
                "Give either --family, for a new model, or --model_name_or_path, to go on from a checkpoint."
            )
        if self.model_name_or_path is not None:
            if given := [name for name in ("preset", "image_size", "patch_size") if getattr(self, name) is not None]:
                raise ValueError(f"--{given[0]} is for a new model; with --model_name_or_path the checkpoint says it.")
            if self.config_overrides:
                raise ValueError(
                    "--config_overrides is for a new model; with --model_name_or_path the checkpoint says it."
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
            **label_maps(label_names),
        }
        options = {name: value for name, value in options.items() if value is not None}
        options |= _parse_overrides(self.config_overrides, family)
        return family(**options) if self.preset is None else family.from_preset(self.preset, **options)


def label_maps(label_names: Sequence[str]) -> dict[str, dict]:
    """`id2label` and `label2id` of a configuration."""
    return {"id2label": dict(enumerate(label_names)), "label2id": {name: i for i, name in enumerate(label_names)}}


def _parse_overrides(overrides: Sequence[str], family: type[VisionMambaConfig]) -> dict[str, Any]:
    options = {}
    for override in overrides:
        name, separator, value = override.partition("=")
        if not separator:
            raise ValueError(f"--config_overrides has {override!r}: key=value is needed.")
        if name in ("token_pruning", "drop_path_rate", "image_size", "patch_size") or name.startswith("_"):
            raise ValueError(f"--config_overrides has {name!r}, which is not set this way; see --help.")
        if name not in family.__dataclass_fields__:
            raise ValueError(f"--config_overrides has {name!r}, which {family.__name__} does not know.")
        options[name] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
