"""Options of an evaluation and of an estimate."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from hf_vssm_prune.training.arguments.model import WEIGHT_DTYPES
from hf_vssm_prune.training.arguments.parsing import (
    MOST_SEED,
    check_output_file,
    check_output_folder,
    check_range,
    describe,
)
from hf_vssm_prune.training.devices import MIXED_PRECISIONS


@dataclass
class EvaluationArguments:
    """The model, and how it is evaluated."""

    _argument_group_name = "evaluation"

    model_name_or_path: str = field(metadata=describe("the checkpoint, on the Hub or in a folder"))
    per_device_eval_batch_size: int = field(
        default=64, metadata=describe("evaluation batch size per device", "--batch_size")
    )
    device: str | None = field(
        default=None, metadata=describe("cpu, cuda, cuda:1, ...; by default a GPU if there is one")
    )
    dtype: str = field(default="float32", metadata=describe("data type of the weights", choices=WEIGHT_DTYPES))
    mixed_precision: str = field(
        default="no",
        metadata=describe("precision of the computation with weights in float32", choices=tuple(MIXED_PRECISIONS)),
    )
    seed: int = field(
        default=0,
        metadata=describe("random seed for choosing --max_eval_samples images, or those of --train_val_split"),
    )
    train_val_split: float | None = field(
        default=None,
        metadata=describe(
            "evaluate the images that a training run with this --train_val_split (0.1 if it was not given) and --seed "
            "held out; by default, all images of a data set without an evaluation split"
        ),
    )
    json: str | None = field(default=None, metadata=describe("file to write the results to"))
    save_results: str | None = field(
        default=None,
        metadata=describe(
            "file or folder for the results in the format of `evaluate.save`, with date, commit and versions"
        ),
    )

    def __post_init__(self) -> None:
        check_range("per_device_eval_batch_size", self.per_device_eval_batch_size, 1, math.inf)
        check_range("seed", self.seed, 0, MOST_SEED)
        check_range("train_val_split", self.train_val_split, 0, 1, above=True, below=True)
        if self.dtype != "float32" and self.mixed_precision != "no":
            raise ValueError(
                f"--mixed_precision {self.mixed_precision} needs weights in float32, but --dtype is {self.dtype}: give "
                "only one of them."
            )
        check_output_file("json", self.json)
        if self.save_results is not None:
            path = Path(self.save_results)
            if path.suffix and path.is_dir():  # `evaluate.save` takes it for a file
                raise ValueError(f"--save_results {path} is a folder; with a suffix, it must be a file.")
            check_output_folder("save_results", path.parent if path.suffix else path)


@dataclass
class BesideArguments:
    """Models to compare with."""

    _argument_group_name = "comparison"

    dense_name_or_path: str | None = field(
        default=None, metadata=describe("dense model to compare with; by default the same weights without pruning")
    )
    int8: bool = field(
        default=False, metadata=describe("also evaluate the models with int8 linear layers; float32 on a CPU only")
    )


@dataclass
class EstimateArguments:
    """The assumed images and devices."""

    _argument_group_name = "estimate"

    num_images: int = field(default=1_281_167, metadata=describe("number of training images; by default ImageNet-1k's"))
    num_eval_images: int = field(default=50_000, metadata=describe("number of images evaluated after each epoch"))
    num_classes: int | None = field(
        default=None, metadata=describe("number of labels; by default the checkpoint's, or 1000 for a new model")
    )
    num_devices: int = field(default=8, metadata=describe("number of devices"))
    device_tflops: float = field(
        default=40.0,
        metadata=describe(
            "assumed sustained TFLOP/s of a device (a multiply-add counts as two), which is far below its peak"
        ),
    )
    measured_batch_sizes: list[int] = field(
        default_factory=lambda: [1, 2],
        metadata=describe("two batch sizes, ascending, for measuring memory and speed on this machine"),
    )
    json: str | None = field(default=None, metadata=describe("file to write the results to"))

    def __post_init__(self) -> None:
        for name in ("num_images", "num_eval_images", "num_classes", "num_devices"):
            check_range(name, getattr(self, name), 1, math.inf)
        check_range("device_tflops", self.device_tflops, 0, math.inf, above=True, below=True)
        sizes = self.measured_batch_sizes
        if len(sizes) != 2 or not 0 < sizes[0] < sizes[1]:
            raise ValueError(f"--measured_batch_sizes is {sizes}: give two sizes, the smaller one first.")
        check_output_file("json", self.json)
